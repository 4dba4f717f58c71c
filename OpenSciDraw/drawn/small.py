"""The small style: figures of 128 x 128 pixels that a model of a few million parameters can learn to draw.

Few and large shapes on fixed places, six colours that are easy to tell apart, labels of one letter or a short
word, and captions of fewer than 80 tokens that say all that the picture shows. Caption phrases and ground truth
are those of the rich kinds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from OpenSciDraw.drawn.canvas import INK, LABEL_ROOM, PALETTE, Canvas, Node, wrap
from OpenSciDraw.drawn.pieces import a, describe_arrows, listing, named, number

SIDE = 128
COLORS = ("blue", "gray", "green", "orange", "purple", "red")
SHAPES = ("rectangle", "rounded rectangle", "ellipse", "diamond", "trapezoid")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORDS = ("CNN", "MLP", "VAE", "DNA", "RNA", "GPU", "API", "Key", "Net", "Sum", "Map", "Log")
TRENDS = {"rising": "rises", "falling": "falls", "peak": "rises and falls", "valley": "falls and rises"}
HEIGHTS = (0.25, 0.5, 0.75, 1.0)
EM = 13.0
LETTER = 1.2  # font size of a label of one letter, in ems
FRAME = (10, 8, 122, 104)  # left, top, right, bottom of a plot in pixels

# Places of the nodes, (x, y) of their centres, and their width and height, by the layout's name; pairs of neighbours
# between which an arrow may run. Centres are those of 16 px squares, the model's tokens, wherever there is a choice: a
# letter then lies in one of them.
LAYOUTS: dict[str, tuple[Sequence[tuple[int, int]], tuple[int, int], Sequence[tuple[int, int]]]] = {
    "row of two": ([(24, 64), (104, 64)], (44, 40), [(0, 1)]),
    "row of three": ([(x, 64) for x in (24, 64, 104)], (26, 34), [(0, 1), (1, 2)]),
    "column of two": ([(64, 24), (64, 104)], (60, 36), [(0, 1)]),
    "column of three": ([(64, y) for y in (20, 64, 108)], (60, 26), [(0, 1), (1, 2)]),
    "square": ([(24, 24), (104, 24), (24, 104), (104, 104)], (44, 36), [(0, 1), (2, 3), (0, 2), (1, 3)]),
    "fork": ([(64, 24), (24, 104), (104, 104)], (44, 36), [(0, 1), (0, 2), (1, 2)]),
    "join": ([(24, 24), (104, 24), (64, 104)], (44, 36), [(0, 2), (1, 2), (0, 1)]),
}
BARS = {2: (40, 88), 3: (40, 72, 104), 4: (28, 54, 80, 106)}  # x of their middles


class SmallCanvas(Canvas):
    """A canvas with nothing left to chance: strokes of 2 px in the shape's own colour, one font size."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng, SIDE, SIDE, EM)
        self.stroke, self.radius, self.dark_outline = 2, 9.0, False
        self.colors = rng.sample(COLORS, len(COLORS))


def labels(rng: random.Random, shapes: Sequence[str], width: int, height: int) -> list[str]:
    """Different labels: letters and, where they fit, some words."""
    words, letters = rng.sample(WORDS, len(shapes)), rng.sample(LETTERS, len(shapes))
    share = 0.25 if width >= 40 else 0.0
    out = []
    for word, letter, shape in zip(words, letters, shapes, strict=True):
        room = LABEL_ROOM[shape]
        fits = wrap(word, width * room[0], height * room[1], EM)
        out.append(word if rng.random() < share and fits else letter)
    return out


def ports(layout: str, source: Node, target: Node) -> tuple[tuple[float, float], ...]:
    """Where an arrow leaves one node and reaches the other; between rows of a fork it bends."""
    if source.y == target.y:
        return (source.port("right"), target.port("left")) if source.x < target.x else (source.port("left"), target.port("right"))
    down = source.y < target.y
    if source.x == target.x:
        return source.port("bottom" if down else "top"), target.port("top" if down else "bottom")
    # the node that stands alone in its row is left sideways, the other one is met from above or below
    alone = 0 if layout == "fork" else 2
    if source.id == f"n{alone}":
        start = source.port("right" if target.x > source.x else "left")
        return start, (target.x, start[1]), target.port("top" if down else "bottom")
    end = target.port("right" if source.x > target.x else "left")
    return source.port("bottom" if down else "top"), (source.x, end[1]), end


