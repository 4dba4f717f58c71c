"""First lessons of editing, as pictures that hold nothing but what is to be learned, many times over (docs/edit.md).

Mosaics (style "mosaic" of drawn/edits.py) are squares cut out of small figures, side by side in an order that nothing tells. As an
edit that changes nothing a mosaic can only be drawn by copying its source place by place: the prompt does not say what it shows,
and no square follows from its neighbours. A model learns this far sooner than from edits of diagrams, most of whose pixels can be
guessed.

Letters (style "letters") are cells with a label each, a few labels many times over, some of which get another colour: where 'A' is
must be read in 32 or 64 places of a picture, in a diagram in two to four.
"""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
from PIL import Image

from OpenSciDraw.drawn.canvas import PALETTE
from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.drawn.pieces import listing
from OpenSciDraw.drawn.small import COLORS, LETTER, LETTERS, SIDE, WORDS, SmallCanvas

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


# -- letters ------------------------------------------------------------------------------------------
def draw_letters(seed: int, index: int) -> tuple[Image.Image, Image.Image, str, tuple[tuple[int, int, int, int], ...]]:
    """Cells before and after some labels get other colours, the instruction, and the boxes of the cells that change."""
    rng = random.Random(f"letters:{seed}:{index}")
    words = rng.random() < 0.3
    width, scale = (2 * SQUARE, 1.0) if words else (SQUARE, LETTER)
    labels = rng.sample(WORDS if words else LETTERS, rng.randint(3, 6))
    new = {label: rng.choice(COLORS) for label in rng.sample(labels, rng.randint(1, min(4, len(labels))))}
    x0, y0 = (rng.choice((0, 0, -SQUARE // 2)) for _ in range(2))  # a label of a diagram may lie between two tokens
    boxes = [(x, y, x + width, y + SQUARE) for y in range(y0, SIDE, SQUARE) for x in range(x0, SIDE, width)]
    cells = [(box, rng.choice(labels), rng.choice(COLORS)) for box in boxes]
    before, after = (
        _cells([(box, label, repaint.get(label, color)) for box, label, color in cells], scale) for repaint in ({}, new)
    )
    said = listing([f"'{label}' {color}" for label, color in new.items()])
    changed = [
        (max(0, x0), max(0, y0), min(SIDE, x1), min(SIDE, y1))
        for (x0, y0, x1, y1), label, color in cells if new.get(label, color) != color
    ]  # fmt: skip
    return before, after, f"Make {said}.", tuple(changed)


def _cells(cells: list[tuple[tuple[int, int, int, int], str, str]], scale: float) -> Image.Image:
    canvas = SmallCanvas(random.Random(0))
    for (x0, y0, x1, y1), label, color in cells:
        fill, _ = PALETTE[color]
        canvas.rectangle(x0, y0, x1, y1, fill, fill)
        canvas.text((x0 + x1) / 2, (y0 + y1) / 2, label, "component", scale=scale)
    return canvas.finish()
