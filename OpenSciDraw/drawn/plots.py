"""The drawn plots and tables: line, bar and scatter plots with axes, ticks and legend; tables with rules.

Each function draws one figure into an area of a canvas, leaves its numbers in `canvas.extra`, and returns
its caption.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from OpenSciDraw.drawn.axes import (
    SHORTEST,
    SMALL,
    Key,
    axes,
    axes_caption,
    fitting,
    legend,
    numeric_axes,
    series_names,
    title,
)
from OpenSciDraw.drawn.canvas import INK, PALETTE, Canvas, text_width
from OpenSciDraw.drawn.pieces import Area, a, intro, listing, number

CATEGORIES: tuple[tuple[str, ...], ...] = (  # the name of the axis, then the categories; the first always fits
    ("Class", "A", "B", "C", "D", "E", "F"), ("Season", "Spring", "Summer", "Autumn", "Winter"),
    ("Quarter", "Q1", "Q2", "Q3", "Q4"), ("Model size", "Tiny", "Small", "Base", "Large", "Huge"),
    ("Data set", "CIFAR", "MNIST", "COCO", "SVHN", "Food"), ("Genotype", "WT", "KO", "Het", "Res"),
    ("Dose", "None", "Low", "Mid", "High"), ("Layer", "L1", "L2", "L3", "L4", "L5", "L6"),
    ("Day", "Mon", "Tue", "Wed", "Thu", "Fri"), ("Size", "S", "M", "L", "XL"),
    ("Sensor", "S1", "S2", "S3", "S4", "S5", "S6"), ("Region", "North", "South", "East", "West"),
)  # fmt: skip
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


def line(c: Canvas, area: Area) -> str:
    """One to four curves, each with a trend, a colour and a style."""
    em, rng = c.em, c.rng
    area, heading = title(c, area)
    count = rng.randint(1, 2 if min(area.width, 1.2 * area.height) < 15 * em else 4)
    marked = rng.random() < 0.5
    marks = rng.sample(("circle", "square", "triangle", "diamond"), 4)
    styles = marks if marked else ["line", "line", "dashes", "line"]
    keys = [Key(n, c.colors[i], styles[i]) for i, n in enumerate(series_names(c, count, min(area.width, 12 * em)))]
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
    return f"{start} {axes_caption(x_label, y_label, heading)} As '{x_label}' grows, {listing(phrases)}."


def bar(c: Canvas, area: Area) -> str:
    """Grouped upright bars over two to six categories."""
    em, rng = c.em, c.rng
    area, heading = title(c, area)
    room = area.width - 5 * em
    size = max(8.0, SMALL * em)
    groups = rng.randint(2, max(2, min(6, int(room / (2.4 * em)))))
    count = 1 if room / groups < 2.2 * em else rng.randint(1, 3)
    keys = [Key(n, c.colors[i], "bar") for i, n in enumerate(series_names(c, count, min(area.width, 12 * em)))]
    area = legend(c, area, keys) if count > 1 else area
    cell = (area.width - 5 * em) / groups - 0.4 * em
    sets = [s for s in CATEGORIES if len(s) > groups and all(text_width(n, size) < cell for n in s[1:])]
    x_label, *names = rng.choice(sets or CATEGORIES[:1])
    names = names[:groups]
    if area.height < 11 * em or text_width(x_label, em) > area.width - 4 * em:
        x_label = ""
    _, _, y_label, y_high = rng.choice([p for p in fitting(c, area) if len(p[2]) > 1] or SHORTEST)
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
    keys = [Key(n, c.colors[i], marks[i]) for i, n in enumerate(series_names(c, count, min(area.width, 12 * em)))]
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
    return f"{start} {axes_caption(x_label, y_label, heading)} {found[0].upper()}{found[1:]}."


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
