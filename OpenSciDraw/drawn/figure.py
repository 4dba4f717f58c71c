"""Figures that the program draws itself: diagrams, plots and tables with captions and exact ground truth.

They feed the demo and the tests, and later the measured quality of text and arrows. A figure is a pure
function of (seed, index, size, kind): the same on every machine with the same Pillow, in any order.

Ground truth (`DrawnFigure.truth`) can be written as JSON; all boxes are [x0, y0, x1, y1] in pixels of the
picture, half-open, strokes included:

    kind, width, height
    components  [{id, shape, color, fill: [r, g, b], label, box}]
    arrows      [{source, target, directed, dashed, label, points: [[x, y], ...]}]   the tip is the last point
    labels      [{text, role, box}]     role: component, container, arrow, layer, title, axis, tick, legend, cell
    plot        plots: {kind, title, x_label, y_label, ..., series: [{name, color, trend, ...}]}
    table       tables: {columns, rows: [{name, values}], best}
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from PIL import Image

from OpenSciDraw.drawn import house, kinds, plots, small
from OpenSciDraw.drawn.canvas import Canvas
from OpenSciDraw.drawn.pieces import Area
from OpenSciDraw.errors import UserError

MIN_SIZE = 96
MAX_SIZE = 4096
_DRAW: dict[str, Callable[[Canvas, Area], str]] = {
    "pipeline": kinds.pipeline,
    "flowchart": kinds.flowchart,
    "method": kinds.method,
    "network": kinds.network,
    "graph": kinds.graph,
    "tree": kinds.tree,
    "line": plots.line,
    "bar": plots.bar,
    "scatter": plots.scatter,
    "table": plots.table,
}
KINDS: tuple[str, ...] = tuple(_DRAW)
STYLES = ("rich", "small", "house", "mixed")
_ASPECTS = (0.5, 0.75, 1.0, 1.0, 4 / 3, 4 / 3, 1.5, 16 / 9, 2.0)  # width / height


@dataclass(frozen=True)
class DrawnFigure:
    """A picture (RGB), its caption, and what is in it (the module's docstring gives the keys)."""

    id: str
    image: Image.Image
    caption: str
    truth: dict[str, Any]


def draw_figure(
    seed: int, index: int, size: int = 256, kind: str | None = None,
    *, width: int | None = None, height: int | None = None, style: str = "rich",
) -> DrawnFigure:  # fmt: skip
    """Draw figure `index` of the sequence `seed`.

    `style` "small" is that of the embedded model (see small.py): 128 x 128 pixels, kinds diagram, bars and lines;
    "house" (house.py) is the demo's, the same diagrams drawn by hand; "mixed" takes one of the three, all at 128 x 128.

    `size` in pixels is the side of the square with the figure's area; the aspect ratio is drawn by chance
    unless `width` and `height` are both given (which then replace `size`), and so is the kind unless it is.
    Larger figures hold more and longer labels; at 128 px they are few and short.

    Raises UserError for an unknown kind or style, or a size outside 96 to 4096 (small and house: other than 128).
    """
    if style not in STYLES:
        raise UserError(f"Unknown figure style {style!r}. Known: {', '.join(STYLES)}; of edits also mosaic, letters, repaint.")
    if style == "mixed":
        style = random.Random(f"mixed:{seed}:{index}").choices(("small", "rich", "house"), (6, 1, 3))[0]
        width = height = size
    if style != "rich":
        sides = (size if width is None else width, size if height is None else height)
        return _draw_small(f"{style}:{seed}:{index}", f"drawn-{style}-{seed}-{index:07d}", sides, kind, style)
    rng = random.Random(f"{seed}:{index}")
    if kind is not None and kind not in _DRAW:
        raise UserError(f"Unknown kind of drawn figure {kind!r}. Known: {', '.join(KINDS)}.")
    if width is not None and height is not None:
        size = round(math.sqrt(width * height))
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UserError(f"A drawn figure of size {size} px is not possible; choose {MIN_SIZE} to {MAX_SIZE}.")
    chosen = kind or rng.choice(KINDS)
    if width is None or height is None:
        width, height = _aspect(rng, chosen, size)
    em = max(8.0, 9.6 * (size / 128) ** 0.55)
    canvas = Canvas(rng, width, height, em * rng.uniform(1.0, 1.08))
    margin = 0.5 * canvas.em
    caption = _DRAW[chosen](canvas, Area(margin, margin, width - margin, height - margin))
    return DrawnFigure(f"drawn-{seed}-{index:07d}", canvas.finish(), caption, truth_of(chosen, canvas))


def _draw_small(key: str, ident: str, sides: tuple[int, int], kind: str | None, style: str) -> DrawnFigure:
    side, kinds = small.SIDE, small.KINDS if style == "small" else {"diagram": small.diagram}
    if sides != (side, side):
        raise UserError(f"Figures of style {style!r} have {side} x {side} px, not {sides[0]} x {sides[1]}. Write size={side}.")
    if kind is not None and kind not in kinds:
        raise UserError(f"Unknown kind of drawn figure {kind!r} of style {style!r}. Known: {', '.join(kinds)}.")
    rng = random.Random(key)
    if style == "house":
        chosen, canvas = "diagram", cast(Canvas, house.HouseCanvas(rng))
        caption = small.diagram(canvas, house.SHAPES, house.LAYOUTS)
    else:
        chosen = rng.choices(tuple(kinds), small.WEIGHTS)[0] if kind is None else kind
        canvas = small.SmallCanvas(rng)
        caption = kinds[chosen](canvas)
    return DrawnFigure(ident, canvas.finish(), caption, truth_of(chosen, canvas))


def truth_of(kind: str, canvas: Canvas) -> dict[str, Any]:
    return {
        "kind": kind, "width": canvas.width, "height": canvas.height,
        "components": canvas.components, "arrows": canvas.arrows, "labels": canvas.labels, **canvas.extra,
    }  # fmt: skip


def _aspect(rng: random.Random, kind: str, size: int) -> tuple[int, int]:
    """Width and height of area about size², in whole units of 16 px (8 px below 128)."""
    low, high = (0.75, 4 / 3) if size < 128 else (0.5, 2.0)
    if kind in ("line", "bar", "scatter", "table", "network"):
        low = max(low, 0.75 if kind != "table" else 1.0)
    aspect = rng.choice([a for a in _ASPECTS if low <= a <= high])
    unit = 16 if size >= 128 else 8
    return round(size * math.sqrt(aspect) / unit) * unit, round(size / math.sqrt(aspect) / unit) * unit


def iter_figures(count: int, seed: int = 0, size: int = 256, style: str = "rich") -> Iterator[DrawnFigure]:
    """The first `count` figures of a sequence, drawn one at a time."""
    for index in range(count):
        yield draw_figure(seed, index, size, style=style)
