"""Classical vision that reads a drawn figure back: filled shapes, arrows between them, labels, bars and curves.

Made for figures of drawn/figure.py and for pictures that a model draws of their captions: pastel shapes on white, dark
arrows with filled heads, the drawing font. Lengths are measured in pixels of the picture as it is; it is enlarged for the
work, so that strokes of one pixel have width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from OpenSciDraw.drawn.canvas import PALETTE
from OpenSciDraw.reading.glyphs import read_text

WORK_SIDE = 512  # pixels of the longer side that the work is done at
_SHAPE_SIDE = 48
_DOUBT = {"cylinder": 1.7, "rounded rectangle": 1.5}  # an unsteady rectangle is nearer to them than they to a rectangle
_DARK = 120  # luma below which a pixel is ink
_AXIS = 165  # luma of an axis, which a model draws less evenly than a program
_FAINT = 200  # luma of a slanted line of one pixel: ink where it joins pixels that are dark


@dataclass
class ReadComponent:
    """A shape: `box` [x0, y0, x1, y1] in pixels of the picture."""

    shape: str
    color: str
    label: str
    box: tuple[float, float, float, float]

    @property
    def middle(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass
class ReadArrow:
    """From component `source` to `target` (places in the list); without a head, `directed` is False."""

    source: int
    target: int
    directed: bool


@dataclass
class ReadText:
    text: str
    box: tuple[float, float, float, float]


@dataclass
class ReadFigure:
    """All that was read. `curves`: colour name -> (n, 2) points (x, y) in pixels, left to right; `axes`: an L of lines."""

    components: list[ReadComponent] = field(default_factory=list)
    arrows: list[ReadArrow] = field(default_factory=list)
    texts: list[ReadText] = field(default_factory=list)
    axes: tuple[float, float, float, float] | None = None
    curves: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class _Work:
    """The enlarged picture: rgb (h, w, 3) float, luma, and pixels of the work per pixel of the picture."""

    rgb: np.ndarray
    luma: np.ndarray
    scale: float


def read_figure(picture: Image.Image) -> ReadFigure:
    """Read a picture (any mode, any size) of at least 32 px."""
    import cv2

    pixels = np.asarray(picture.convert("RGB"), np.float32)
    scale = WORK_SIDE / max(pixels.shape[:2])
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    rgb = np.clip(cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA), 0, 255)
    paper = np.median(np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]]), axis=0)
    if paper.min() > 200:  # a tint of the paper is no colour of the figure
        rgb = np.clip(rgb * (255 / paper), 0, 255)
    work = _Work(rgb, rgb @ np.array([0.299, 0.587, 0.114], np.float32), scale)
    figure = ReadFigure()
    regions = _regions(work)
    figure.axes = _axes(work)
    inside = np.zeros(work.luma.shape, np.uint8)
    for region in regions:
        figure.components.append(_component(work, region, bar=figure.axes is not None))
        inside |= region.mask
    if figure.axes is not None:
        figure.curves = _curves(work, figure.axes)
        figure.texts = _outer_texts(work, inside, figure.axes)
    else:
        figure.arrows = _arrows(work, regions, inside)
    return figure


# -- shapes ----------------------------------------------------------------------------------------
@dataclass
class _Region:
    """A filled shape with its outline: full-size mask (uint8 0/1), box in work pixels, fill colour (3,)."""

    mask: np.ndarray
    box: tuple[int, int, int, int]
    fill: np.ndarray


def _fill_mask(work: _Work) -> np.ndarray:
    """Pixels of a pastel fill: neither paper nor stroke."""
    low, high = work.rgb.min(2), work.rgb.max(2)
    return ((low < 243) & (high > 195) & (work.luma > 170)).astype(np.uint8)


def _regions(work: _Work) -> list[_Region]:
    import cv2

    unit = max(1, round(work.scale))  # one pixel of the picture
    fill = _fill_mask(work)
    core = cv2.morphologyEx(fill, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * unit + 1, 2 * unit + 1)))
    joined = cv2.morphologyEx(core, cv2.MORPH_CLOSE, np.ones((3 * unit, 3 * unit), np.uint8))
    joined = cv2.bitwise_and(joined, 1 - _stroke_walls(work))
    count, blobs, stats, _ = cv2.connectedComponentsWithStats(joined, connectivity=4)
    marked = (work.rgb.min(2) < 236).astype(np.uint8)
    found: list[_Region] = []
    smallest = (5 * work.scale) ** 2
    for index in range(1, count):
        if stats[index, cv2.CC_STAT_AREA] < smallest:
            continue
        mask = _filled((blobs == index).astype(np.uint8))
        near = cv2.dilate(mask, np.ones((3, 3), np.uint8), iterations=round(3 * work.scale))
        outlined = _filled(near & marked)  # with its outline, and the first pixels of arrows, which opening takes off again
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3 * unit + 1, 3 * unit + 1))
        grown = cv2.morphologyEx(outlined, cv2.MORPH_OPEN, disc)
        if not grown.any():
            continue
        ys, xs = np.nonzero(grown)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        if min(box[2] - box[0], box[3] - box[1]) < 8 * work.scale:
            continue
        own = (blobs == index) & (core > 0)
        found.append(_Region(grown, box, np.median(work.rgb[own if own.any() else blobs == index], axis=0)))
    return _merged(found)


def _stroke_walls(work: _Work) -> np.ndarray:
    """Dark or saturated pixels: outlines, which part one fill from the next."""
    low, high = work.rgb.min(2), work.rgb.max(2)
    return ((work.luma < 150) | (high - low > 110)).astype(np.uint8)


def _filled(mask: np.ndarray) -> np.ndarray:
    import cv2

    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros_like(mask), contours, -1, 1, cv2.FILLED)


def _merged(found: Sequence[_Region]) -> list[_Region]:
    """Pieces that a wide label parts become one shape: boxes that overlap much, or hulls that meet, of one colour."""
    import cv2

    pieces = list(found)
    at = 0
    while at < len(pieces):
        for other in range(at + 1, len(pieces)):
            a, b = pieces[at], pieces[other]
            wide = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
            high = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
            if wide > 0 and high > 0 and np.abs(a.fill - b.fill).max() < 14 and (a.mask & b.mask).sum() > 0:
                mask = _filled(cv2.morphologyEx(a.mask | b.mask, cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8)))
                ys, xs = np.nonzero(mask)
                box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
                weight = np.array([a.mask.sum(), b.mask.sum()], np.float32)
                fill = (a.fill * weight[0] + b.fill * weight[1]) / weight.sum()
                pieces[at] = _Region(mask, box, fill)
                del pieces[other]
                at = -1
                break
        at += 1
    return pieces


def _component(work: _Work, region: _Region, bar: bool) -> ReadComponent:
    x0, y0, x1, y1 = region.box
    box = (x0 / work.scale, y0 / work.scale, x1 / work.scale, y1 / work.scale)
    shape = "bar" if bar else shape_of(region.mask[y0:y1, x0:x1], work.scale)
    return ReadComponent(shape, color_of(region.fill), "" if bar else _label(work, region), box)


def color_of(fill: np.ndarray) -> str:
    """The palette's name for a fill: the direction away from white decides, since a pale print keeps it."""
    names = list(PALETTE)
    pure = np.array([PALETTE[name][0] for name in names], np.float32)
    away, wanted = 255 - np.asarray(fill, np.float32), 255 - pure
    strength = np.linalg.norm(away) + 1e-6
    unit = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    angle = 1 - unit @ (away / strength)
    distance = np.linalg.norm(wanted - away, axis=1) / 60
    return names[int((4 * angle + distance).argmin())]


