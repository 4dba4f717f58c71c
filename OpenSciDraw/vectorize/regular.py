"""What was measured becomes as regular as people draw: few sizes and colours, and lines that fill whole pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from OpenSciDraw.vectorize.figure import Box, Connector, Point, Rgb, Shape, VectorFigure
from OpenSciDraw.vectorize.labels import of_one_size, rgb

_ONE_COLOR = 16  # of 255: inks that differ by no more in every channel are one
_EVEN = 0.3  # widths that differ by less than this share are one
_WHOLE = 0.35  # px: a width that differs by less from a whole number is that number
_REACH = 2.0  # px: an end so near to the edge of its shape stands on it


def regular(figure: VectorFigure) -> VectorFigure:
    """The figure with its lengths and colours evened; each changes by less than the measurement is off."""
    widths = [_whole(width) for width in _evened([shape.width for shape in figure.shapes])]
    figure.shapes = [_crisp(shape, width) for shape, width in zip(figure.shapes, widths, strict=True)]
    ways = figure.connectors
    sizes = (_evened([way.width for way in ways]), _evened([way.head[0] for way in ways]), _evened([way.head[1] for way in ways]))
    inks = [way.color for way in ways] + [line.color for line in figure.all_texts()]
    boxes = {shape.id: shape.box for shape in figure.shapes}
    figure.connectors = [
        _laid(replace(way, width=_whole(w), head=(a, b), color=_usual(way.color, inks)), boxes[way.source], boxes[way.target])
        for way, w, a, b in zip(ways, *sizes, strict=True)
    ]
    figure.lines = [replace(line, width=_whole(line.width)) for line in figure.lines]
    even = iter([replace(line, color=_usual(line.color, inks)) for line in of_one_size(figure.all_texts())])
    figure.shapes = [replace(shape, label=tuple(next(even) for _ in shape.label)) for shape in figure.shapes]
    figure.texts = [next(even) for _ in figure.texts]
    return figure


def _evened(values: Sequence[float]) -> list[float]:
    """The values, each the median of those that lie near it."""
    return [float(np.median([other for other in values if abs(other - value) <= _EVEN * value])) for value in values]


def _usual(color: Rgb, all_of_them: Sequence[Rgb]) -> Rgb:
    """The median of the colours that hardly differ from this one."""
    near = [other for other in all_of_them if max(abs(a - b) for a, b in zip(color, other, strict=True)) <= _ONE_COLOR]
    return rgb(np.median(np.array(near), axis=0))


def _whole(width: float) -> float:
    return float(round(width)) if round(width) and abs(width - round(width)) <= _WHOLE else width


def _crisp(shape: Shape, width: float) -> Shape:
    x0, y0, x1, y1 = (float(round(v)) for v in shape.box)
    return replace(shape, width=width, box=(x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))


def _laid(way: Connector, source: Box, target: Box) -> Connector:
    """Level and upright pieces on whole pixels, and ends on the edges of the shapes."""
    points = [list(point) for point in way.points]
    for k, (a, b) in enumerate(zip(way.points, way.points[1:], strict=False)):
        for axis in (0, 1):
            if abs(a[axis] - b[axis]) < 0.01:  # upright (0) or level (1)
                points[k][axis] = points[k + 1][axis] = round(a[axis] - way.width / 2) + way.width / 2
    for at, beside, box in ((0, 1, source), (-1, -2, target)):
        for axis in (0, 1):
            if abs(points[at][1 - axis] - points[beside][1 - axis]) < 0.01:
                edge = min((box[axis], box[axis + 2]), key=lambda v: abs(v - points[at][axis]))
                if abs(edge - points[at][axis]) < _REACH:
                    points[at][axis] = edge
    ends: tuple[Point, ...] = tuple((x, y) for x, y in points)
    return replace(way, points=ends)
