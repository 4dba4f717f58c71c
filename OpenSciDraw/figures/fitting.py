"""A figure decoded and fitted into its bucket: ready for the VAE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor

from OpenSciDraw.config import EncodeConfig
from OpenSciDraw.figures.buckets import Bucket, best_bucket, buckets, fit, in_bucket
from OpenSciDraw.figures.listing import DrawnRef, FigureRef, RejectedFigure, load_figure

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Prepared:
    """A figure ready for the VAE: pixels (3, H, W) uint8 of exactly its bucket's size.

    Of an edit, `references` are the pictures that it starts from, each fitted into a bucket of its own, and `edit_boxes` are
    x0, y0, x1, y1 as fractions of the bucket's width and height.
    """

    ref: FigureRef
    bucket: Bucket
    placement: tuple[int, int, int, int]
    aspect_ratio: float
    pixels: Tensor
    content: bytes | None
    references: tuple[Prepared, ...] = ()
    edit_boxes: tuple[Box, ...] = ()


def prepare(ref: FigureRef, encode: EncodeConfig) -> Prepared:
    """Decode a figure and fit it into its bucket, and the pictures that it was made from. Raises RejectedFigure."""
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
    pixels = pixels_of(fitted)
    content = xxhash.xxh3_128_digest(given) if isinstance(given, bytes) else None
    boxes = tuple(
        (x0 / bucket.width, y0 / bucket.height, x1 / bucket.width, y1 / bucket.height)
        for x0, y0, x1, y1 in (in_bucket(box, image.size, bucket) for box in ref.edit_boxes)
    )
    references = tuple(_reference(reference, encode) for reference in ref.references)
    return Prepared(ref, bucket, placement, image.height / image.width, pixels, content, references, boxes)


def _reference(ref: FigureRef, encode: EncodeConfig) -> Prepared:
    try:
        return prepare(ref, encode)
    except RejectedFigure as error:
        raise RejectedFigure(f"reference: {ref.id}: {error}") from error


def pixels_of(image: Image.Image) -> Tensor:
    """An RGB picture as (3, H, W) uint8."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 (…) -> float in [-1, 1], as the pipelines' image processors do."""
    return pixels.float() / 127.5 - 1.0
