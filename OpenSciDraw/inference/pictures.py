"""What pictures are asked for, and how they are laid out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from OpenSciDraw.config import Config, EncodeConfig
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.buckets import best_bucket, fit
from OpenSciDraw.figures.listing import RejectedFigure, load_figure
from OpenSciDraw.models.base import FigureModel


def guidance_of(config: Config) -> float:
    """`true_cfg_scale`, else `guidance_scale`, else `validation_guidance_scale`: here all mean true guidance."""
    given = (config.true_cfg_scale, config.guidance_scale, config.validation_guidance_scale)
    return next(value for value in given if value is not None)


def draw_guidance(config: Config) -> float:
    """Guidance of the pictures that training on rewards draws."""
    given = config.reward.draw_guidance
    return guidance_of(config) if given is None else given


def resolutions(config: Config) -> list[tuple[int, int]]:
    """(width, height) of each prompt's picture: one for all, one each, or the encoded resolution."""
    given = [(int(w), int(h)) for w, h in config.resolution_list]
    if not given:
        side = config.encode.resolution
        given = [(side, side)]
    return given * len(config.validation_prompts) if len(given) == 1 else given


def pictures_to_edit(files: Sequence[str], model: FigureModel, encode: EncodeConfig, key: str) -> list[Image.Image]:
    """Pictures in files, which `key` names, each fitted into its bucket as encoding fits figures.

    Raises UserError for a file that is no picture, and for a model that does not edit.
    """
    if files and not model.edits:
        raise UserError(f"{key}: the pipeline of {model.family} takes no pictures to edit. Leave {key} out.")
    pictures = []
    for file in files:
        try:
            picture = load_figure(Path(file).read_bytes(), encode.max_image_pixels, encode.min_side, encode.max_aspect_ratio)
        except (RejectedFigure, OSError) as error:
            raise UserError(f"{key}: {file}: {error}. Give PNG, JPEG, WebP, GIF, TIFF or BMP.") from error
        pictures.append(fit(picture, best_bucket(picture.width, picture.height, encode.resolution))[0])
    return pictures


def grid(pictures: Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """Pictures in rows on white, each in a cell as large as the largest."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = max(p.width for p in pictures) + gap, max(p.height for p in pictures) + gap
    sheet = Image.new("RGB", (columns * width + gap, math.ceil(len(pictures) / columns) * height + gap), "#cccccc")
    for at, picture in enumerate(pictures):
        sheet.paste(picture, (gap + at % columns * width, gap + at // columns * height))
    return sheet
