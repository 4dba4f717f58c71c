"""Mosaics: squares cut out of small figures, side by side in an order that nothing tells.

As an edit that changes nothing (drawn/edits.py, style "mosaic") a mosaic can only be drawn by copying its source place by place:
the prompt does not say what it shows, and no square follows from its neighbours. A model learns this far sooner than from edits
of diagrams, most of whose pixels can be guessed (docs/edit.md).
"""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
from PIL import Image

from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.drawn.small import SIDE

SQUARE = 16  # px: a token of the small model
_FIGURES = 400  # that squares are cut from, of each seed
_SAID = ("Keep the picture as it is.", "Change nothing.", "Leave everything as it is.", "Copy the picture.")
_LEAST_INK = 25.0  # standard deviation of a square's values (0 to 255): no empty ones


def draw_mosaic(seed: int, index: int) -> tuple[Image.Image, str]:
    """Mosaic `index` of the sequence `seed`, 128 x 128 px, and an instruction that asks for it as it is."""
    rng = random.Random(f"mosaic:{seed}:{index}")
    count = SIDE // SQUARE
    rows = [np.concatenate([_square(rng, seed) for _ in range(count)], axis=1) for _ in range(count)]
    return Image.fromarray(np.concatenate(rows)), rng.choice(_SAID)


def _square(rng: random.Random, seed: int) -> np.ndarray:
    while True:
        x, y = rng.randrange(SIDE - SQUARE), rng.randrange(SIDE - SQUARE)
        square = _pixels(seed, rng.randrange(_FIGURES))[y : y + SQUARE, x : x + SQUARE]
        if square.std() > _LEAST_INK:
            return square


@lru_cache(maxsize=_FIGURES)
def _pixels(seed: int, index: int) -> np.ndarray:
    return np.asarray(draw_figure(seed, index, SIDE, style="small").image)
