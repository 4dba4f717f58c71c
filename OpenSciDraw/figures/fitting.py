"""A figure decoded and fitted into its bucket: ready for the VAE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from OpenSciDraw.config import EncodeConfig
from OpenSciDraw.figures.buckets import Bucket, best_bucket, buckets, fit
from OpenSciDraw.figures.listing import DrawnRef, FigureRef, RejectedFigure, load_figure


@dataclass(frozen=True)
class Prepared:
    """A figure ready for the VAE: pixels (3, H, W) uint8 of exactly its bucket's size."""

    ref: FigureRef
    bucket: Bucket
    placement: tuple[int, int, int, int]
    aspect_ratio: float
    pixels: Tensor
    content: bytes | None


def prepare(ref: FigureRef, encode: EncodeConfig) -> Prepared:
    """Decode a figure and fit it into its bucket. Raises RejectedFigure."""
    given = ref if isinstance(ref, DrawnRef) else ref.read()
    image = load_figure(given, encode.max_image_pixels, encode.min_side, encode.max_aspect_ratio)
    bucket = best_bucket(image.width, image.height, encode.resolution)
    if ref.bucket is not None and (named := Bucket(ref.bucket[1], ref.bucket[0])) in buckets(encode.resolution):
        bucket = named
    scale = min(bucket.width / image.width, bucket.height / image.height)
    if scale > encode.max_upscale:
        raise RejectedFigure(
            f"too coarse: {image.width} x {image.height} px would be enlarged {scale:.3g} times, over max_upscale = "
            f"{encode.max_upscale:g}"
        )
    fitted, placement = fit(image, bucket)
    pixels = torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1).contiguous()
    content = xxhash.xxh3_128_digest(given) if isinstance(given, bytes) else None
    return Prepared(ref, bucket, placement, image.height / image.width, pixels, content)


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 (…) -> float in [-1, 1], as the pipelines' image processors do."""
    return pixels.float() / 127.5 - 1.0
