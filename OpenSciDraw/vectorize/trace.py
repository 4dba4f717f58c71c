"""From a picture to the figure that is written: what the structure metric reads, with places, colours, widths and bends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from OpenSciDraw.reading.arrows import Stroke
from OpenSciDraw.reading.figure import ReadArrow
from OpenSciDraw.reading.shapes import Region, label_ink
from OpenSciDraw.reading.vision import Seen, see
from OpenSciDraw.vectorize.figure import Connector, Line, Shape, TextLine, VectorFigure, slug
from OpenSciDraw.vectorize.labels import by_glyphs, by_ocr, chosen, extents, ink_color, ocr_lines, placed, rgb
from OpenSciDraw.vectorize.regular import regular
from OpenSciDraw.vectorize.routes import head_size, line_width, route, simplified, stroke_color, to_edge

_RIM = 3.0  # px of the picture: an outline is not wider


_SEEN = 24.0  # of 255: an outline differs from the fill by as much


@dataclass(frozen=True)
class _Part:
    """Place of a region in what was seen, and the shape that it became."""

    region: Region
    shape: Shape
    inset: float  # work px from the region's edge to the outer edge of the shape


def trace(picture: Image.Image, ocr: bool) -> VectorFigure:
    """The figure in a picture (any mode, at least 32 px); `ocr`: texts that glyphs do not know are read by OCR.

    Raises UserError where `ocr` is asked for and not installed.
    """
    picture = picture.convert("RGB")
    seen = see(picture)
    figure = VectorFigure(*picture.size, rgb(seen.paper))
    lines = [by_ocr(line, seen.work) for line in ocr_lines(picture)] if ocr else []
    bars = seen.figure.axes is not None
    pixels = np.asarray(picture, np.float32)
    parts = [
        _part(seen, pixels, region, "rectangle" if bars else read.shape)
        for region, read in zip(seen.regions, seen.figure.components, strict=True)
    ]
    number = {k: n + 1 for n, k in enumerate(_reading_order([part.shape for part in parts]))}
    owners = [_owner(line, parts) for line in lines]
    for k, part in enumerate(parts):
        own = [line for line, owner in zip(lines, owners, strict=True) if owner == k]
        glyphs = ([], 0.0) if bars else by_glyphs(label_ink(seen.work, part.region), part.region.box[:2], seen.work)
        label = tuple(chosen(glyphs, own))
        name = slug(" ".join(line.text for line in label))
        ident = f"{'bar' if bars else 'box'}{number[k]}" + (f"-{name}" if name else "")
        parts[k] = replace(part, shape=replace(part.shape, id=ident, label=label))
    figure.connectors = [one for stroke in seen.strokes for one in _connectors(seen, stroke, parts)]
    figure.lines = _plot_lines(seen, pixels)
    free = [line for line, owner in zip(lines, owners, strict=True) if owner is None]
    figure.texts = free + [text for text in _plot_texts(seen) if not any(_over(text, line) for line in lines)]
    figure.shapes = [part.shape for part in sorted(parts, key=lambda part: -float(part.region.mask.sum()))]
    return regular(figure)


def _over(text: TextLine, line: TextLine) -> bool:
    """Whether the middle of a text lies in the box of a line: OCR has read it too."""
    x, y = (text.box[0] + text.box[2]) / 2, (text.box[1] + text.box[3]) / 2
    return line.box[0] <= x <= line.box[2] and line.box[1] <= y <= line.box[3]


def _reading_order(shapes: Sequence[Shape]) -> list[int]:
    """Places of shapes row by row, from left to right."""
    if not shapes:
        return []
    row = 0.5 * float(np.median([shape.box[3] - shape.box[1] for shape in shapes]))
    return sorted(range(len(shapes)), key=lambda k: (round(shapes[k].middle[1] / row), shapes[k].middle[0]))


def _owner(line: TextLine, parts: Sequence[_Part]) -> int | None:
    """The smallest shape in which a line's middle lies."""
    x, y = (line.box[0] + line.box[2]) / 2, (line.box[1] + line.box[3]) / 2
    inside = [
        ((box[2] - box[0]) * (box[3] - box[1]), k)
        for k, box in enumerate(part.shape.box for part in parts)
        if box[0] <= x <= box[2] and box[1] <= y <= box[3]
    ]
    return min(inside)[1] if inside else None


