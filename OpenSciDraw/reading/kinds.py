"""What kind of picture it is: diagram, plot, photo or table. Cheap features and a small fitted model, not a network.

The features ask what a person sees first: how many colours and how flat they are (drawn or photographed), whether
two long lines meet in a corner with ticks outside it (axes), whether rows of text repeat with gaps between them (a
table). A multinomial logistic regression weighs them; `kind_weights.py` holds its numbers, which
`benchmarks/run_kinds.py --refit` writes. How often it is wrong: docs/prepare.md.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from OpenSciDraw.reading.kind_weights import BIAS, KINDS, MEAN, SCALE, WEIGHTS

SIDE = 512  # px: colours are counted and steps measured no larger than this
LINE_SIDE = 1024  # px: lines and ticks need more
FEATURES = (
    "background", "background_luma", "border", "colours", "entropy", "top_colours", "saturation", "saturated", "grey_ink",
    "flat", "soft", "sharp", "oblique", "longest_row", "longest_column", "long_rows", "long_columns", "corner", "frame",
    "row_ticks", "column_ticks", "row_labels", "column_labels", "blank_rows", "blank_columns", "row_period",
    "column_period", "text", "aspect",
)  # fmt: skip

Bool = NDArray[np.bool_]
_NEAR = 16  # of 255: colours no further apart than this are one (JPEG noise on white stays below)
_BUSIEST = 96  # rows, and columns, in which lines are looked for
_SHARP = 40  # of 255: a step between neighbouring pixels that is an edge


def kind_of(features: NDArray[np.float64]) -> tuple[str, float]:
    """The likeliest kind and its probability by the model, from `kind_features`."""
    scores = (features - MEAN) / SCALE @ WEIGHTS + BIAS
    shares = np.exp(scores - scores.max())
    best = int(shares.argmax())
    return KINDS[best], float(shares[best] / shares.sum())


def kind_features(image: Image.Image, background: NDArray[np.uint8], text: float) -> NDArray[np.float64]:
    """(len(FEATURES),) of an RGB picture, its `background` colour (3,) and `text`, the share of it that text covers."""
    small = shrink(image, SIDE)
    pixels = np.asarray(small)
    ink = far_from(pixels, background)
    large = shrink(image, LINE_SIDE)
    return np.array(
        [
            *_colours(pixels, ink, background),
            *_steps(np.asarray(small.convert("L")).astype(np.int16)),
            *_lines(np.asarray(large.convert("L")).astype(np.int16), far_from(np.asarray(large), background)),
            *_repetition(ink),
            text,
            math.log(image.width / image.height),
        ]
    )


def shrink(image: Image.Image, side: int) -> Image.Image:
    """By the smallest whole factor that brings the longer side to at most `side` px."""
    factor = math.ceil(max(image.size) / side)
    return image.reduce(factor) if 1 < factor <= min(image.size) else image


def background_colour(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(3,): the commonest colour along the border of (height, width, 3) pixels, as the mean of its like."""
    depth = max(1, min(pixels.shape[:2]) // 50)
    border = np.concatenate([
        pixels[:depth].reshape(-1, 3), pixels[-depth:].reshape(-1, 3),
        pixels[:, :depth].reshape(-1, 3), pixels[:, -depth:].reshape(-1, 3),
    ])  # fmt: skip
    codes = _codes(border)
    common = border[codes == np.bincount(codes, minlength=4096).argmax()]
    return np.rint(common.mean(axis=0)).astype(np.uint8)


def far_from(pixels: NDArray[np.uint8], colour: NDArray[np.uint8]) -> Bool:
    """(height, width): pixels whose colour is more than JPEG noise away from `colour`."""
    low = np.clip(colour.astype(np.int16) - _NEAR, 0, 255).astype(np.uint8)
    high = np.clip(colour.astype(np.int16) + _NEAR, 0, 255).astype(np.uint8)
    far = np.zeros(pixels.shape[:2], bool)
    for channel in range(3):  # three passes over one plane are faster than one over three
        plane = pixels[..., channel]
        far |= plane < low[channel]
        far |= plane > high[channel]
    return far


def _codes(pixels: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Colours in 4 bits a channel, 0 to 4095."""
    high = pixels.astype(np.uint16) >> 4
    return np.asarray((high[..., 0] << 8) | (high[..., 1] << 4) | high[..., 2], dtype=np.uint16)


def _colours(pixels: NDArray[np.uint8], ink: Bool, background: NDArray[np.uint8]) -> tuple[float, ...]:
    shares = np.bincount(_codes(pixels).ravel(), minlength=4096) / ink.size
    used = shares[shares > 0]
    red, green, blue = (np.ascontiguousarray(pixels[..., channel]) for channel in range(3))  # much faster than axis=2
    colourful = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
    inked = max(1, int(ink.sum()))
    return (
        1 - inked / ink.size,
        float(background @ (0.299, 0.587, 0.114)) / 255,
        1 - float(border.mean()),
        math.log1p(np.count_nonzero(shares > 1e-3)),
        float(-(used * np.log2(used)).sum()),
        float(np.sort(shares)[-8:].sum()),
        float(colourful.mean()) / 255,
        float(np.count_nonzero(colourful > 64)) / inked,
        float(np.count_nonzero(ink & (colourful < 24))) / inked,
    )


def _steps(grey: NDArray[np.int16]) -> tuple[float, ...]:
    """How neighbouring pixels differ: not, a little (shading), sharply; and of the sharp ones, how many obliquely."""
    down = np.abs(grey[1:, :-1] - grey[:-1, :-1])
    across = np.abs(grey[:-1, 1:] - grey[:-1, :-1])
    step = np.maximum(down, across)
    sharp = np.count_nonzero(step > _SHARP)
    oblique = np.count_nonzero(np.minimum(down, across) > _SHARP // 2)
    size = max(1, step.size)
    flat = np.count_nonzero(step <= 2)
    soft = np.count_nonzero(step <= 24) - flat
    return flat / size, soft / size, sharp / size, oblique / max(1, sharp + oblique)


def _lines(grey: NDArray[np.int16], ink: Bool) -> tuple[float, ...]:
    """Long straight lines; whether they meet as axes do; and what stands beside them at even distances."""
    height, width = ink.shape
    if min(height, width) < 16:
        return (0.0,) * 10
    # where grey changes from row to row and from column to column
    across, across_end = _longest_runs(np.abs(np.diff(grey, axis=0)) > _SHARP)
    down, down_end = _longest_runs(np.ascontiguousarray(np.abs(np.diff(grey, axis=1)).T) > _SHARP)
    rows, columns = _longest(across, 0.15 * width), _longest(down, 0.15 * height)
    near = max(4, 0.02 * max(height, width))
    corner, frame = 0.0, 0.0
    for y in rows:
        for x in columns:
            if abs(across_end[y] - across[y] - x) <= near and abs(down_end[x] - y) <= near:
                corner = max(corner, across[y] / width, down[x] / height)
            if abs(across_end[y] - x) <= near and abs(down_end[x] - down[x] - y) <= near:
                frame = max(frame, min(across[y] / width, down[x] / height))
    below = [_beside(ink, y, int(across_end[y] - across[y]), int(across_end[y])) for y in rows]
    turned = ink.T[::-1]  # what was to the left of a line is now below it
    left = [_beside(turned, width - 2 - x, int(down_end[x] - down[x]), int(down_end[x])) for x in columns]
    return (
        float(across.max()) / width, float(down.max()) / height,
        math.log1p(np.count_nonzero(across >= 0.4 * width)), math.log1p(np.count_nonzero(down >= 0.4 * height)),
        corner, frame,
        max((ticks for ticks, _ in below), default=0.0), max((ticks for ticks, _ in left), default=0.0),
        max((labels for _, labels in below), default=0.0), max((labels for _, labels in left), default=0.0),
    )  # fmt: skip


def _longest_runs(mask: Bool) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Of every row of (rows, n): length of its longest run of True, and the index behind that run's end.

    Only in the _BUSIEST rows with the most True, where all lines are; 0 in the others, which saves most of the time.
    """
    count = mask.sum(axis=1, dtype=np.int16)
    busiest = np.sort(np.argsort(-count, kind="stable")[:_BUSIEST])
    part = mask[busiest]
    index = np.arange(1, mask.shape[1] + 1, dtype=np.int16)
    last_gap = np.maximum.accumulate(np.where(part, np.int16(0), index), axis=1)
    run = index - last_gap
    last = run.argmax(axis=1)
    length, end = np.zeros(len(mask), dtype=np.int16), np.zeros(len(mask), dtype=np.int16)
    length[busiest], end[busiest] = run[np.arange(len(part)), last], last + 1
    return length, end


def _longest(lengths: NDArray[np.int16], least: float) -> list[int]:
    """Up to eight of the longest lines of at least `least` px, no two within 3 px; in their order."""
    chosen: list[int] = []
    order = np.argsort(-lengths, kind="stable")[:64]
    for line in order[lengths[order] >= max(16, least)].tolist():
        if len(chosen) < 8 and all(abs(line - other) > 3 for other in chosen):
            chosen.append(line)
    return sorted(chosen)


def _beside(ink: Bool, line: int, begin: int, end: int) -> tuple[float, float]:
    """How many ticks touch a line (either side) and how many labels stand below it, at even distances: log(1 + n)."""
    ticks = max(_evenly(ink[line + at : line + at + 1, begin:end], 1) for at in (-4, -3, 4, 5) if line + at >= 0)
    reach = max(12, (end - begin) // 12)
    labels = _evenly(ink[line + 6 : line + 6 + reach, max(0, begin - reach) : end + reach], 5)
    return ticks, labels


def _evenly(strip: Bool, join: int) -> float:
    """log(1 + n) of the marks along a strip (depth, length) whose distances are the same; gaps up to `join` px close."""
    if not strip.size:
        return 0.0
    marked = np.flatnonzero(strip.any(axis=0))
    if len(marked) < 3 or len(marked) > 0.7 * strip.shape[1]:
        return 0.0
    breaks = np.flatnonzero(np.diff(marked) > join)
    centres = (marked[np.append(0, breaks + 1)] + marked[np.append(breaks, len(marked) - 1)]) / 2
    gaps = np.diff(centres)
    if len(gaps) < 2:
        return 0.0
    usual = np.median(gaps)
    even = np.count_nonzero(np.abs(gaps - usual) <= max(1.5, 0.06 * usual))
    return math.log1p(even) * even / len(gaps)


def _repetition(ink: Bool) -> tuple[float, ...]:
    """Empty rows and columns between inked ones, and how regularly ink comes back: lines of a table."""
    values = []
    periods = []
    for axis in (1, 0):
        profile = ink.mean(axis=axis)
        inked = np.flatnonzero(profile > 0.002)
        inside = profile[inked[0] : inked[-1] + 1] if len(inked) else profile
        values.append(float((inside < 0.02).mean()))
        centred = inside - inside.mean()
        n = len(centred)
        energy = float(centred @ centred)
        if n < 32 or energy < 1e-6:
            periods.append(0.0)
            continue
        spectrum = np.abs(np.fft.rfft(centred, 2 * n)) ** 2
        again = np.fft.irfft(spectrum)[:n] / energy * (n / np.arange(n, 0, -1))
        lags = again[6 : max(8, n // 3)]
        dip = np.minimum.accumulate(lags)
        periods.append(float((lags - dip).max()))  # a peak after a dip: the next line of text
    return values[0], values[1], periods[0], periods[1]
