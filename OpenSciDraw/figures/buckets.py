"""Aspect-ratio buckets: which picture size a figure is trained at, and how it gets there. Pure functions.

A scientific figure carries its axis labels, legends and captions at its edges, and a crop that looks
harmless on a photograph cuts words in half there. So a figure is never cropped: it is scaled to fit inside
its bucket and the rest is padded with the colour of its own background. Its bucket is the one with the
least padding: 2.3 % of the pixels on average and 7.4 % at most for aspect ratios between 1:4 and 4:1.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import numpy as np
from PIL import Image

from OpenSciDraw.errors import UserError

# (height, width) in units; the grid of existing encoded data. 11x21 has no 21x11 there.
GRID: tuple[tuple[int, int], ...] = (
    (8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21),
    (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16), (16, 15), (17, 15),
    (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10), (25, 10), (26, 9),
    (27, 9), (28, 9), (29, 8), (30, 8), (31, 8), (32, 8),
)  # fmt: skip
UNITS: dict[int, int] = {1024: 64, 768: 48, 512: 32, 256: 16, 128: 8}  # resolution in px: unit in px
TOKEN = 16  # pixels of a token's side in FLUX.2 and Qwen-Image: of the grid of 128 only such buckets are used
WHITE = (255, 255, 255)
_SAME_COLOUR = 8  # levels per channel; JPEG noise around a flat background stays below

Box = tuple[int, int, int, int]


@dataclass(frozen=True, order=True)
class Bucket:
    """The size of a training picture, in pixels."""

    height: int
    width: int


@lru_cache
def buckets(resolution: int) -> tuple[Bucket, ...]:
    """All buckets of a resolution (about resolution² pixels each), from the widest to the tallest.

    Raises UserError for a resolution without a grid.
    """
    if resolution not in UNITS:
        allowed = ", ".join(str(known) for known in UNITS)
        raise UserError(f"There is no bucket grid for resolution {resolution!r}. Allowed: {allowed}.")
    unit = UNITS[resolution]
    sizes = [Bucket(height * unit, width * unit) for height, width in GRID]
    return tuple(size for size in sizes if size.height % TOKEN == 0 and size.width % TOKEN == 0)


@lru_cache
def _by_aspect(resolution: int) -> tuple[list[float], tuple[Bucket, ...]]:
    """Buckets from the tallest to the widest, and the aspect ratios (width / height) that part neighbours."""
    ordered = tuple(sorted(buckets(resolution), key=lambda bucket: bucket.width / bucket.height))
    aspects = [bucket.width / bucket.height for bucket in ordered]
    return [sqrt(low * high) for low, high in zip(aspects, aspects[1:], strict=False)], ordered


def padded_share(width: int, height: int, bucket: Bucket) -> float:
    """Share of the bucket's area that a figure of width x height leaves to padding: 0 for the same aspect ratio.

    The figure is scaled until it touches, so the share that it covers is the ratio of the two aspect ratios.
    """
    a, b = width * bucket.height, height * bucket.width
    return 1 - min(a, b) / max(a, b)


def best_bucket(width: int, height: int, resolution: int) -> Bucket:
    """The bucket with the least padding for a figure of width x height pixels.

    The padded share depends on the ratio of aspect ratios alone, so neighbouring buckets meet at the
    geometric mean of theirs: one binary search. No rational aspect ratio lies on such a boundary; there are
    no ties.

    Raises:
        UserError: a resolution without a grid.
        ValueError: a side below one pixel.
    """
    if width < 1 or height < 1:
        raise ValueError(f"A figure of {width} x {height} px has no aspect ratio.")
    boundaries, ordered = _by_aspect(resolution)
    return ordered[bisect_right(boundaries, width / height)]


def background_colour(image: Image.Image) -> tuple[int, int, int]:
    """The colour of an RGB figure's outermost pixels if most of them share one, else white (as paper is)."""
    pixels = np.asarray(image)  # (H, W, 3) uint8
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]]).astype(np.int32)
    codes = (border[:, 0] << 16) | (border[:, 1] << 8) | border[:, 2]
    values, counts = np.unique(codes, return_counts=True)
    code = int(values[counts.argmax()])
    colour = (code >> 16, (code >> 8) & 255, code & 255)
    alike = (np.abs(border - np.array(colour)) <= _SAME_COLOUR).all(axis=1)
    return colour if alike.mean() >= 0.5 else WHITE


def placement(size: tuple[int, int], bucket: Bucket) -> Box:
    """Where a picture of `size` (width, height) lies in its bucket: x0, y0, x1, y1, half-open."""
    scale = min(bucket.width / size[0], bucket.height / size[1])
    width, height = (min(most, max(1, round(side * scale))) for side, most in zip(size, (bucket.width, bucket.height), strict=True))
    x0, y0 = (bucket.width - width) // 2, (bucket.height - height) // 2
    return x0, y0, x0 + width, y0 + height


def in_bucket(box: tuple[float, float, float, float], size: tuple[int, int], bucket: Bucket) -> tuple[float, float, float, float]:
    """A box in pixels of a picture of `size`, cut to it, in pixels of the bucket that the picture is fitted into."""
    x0, y0, x1, y1 = placement(size, bucket)
    across, down = (x1 - x0) / size[0], (y1 - y0) / size[1]
    left, right = (x0 + min(max(x, 0), size[0]) * across for x in (box[0], box[2]))
    top, bottom = (y0 + min(max(y, 0), size[1]) * down for y in (box[1], box[3]))
    return left, top, right, bottom


def fit(image: Image.Image, bucket: Bucket) -> tuple[Image.Image, Box]:
    """Scale an RGB figure into a bucket and pad it; nothing is cropped, small figures are enlarged.

    Returns the picture, exactly bucket.width x bucket.height, and the box (x0, y0, x1, y1) in pixels, half-open,
    where the figure lies in it: `picture.crop(box)` is the figure again. Lanczos scaling, antialiased.

    Raises ValueError for a picture that is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"fit() takes an RGB picture, not {image.mode}; load_figure() gives one.")
    box = placement(image.size, bucket)
    width, height = box[2] - box[0], box[3] - box[1]
    scaled = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)
    if (width, height) == (bucket.width, bucket.height):
        return scaled, box
    picture = Image.new("RGB", (bucket.width, bucket.height), background_colour(image))
    picture.paste(scaled, box)
    return picture, box


def fitted(picture: Image.Image, resolution: int) -> Image.Image:
    """An RGB picture fitted into its bucket at `resolution`, as encoding fits figures.

    Raises UserError for a resolution without a grid, and ValueError for a picture that is not RGB.
    """
    return fit(picture, best_bucket(picture.width, picture.height, resolution))[0]
