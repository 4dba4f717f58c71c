"""A figure drawn as a picture again, beside the original, and how much of the original it explains."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from OpenSciDraw.drawn.canvas import font
from OpenSciDraw.vectorize.figure import VectorFigure
from OpenSciDraw.vectorize.svg import write_svg

_INK = 12  # of 255: what differs from the paper by less is paper
_SAME = 48  # of 255: two pixels are alike
_SIDE = 320  # px: pictures are compared at this longer side at most
_REACH = 2  # px there: how far a line may lie from its place


@dataclass(frozen=True)
class Share:
    """`explained`: of the picture's ink, what is drawn again in its place. `added`: of the drawn ink, what the picture lacks."""

    explained: float
    added: float


def draw(figure: VectorFigure, scale: float = 1.0) -> Image.Image:
    """The figure as an RGB picture, by resvg, in the font inside Pillow where its texts ask for it."""
    import resvg_py

    with tempfile.TemporaryDirectory() as folder:
        face = Path(folder) / "font.otf"
        face.write_bytes(font(16).font_bytes)
        data = resvg_py.svg_to_bytes(
            svg_string=write_svg(figure), background="white", font_files=[str(face)], width=max(1, round(figure.width * scale))
        )
    return Image.open(BytesIO(bytes(data))).convert("RGB")


def share_of(picture: Image.Image, drawn: Image.Image, figure: VectorFigure) -> Share:
    """How much of the picture's ink the drawn figure explains. Ink is weighed by how much it differs from the paper.

    A pixel is explained where the drawn figure has nearly its colour within a short way, or where a text was read, whose
    font may be another.
    """
    scale = min(1.0, _SIDE / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    there, again = (np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX), np.int16) for image in (picture, drawn))
    texts = np.zeros(there.shape[:2], bool)
    for line in figure.all_texts():
        x0, y0, x1, y1 = (round(v * scale) for v in line.box)
        texts[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = True
    paper = np.array(figure.paper, np.int16)
    return Share(_matched(there, again, paper, texts), 1 - _matched(again, there, paper, texts))


def _matched(one: np.ndarray, other: np.ndarray, paper: np.ndarray, texts: np.ndarray) -> float:
    """Share of the ink of `one` (h, w, 3) that `other` has within `_REACH` pixels; 1 where there is no ink."""
    ink = np.abs(one - paper).max(2).astype(np.float64)
    ink[ink < _INK] = 0
    found = texts.copy()
    height, width = ink.shape
    marked = np.abs(other - paper).max(2) >= _INK
    for dy in range(-_REACH, _REACH + 1):
        for dx in range(-_REACH, _REACH + 1):
            if dx * dx + dy * dy > _REACH * _REACH:
                continue
            a = slice(max(0, dy), height + min(0, dy)), slice(max(0, dx), width + min(0, dx))
            b = slice(max(0, -dy), height + min(0, -dy)), slice(max(0, -dx), width + min(0, -dx))
            found[a] |= marked[b] & (np.abs(one[a] - other[b]).max(2) <= _SAME)
    return float((ink * found).sum() / ink.sum()) if ink.any() else 1.0


def side_by_side(picture: Image.Image, drawn: Image.Image, gap: int = 12) -> Image.Image:
    """The original and what was drawn again, at one height, on light grey."""
    picture, drawn = picture.convert("RGB"), drawn.resize(picture.size, Image.Resampling.LANCZOS)
    page = Image.new("RGB", (2 * picture.width + 3 * gap, picture.height + 2 * gap), (224, 224, 224))
    page.paste(picture, (gap, gap))
    page.paste(drawn, (2 * gap + picture.width, gap))
    return page