@lru_cache(maxsize=64)
def _shape_templates(aspect_step: int) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Each shape stretched to its box as (mask, distance to its edge), for boxes of width / height = 2 ** (aspect_step / 4)."""
    width = 400
    height = round(width / 2 ** (aspect_step / 4))
    short = min(width, height)

    def mask(draw: Any) -> tuple[np.ndarray, np.ndarray]:
        import cv2

        image = Image.new("L", (width, height), 0)
        draw(ImageDraw.Draw(image))
        small = image.resize((_SHAPE_SIDE, _SHAPE_SIDE), Image.Resampling.BOX)
        share = np.asarray(small, np.float32) / 255
        solid = np.pad((share > 0.5).astype(np.uint8), _SHAPE_SIDE)
        inside, outside = (cv2.distanceTransform(m, cv2.DIST_L2, 5) for m in (solid, 1 - solid))
        middle = slice(_SHAPE_SIDE, 2 * _SHAPE_SIDE)
        return share, np.maximum(inside, outside)[middle, middle]

    def polygon(points: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
        return mask(lambda pen: pen.polygon([(x * (width - 1), y * (height - 1)) for x, y in points], fill=255))

    full = (0, 0, width - 1, height - 1)
    inset = min(0.25 * width, 0.4 * height) / width

    def cylinder(cap: float) -> tuple[np.ndarray, np.ndarray]:
        def draw(pen: Any) -> None:
            tall = cap * height
            pen.rectangle((0, tall / 2, width - 1, height - 1 - tall / 2), fill=255)
            pen.ellipse((0, 0, width - 1, tall), fill=255)
            pen.ellipse((0, height - 1 - tall, width - 1, height - 1), fill=255)

        return mask(draw)

    return {
        "rectangle": [mask(lambda pen: pen.rectangle(full, fill=255))],
        "rounded rectangle": [
            mask(lambda pen, r=r: pen.rounded_rectangle(full, r * short, fill=255)) for r in (0.2, 0.27, 0.34, 0.42)
        ],
        "ellipse": [mask(lambda pen: pen.ellipse(full, fill=255))],
        "diamond": [polygon([(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)])],
        "trapezoid": [polygon([(0, 0), (1, 0.18), (1, 0.82), (0, 1)])],
        "hexagon": [polygon([(inset, 0), (1 - inset, 0), (1, 0.5), (1 - inset, 1), (inset, 1), (0, 0.5)])],
        "cylinder": [cylinder(0.2)],
    }


def shape_of(mask: np.ndarray, scale: float) -> str:
    """The shape whose template differs least from the mask (h, w); what lies within two pixels of its edge counts little.

    `scale`: pixels of the mask per pixel of the picture.
    """
    import cv2

    step = int(np.clip(round(4 * np.log2(mask.shape[1] / mask.shape[0])), -12, 12))
    small = cv2.resize(mask.astype(np.float32), (_SHAPE_SIDE, _SHAPE_SIDE), interpolation=cv2.INTER_AREA)
    per_pixel = _SHAPE_SIDE * scale / np.sqrt(mask.shape[0] * mask.shape[1])  # of the template, per pixel of the picture
    best, name = float("inf"), ""
    for shape, templates in _shape_templates(step).items():
        for template, depth in templates:
            wrong = np.abs(small - template)
            error = float((wrong * (np.maximum(0, depth / per_pixel - 1.7) + 0.05)).sum())
            error *= _DOUBT.get(shape, 1.0)
            if error < best:
                best, name = error, shape
    return name


def _label(work: _Work, region: _Region) -> str:
    """The text in a shape's middle."""
    import cv2

    x0, y0, x1, y1 = region.box
    whole = np.pad(region.mask[y0:y1, x0:x1], 1)  # the mask ends here, which erosion must see
    inner = cv2.erode(whole, np.ones((3, 3), np.uint8), iterations=round(2.9 * work.scale))[1:-1, 1:-1]
    luma = work.luma[y0:y1, x0:x1]
    paper = float(np.median(luma[inner > 0])) if inner.any() else 255.0
    ink = np.clip((0.92 * paper - luma) / max(1.0, 0.92 * paper - 40), 0, 1) * inner
    return read_text(_without_outline(ink, inner, work.scale))


