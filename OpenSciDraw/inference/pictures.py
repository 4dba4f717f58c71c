"""What pictures are asked for, and how they are laid out."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from OpenSciDraw.config import Config, Drawing, EncodeConfig, drawing_as_asked, drawing_of_run
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.buckets import fitted
from OpenSciDraw.figures.fitting import pixels_of, to_model_range
from OpenSciDraw.figures.listing import RejectedFigure, load_figure
from OpenSciDraw.models.base import FigureModel

_LOG = logging.getLogger("OpenSciDraw")


def drawing_of_trained(model: FigureModel, config: Config, steps: int | None = None, guidance: float | None = None) -> Drawing:
    """How a run's weights draw on `model`: as asked for; else what learned few steps, and a base that was distilled, in those.

    A line says what the few steps come from. A distilled base's pipeline knows no guidance; a line says so where it is asked for.
    """
    usual, why = drawing_of_run(config), "the run was distilled" if config.distills else ""
    if model.is_distilled:
        usual, why = Drawing(model.distilled_steps, 1.0), f"{model.requested_source.name} is distilled"
        if guidance is not None and guidance > 1:
            _LOG.warning("%s: its pipeline draws without guidance, so guidance %g has no effect", why, guidance)
            guidance = 1.0
    drawing = Drawing(steps or usual.steps, usual.guidance if guidance is None else guidance)
    if why and drawing == usual:
        _LOG.info("%s: drawing in %d steps without guidance", why, usual.steps)
    return drawing


def draw_guidance(config: Config) -> float:
    """Guidance of the pictures that training on rewards draws."""
    given = config.reward.draw_guidance
    return drawing_as_asked(config).guidance if given is None else given


def resolutions(config: Config) -> list[tuple[int, int]]:
    """(width, height) of each prompt's picture: one for all, one each, or the encoded resolution."""
    given = [(int(w), int(h)) for w, h in config.resolution_list]
    if not given:
        side = config.encode.resolution
        given = [(side, side)]
    return given * len(config.validation_prompts) if len(given) == 1 else given


def pictures_to_edit(files: Sequence[str], model: FigureModel, encode: EncodeConfig, key: str) -> list[Image.Image]:
    """Pictures in files, which `key` names, each fitted into its bucket as encoding fits figures.

    Raises UserError for a file that is not there or is no picture, and for a model that does not edit.
    """
    if files and not model.edits:
        raise UserError(f"{key}: the pipeline of {model.family} takes no pictures to edit. Leave {key} out.")
    pictures = []
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"{key}: there is no file {file}. Correct the path; a relative one starts at {Path.cwd()}.")
        try:
            picture = load_figure(Path(file).read_bytes(), encode.max_image_pixels, encode.min_side, encode.max_aspect_ratio)
        except (RejectedFigure, OSError) as error:
            raise UserError(f"{key}: {file}: {error}. Give PNG, JPEG, WebP, GIF, TIFF or BMP.") from error
        pictures.append(fitted(picture, encode.resolution))
    return pictures


def encode_prompt(model: FigureModel, prompt: str, images: Sequence[Image.Image] = ()) -> Tensor:
    """(L, D) text of a prompt that edits `images`, alone: batches change its last bits. On the CPU."""
    if not images:
        return model.encode_prompts([prompt])[0].cpu()
    return model.encode_instructions([prompt], [[to_model_range(pixels_of(image)) for image in images]])[0].cpu()


@torch.no_grad()
def decoded(model: FigureModel, latents: Tensor) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8 of normalised latents, rounded as the pipelines do it; the VAE must be loaded."""
    with torch.autocast(model.device.type, enabled=False):
        pixels = model.decode(latents).float()
    return (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid(pictures: Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """Pictures in rows on white, each in a cell as large as the largest."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = max(p.width for p in pictures) + gap, max(p.height for p in pictures) + gap
    sheet = Image.new("RGB", (columns * width + gap, math.ceil(len(pictures) / columns) * height + gap), "#cccccc")
    for at, picture in enumerate(pictures):
        sheet.paste(picture, (gap + at % columns * width, gap + at // columns * height))
    return sheet
