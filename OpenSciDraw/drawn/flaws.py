"""Diagrams of the small style with one flaw each: what a picture looks like that fails on one axis alone.

With the flawless figure they are a group of preferences whose ground truth is known (docs/preferences.md).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from OpenSciDraw.drawn.canvas import Node, Point, Rgb
from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.drawn.small import LETTER, LETTERS, SIDE, SmallCanvas, diagram
from OpenSciDraw.utils.files import make_folder

FLAWS = ("component", "arrow", "text")


class _FlawedCanvas(SmallCanvas):
    """Draws as it is told but for one thing: a shape that is left out with its label, an arrow turned around, a wrong label."""

    def __init__(self, rng: random.Random, flaw: str, which: int) -> None:
        super().__init__(rng)
        self._flaw, self._which = flaw, which

    def node(
        self, shape: str, x: float, y: float, width: float, height: float, color: str, label: str = "", scale: float = 1.0
    ) -> Node:
        if len(self.components) == self._which and self._flaw == "component":
            label = ""
        elif len(self.components) == self._which and self._flaw == "text":
            label, scale = LETTERS[(LETTERS.find(label[0]) + 7) % len(LETTERS)], LETTER
        return super().node(shape, x, y, width, height, color, label, scale)

    def _shape(self, node: Node, fill: Rgb, edge: Rgb) -> None:
        if not (len(self.components) == self._which and self._flaw == "component"):
            super()._shape(node, fill, edge)

    def arrow(self, source: Node, target: Node, points: Sequence[Point], **options: Any) -> None:
        if self._flaw == "arrow" and not self.arrows:
            source, target, points = target, source, points[::-1]
        super().arrow(source, target, points, **options)


def draw_flawed(seed: int, index: int, flaw: str) -> Image.Image:
    """`draw_figure(seed, index, 128, "diagram", style="small")` with a flaw: RGB, 128 x 128 pixels.

    "component": one shape is missing. "arrow": the first arrow points the other way. "text": one label is another letter.
    """
    which = random.Random(f"flaw:{seed}:{index}:{flaw}").randrange(2)  # every diagram has two shapes at least
    canvas = _FlawedCanvas(random.Random(f"small:{seed}:{index}"), flaw, which)
    diagram(canvas)
    return canvas.finish()


def write_groups(figures: Path, groups: Path, count: int, seed: int = 0) -> None:
    """`count` figures with their three flawed forms, each a .png with its caption beside, and the file that says who won.

    Encode `figures`, and put `groups` (groups.parquet, see datasets/preference_groups.py) into the store's folder.
    """
    make_folder(figures)
    rows = []
    for index in range(count):
        drawn = draw_figure(seed, index, SIDE, "diagram", style="small")
        row, pictures = {"group_id": drawn.id, "caption": drawn.caption}, {"winner": drawn.image}
        pictures |= {f"loser_{flaw}": draw_flawed(seed, index, flaw) for flaw in FLAWS}
        for role, picture in pictures.items():
            row[role] = f"{drawn.id}-{role}.png"  # the id that a figure of a folder has
            picture.save(figures / row[role])
            (figures / row[role]).with_suffix(".txt").write_text(drawn.caption + "\n", encoding="utf-8")
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), groups)