def _without_outline(ink: np.ndarray, inner: np.ndarray, scale: float) -> np.ndarray:
    """Ink without specks and without what hangs on the border of the shape."""
    import cv2

    strong = (ink > 0.5).astype(np.uint8)
    count, blobs, stats, _ = cv2.connectedComponentsWithStats(strong, connectivity=8)
    kept = np.zeros_like(ink)
    for index in range(1, count):
        width, height, area = (int(stats[index, k]) for k in (cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT, cv2.CC_STAT_AREA))
        if area < 3 * scale**2 or max(width, height) < 4 * scale:
            continue
        near = cv2.dilate((blobs == index).astype(np.uint8), np.ones((3, 3), np.uint8), iterations=max(1, round(scale / 2)))
        kept = np.maximum(kept, ink * near)
    return kept


# -- arrows ------------------------------------------------------------------------------------------
def _arrows(work: _Work, regions: Sequence[_Region], inside: np.ndarray) -> list[ReadArrow]:
    import cv2

    unit = work.scale
    free = 1 - cv2.dilate(inside, np.ones((3, 3), np.uint8), iterations=round(0.6 * unit))
    outside = (free > 0) & (work.luma < _FAINT)
    ink, dark = (
        cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8), iterations=max(1, round(unit / 2)))
        for mask in (outside, outside & (work.luma < _DARK))
    )
    count, blobs, stats, _ = cv2.connectedComponentsWithStats(ink, connectivity=8)
    near = [cv2.dilate(r.mask, np.ones((3, 3), np.uint8), iterations=round(4.2 * unit)) for r in regions]
    arrows: list[ReadArrow] = []
    for index in range(1, count):
        if max(stats[index, cv2.CC_STAT_WIDTH], stats[index, cv2.CC_STAT_HEIGHT]) < 4 * unit:
            continue
        stroke = (blobs == index).astype(np.uint8)
        solid = stroke & dark
        if not solid.any():
            continue
        contacts = [(k, _centroid(stroke & mask, solid & mask)) for k, mask in enumerate(near) if (stroke & mask).any()]
        if len(contacts) >= 2:
            arrows += _connected(solid, contacts, unit)
    return arrows