def _part(seen: Seen, pixels: np.ndarray, region: Region, kind: str) -> _Part:
    """`pixels`: the picture itself, whose colours enlarging has not changed."""
    x0, y0, x1, y1 = region.box
    scale = seen.work.scale
    rim = _rim(seen.work.rgb, pixels, region, scale)
    missing = (x1 - x0) * (y1 - y0) - float(region.mask[y0:y1, x0:x1].sum())
    short = min(x1 - x0, y1 - y0)
    radius = 0.0
    if kind == "rounded rectangle":  # what the corners lack of the box: (4 - pi) r²
        radius = min(0.5 * short, max(0.08 * short, math.sqrt(max(0.0, missing) / (4 - math.pi))))
    box = (x0 + rim.inset) / scale, (y0 + rim.inset) / scale, (x1 - rim.inset) / scale, (y1 - rim.inset) / scale
    outline = None if rim.color is None else rgb(rim.color)
    shape = Shape("", kind, box, rgb(seen.as_seen(region.fill)), outline, rim.width / scale, radius / scale)
    return _Part(region, shape, rim.inset)


@dataclass(frozen=True)
class _Rim:
    """An outline in work pixels: colour (None: there is none), width, and how far its outer edge lies inside the region's."""

    color: np.ndarray | None
    width: float
    inset: float


def _rim(work: np.ndarray, pixels: np.ndarray, region: Region, scale: float) -> _Rim:
    """The outline from the mean colours at each distance from the region's edge: paper, outline, fill, with soft borders.

    Where a pixel's colour stands between the outline's and that of its side tells how much of it the outline covers; the sum
    of these shares is the width, which is finer than a pixel.
    """
    import cv2

    pad = math.ceil(2 * scale)
    x0, y0 = max(0, region.box[0] - pad), max(0, region.box[1] - pad)
    part = slice(y0, region.box[3] + pad), slice(x0, region.box[2] + pad)
    mask, colors = region.mask[part], work[part]
    depth = cv2.distanceTransform(mask, cv2.DIST_L2, 5) - cv2.distanceTransform(1 - mask, cv2.DIST_L2, 5)
    depth = np.where(depth > 0, depth - 0.5, depth + 0.5)
    levels = np.arange(-1.5 * scale, _RIM * scale + 1)
    rings = [np.abs(depth - at) <= 0.5 for at in levels]
    profile = np.stack([np.median(colors[ring], axis=0) if ring.any() else region.fill for ring in rings])
    inside = np.abs(profile - region.fill).max(1)
    beside = np.minimum(inside, np.abs(profile - 255).max(1))
    peak = int(beside.argmax())
    if beside[peak] < _SEEN:
        edge = np.flatnonzero(inside < 0.5 * max(1.0, np.abs(region.fill - 255).max()))
        return _Rim(None, 0.0, float(levels[edge[0]]) if len(edge) else 0.0)
    ys, xs = np.nonzero(np.abs(depth - levels[peak]) <= 1)
    rows, columns = (((at + corner) / scale).astype(int) for at, corner in ((ys, y0), (xs, x0)))
    own = pixels[np.minimum(rows, len(pixels) - 1), np.minimum(columns, pixels.shape[1] - 1)]
    strong = np.minimum(np.abs(own - region.fill).max(1), np.abs(own - 255).max(1))
    color = np.median(own[strong >= np.percentile(strong, 75)], axis=0)  # a thin line is pure in few of its pixels
    before = _cover(profile[:peak], color, np.full(3, 255.0))
    behind = _cover(profile[peak + 1 :], color, region.fill)
    at_peak = float(_cover(profile[peak : peak + 1], color, np.full(3, 255.0)))
    return _Rim(color, max(0.6 * scale, before + at_peak + behind), float(levels[peak]) - before - 0.5)


def _cover(profile: np.ndarray, color: np.ndarray, base: np.ndarray) -> float:
    """How many levels of `profile` (n, 3) a line of `color` on `base` covers, as a sum of shares."""
    away = color - base
    return float(np.clip((profile - base) @ away / max(1.0, float(away @ away)), 0, 1).sum())


def _connectors(seen: Seen, stroke: Stroke, parts: Sequence[_Part]) -> list[Connector]:
    """A connector for each pair of shapes that the stroke joins; arrows there and back are one with two heads."""
    pairs: dict[frozenset[int], list[ReadArrow]] = {}
    for arrow in stroke.arrows:
        pairs.setdefault(frozenset((arrow.source, arrow.target)), []).append(arrow)
    return [_connector(seen, stroke, parts, arrows) for arrows in pairs.values()]


