"""Objectives of the parts that come before the transformer: the VAE and the text encoder (models/flux2_klein_parts.py)."""

from __future__ import annotations

import random
import re

import torch
from torch import Tensor
from torch.nn import functional

from OpenSciDraw.config import Config
from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.flow import keyed_generator
from OpenSciDraw.models.flux2_klein_parts import Flux2KleinText, Flux2KleinVAE
from OpenSciDraw.registry import TRAIN_ITERATION_FUNCS
from OpenSciDraw.train_iteration_funcs.flow_matching import LossOutput, Place

SQUARED_WEIGHT, COLOUR_WEIGHT = 8.0, 4.0
STROKE_WEIGHT = 40.0  # of squared errors times the contrast to the 5 x 5 pixels around, in the decoder's own training
KL_WEIGHT = 2e-4  # of nats of a latent value, against the mean absolute error of a pixel value in [-1, 1]


@TRAIN_ITERATION_FUNCS.register("vae_reconstruction")
def vae_reconstruction_loss(
    model: Flux2KleinVAE, batch: Batch, place: Place, config: Config, empty_text: Tensor
) -> LossOutput:
    """|e| + 8 e^2 + 4 |colour of e over 4 x 4 pixels| + KL / 5000, e = D(z) - x, z drawn from the posterior; means over values.

    The variational autoencoder of Kingma and Welling (2014). Its third term counts the differences red - green and
    blue - yellow of areas: pastel fills on white weigh little beside the edges around them, and are learned late without it.
    """
    pixels = batch.require_pixels().to(model.device)
    mean, log_variance = _posterior(model, pixels)
    kl = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance)
    per_sample = _size_of(_error(model, pixels, mean, log_variance, place)) + KL_WEIGHT * kl.flatten(1).mean(1)
    return LossOutput(per_sample.mean(), per_sample.detach())


@TRAIN_ITERATION_FUNCS.register("vae_decoder_reconstruction")
def vae_decoder_reconstruction_loss(
    model: Flux2KleinVAE, batch: Batch, place: Place, config: Config, empty_text: Tensor
) -> LossOutput:
    """The same with strokes counting more, for the decoder alone: a transformer trained on the encoder's latents fits both.

    Letters are a few dark pixels, and a blurred one ('O' for 'Q') hardly shows in a mean over all pixels. So squared errors are
    added that weigh by how far the figure's own pixel is from the mean of the 5 x 5 around it (the largest of three channels).
    """
    pixels = batch.require_pixels().to(model.device)
    with torch.no_grad():
        mean, log_variance = _posterior(model, pixels)
        around = functional.avg_pool2d(pixels, 5, stride=1, padding=2, count_include_pad=False)
        strokes = (pixels - around).abs().amax(1, keepdim=True)
    error = _error(model, pixels, mean, log_variance, place)
    per_sample = _size_of(error) + STROKE_WEIGHT * (strokes * error.pow(2)).flatten(1).mean(1)
    return LossOutput(per_sample.mean(), per_sample.detach())


def _posterior(model: Flux2KleinVAE, pixels: Tensor) -> tuple[Tensor, Tensor]:
    posterior = model.transformer.encode(pixels).latent_dist
    return posterior.mean.float(), posterior.logvar.float()


def _error(model: Flux2KleinVAE, pixels: Tensor, mean: Tensor, log_variance: Tensor, place: Place) -> Tensor:
    """What figures decoded from a draw of their posterior differ by, (B, 3, H, W)."""
    generator = keyed_generator("posterior", place.seed, place.micro_step, place.rank)
    latents = mean + torch.randn(mean.shape, generator=generator).to(mean.device) * (0.5 * log_variance).exp()
    return model.transformer.decode(latents).sample.float() - pixels


def _size_of(error: Tensor) -> Tensor:
    """(B,) the first three terms of `vae_reconstruction_loss`."""
    red, green, blue = functional.avg_pool2d(error, 4).unbind(1)
    colour = torch.stack([red - green, blue - (red + green) / 2], 1)
    per_sample = (error.abs() + SQUARED_WEIGHT * error.pow(2)).flatten(1).mean(1)
    return per_sample + COLOUR_WEIGHT * colour.abs().flatten(1).mean(1)


def number_names(caption: str, chance: random.Random) -> str:
    """The caption, half of its quoted names that were quoted before with the number of their first mention: 'B' -> 'B2'."""
    first: dict[str, int] = {}

    def mention(found: re.Match[str]) -> str:
        name, known = found[1], found[1] in first
        number = first.setdefault(name, len(first) + 1)
        return f"'{name}{number}'" if known and chance.random() < 0.5 else found[0]

    return re.sub("'([^']*)'", mention, caption)


@TRAIN_ITERATION_FUNCS.register("caption_language_model")
def caption_language_model_loss(
    model: Flux2KleinText, batch: Batch, place: Place, config: Config, empty_text: Tensor
) -> LossOutput:
    """Cross entropy of each next token of the caption in its chat template (nats a token); pads do not count.

    Half of the names said again carry their number (`number_names`), so that the states of a name in "from 'A' to 'B'" have
    to hold which of the parts it names. Plain captions do not ask for that, and a transformer that reads their states
    has to find out by itself where an arrow's ends lie.
    """
    chance = random.Random(f"names:{place.seed}:{place.micro_step}:{place.rank}")
    ids, mask = model.tokenize([number_names(caption, chance) for caption in batch.captions])
    logits = model.transformer(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    nats = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]
    per_sample = nats.sum(1) / mask[:, 1:].sum(1)
    return LossOutput(nats.sum() / mask[:, 1:].sum(), per_sample.detach())
