"""Axes, titles and legends of drawn plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from OpenSciDraw.drawn.canvas import FAINT, INK, PALETTE, Canvas, Point, text_width
from OpenSciDraw.drawn.pieces import Area

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
TITLES = ("Results", "Ablation study", "Comparison of methods", "Test set", "Training curves", "Measured data",
          "Overview", "Run 1", "Validation", "Effect of scale")  # fmt: skip


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


def fitting(c: Canvas, area: Area) -> list[tuple[str, float, str, float]]:
    wide, tall = 0.6 * area.width, area.height - 4 * c.em
    return [p for p in AXES if text_width(p[0], c.em) < wide and text_width(p[2], c.em) < tall]


def numeric_axes(c: Canvas, area: Area) -> tuple[Frame, str, str]:
    """Axes with a pair of names that fit, numbers on both."""
    x_label, x_high, y_label, y_high = c.rng.choice(fitting(c, area) or SHORTEST)
    size = max(8.0, SMALL * c.em)
    widest = max(text_width(shown(v), size) for v in ticks(x_high, 6)) + 1.2 * c.em
    x_ticks = ticks(x_high, max(2, min(6, int((area.width - 4 * c.em) / widest) + 1)))
    frame = axes(c, area, x_label, y_label, [(v, shown(v)) for v in x_ticks], x_high, y_high)
    return frame, x_label, y_label


def series_names(c: Canvas, count: int, width: float) -> list[str]:
    size = max(8.0, SMALL * c.em)
    fits = [n for n in SERIES if text_width(n, size) + 2.2 * c.em <= width]
    return c.rng.sample(fits, count)


def axes_caption(x_label: str, y_label: str, heading: str) -> str:
    named = f"The x axis is labelled '{x_label}' and the y axis '{y_label}'."
    return named + (f" The title reads '{heading}'." if heading else "")
