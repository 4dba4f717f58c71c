"""The flow-matching objective: a batch of encoded figures -> a loss. One body for every model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from OpenSciDraw import flow
from OpenSciDraw.config import Config
from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel, TextBatch
from OpenSciDraw.quiet import warn_once
from OpenSciDraw.registry import TRAIN_ITERATION_FUNCS


@dataclass(frozen=True)
class Place:
    """Where a batch stands in training: what noise is keyed by."""

    seed: int
    micro_step: int  # counts every micro-step since step 0, not optimizer steps
    rank: int
    world_size: int


@dataclass(frozen=True)
class Means:
    """Numbers that an objective has the log average, by name: `sums` (2, K) on the device, of each the sum and how many it is of.

    The names are the same at every micro-step and on every rank; one with nothing to count has the sum 0 of 0.
    """

    names: tuple[str, ...]
    sums: Tensor


@dataclass(frozen=True)
class LossOutput:
    """`loss` scalar with gradient; `per_sample` and `sigma` (B,) detached, unweighted, for the logs.

    `sigma` is None where an objective has no noise level, `means` where it has no numbers of its own.
    """

    loss: Tensor
    per_sample: Tensor
    sigma: Tensor | None = None
    means: Means | None = None


@TRAIN_ITERATION_FUNCS.register(
    "flow_matching",
    "Flux2Klein_train_iteration_func_parquet",
    "Flux2Klein_train_iteration_func",
    "Flux2Klein_fulltune_train_iteration",
    "Qwen_Image_train_iteration_func_parquet",
    "Qwen_Image_train_iteration_func",
    "QwenImage_fulltune_train_iteration",
    "Flux2Klein_mixed_edit_train_iteration",
)
def flow_matching_loss(model: FigureModel, batch: Batch, place: Place, config: Config, empty_text: Tensor) -> LossOutput:
    """E || v(x_sigma, sigma, text) - (e - x) ||^2 (rectified flow, see flow.py), each sample weighted equally.

    Parts that the batch does not carry (latents, text) are encoded here, by the frozen encoders. Edits are predicted from their
    references too; `gen_loss_weight` and `edit_loss_weight` scale the loss of a batch, which is of one kind. A sample's loss is the
    mean over its tokens weighed by `token_weights` (its mask, an edit's regions), and counts as much as its weight says.
    """
    ids = batch.sample_ids
    with torch.autocast(model.device.type, enabled=False):  # encoders work as `scienceflow encode` runs them
        stored = batch.latents
        latents = model.encode_images(batch.require_pixels()) if stored is None else stored.to(model.device, non_blocking=True)
        dropped = flow.keyed_uniform("caption_dropout", place.seed, place.micro_step, ids) < config.caption_dropout
        rows = text_rows(model, batch, dropped.tolist(), empty_text)
        clean = model.normalize(latents)
        references = model.normalize_references(batch.references, are_pixels=stored is None)

    text = model.collate_text([row.to(clean.device, non_blocking=True) for row in rows])

    sigma, noise = drawn_noise(batch, place, config, clean)
    noisy = flow.interpolate(clean, noise, sigma)
    target = flow.velocity_target(clean, noise)
    if config.dataset.keeps_base and batch.keeps_base is not None:
        target = kept_target(model, batch.keeps_base, place, _Inputs(noisy, sigma, rows, references), target)
    if model.route_tokens is not None:
        model.route_tokens((place.seed, place.micro_step, ids[0]))
    predicted = _velocity(model, noisy, sigma, text, references)
    error = (predicted.float() - target).pow(2)
    per_sample = weighted = error.flatten(1).mean(1)
    tokens = token_weights(batch, error.shape[-2], error.shape[-1], config, bool(references))
    if tokens is not None:
        weighted = (tokens.to(error.device, non_blocking=True) * error).flatten(1).mean(1)
    of_kind = config.edit_loss_weight if references else config.gen_loss_weight
    scale = flow.loss_weight(sigma, config.weighting_scheme)
    if batch.weights is not None and bool((batch.weights != 1).any()):  # on the CPU: nothing waits for the device
        scale = scale * batch.weights.to(scale.device, non_blocking=True)
    loss = of_kind * (scale * weighted).mean()
    return LossOutput(loss, per_sample.detach(), sigma.detach(), means_by_source(per_sample.detach(), batch, config))


@dataclass(frozen=True)
class _Inputs:
    """What a velocity is predicted from: `noisy` (B, Cn, hn, wn), `sigma` (B,), `rows` B texts (L_i, D), `references` of B each."""

    noisy: Tensor
    sigma: Tensor
    rows: list[Tensor]
    references: list[Tensor]


def _velocity(model: FigureModel, noisy: Tensor, sigma: Tensor, text: TextBatch, references: list[Tensor]) -> Tensor:
    return model.velocity(noisy, sigma, text, references) if references else model.velocity(noisy, sigma, text)


def kept_target(model: FigureModel, keeps_base: Tensor, place: Place, inputs: _Inputs, target: Tensor) -> Tensor:
    """`target` (B, Cn, hn, wn), with the base's velocity for samples that `keeps_base` (B,): prior preservation.

    Beside a LoRA the base is the model with its adapter off. DreamBooth (arXiv:2208.12242) trains on pictures that the base drew;
    to ask for the base's own velocity is learning without forgetting (arXiv:1606.09282): where nothing has moved, the loss is 0.
    One process runs the base on these samples alone; of several all run it on their whole batch, since under FSDP2
    they must call the model equally often.
    """
    if place.world_size == 1 and not keeps_base.any():
        return target
    at = keeps_base.nonzero().flatten() if place.world_size == 1 else torch.arange(len(keeps_base))
    there = at.to(target.device, non_blocking=True)
    text = model.collate_text([inputs.rows[row].to(target.device, non_blocking=True) for row in at.tolist()])
    references = [part.index_select(0, there) for part in inputs.references]
    with torch.no_grad(), model.as_reference():
        noisy, sigma = inputs.noisy.index_select(0, there), inputs.sigma.index_select(0, there)
        predicted = _velocity(model, noisy, sigma, text, references).float()
    kept = keeps_base.to(target.device, non_blocking=True).view(-1, 1, 1, 1)
    return torch.where(kept, target.new_zeros(target.shape).index_copy(0, there, predicted.to(target.dtype)), target)


def means_by_source(per_sample: Tensor, batch: Batch, config: Config) -> Means | None:
    """Of a mixed data set, for the log: each source's share of the samples and its mean unweighted loss; None of others."""
    if not config.dataset.sources or batch.sources is None:
        return None
    labels = [source.label for source in config.dataset.sources]
    of = F.one_hot(batch.sources, len(labels)).to(per_sample.device, per_sample.dtype, non_blocking=True)  # (B, S)
    counts, sums = of.sum(0), (of * per_sample[:, None]).sum(0)
    total = torch.full_like(counts, len(per_sample))
    names = (*(f"source_share_{label}" for label in labels), *(f"source_loss_{label}" for label in labels))
    return Means(names, torch.stack([torch.cat([counts, sums]), torch.cat([total, counts])]))


def text_rows(model: FigureModel, batch: Batch, dropped: Sequence[bool], empty_text: Tensor) -> list[Tensor]:
    """Each sample's text (L_i, D), stored or encoded here; of those `dropped` the empty prompt's, where need be with the pictures.

    Raises UserError for edits whose text depends on their pictures, where the batch has neither these nor that text.
    """
    depends = model.text_sees_pictures and bool(batch.references)
    if depends and batch.latents is not None and (batch.text is None or (any(dropped) and batch.unprompted is None)):
        raise UserError(
            f"The text encoder of {model.family} reads the pictures that edits start from, and this store holds no text that was "
            "made with them. Encode it with text = 'stored' by this program, or use dataset.type = 'FigureDataset'."
        )
    if depends and batch.text is None:
        captions = ["" if drop else caption for caption, drop in zip(batch.captions, dropped, strict=True)]
        return model.encode_instructions(captions, batch.pictures())
    rows = batch.text if batch.text is not None else model.encode_prompts(batch.captions)
    empty = batch.unprompted if depends and batch.unprompted is not None else [empty_text] * len(rows)
    return [nothing if drop else row for row, nothing, drop in zip(rows, empty, dropped, strict=True)]


def drawn_noise(batch: Batch, place: Place, config: Config, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Noise level (B,) and noise like `clean` (B, Cn, hn, wn) of a micro-step: functions of its place and the samples' ids."""
    tokens = clean.shape[-2] * clean.shape[-1]
    sigma = drawn_sigma(batch.sample_ids, place, config, tokens, config.train_batch_size).to(clean.device, non_blocking=True)
    drawn = batch.noise if batch.micro_step == place.micro_step else None
    return sigma, flow.noise_of(drawn, place.seed, place.micro_step, batch.sample_ids, clean)


def drawn_sigma(ids: Sequence[str], place: Place, config: Config, tokens: int, of_a_rank: int) -> Tensor:
    """Noise level (B,), on the CPU, of pictures of `tokens` tokens, spread evenly over the `of_a_rank` pictures of every rank."""
    first, total = place.rank * of_a_rank, place.world_size * of_a_rank
    quantile = flow.stratified_quantiles(place.seed, place.micro_step, ids, first, total)
    sigma = flow.sigma_of_quantile(
        quantile, config.weighting_scheme, config.logit_mean, config.logit_std, config.mode_scale
    )
    return flow.shift_sigma(sigma, flow.shift_of(config.timestep_shift, tokens=tokens))


def token_weights(batch: Batch, height: int, width: int, config: Config, edits: bool) -> Tensor | None:
    """Weights of the loss at each token, (B, 1, height, width), of mean 1 in a sample; None: alike.

    A mask m (the mean over the token's area, 0 to 1) and mask_outside_weight u give a token the weight u + (1 - u) m; times
    those of `edit_weights`; then divided by their mean, so that a figure's loss is a mean over what counts of it,
    however small that is.
    """
    weights: Tensor | None = None
    if edits and config.edit_loss_mode != "uniform":
        weights = edit_weights(batch.edit_boxes, height, width, config)
    if any(mask is not None for mask in batch.masks):
        outside = config.mask_outside_weight
        weights = torch.ones(len(batch.masks), 1, height, width) if weights is None else weights
        for weight, mask in zip(weights, batch.masks, strict=True):
            if mask is not None:
                covered = F.interpolate(mask[None, None].float() / 255, size=(height, width), mode="area")[0]
                weight *= outside + (1 - outside) * covered
                weight /= weight.mean().clamp(min=1e-6)  # nothing counts where mode "balanced" gives all that is masked 0
    return weights


def edit_weights(boxes: Sequence[Tensor | None], height: int, width: int, config: Config) -> Tensor:
    """Weights of the loss at each token of edits, (B, 1, height, width), of mean 1 in each sample.

    Tokens that a box touches are edited. `edit_loss_mode` "weighted": they count `edit_region_weight` times as much as the others.
    "balanced": all of them together count `edit_loss_ratio`, all others together the rest. A sample without known boxes, or
    of which all or nothing is edited, is weighted alike.
    """
    weights = torch.ones(len(boxes), 1, height, width)
    for weight, edits in zip(weights, boxes, strict=True):
        if edits is None:
            warn_once(f"edit_loss_mode = {config.edit_loss_mode!r}: some edits have no edit_boxes, so their tokens count alike")
            continue
        edited = torch.zeros(1, height, width, dtype=torch.bool)
        for x0, y0, x1, y1 in edits.tolist():
            columns, rows = (math.floor(x0 * width), math.ceil(x1 * width)), (math.floor(y0 * height), math.ceil(y1 * height))
            edited[:, max(0, rows[0]) : max(0, rows[1]), max(0, columns[0]) : max(0, columns[1])] = True
        share = edited.float().mean().item()
        if 0 < share < 1:
            if config.edit_loss_mode == "weighted":
                weight[edited] = config.edit_region_weight
                weight /= weight.mean()
            else:
                weight[edited], weight[~edited] = config.edit_loss_ratio / share, (1 - config.edit_loss_ratio) / (1 - share)
    return weights
