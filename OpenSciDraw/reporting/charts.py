"""Line charts as inline SVG, readable without JavaScript; page.js adds the values under the pointer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 28, 14, 42
COLOURS = 8  # classes c0 to c7 of page.css, after Okabe and Ito's palette for colour-blind readers
_MOST_POINTS = 600


@dataclass(frozen=True)
class Line:
    """One line of a chart; values that are not finite are left out."""

    name: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from `low` to `high`."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    step = next(step * k for k in (1, 2, 5, 10, 20) if span / (step * k) <= most)
    return [round(step * i, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _MOST_POINTS of the finite points, the first and the last among them."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) <= _MOST_POINTS:
        return finite
    return [finite[round(i * (len(finite) - 1) / (_MOST_POINTS - 1))] for i in range(_MOST_POINTS)]


def smoothed(points: Sequence[tuple[float, float]], share: float = 0.05) -> list[tuple[float, float]]:
    """Mean over a centred window of `share` of the points."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    half = max(1, round(len(finite) * share / 2))
    sums = [0.0]
    for _, y in finite:
        sums.append(sums[-1] + y)
    out = []
    for i, (x, _) in enumerate(finite):
        low, high = max(0, i - half), min(len(finite), i + half + 1)
        out.append((x, (sums[high] - sums[low]) / (high - low)))
    return out


def short(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def chart(title: str, lines: Sequence[Line], y_label: str, x_label: str = "step", log: bool = False) -> str:
    """A figure element with the chart and its legend, or '' where no line has a point.

    `log`: logarithmic y, where all values are positive and span more than a factor of ten.
    """
    drawn = [(line, thinned(line.points)) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return ""
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    log = log and min(ys) > 0 and max(ys) > 10 * min(ys)
    low, high = (math.log10(min(ys)), math.log10(max(ys))) if log else (min(ys), max(ys))
    pad = (high - low or abs(high) or 1.0) * 0.05
    low, high = low - pad, high + pad
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        level = math.log10(y) if log else y
        across = _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
        return across, HEIGHT - _BOTTOM - (level - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    grid = _grid(x_low, x_high, low, high, log, at, x_label, y_label)
    paths, legend, data = [], [], []
    for index, (line, points) in enumerate(drawn):
        name = f"c{index % COLOURS}" + (" faint" if line.faint else "") + (" again" if index >= COLOURS else "")
        spots = [at(x, y) for x, y in points]
        if len(spots) == 1:
            paths.append(f'<circle class="dot {name}" cx="{spots[0][0]:.1f}" cy="{spots[0][1]:.1f}" r="3.5"/>')
        else:
            route = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            paths.append(f'<polyline class="line {name}" points="{route}"/>')
        legend.append(f'<li><span class="key {name}"></span>{escape(line.name)}</li>')
        data.append({"name": line.name, "points": [[x, y, round(px, 1), round(py, 1)] for (x, y), (px, py) in
                                                    zip(points, spots, strict=True)]})  # fmt: skip
    last = "; ".join(f"{line.name} {short(points[-1][1])}" for line, points in drawn)
    described = escape(f"{title}, {x_label} {short(x_low)} to {short(max(xs))}. Last values: {last}", quote=True)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}" data-x="{escape(x_label, quote=True)}" '
        f'data-lines="{escape(json.dumps(data), quote=True)}">{grid}{"".join(paths)}</svg>'
        f'<ul class="legend">{"".join(legend)}</ul></figure>'
    )


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between 10**low and 10**high, with 2 and 5 times them where they are few."""
    powers = range(math.floor(low), math.floor(high) + 1)
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    return [f * 10.0**k for k in powers for f in factors if low <= math.log10(f * 10.0**k) <= high]


def _grid(x_low, x_high, low, high, log, at, x_label, y_label) -> str:  # type: ignore[no-untyped-def]
    parts = []
    levels = _log_ticks(low, high) if log else ticks(low, high)
    for value in levels:
        _, y = at(x_low, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in ticks(x_low, x_high):
        x = _LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{short(value)}</text>')
    base = HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (_TOP + base) / 2
    parts.append(f'<text class="name" x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    label = escape(y_label) + (" (log)" if log else "")
    parts.append(f'<text class="name" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{label}</text>')
    return "".join(parts)
