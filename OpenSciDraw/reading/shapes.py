"""Filled shapes with their outlines, colours and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from OpenSciDraw.drawn.canvas import PALETTE
from OpenSciDraw.reading.figure import ReadComponent, Work
from OpenSciDraw.reading.glyphs import read_text

_SHAPE_SIDE = 48
_DOUBT = {"cylinder": 1.7, "rounded rectangle": 1.5}  # an unsteady rectangle is nearer to them than they to a rectangle


@dataclass
class Region:
    """A filled shape with its outline: full-size mask (uint8 0/1), box in work pixels, fill colour (3,)."""

    mask: np.ndarray
    box: tuple[int, int, int, int]
    fill: np.ndarray


def _fill_mask(work: Work) -> np.ndarray:
    """Pixels of a pastel fill: neither paper nor stroke."""
    return ((work.low < 243) & (work.high > 195) & (work.luma > 170)).astype(np.uint8)


def find_regions(work: Work) -> list[Region]:
    import cv2

    unit = max(1, round(work.scale))  # one pixel of the picture
    fill = _fill_mask(work)
    core = cv2.morphologyEx(fill, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * unit + 1, 2 * unit + 1)))
    joined = cv2.morphologyEx(core, cv2.MORPH_CLOSE, np.ones((3 * unit, 3 * unit), np.uint8))
    joined = cv2.bitwise_and(joined, 1 - _stroke_walls(work))
    count, blobs, stats, _ = cv2.connectedComponentsWithStats(joined, connectivity=4)
    marked = (work.low < 236).astype(np.uint8)
    found: list[Region] = []
    smallest = (5 * work.scale) ** 2
    for index in range(1, count):
        if stats[index, cv2.CC_STAT_AREA] < smallest:
            continue
        mask = _filled((blobs == index).astype(np.uint8))
        near = cv2.dilate(mask, np.ones((3, 3), np.uint8), iterations=round(3 * work.scale))
        outlined = _filled(cv2.bitwise_and(near, marked))  # with the first pixels of arrows, which opening takes off again
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3 * unit + 1, 3 * unit + 1))
        grown = cv2.morphologyEx(outlined, cv2.MORPH_OPEN, disc)
        if not grown.any():
            continue
        ys, xs = np.nonzero(grown)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        if min(box[2] - box[0], box[3] - box[1]) < 8 * work.scale:
            continue
        own = (blobs == index) & (core > 0)
        found.append(Region(grown, box, np.median(work.rgb[own if own.any() else blobs == index], axis=0)))
    return _merged(found)


def _stroke_walls(work: Work) -> np.ndarray:
    """Dark or saturated pixels: outlines, which part one fill from the next."""
    return ((work.luma < 150) | (work.high - work.low > 110)).astype(np.uint8)


def _filled(mask: np.ndarray) -> np.ndarray:
    import cv2

    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros_like(mask), contours, -1, 1, cv2.FILLED)


def _merged(found: Sequence[Region]) -> list[Region]:
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
                pieces[at] = Region(mask, box, fill)
                del pieces[other]
                at = -1
                break
        at += 1
    return pieces


def read_component(work: Work, region: Region, bar: bool) -> ReadComponent:
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


def _label(work: Work, region: Region) -> str:
    """The text in a shape's middle."""
    return read_text(label_ink(work, region))


def label_ink(work: Work, region: Region) -> np.ndarray:
    """(h, w) of the region's box: the ink in 0..1 of the text in the shape's middle."""
    import cv2

    x0, y0, x1, y1 = region.box
    whole = np.pad(region.mask[y0:y1, x0:x1], 1)  # the mask ends here, which erosion must see
    inner = cv2.erode(whole, np.ones((3, 3), np.uint8), iterations=round(2.9 * work.scale))[1:-1, 1:-1]
    luma = work.luma[y0:y1, x0:x1]
    paper = float(np.median(luma[inner > 0])) if inner.any() else 255.0
    ink = np.clip((0.92 * paper - luma) / max(1.0, 0.92 * paper - 40), 0, 1) * inner
    return _without_outline(ink, inner, work.scale)


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
