"""What is written: shapes, connectors, lines and texts, with all lengths in pixels of the picture, y downwards."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

Rgb = tuple[int, int, int]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1
Point = tuple[float, float]

TRAPEZOID_DROP = 0.18  # share of its height by which a trapezoid's right side begins lower and ends higher
CYLINDER_CAP = 0.2  # share of its height that a cylinder's lid takes
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # what XML cannot hold, and nobody can see


@dataclass(frozen=True)
class TextLine:
    """One line of text: middle `x`, baseline `y`, font size in px; `upward`: it reads upwards, and x, y are those of its
    middle along the line and of its baseline after the turn. `by`: "glyphs" or "ocr"."""

    text: str
    x: float
    y: float
    size: float
    color: Rgb
    box: Box
    by: str
    upward: bool = False


@dataclass(frozen=True)
class Shape:
    """A filled shape. `box` is that of its outer edge, outline included; `radius` of a rounded rectangle's corners."""

    id: str
    kind: str
    box: Box
    fill: Rgb
    outline: Rgb | None
    width: float
    radius: float
    label: tuple[TextLine, ...] = ()

    @property
    def middle(self) -> Point:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def path(self) -> Box:
        """The box of the middle of the outline, which is what programs draw along."""
        half = self.width / 2 if self.outline else 0.0
        return self.box[0] + half, self.box[1] + half, self.box[2] - half, self.box[3] - half

    def corners(self) -> list[Point]:
        """Corners of a polygon (diamond, trapezoid, hexagon) along `path`; [] for other kinds."""
        x0, y0, x1, y1 = self.path
        x, y, width, height = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
        if self.kind == "diamond":
            return [(x, y0), (x1, y), (x, y1), (x0, y)]
        if self.kind == "trapezoid":
            drop = TRAPEZOID_DROP * height
            return [(x0, y0), (x1, y0 + drop), (x1, y1 - drop), (x0, y1)]
        if self.kind == "hexagon":
            inset = min(0.25 * width, 0.4 * height)
            return [(x0 + inset, y0), (x1 - inset, y0), (x1, y), (x1 - inset, y1), (x0 + inset, y1), (x0, y)]
        return []


@dataclass(frozen=True)
class Connector:
    """A line between two shapes, from the edge of `source` over its bends to the edge of `target` (ids).

    Heads stand at its ends: `head` (length, width) in px, at the target if `to_target`, at the source if `to_source`.
    """

    id: str
    source: str
    target: str
    points: tuple[Point, ...]
    color: Rgb
    width: float
    head: tuple[float, float]
    to_target: bool
    to_source: bool
    dashed: bool = False


@dataclass(frozen=True)
class Line:
    """A line that ends at nothing: axes and curves of plots."""

    id: str
    points: tuple[Point, ...]
    color: Rgb
    width: float


@dataclass
class VectorFigure:
    """A figure of `width` x `height` px on `paper`: shapes from the back to the front, then lines, connectors and free texts."""

    width: int
    height: int
    paper: Rgb
    shapes: list[Shape] = field(default_factory=list)
    connectors: list[Connector] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    texts: list[TextLine] = field(default_factory=list)

    def all_texts(self) -> list[TextLine]:
        return [line for shape in self.shapes for line in shape.label] + self.texts

    def shape(self, ident: str) -> Shape:
        return next(shape for shape in self.shapes if shape.id == ident)


def clean(text: str) -> str:
    """The text without control characters, which a reader of pictures may return and no format holds."""
    return " ".join(_CONTROL.sub(" ", text).split())


def slug(text: str) -> str:
    """Plain letters, digits and hyphens of a text, for an id that people can read and every format allows."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:24].strip("-")
