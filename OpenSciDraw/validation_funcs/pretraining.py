"""What the VAE and the text encoder make of figures that they were not trained on."""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from OpenSciDraw.config import Config
from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.figures.fitting import to_model_range
from OpenSciDraw.inference.pictures import grid
from OpenSciDraw.models.flux2_klein_parts import Flux2KleinText, Flux2KleinVAE
from OpenSciDraw.parallel.ranks import evaluating
from OpenSciDraw.registry import VALIDATION_FUNCS
from OpenSciDraw.validation_funcs.sample_prompts import PromptSet, image_folder

UNSEEN = [(1, index) for index in range(32)]  # (seed, index) of drawn figures; pretraining draws from seed 0


@VALIDATION_FUNCS.register("vae_reconstruction_validation_func")
@torch.no_grad()
def vae_reconstruction(
    model: Flux2KleinVAE, config: Config, prompts: PromptSet, step: int, accelerator: Accelerator
) -> dict[str, float]:
    """Rebuild 32 unseen figures by the posterior's mode; `validation_images/step_N/grid.png` has each beside its original.

    Returns `psnr` (dB, peak 2 in [-1, 1], of the mean squared error over all) and `mean_absolute_error` (of 255).
    """
    if not accelerator.is_main_process:
        return {}
    figures = [np.asarray(draw_figure(seed, at, 128, style="small").image) for seed, at in UNSEEN]
    pixels = to_model_range(torch.from_numpy(np.stack(figures)).permute(0, 3, 1, 2))
    with evaluating(model.transformer, accelerator) as vae:
        rebuilt = vae.decode(vae.encode(pixels.to(model.device)).latent_dist.mode()).sample.cpu()
    error = rebuilt - pixels
    pairs = []
    for original, picture in zip(pixels, rebuilt, strict=True):
        both = torch.cat([original, picture], 2).clamp(-1, 1)
        pairs.append(Image.fromarray(((both + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()))
    folder = image_folder(config, step)
    folder.mkdir(parents=True, exist_ok=True)
    grid(pairs).save(folder / "grid.png")
    return {
        "psnr": (10 * torch.log10(4 / error.pow(2).mean())).item(),
        "mean_absolute_error": (error.abs().mean() * 127.5).item(),
    }


@VALIDATION_FUNCS.register("caption_language_model_validation_func")
@torch.no_grad()
def caption_language_model(
    model: Flux2KleinText, config: Config, prompts: PromptSet, step: int, accelerator: Accelerator
) -> dict[str, float]:
    """Returns `unseen_loss`: nats a token on 32 captions of unseen figures."""
    ids, mask = model.tokenize([draw_figure(seed, at, 128, style="small").caption for seed, at in UNSEEN])
    with evaluating(model.transformer, accelerator) as encoder, accelerator.autocast():
        logits = encoder(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]
    return {"unseen_loss": (nats.sum() / mask[:, 1:].sum()).item()}