def _centroid(faint: np.ndarray, solid: np.ndarray) -> np.ndarray:
    """(x, y) of the middle of the solid ink, or of the faint ink where there is no other."""
    ys, xs = np.nonzero(solid if solid.any() else faint)
    return np.array([xs.mean(), ys.mean()])


def _connected(stroke: np.ndarray, contacts: Sequence[tuple[int, np.ndarray]], unit: float) -> list[ReadArrow]:
    """Arrows of one connected stroke: from every end without a head to every end with one."""
    import cv2

    depth = cv2.distanceTransform(stroke, cv2.DIST_L2, 5)
    ridge = depth[(depth >= cv2.dilate(depth, np.ones((3, 3), np.float32))) & (depth > 0.3 * unit)]
    width = float(np.percentile(ridge, 25)) if len(ridge) else unit
    heads = (depth > max(1.55 * width, width + 0.45 * unit)).astype(np.uint8)
    count, blobs = cv2.connectedComponents(heads, connectivity=8)
    pointed = set()
    for index in range(1, count):
        y, x = np.unravel_index(int(np.where(blobs == index, depth, 0).argmax()), depth.shape)
        pointed.add(min(contacts, key=lambda contact: float(np.hypot(*(contact[1] - (x, y)))))[0])
    ends = [k for k, _ in contacts]
    sources = [k for k in ends if k not in pointed]
    if not pointed:
        return [ReadArrow(ends[0], other, False) for other in ends[1:]]
    if not sources:  # a head at both ends
        return [ReadArrow(a, b, True) for a in ends for b in ends if a != b]
    return [ReadArrow(source, target, True) for source in sources for target in ends if target in pointed]


