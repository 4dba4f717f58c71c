"""The drawn plots and tables: line, bar and scatter plots with axes, ticks and legend; tables with rules.

Each function draws one figure into an area of a canvas, leaves its numbers in `canvas.extra`, and returns
its caption.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from OpenSciDraw.drawn.canvas import FAINT, INK, PALETTE, Canvas, Point, text_width
from OpenSciDraw.drawn.kinds import Area, a, intro, listing, number

SMALL = 0.86  # font size of ticks and legends, in ems
AXES: tuple[tuple[str, float, str, float], ...] = (
    ("Epoch", 100, "Accuracy (%)", 100), ("Step", 5000, "Loss", 5), ("Time (s)", 20, "Voltage (mV)", 80),
    ("Temperature (K)", 400, "Resistivity", 12), ("Energy (eV)", 8, "Intensity", 1), ("Dose", 50, "Response", 1),
    ("Distance (m)", 30, "Power (dB)", 60), ("Recall", 1, "Precision", 1), ("Year", 40, "Emissions (Gt)", 15),
    ("x", 10, "y", 1), ("t", 5, "f(t)", 2), ("n", 64, "Error", 0.5), ("k", 20, "S(k)", 3),
)  # fmt: skip
SHORTEST = (("x", 10.0, "y", 1.0),)
SERIES = (
    "Ours", "Baseline", "CNN", "LSTM", "SGD", "Adam", "Model A", "Model B", "Theory", "Data", "Control", "Treated",
    "A", "B", "C", "Train", "Test", "Full model", "No augmentation", "Group 1", "Group 2", "Fit",
)  # fmt: skip
CATEGORIES: tuple[tuple[str, ...], ...] = (  # the name of the axis, then the categories; the first always fits
    ("Class", "A", "B", "C", "D", "E", "F"), ("Season", "Spring", "Summer", "Autumn", "Winter"),
    ("Quarter", "Q1", "Q2", "Q3", "Q4"), ("Model size", "Tiny", "Small", "Base", "Large", "Huge"),
    ("Data set", "CIFAR", "MNIST", "COCO", "SVHN", "Food"), ("Genotype", "WT", "KO", "Het", "Res"),
    ("Dose", "None", "Low", "Mid", "High"), ("Layer", "L1", "L2", "L3", "L4", "L5", "L6"),
    ("Day", "Mon", "Tue", "Wed", "Thu", "Fri"), ("Size", "S", "M", "L", "XL"),
    ("Sensor", "S1", "S2", "S3", "S4", "S5", "S6"), ("Region", "North", "South", "East", "West"),
)  # fmt: skip
TITLES = ("Results", "Ablation study", "Comparison of methods", "Test set", "Training curves", "Measured data",
          "Overview", "Run 1", "Validation", "Effect of scale")  # fmt: skip
TRENDS: dict[str, tuple[str, Callable[[float], float]]] = {
    "rising": ("rises steadily", lambda t: t),
    "falling": ("falls steadily", lambda t: 1 - t),
    "saturating": ("rises quickly and then saturates", lambda t: 1 - math.exp(-4 * t)),
    "decaying": ("decays quickly and then levels off", lambda t: math.exp(-4 * t)),
    "peak": ("rises to a peak and falls again", lambda t: math.exp(-(((t - 0.5) / 0.2) ** 2))),
    "valley": ("falls to a minimum and rises again", lambda t: (2 * t - 1) ** 2),
    "oscillating": ("oscillates", lambda t: 0.5 + 0.5 * math.sin(4 * math.pi * t)),
    "constant": ("stays nearly constant", lambda t: 0.5),
}


def ticks(high: float, most: int) -> list[float]:
    """Round values from 0 to at most `high`, at most `most` of them."""
    scale = 10.0 ** math.floor(math.log10(high))
    for step in (0.1 * scale, 0.2 * scale, 0.25 * scale, 0.5 * scale, scale, 2 * scale, 5 * scale):
        if math.floor(high / step + 1e-9) + 1 <= most:
            return [i * step for i in range(math.floor(high / step + 1e-9) + 1)]
    return [0.0]


def shown(value: float) -> str:
    return f"{value:.6g}"


@dataclass(frozen=True)
class Frame:
    """The rectangle of a plot and its scales, which start at 0."""

    box: Area
    x_high: float
    y_high: float

    def at(self, x: float, y: float) -> Point:
        box = self.box
        return box.x0 + x / self.x_high * box.width, box.y1 - y / self.y_high * box.height


@dataclass(frozen=True)
class Key:
    """A legend entry."""

    name: str
    color: str
    marker: str  # of Canvas.marker, or "bar" or "line" or "dashes"


def _choose(c: Canvas, words: Sequence[str], width: float, scale: float = 1.0) -> str:
    fits = [w for w in words if text_width(w, max(8.0, c.em * scale)) <= width]
    return c.rng.choice(fits) if fits else ""


def title(c: Canvas, area: Area, titles: Sequence[str] = TITLES) -> tuple[Area, str]:
    """Sometimes a title above; the area that is left."""
    text = _choose(c, titles, area.width) if area.height > 13 * c.em and c.rng.random() < 0.5 else ""
    if not text:
        return area, ""
    c.text((area.x0 + area.x1) / 2, area.y0 + 0.6 * c.em, text, "title")
    return Area(area.x0, area.y0 + 1.6 * c.em, area.x1, area.y1), text


def legend(c: Canvas, area: Area, keys: Sequence[Key]) -> Area:
    """Names and marks in a column on the right of wide plots, in rows above others; the area that is left."""
    em, size = c.em, max(8.0, SMALL * c.em)
    widths = [text_width(k.name, size) + 2.0 * em for k in keys]
    places: list[Point] = []
    if area.width > 1.25 * area.height and area.width > 22 * em:
        left = area.x1 - max(widths) + 0.1 * em
        places = [(left, area.y0 + (0.9 + 1.4 * i) * em) for i in range(len(keys))]
        rest = Area(area.x0, area.y0, left - 0.6 * em, area.y1)
    else:
        rows: list[list[int]] = [[]]
        for i, w in enumerate(widths):
            if rows[-1] and sum(widths[k] + 0.6 * em for k in rows[-1]) + w > area.width:
                rows.append([])
            rows[-1].append(i)
        for r, row in enumerate(rows):
            x = (area.x0 + area.x1 - sum(widths[k] for k in row) - 0.6 * em * (len(row) - 1)) / 2
            for k in row:
                places.append((x, area.y0 + (0.6 + 1.3 * r) * em))
                x += widths[k] + 0.6 * em
        rest = Area(area.x0, area.y0 + (1.3 * len(rows) + 0.3) * em, area.x1, area.y1)
    for (x, y), key in zip(places, keys, strict=True):
        fill, edge = PALETTE[key.color]
        y = round(y)
        if key.marker == "bar":
            c.rectangle(x + 0.4 * em, y - 0.4 * em, x + 1.4 * em, y + 0.4 * em, fill, edge)
        else:
            if key.marker in ("line", "dashes"):
                c.polyline([(x, y), (x + 1.5 * em, y)], edge, 2 * c.stroke, dashed=key.marker == "dashes")
            else:
                c.marker(key.marker, x + 0.75 * em, y, 0.32 * em, edge)
        c.text(x + 1.8 * em, y, key.name, "legend", scale=SMALL, anchor="lm")
    return rest


def axes(
    c: Canvas, area: Area, x_label: str, y_label: str, x_ticks: Sequence[tuple[float, str]], x_high: float,
    y_high: float,
) -> Frame:  # fmt: skip
    """Draw axes, ticks, tick labels and names. `x_ticks` are (value, text); y ticks are chosen here."""
    em, rng = c.em, c.rng
    bottom = area.y1 - (2.75 if x_label else 1.4) * em
    top = area.y0 + 0.35 * em
    y_ticks = ticks(y_high, max(2, min(7, int((bottom - top) / (1.7 * em)))))
    tick_width = max(text_width(shown(v), max(8.0, SMALL * em)) for v in y_ticks)
    left = area.x0 + tick_width + (2.0 if y_label else 0.55) * em
    right = area.x1 - (text_width(x_ticks[-1][1], max(8.0, SMALL * em)) / 2 if x_ticks else 0)
    frame = Frame(
        Area(float(round(left)), float(round(top)), float(round(right)), float(round(bottom))), x_high, y_high
    )
    box, tick = frame.box, 0.28 * em
    grid, boxed = rng.random() < 0.4, rng.random() < 0.5
    for value in y_ticks:
        y = float(round(frame.at(0, value)[1]))
        if grid and value:
            c.polyline([(box.x0, y), (box.x1, y)], FAINT, c.stroke)
        c.polyline([(box.x0 - tick, y), (box.x0, y)], INK, c.stroke)
        c.text(box.x0 - 0.5 * em, y, shown(value), "tick", scale=SMALL, anchor="rm")
    for value, text in x_ticks:
        x = float(round(frame.at(value, 0)[0]))
        c.polyline([(x, box.y1), (x, box.y1 + tick)], INK, c.stroke)
        c.text(x, box.y1 + 0.9 * em, text, "tick", scale=SMALL)
    c.polyline([(box.x0, box.y0), (box.x0, box.y1), (box.x1 + c.stroke, box.y1)], INK, c.stroke)
    if boxed:
        c.polyline([(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1)], INK, c.stroke)
    if x_label:
        c.text((box.x0 + box.x1) / 2, area.y1 - 0.6 * em, x_label, "axis")
    if y_label:
        c.text(area.x0 + 0.6 * em, (box.y0 + box.y1) / 2, y_label, "axis", vertical=True)
    return frame


def _fitting(c: Canvas, area: Area) -> list[tuple[str, float, str, float]]:
    wide, tall = 0.6 * area.width, area.height - 4 * c.em
    return [p for p in AXES if text_width(p[0], c.em) < wide and text_width(p[2], c.em) < tall]


def numeric_axes(c: Canvas, area: Area) -> tuple[Frame, str, str]:
    """Axes with a pair of names that fit, numbers on both."""
    x_label, x_high, y_label, y_high = c.rng.choice(_fitting(c, area) or SHORTEST)
    size = max(8.0, SMALL * c.em)
    widest = max(text_width(shown(v), size) for v in ticks(x_high, 6)) + 1.2 * c.em
    x_ticks = ticks(x_high, max(2, min(6, int((area.width - 4 * c.em) / widest) + 1)))
    frame = axes(c, area, x_label, y_label, [(v, shown(v)) for v in x_ticks], x_high, y_high)
    return frame, x_label, y_label


def _names(c: Canvas, count: int, width: float) -> list[str]:
    size = max(8.0, SMALL * c.em)
    fits = [n for n in SERIES if text_width(n, size) + 2.2 * c.em <= width]
    return c.rng.sample(fits, count)


def _axes_caption(x_label: str, y_label: str, heading: str) -> str:
    named = f"The x axis is labelled '{x_label}' and the y axis '{y_label}'."
    return named + (f" The title reads '{heading}'." if heading else "")


def line(c: Canvas, area: Area) -> str:
    """One to four curves, each with a trend, a colour and a style."""
    em, rng = c.em, c.rng
    area, heading = title(c, area)
    count = rng.randint(1, 2 if min(area.width, 1.2 * area.height) < 15 * em else 4)
    marked = rng.random() < 0.5
    marks = rng.sample(("circle", "square", "triangle", "diamond"), 4)
    styles = marks if marked else ["line", "line", "dashes", "line"]
    keys = [Key(n, c.colors[i], styles[i]) for i, n in enumerate(_names(c, count, min(area.width, 12 * em)))]
    frame, x_label, y_label = numeric_axes(c, legend(c, area, keys))
    points = rng.randint(6, 10) if marked else 40
    trends = rng.sample(tuple(TRENDS), count)
    noise = rng.choice((0.0, 0.02, 0.04))
    phrases, series = [], []
    for key, trend in zip(keys, trends, strict=True):
        low = rng.uniform(0.05, 0.4)
        high = rng.uniform(max(0.6, low + 0.3), 0.95)
        phrase, curve = TRENDS[trend]
        xs = [frame.x_high * i / (points - 1) for i in range(points)]
        ys = [
            frame.y_high * min(0.99, max(0.01, low + (high - low) * curve(i / (points - 1)) + rng.gauss(0, noise)))
            for i in range(points)
        ]
        path = [frame.at(x, y) for x, y in zip(xs, ys, strict=True)]
        ink = PALETTE[key.color][1]
        c.polyline(path, ink, 1.5 * c.stroke, dashed=key.marker == "dashes")
        if marked:
            for x, y in path:
                c.marker(key.marker, x, y, 0.3 * em, ink)
        style = (
            f"{key.color} {key.marker}s"
            if marked
            else a(f"{key.color} {'dashed' if key.marker == 'dashes' else 'solid'} line")
        )
        phrases.append(f"the series '{key.name}' ({style}) {phrase}")
        series.append({"name": key.name, "color": key.color, "marker": key.marker, "trend": trend,
                       "x": [round(x, 4) for x in xs], "y": [round(y, 4) for y in ys]})  # fmt: skip
    c.extra["plot"] = {"kind": "line", "title": heading, "x_label": x_label, "y_label": y_label,
                       "x_range": [0, frame.x_high], "y_range": [0, frame.y_high], "series": series}  # fmt: skip
    start = intro(c, f"a line plot of {number(count)} series" if count > 1 else "a line plot of one series")
    return f"{start} {_axes_caption(x_label, y_label, heading)} As '{x_label}' grows, {listing(phrases)}."


def bar(c: Canvas, area: Area) -> str:
    """Grouped upright bars over two to six categories."""
    em, rng = c.em, c.rng
    area, heading = title(c, area)
    room = area.width - 5 * em
    size = max(8.0, SMALL * em)
    groups = rng.randint(2, max(2, min(6, int(room / (2.4 * em)))))
    count = 1 if room / groups < 2.2 * em else rng.randint(1, 3)
    keys = [Key(n, c.colors[i], "bar") for i, n in enumerate(_names(c, count, min(area.width, 12 * em)))]
    area = legend(c, area, keys) if count > 1 else area
    cell = (area.width - 5 * em) / groups - 0.4 * em
    sets = [s for s in CATEGORIES if len(s) > groups and all(text_width(n, size) < cell for n in s[1:])]
    x_label, *names = rng.choice(sets or CATEGORIES[:1])
    names = names[:groups]
    if area.height < 11 * em or text_width(x_label, em) > area.width - 4 * em:
        x_label = ""
    _, _, y_label, y_high = rng.choice([p for p in _fitting(c, area) if len(p[2]) > 1] or SHORTEST)
    frame = axes(c, area, x_label, y_label, [(i + 0.5, n) for i, n in enumerate(names)], groups, y_high)
    wide = rng.uniform(0.6, 0.8) / count
    phrases, series = [], []
    for k, key in enumerate(keys):
        values = [round(y_high * rng.uniform(0.12, 0.95), 3) for _ in names]
        fill, edge = PALETTE[key.color]
        for i, value in enumerate(values):
            x0, y0 = frame.at(i + 0.5 + (k - count / 2) * wide, value)
            x1 = frame.at(i + 0.5 + (k + 1 - count / 2) * wide, 0)[0]
            box = (round(x0), round(y0), round(x1), round(frame.box.y1))
            c.rectangle(*box, fill, edge)
            c.record("bar", key.color, box, "", fill)
        best, worst = names[values.index(max(values))], names[values.index(min(values))]
        who = f"for '{key.name}' ({key.color} bars) the" if count > 1 else f"the {key.color}"
        phrases.append(f"{who} highest bar is '{best}' and the lowest '{worst}'")
        series.append({"name": key.name if count > 1 else "", "color": key.color, "trend": f"highest {best}",
                       "values": values})  # fmt: skip
    c.polyline([(frame.box.x0, frame.box.y1), (frame.box.x1, frame.box.y1)], INK, c.stroke)
    c.extra["plot"] = {"kind": "bar", "title": heading, "x_label": x_label, "y_label": y_label, "categories": names,
                       "y_range": [0, y_high], "series": series}  # fmt: skip
    quoted = [f"'{n}'" for n in names]
    named = f"The y axis is labelled '{y_label}'" + (f" and the x axis '{x_label}'." if x_label else ".")
    text = f"{intro(c, f'a bar chart of {number(groups)} categories, ' + listing(quoted))} {named}"
    text += f" The title reads '{heading}'." if heading else ""
    found = listing(phrases)
    return f"{text} {found[0].upper()}{found[1:]}."


def scatter(c: Canvas, area: Area) -> str:
    """One to three clouds of points: correlated, or clusters apart."""
    em, rng = c.em, c.rng
    area, heading = title(c, area)
    count = rng.randint(1, 2 if min(area.width, 1.2 * area.height) < 15 * em else 3)
    marks = rng.sample(("circle", "square", "triangle", "diamond"), 3)
    keys = [Key(n, c.colors[i], marks[i]) for i, n in enumerate(_names(c, count, min(area.width, 12 * em)))]
    frame, x_label, y_label = numeric_axes(c, legend(c, area, keys) if count > 1 else area)
    points = rng.randint(12, 20 if area.width < 15 * em else 36)
    centres = rng.sample([(0.25, 0.28), (0.72, 0.3), (0.28, 0.74), (0.75, 0.75)], 3)
    phrases, series = [], []
    for key, (mx, my) in zip(keys, centres, strict=False):
        trend = "cluster" if count > 1 else rng.choice(("positive", "negative", "none"))
        xs, ys = [], []
        for _ in range(points):
            u = rng.gauss(mx, 0.08) if trend == "cluster" else rng.uniform(0.05, 0.95)
            slope = {"positive": 0.7, "negative": -0.7}.get(trend, 0.0)
            v = {"cluster": rng.gauss(my, 0.08), "none": rng.uniform(0.05, 0.95)}.get(trend, 0.5)
            v = rng.gauss(v, 0.07) + slope * (u - 0.5) if slope else v
            xs.append(round(frame.x_high * min(0.97, max(0.03, u)), 4))
            ys.append(round(frame.y_high * min(0.97, max(0.03, v)), 4))
        for x, y in zip(xs, ys, strict=True):
            c.marker(key.marker, *frame.at(x, y), 0.28 * em, PALETTE[key.color][1])
        place = f"{'upper' if my > 0.5 else 'lower'} {'right' if mx > 0.5 else 'left'}"
        phrases.append(
            f"the points of '{key.name}' ({key.color} {key.marker}s) form a cluster at the {place}" if count > 1
            else f"the {key.color} {key.marker}s show {'no' if trend == 'none' else a(trend)} correlation"
        )  # fmt: skip
        series.append({"name": key.name if count > 1 else "", "color": key.color, "marker": key.marker,
                       "trend": trend, "x": xs, "y": ys})  # fmt: skip
    c.extra["plot"] = {"kind": "scatter", "title": heading, "x_label": x_label, "y_label": y_label,
                       "x_range": [0, frame.x_high], "y_range": [0, frame.y_high], "series": series}  # fmt: skip
    start = intro(c, f"a scatter plot of '{y_label}' against '{x_label}'")
    found = listing(phrases)
    return f"{start} {_axes_caption(x_label, y_label, heading)} {found[0].upper()}{found[1:]}."


# name: (lowest, highest, decimals, larger is better)
METRICS: dict[str, tuple[float, float, int, bool]] = {
    "Acc": (60, 99, 1, True), "F1": (0.5, 0.99, 2, True), "mAP": (20, 60, 1, True), "FID": (2, 40, 1, False),
    "BLEU": (15, 45, 1, True), "PSNR": (22, 38, 1, True), "Error": (1, 20, 1, False), "Time": (1, 90, 0, False),
    "AUC": (0.6, 0.99, 2, True), "R2": (0.4, 0.99, 2, True), "Loss": (0.1, 4, 2, False), "IoU": (40, 90, 1, True),
}  # fmt: skip
METHODS = ("CNN", "LSTM", "ViT", "MLP", "GRU", "U-Net", "BERT", "SVM", "Ours", "Base", "Large", "Small", "ResNet",
           "Random forest", "Transformer", "kNN", "DiT", "Mamba", "Linear", "XGBoost")  # fmt: skip


TABLE_TITLES = (
    "Results",
    "Ablation study",
    "Comparison of methods",
    "Test set",
    "Validation",
    "Main results",
)


def table(c: Canvas, area: Area) -> str:
    """Methods against measures, ruled as in papers, the best value of each column bold."""
    em, rng = c.em, c.rng
    area, heading = title(c, area, TABLE_TITLES)
    first, cell = 5.0 * em, 3.6 * em
    columns = rng.sample(tuple(METRICS), max(1, min(rng.randint(2, 5), int((area.width - first) // cell))))
    count = max(2, min(rng.randint(3, 7), int(area.height // (1.6 * em)) - 1))
    spare = (area.width - first - cell * len(columns)) / (len(columns) + 1)
    first, cell = first + min(spare, 3 * em), cell + min(spare, 1.6 * em)
    methods = [m for m in METHODS if text_width(m, em) < first - 0.6 * em]
    rows = rng.sample(methods, count)
    height = min((area.height - 0.5 * em) / (count + 1), 2.6 * em)
    left = round((area.x0 + area.x1 - first - cell * len(columns)) / 2)
    right = round(left + first + cell * len(columns))
    top = (area.y0 + area.y1 - height * (count + 1)) / 2 if not heading else area.y0 + 0.3 * em
    ys = [top + (i + 0.5) * height for i in range(count + 1)]
    color, style = c.colors[0], rng.choice(("ruled", "header", "stripes"))
    for i in range(count + 1):
        box = (left, round(top + i * height), right, round(top + (i + 1) * height))
        fill = PALETTE["gray" if style == "stripes" else color][0]
        if (style == "header" and i == 0) or (style == "stripes" and i % 2 == 0 and i):
            c.rectangle(*box, fill, fill)
            c.record("rectangle", "gray" if style == "stripes" else color, box, "", fill)
    for y, w in ((top, 2), (top + height, 1), (top + height * (count + 1), 2)):
        c.polyline([(left, float(round(y))), (right, float(round(y)))], INK, w * c.stroke)
    values: dict[str, list[str]] = {}
    best: dict[str, int] = {}
    for m in columns:
        low, high, decimals, larger = METRICS[m]
        unit = 10**decimals
        numbers = rng.sample(range(round(low * unit), round(high * unit) + 1), count)  # no two alike: one is best
        best[m] = numbers.index(max(numbers) if larger else min(numbers))
        values[m] = [f"{n / unit:.{decimals}f}" for n in numbers]
    c.text(left + 0.3 * em, ys[0], "Method", "cell", anchor="lm")
    for r, name in enumerate(rows):
        c.text(left + 0.3 * em, ys[r + 1], name, "cell", anchor="lm")
    for k, m in enumerate(columns):
        x = left + first + (k + 0.5) * cell
        c.text(x, ys[0], m, "cell")
        for r in range(count):
            c.text(x, ys[r + 1], values[m][r], "cell", bold=best[m] == r)
    c.extra["table"] = {
        "title": heading, "columns": ["Method", *columns], "best": {m: rows[best[m]] for m in columns},
        "rows": [{"name": n, "values": [values[m][r] for m in columns]} for r, n in enumerate(rows)],
    }  # fmt: skip
    heads = listing([f"'{m}'" for m in ("Method", *columns)])
    body = [f"the row '{n}' reads " + listing([f"'{values[m][r]}'" for m in columns]) for r, n in enumerate(rows)]
    start = intro(c, f"a table with {number(count)} rows and the columns {heads}")
    text = f"{start} " + (f"The title reads '{heading}'. " if heading else "")
    listed = "; ".join(body)
    winners = listing([f"'{rows[best[m]]}' has the best value of '{m}'" for m in columns])
    return f"{text}{listed[0].upper()}{listed[1:]}. In bold, {winners}."
