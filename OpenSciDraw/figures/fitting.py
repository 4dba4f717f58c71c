"""A figure decoded and fitted into its bucket: ready for the VAE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor

from OpenSciDraw.config import EncodeConfig
from OpenSciDraw.figures.buckets import Bucket, best_bucket, buckets, fit, in_bucket, placement
from OpenSciDraw.figures.decode import decode_picture
from OpenSciDraw.figures.listing import DrawnRef, FigureRef, RejectedFigure, load_figure

MASK_CELL = 8  # pixels of a side, of which a mask keeps the mean
MASK_RATIO = 64.0  # long side / short side of a mask, at most
_STRETCH = 0.05  # of a mask that is laid over its figure
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Prepared:
    """A figure ready for the VAE: pixels (3, H, W) uint8 of exactly its bucket's size.

    Of an edit, `references` are the pictures that it starts from, each fitted into a bucket of its own, and `edit_boxes` are
    x0, y0, x1, y1 as fractions of the bucket's width and height. `mask` (H / 8, W / 8) uint8 says where the figure counts in the
    loss, 255 = in full, by the mean over cells of 8 x 8 pixels; None: everywhere.
    """

    ref: FigureRef
    bucket: Bucket
    placement: tuple[int, int, int, int]
    aspect_ratio: float
    pixels: Tensor
    content: bytes | None
    references: tuple[Prepared, ...] = ()
    edit_boxes: tuple[Box, ...] = ()
    mask: Tensor | None = None


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
    fitted, place = fit(image, bucket)
    pixels = pixels_of(fitted)
    mask_file = None if ref.mask is None else ref.mask.read()
    content = xxhash.xxh3_128_digest(given + (mask_file or b"")) if isinstance(given, bytes) else None
    mask = None if ref.mask is None or not mask_file else _mask(ref.mask.id, mask_file, image.size, bucket, encode.max_image_pixels)
    boxes = tuple(
        (x0 / bucket.width, y0 / bucket.height, x1 / bucket.width, y1 / bucket.height)
        for x0, y0, x1, y1 in (in_bucket(box, image.size, bucket) for box in ref.edit_boxes)
    )
    references = tuple(_reference(reference, encode) for reference in ref.references)
    return Prepared(ref, bucket, place, image.height / image.width, pixels, content, references, boxes, mask)


def _reference(ref: FigureRef, encode: EncodeConfig) -> Prepared:
    try:
        return prepare(ref, encode)
    except RejectedFigure as error:
        raise RejectedFigure(f"reference: {ref.id}: {error}") from error


def _mask(identity: str, file: bytes, size: tuple[int, int], bucket: Bucket, max_image_pixels: int) -> Tensor:
    """The cells of a mask of a figure of `size`, laid over the figure; what is beside it in the bucket does not count.

    Raises RejectedFigure: unreadable, of another shape than the figure, or black.
    """
    try:
        picture = decode_picture(file, max_image_pixels, 1, MASK_RATIO).convert("L")
    except RejectedFigure as error:
        raise RejectedFigure(f"mask: {identity}: {error}") from error
    stretch = (picture.width / size[0]) / (picture.height / size[1])
    if not 1 / (1 + _STRETCH) <= stretch <= 1 + _STRETCH:
        shapes = f"{picture.width} x {picture.height} px, and the figure {size[0]} x {size[1]} px"
        raise RejectedFigure(f"mask: {identity}: of another shape: {shapes}")
    x0, y0, x1, y1 = placement(size, bucket)
    whole = Image.new("L", (bucket.width, bucket.height), 0)
    whole.paste(picture.resize((x1 - x0, y1 - y0), Image.Resampling.BOX), (x0, y0))
    cells = torch.from_numpy(np.asarray(whole.reduce(MASK_CELL)).copy())
    if not cells.any():
        raise RejectedFigure(f"mask: {identity}: it is black, so that nothing of the figure would count")
    return cells


def pixels_of(image: Image.Image) -> Tensor:
    """An RGB picture as (3, H, W) uint8."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 (…) -> float in [-1, 1], as the pipelines' image processors do."""
    return pixels.float() / 127.5 - 1.0