def diagram(c: Canvas, known: Sequence[str] = SHAPES, layouts: Sequence[str] = tuple(LAYOUTS)) -> str:
    """Two to four labelled shapes in a row, column, square, fork or join, with arrows between neighbours."""
    rng = c.rng
    layout = rng.choice(layouts)
    places, (width, height), pairs = LAYOUTS[layout]
    colors = [rng.choice(sorted(c.colors)) for _ in places]
    shape = rng.choice(known)
    shapes = [rng.choice(known) for _ in places] if rng.random() < 0.75 else [shape] * len(places)
    nodes = []
    for (x, y), look, color, label in zip(places, shapes, colors, labels(rng, shapes, width, height), strict=True):
        nodes.append(c.node(look, x, y, width, height, color, label, LETTER if len(label) == 1 else 1.0))
    joined = [pair for pair in pairs if rng.random() < 0.75] or [pairs[0]]
    for first, second in joined:
        ends = (nodes[first], nodes[second])
        source, target = ends if rng.random() < 0.6 else ends[::-1]
        c.arrow(source, target, ports(layout, source, target))
    return describe(c, layout, range(len(places)))


def describe(c: Canvas, layout: str, places: Sequence[int]) -> str:
    """The caption of a diagram whose components stand at these places of the layout, in their order."""
    said = [named(part) for part in c.components]
    if layout.startswith("row"):
        text = f"From left to right: {listing(said)}."
    elif layout.startswith("column"):
        text = f"From top to bottom: {listing(said)}."
    else:
        top = sum(place < (1 if layout == "fork" else 2) for place in places)
        rows = [("Top", said[:top]), ("Bottom", said[top:])]
        text = " ".join(f"{name}: {listing(parts)}." for name, parts in rows if parts)
    return f"{text} {describe_arrows(c)}".rstrip()


def _axes(c: Canvas) -> None:
    """Axes without numbers."""
    left, top, right, bottom = FRAME
    c.polyline([(left, top), (left, bottom), (right, bottom)], INK, c.stroke)


def bars(c: Canvas) -> str:
    """Two to four bars, each with its own height and letter, all of one colour."""
    rng = c.rng
    count, color = rng.randint(2, 4), c.colors[0]
    heights = rng.sample(HEIGHTS, count)
    return draw_bars(c, sorted(rng.sample(LETTERS, count)), heights, color)


def draw_bars(c: Canvas, names: Sequence[str], heights: Sequence[float], color: str) -> str:
    """Bars of these heights, as shares of the axis; returns the caption."""
    top, bottom = FRAME[1], FRAME[3]
    count = len(names)
    fill, edge = PALETTE[color]
    wide = 24 if count < 4 else 18
    for x, height, name in zip(BARS[count], heights, names, strict=True):
        box = (x - wide // 2, round(bottom - height * (bottom - top - 4)), x + wide // 2, bottom)
        c.rectangle(*box, fill, edge)
        c.record("bar", color, box, "", fill)
        c.text(x, bottom + 14, name, "tick", scale=LETTER)
    _axes(c)
    best, order = names[heights.index(max(heights))], sorted(zip(heights, names, strict=True), reverse=True)
    c.extra["plot"] = {"kind": "bar", "title": "", "x_label": "", "y_label": "", "categories": list(names), "y_range": [0, 1],
                       "series": [{"name": "", "color": color, "trend": f"highest {best}", "values": list(heights)}]}  # fmt: skip
    ranked = listing([f"'{name}'" for _, name in order])
    quoted = listing([f"'{name}'" for name in names])
    return f"A bar chart with {number(count)} {color} bars, {quoted}. From highest to lowest: {ranked}."


def line(c: Canvas) -> str:
    """One or two curves with different trends and colours over plain axes named by letters."""
    rng = c.rng
    left, top, right, bottom = FRAME
    _axes(c)
    count = rng.choice((1, 2))
    trends, phrases, series = rng.sample(tuple(TRENDS), count), [], []
    for color, trend in zip(c.colors, trends, strict=False):
        ts = [i / 20 for i in range(21)]
        curve = {"rising": lambda t: t, "falling": lambda t: 1 - t, "peak": lambda t: 1 - (2 * t - 1) ** 2,
                 "valley": lambda t: (2 * t - 1) ** 2}[trend]  # fmt: skip
        ys = [0.06 + 0.72 * curve(t) for t in ts]
        path = [(left + 4 + t * (right - left - 8), bottom - y * (bottom - top)) for t, y in zip(ts, ys, strict=True)]
        c.polyline(path, PALETTE[color][1], 3)
        phrases.append(f"{a(color)} line {TRENDS[trend]}")
        series.append({"name": "", "color": color, "marker": "line", "trend": trend, "x": ts, "y": [round(y, 4) for y in ys]})
    x_label, y_label = rng.sample(LETTERS, 2)
    c.text(72, bottom + 14, x_label, "axis", scale=LETTER)
    c.text(24, top + 4, y_label, "axis", scale=LETTER)
    c.extra["plot"] = {"kind": "line", "title": "", "x_label": x_label, "y_label": y_label, "x_range": [0, 1],
                       "y_range": [0, 1], "series": series}  # fmt: skip
    return f"A line plot: {listing(phrases)}. The x axis is labelled '{x_label}' and the y axis '{y_label}'."


KINDS = {"diagram": diagram, "bars": bars, "lines": line}
WEIGHTS = (8, 1, 1)