# -- plots --------------------------------------------------------------------------------------------
def _axes(work: _Work) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom (work pixels) of an L of long dark lines, or None."""
    dark = work.luma < _AXIS
    height, width = dark.shape
    runs_down = [(int(x), _longest_run(dark[:, x])) for x in np.flatnonzero(dark.sum(0) > 0.45 * height)]
    runs_across = [(int(y), _longest_run(dark[y])) for y in np.flatnonzero(dark.sum(1) > 0.45 * width)]
    down = [(x, run) for x, run in runs_down if run[1] - run[0] > 0.45 * height]
    across = [(y, run) for y, run in runs_across if run[1] - run[0] > 0.45 * width]
    if not down or not across:
        return None
    left, (top, _) = min(down, key=lambda item: item[0])
    bottom, (start, right) = max(across, key=lambda item: item[0])
    return (float(left), float(top), float(right), float(bottom)) if abs(start - left) < 0.06 * width else None


def _longest_run(line: np.ndarray) -> tuple[int, int]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
    starts, ends = edges[::2], edges[1::2]
    best = int((ends - starts).argmax())
    return int(starts[best]), int(ends[best])


def _curves(work: _Work, axes: tuple[float, float, float, float]) -> dict[str, np.ndarray]:
    """Strokes in the palette's saturated colours inside the axes, each as its mean height at every column."""
    left, top, right, bottom = (int(v) for v in axes)
    pad = round(2.5 * work.scale)
    area = work.rgb[top : bottom - pad, left + pad : right]
    low, high = area.min(2), area.max(2)
    stroke = (low < 150) & ((high - low > 45) | ((high < 150) & (low > 60)))
    names = list(PALETTE)
    pure = np.array([PALETTE[name][1] for name in names], np.float32)
    nearest = ((area[:, :, None, :] - pure) ** 2).sum(3).argmin(2)
    curves: dict[str, np.ndarray] = {}
    counts = [int((stroke & (nearest == index)).sum()) for index in range(len(names))]
    for index, name in enumerate(names):
        own = stroke & (nearest == index)
        columns = np.flatnonzero(own.sum(0) > 0.5 * work.scale)
        if len(columns) < 0.35 * area.shape[1] or counts[index] < 0.4 * max(counts):  # the rim of another stroke
            continue
        heights = np.array([np.flatnonzero(own[:, x]).mean() for x in columns])
        curves[name] = np.stack([columns + left + pad, heights + top], 1) / work.scale
    return curves


def _outer_texts(work: _Work, inside: np.ndarray, axes: tuple[float, float, float, float]) -> list[ReadText]:
    """Marks beside the axes and the shapes, each read as a word."""
    import cv2

    free = 1 - cv2.dilate(inside, np.ones((3, 3), np.uint8), iterations=round(1.5 * work.scale))
    ink = np.clip((225 - work.luma) / 180, 0, 1)
    low, high = work.rgb.min(2), work.rgb.max(2)
    ink = ink * free * (high - low < 60)
    strong = (ink > 0.5).astype(np.uint8)
    count, blobs, stats, _ = cv2.connectedComponentsWithStats(strong, connectivity=8)
    texts = []
    for index in range(1, count):
        x, y, w, h = (int(stats[index, k]) for k in range(4))
        if not 5 * work.scale < max(w, h) < 20 * work.scale:
            continue
        near = cv2.dilate((blobs == index).astype(np.uint8), np.ones((3, 3), np.uint8))
        text = read_text((ink * near)[max(0, y - 2) : y + h + 2, max(0, x - 2) : x + w + 2])
        if text:
            texts.append(ReadText(text, (x / work.scale, y / work.scale, (x + w) / work.scale, (y + h) / work.scale)))
    return texts
