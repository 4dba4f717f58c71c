"""Strokes between shapes, and where their heads are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from OpenSciDraw.reading.figure import ReadArrow, Work
from OpenSciDraw.reading.shapes import Region

_DARK = 120  # luma below which a pixel is ink
_FAINT = 200  # luma of a slanted line of one pixel: ink where it joins pixels that are dark


@dataclass
class Stroke:
    """A connected stroke that joins shapes: masks (h, w, uint8 0/1) of all its ink and of its dark ink, and its arrows.

    `contacts`: (place of a region, (x, y) of the ink near it in work pixels).
    """

    ink: np.ndarray
    solid: np.ndarray
    contacts: list[tuple[int, np.ndarray]]
    arrows: list[ReadArrow]


def find_strokes(work: Work, regions: Sequence[Region], inside: np.ndarray) -> list[Stroke]:
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
    strokes: list[Stroke] = []
    for index in range(1, count):
        if max(stats[index, cv2.CC_STAT_WIDTH], stats[index, cv2.CC_STAT_HEIGHT]) < 4 * unit:
            continue
        stroke = (blobs == index).astype(np.uint8)
        solid = stroke & dark
        if not solid.any():
            continue
        contacts = [(k, _centroid(stroke & mask, solid & mask)) for k, mask in enumerate(near) if (stroke & mask).any()]
        if len(contacts) >= 2:
            strokes.append(Stroke(stroke, solid, contacts, _connected(solid, contacts, unit)))
    return strokes


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
