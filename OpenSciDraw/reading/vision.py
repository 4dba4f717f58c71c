"""Classical vision that reads a drawn figure back: filled shapes, arrows between them, labels, bars and curves.

Made for figures of drawn/figure.py and for pictures that a model draws of their captions: pastel shapes on white, dark
arrows with filled heads, the drawing font. Lengths are measured in pixels of the picture as it is; it is enlarged for the
work, so that strokes of one pixel have width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from OpenSciDraw.drawn.canvas import PALETTE
from OpenSciDraw.reading.arrows import Stroke, find_strokes
from OpenSciDraw.reading.figure import ReadFigure, ReadText, Work
from OpenSciDraw.reading.glyphs import read_text
from OpenSciDraw.reading.shapes import Region, find_regions, read_component

WORK_SIDE = 512  # pixels of the longer side that the work is done at
_TINT = 200  # of 255: paper at least as light as this in all channels is tinted, not coloured
_AXIS = 165  # luma of an axis, which a model draws less evenly than a program


@dataclass
class Seen:
    """What was read, and where: `regions` in the order of the figure's components, the strokes of its arrows.

    `paper`: colour (3,) of the picture's border. A light one is a tint, which `work` is free of.
    """

    figure: ReadFigure
    work: Work
    regions: list[Region]
    strokes: list[Stroke]
    paper: np.ndarray

    def as_seen(self, color: np.ndarray) -> np.ndarray:
        """A colour (3,) of `work` as it is in the picture, tint included."""
        return color * (self.paper / 255) if self.paper.min() > _TINT else color


def read_figure(picture: Image.Image) -> ReadFigure:
    """Read a picture (any mode, any size) of at least 32 px."""
    return see(picture).figure


def see(picture: Image.Image) -> Seen:
    """As `read_figure`, with the masks of what was read."""
    import cv2

    pixels = np.asarray(picture.convert("RGB"), np.float32)
    scale = WORK_SIDE / max(pixels.shape[:2])
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    rgb = np.clip(cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA), 0, 255)
    paper = np.median(np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]]), axis=0)
    if paper.min() > _TINT:  # a tint of the paper is no colour of the figure
        rgb = np.clip(rgb * (255 / paper), 0, 255)
    work = Work(rgb, rgb @ np.array([0.299, 0.587, 0.114], np.float32), scale)
    figure = ReadFigure()
    strokes: list[Stroke] = []
    regions = find_regions(work)
    figure.axes = _axes(work)
    inside = np.zeros(work.luma.shape, np.uint8)
    for region in regions:
        figure.components.append(read_component(work, region, bar=figure.axes is not None))
        inside |= region.mask
    if figure.axes is not None:
        figure.curves = _curves(work, figure.axes)
        figure.texts = _outer_texts(work, inside, figure.axes)
    else:
        strokes = find_strokes(work, regions, inside)
        figure.arrows = [arrow for stroke in strokes for arrow in stroke.arrows]
    return Seen(figure, work, regions, strokes, paper)


# -- plots --------------------------------------------------------------------------------------------
def _axes(work: Work) -> tuple[float, float, float, float] | None:
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


def _curves(work: Work, axes: tuple[float, float, float, float]) -> dict[str, np.ndarray]:
    """Strokes in the palette's saturated colours inside the axes, each as its mean height at every column."""
    left, top, right, bottom = (int(v) for v in axes)
    pad = round(2.5 * work.scale)
    area = work.rgb[top : bottom - pad, left + pad : right]
    low, high = (part[top : bottom - pad, left + pad : right] for part in (work.low, work.high))
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


def _outer_texts(work: Work, inside: np.ndarray, axes: tuple[float, float, float, float]) -> list[ReadText]:
    """Marks beside the axes and the shapes, each read as a word."""
    import cv2

    free = 1 - cv2.dilate(inside, np.ones((3, 3), np.uint8), iterations=round(1.5 * work.scale))
    ink = np.clip((225 - work.luma) / 180, 0, 1)
    ink = ink * free * (work.high - work.low < 60)
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
