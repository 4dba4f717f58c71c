"""Bytes of a picture file -> a clean 8-bit sRGB picture, or a reason why not. Never anything else.

What a viewer shows is what is trained on: transparency lies on white, EXIF orientation is applied, colour
profiles are converted to sRGB, CMYK is converted, 16 bits are scaled to 8, and of an animation the first
frame counts. What cannot be shown whole (truncated or damaged files) is rejected, never half decoded.
"""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")  # nothing that starts other programs, as EPS does
MAX_IMAGE_PIXELS = 100_000_000
MIN_SIDE = 32
MAX_ASPECT_RATIO = 16.0

# What Pillow's readers raise on hostile input: they parse in Python and trust lengths and offsets in the file.
_PILLOW_ERRORS = (
    OSError, ValueError, TypeError, SyntaxError, LookupError, AttributeError, ArithmeticError, EOFError, MemoryError,
    AssertionError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError, ImageCms.PyCMSError,
)  # fmt: skip
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"II*\0", b"MM\0*", b"BM")
_VECTOR_MAGIC = (b"%PDF", b"%!PS", b"<svg", b"<?xm", b"\xc5\xd0\xd3\xc6")
_EIGHT_OF_SIXTEEN_BITS = np.rint(np.arange(65536) * (255 / 65535)).astype(np.uint8)
_PHOTOMETRIC = 262  # TIFF tag
_TRANSPOSE = {  # EXIF orientation: what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PROFILE_MODES = {"RGB ": "RGB", "CMYK": "CMYK", "GRAY": "L"}  # colour space of an ICC profile: Pillow's mode


class RejectedFigure(ValueError):
    """A figure that cannot be trained on. The message is the reason: 'kind: details'."""


def decode_picture(
    data: bytes,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    min_side: int = MIN_SIDE,
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
) -> Image.Image:
    """Decode a PNG, JPEG, WebP, GIF, TIFF or BMP file to RGB.

    The size in pixels is read from the header, so too large pictures are rejected before they are decoded.
    (Pillow's own limit against decompression bombs, twice `Image.MAX_IMAGE_PIXELS`, holds as well.)

    Raises RejectedFigure with the reason.
    """
    if not data:
        raise RejectedFigure("empty file")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size, max_image_pixels, min_side, max_aspect_ratio)
            image.load()
            picture = _to_rgb(image)
            orientation = _orientation(image)
        if image.format == "PNG":
            Image.open(BytesIO(data)).verify()  # checksums of the pixel data, which decoding skips
    except RejectedFigure:
        raise
    except Image.DecompressionBombError as error:
        raise RejectedFigure(f"too large: {error}") from error
    except UnidentifiedImageError as error:
        raise RejectedFigure(_unidentified(data)) from error
    except _PILLOW_ERRORS as error:
        raise RejectedFigure(_damage(data, error)) from error
    picture = picture.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else picture
    picture.info = {}  # profile and orientation are applied; a copy saved with them would be converted twice
    return picture


def _check_size(size: tuple[int, int], max_image_pixels: int, min_side: int, max_aspect_ratio: float) -> None:
    width, height = size
    if width * height > max_image_pixels:
        raise RejectedFigure(f"too large: {width} x {height} px, over max_image_pixels = {max_image_pixels}")
    if min(size) < min_side:
        raise RejectedFigure(f"too small: {width} x {height} px, a side under min_side = {min_side}")
    if max(size) > max_aspect_ratio * min(size):
        raise RejectedFigure(f"too long: {width} x {height} px, over max_aspect_ratio = {max_aspect_ratio:g}")


def _unidentified(data: bytes) -> str:
    if data.lstrip()[:4].startswith(_VECTOR_MAGIC):
        return "vector format: PDF, SVG and PostScript must be converted to PNG first"
    if data.startswith(_MAGIC):
        return "truncated: it ends in its header" if _shorter_than_declared(data) else "damaged: unreadable header"
    return f"not an image: none of {', '.join(FORMATS)}"


def _damage(data: bytes, error: BaseException) -> str:
    """'truncated' or 'damaged', with Pillow's words for it."""
    words = f"{error}".strip() or type(error).__name__
    short = "truncated" in words.lower() or isinstance(error, EOFError) or _shorter_than_declared(data)
    return f"{'truncated' if short else 'damaged'}: {words}"


def _shorter_than_declared(data: bytes) -> bool:
    """Whether less data are there than the file's own header or end mark says; not every reader tells."""
    if data.startswith(b"RIFF"):
        return len(data) < 12 or len(data) < 8 + int.from_bytes(data[4:8], "little")
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(b"GIF8"):
        return not data.rstrip(b"\0").endswith(b";")
    return len(data) < 64


def _orientation(image: Image.Image) -> int:
    """EXIF orientation after decoding (Pillow turns TIFF itself); 1, upright, when the EXIF data are unreadable."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _PILLOW_ERRORS:  # as viewers do: the pixels are whole, only the camera's notes are not
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB in sRGB, on white."""
    profile = image.info.get("icc_profile")
    alpha: Image.Image | None = None
    if image.mode == "LAB":
        raise RejectedFigure("unsupported pixel format: CIE Lab")
    if image.mode == "F" or image.mode.startswith("I"):
        image, alpha = _to_eight_bits(image)
    elif image.mode == "LA":  # stays grey: its profile is a grey one
        image, alpha = image.getchannel("L"), image.getchannel("A")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image, alpha = image.convert("RGB"), image.getchannel("A")
    elif image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("RGB")
    picture = _to_srgb(image, profile) if profile else image.convert("RGB")
    if alpha is None:
        return picture
    on_white = Image.new("RGB", picture.size, (255, 255, 255))
    on_white.paste(picture, mask=alpha)
    return on_white


def _to_eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Grey of 16 or 32 bits, or float -> 8 bits, and the alpha of a PNG's transparent grey value.

    16 bits (also in a 32-bit integer): 65535 -> 255. Floats in [0, 1] or [0, 255] are taken as such. Other
    ranges have no known white, so they are stretched from their minimum to their maximum.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite((low, high)).all():
        raise RejectedFigure("damaged: pixels that are not finite numbers")
    if image.mode != "F" and low >= 0 and high <= 65535:
        grey = _EIGHT_OF_SIXTEEN_BITS[values]
    else:
        if image.mode == "F" and low >= 0 and high <= 255:
            low, high = 0.0, 1.0 if high <= 1 else 255.0
        stretched = (values - np.float64(low)) * (255 / (high - low or 1.0))
        grey = np.rint(stretched, out=stretched).astype(np.uint8)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0:
        grey = 255 - grey  # white is zero; Pillow inverts such TIFFs at 8 bits alone
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.fromarray(grey), alpha


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert from an ICC profile; a profile that is damaged or of another colour space is left aside."""
    transform = _srgb_transform(profile, image.mode)
    if transform is None:
        return image.convert("RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # None only when done in place
    return converted


@lru_cache(maxsize=16)  # a transform costs 1 to 50 ms to make, and figures of one source share profiles
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None when nothing is to be converted: already sRGB, or not a usable profile for this mode."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if _PROFILE_MODES.get(source.profile.xcolor_space) != mode:
            return None
        if mode == "RGB" and (source.profile.profile_description or "").startswith("sRGB"):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except _PILLOW_ERRORS:
        return None