def _connector(seen: Seen, stroke: Stroke, parts: Sequence[_Part], arrows: Sequence[ReadArrow]) -> Connector:
    arrow, scale = arrows[0], seen.work.scale
    places = dict(stroke.contacts)
    source, target = parts[arrow.source], parts[arrow.target]
    path = route(stroke.ink, places[arrow.source], places[arrow.target])
    points = simplified(path, scale)
    reach = 8 * scale
    points[0] = to_edge(points[0], points[1], source.region.mask, reach, source.inset)
    points[-1] = to_edge(points[-1], points[-2], target.region.mask, reach, target.inset)
    color = stroke_color(seen.work.rgb, stroke.solid)
    width = line_width(seen.work.rgb, path, color)
    ahead = head_size(stroke.solid, points[-1], points[-2], width, scale)
    return Connector(
        f"{'arrow' if arrow.directed else 'line'}-{source.shape.id}-{target.shape.id}", source.shape.id, target.shape.id,
        tuple((float(x) / scale, float(y) / scale) for x, y in points), rgb(seen.as_seen(color)), width / scale,
        (ahead[0] / scale, ahead[1] / scale), arrow.directed, arrow.directed and len(arrows) > 1,
    )  # fmt: skip


def _plot_lines(seen: Seen, pixels: np.ndarray) -> list[Line]:
    """Axes and curves of a plot."""
    if seen.figure.axes is None:
        return []
    work, (left, top, right, bottom) = seen.work, seen.figure.axes
    scale = work.scale
    row = work.luma[int((top + bottom) / 2), int(left) :]
    width = max(1.0, float(np.argmax(row > 165))) / scale
    column = pixels[round(top / scale) : round(bottom / scale), min(int((left + 1) / scale), pixels.shape[1] - 1)]
    color = rgb(np.median(column, axis=0))
    x, y = left / scale + width / 2, (bottom + 1) / scale - width / 2
    lines = [Line("axes", ((x, top / scale), (x, y), ((right / scale), y)), color, width)]
    curves = {} if seen.regions else seen.figure.curves  # the outlines of bars are no curves
    return lines + [_curve(seen, name, points) for name, points in curves.items()]


def _curve(seen: Seen, name: str, points: np.ndarray) -> Line:
    """A curve along the middle of its colour near the points (n, 2) that were read, as a line with few points."""
    import cv2

    work, scale = seen.work, seen.work.scale
    columns = np.clip(np.round(points[:, 0] * scale).astype(int), 0, work.luma.shape[1] - 1)
    rows = _calm(points[:, 1] * scale, round(4 * scale))
    near = np.clip(np.round(rows).astype(int), 0, work.luma.shape[0] - 1)
    color = np.median(work.rgb[near, columns], axis=0)
    away = color - 255
    heights = np.arange(work.luma.shape[0])
    middles, sums = rows.copy(), np.zeros(len(rows))
    for k, column in enumerate(columns):
        pixels = work.rgb[:, column] - 255
        share = np.clip(pixels @ away / max(1.0, float(away @ away)), 0, 1)
        share *= np.abs(pixels - share[:, None] * away).max(1) < 50  # another colour is another curve
        share *= np.abs(heights - rows[k]) < 7 * scale
        if share.sum() > 0.5 * scale:
            middles[k], sums[k] = float(share @ heights) / share.sum() + 0.5, share.sum()
    middles = _calm(middles, round(2 * scale))
    rise = np.gradient(middles, columns + 0.01 * np.arange(len(columns)))
    width = float(np.median((sums / np.sqrt(1 + rise**2))[sums > 0])) / scale if (sums > 0).any() else 1.0
    path = np.stack([(columns + 0.5) / scale, middles / scale], 1)
    few = cv2.approxPolyDP(path.astype(np.float32).reshape(-1, 1, 2), 0.5, False).reshape(-1, 2)
    return Line(f"curve-{slug(name)}", tuple((float(x), float(y)) for x, y in few), rgb(seen.as_seen(color)), max(1.0, width))


def _calm(values: np.ndarray, reach: int) -> np.ndarray:
    """(n,) each value the median of those up to `reach` places before and behind it."""
    padded = np.pad(values, reach, mode="reflect") if len(values) > reach else values
    if len(padded) == len(values):
        return values
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1)


def _plot_texts(seen: Seen) -> list[TextLine]:
    """Marks beside a plot's axes, as letters."""
    scale = seen.work.scale
    return [
        placed(read.text, read.box, ink_color(seen.work, tuple(v * scale for v in read.box)), "glyphs")  # type: ignore[arg-type]
        for read in seen.figure.texts if all(map(extents, read.text))
    ]  # fmt: skip
