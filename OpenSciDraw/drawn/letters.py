"""Cells with a letter or word each, some of which get another colour: a lesson in finding in a picture what a text names.

As an edit (drawn/edits.py, style "letters") "Make 'A' red." decides up to 64 cells of a picture, in a diagram a few. Pictures
are of the first 2, 4, 8, 16 or 26 letters: two are told apart by what a text names within a hundred steps, and what was learned of
them extends to the others; from pictures of any of 26 it did not come about (docs/edit.md).
"""

from __future__ import annotations

import random

from PIL import Image

from OpenSciDraw.drawn.canvas import PALETTE
from OpenSciDraw.drawn.mosaic import SQUARE
from OpenSciDraw.drawn.pieces import listing
from OpenSciDraw.drawn.small import COLORS, LETTER, LETTERS, SIDE, WORDS, SmallCanvas

_KNOWN = (2, 4, 8, 16, 26)  # how many of the first letters, or words, a picture is made of
_WORDS = 0.2  # share of pictures with words
_SIZES = (1, 2, 3, 4)  # of a row or column, in squares: a label lies in the middle, in one square or between two, as in diagrams

Box = tuple[int, int, int, int]


def draw_letters(seed: int, index: int) -> tuple[Image.Image, Image.Image, str, tuple[Box, ...]]:
    """Picture `index` of the sequence `seed`, 128 x 128 px, before and after, the instruction, and the boxes that change."""
    rng = random.Random(f"letters:{seed}:{index}")
    words = rng.random() < _WORDS
    known = (WORDS if words else LETTERS)[: rng.choice(_KNOWN)]
    labels = rng.sample(known, min(len(known), rng.randint(2, 4)))
    new = {label: rng.choice(COLORS) for label in rng.sample(labels, rng.randint(1, 2))}
    rows, columns = _lines(rng, 1), _lines(rng, 2 if words else 1)
    boxes = [(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in columns]
    cells: list[tuple[str, str]] = []
    while not new.keys() <= {label for label, _ in cells}:  # what is named is there
        cells = []
        for _ in boxes:
            label = rng.choice(labels)
            cells.append((label, rng.choice([color for color in COLORS if color != new.get(label)])))
    before, after = SmallCanvas(random.Random(0)), SmallCanvas(random.Random(0))
    for (x0, y0, x1, y1), (label, color) in zip(boxes, cells, strict=True):
        for canvas, shown in ((before, color), (after, new.get(label, color))):
            canvas.rectangle(x0, y0, x1, y1, *PALETTE[shown])
            canvas.text((x0 + x1) / 2, (y0 + y1) / 2, label, "component", scale=1.0 if words else LETTER)
    changed = tuple(box for box, (label, _) in zip(boxes, cells, strict=True) if label in new)
    said = listing([f"'{label}' {color}" for label, color in new.items()])
    return before.finish(), after.finish(), f"Make {said}.", changed


def _lines(rng: random.Random, least: int) -> list[tuple[int, int]]:
    """Where rows or columns begin and end, in pixels: sizes of at least `least` squares that fill the picture."""
    sizes = [size for size in _SIZES if size >= least]
    largest = rng.choice(sizes)
    at, lines = 0, []
    while at < SIDE // SQUARE:
        size = min(rng.choice([size for size in sizes if size <= largest]), SIDE // SQUARE - at)
        lines.append((at * SQUARE, (at + size) * SQUARE))
        at += size
    if lines[-1][1] - lines[-1][0] < least * SQUARE:  # what is left over is too narrow for a word
        *lines, (start, _), (_, end) = lines
        lines.append((start, end))
    return lines
