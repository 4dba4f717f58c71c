"""What is measured on each picture and caption, for the filters: cheap, without any network unless OCR is asked for."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from OpenSciDraw.prepare.filters.duplicates import HASH_BYTES
from OpenSciDraw.prepare.filters.language import language_of, without_math
from OpenSciDraw.prepare.pictures.render import Picture
from OpenSciDraw.reading.kinds import background_colour, far_from, kind_features, kind_of
from OpenSciDraw.reading.text_share import text_share

MEASUREMENT_FIELDS = [
    pa.field("phash", pa.binary(HASH_BYTES), nullable=False),  # perceptual_hash
    pa.field("ink", pa.float32(), nullable=False),  # share of pixels that are not background
    pa.field("kind", pa.string(), nullable=False),  # diagram, plot, photo or table, as kinds.py guesses
    pa.field("kind_score", pa.float32(), nullable=False),  # its probability
    pa.field("text", pa.float32(), nullable=False),  # text_share: an estimate
    pa.field("sharpness", pa.float32(), nullable=False),  # 0 to 1, see `sharpness`
    pa.field("lossless", pa.bool_(), nullable=False),  # drawn from a vector file, or a PNG
    pa.field("language", pa.string(), nullable=False),  # ISO 639-1 of the caption; 'und' where it cannot be told
    pa.field("caption_words", pa.int32(), nullable=False),
    pa.field("caption_chars", pa.int32(), nullable=False),
    pa.field("ocr_words", pa.int32(), nullable=False),  # words read in the picture; -1 where it was not read
]
_HASH_SIDE, _HASH_BITS = 64, 16
_FAINT = 16  # of 255: grey no further than this from the background is noise around what is drawn
_OUTSIDE, _MARGIN = 0.001, 0.02  # of the ink, of the drawn area: what the hash cuts off, and leaves around it
_WORD = re.compile(r"[^\W\d_]{2,}")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # scripts without spaces: two characters are a word


@dataclass(frozen=True)
class Measurements:
    """Values of MEASUREMENT_FIELDS, in their names."""

    phash: bytes
    ink: float
    kind: str
    kind_score: float
    text: float
    sharpness: float
    lossless: bool
    language: str
    caption_words: int
    caption_chars: int
    ocr_words: int

    def columns(self) -> dict[str, Any]:
        return asdict(self)


def measure(picture: Picture, caption: str, ocr: bool = False) -> Measurements:
    """Measure a picture (RGB) and its caption.

    Raises:
        UserError: `ocr` without the extra 'ocr'.
    """
    image = picture.image
    pixels = np.asarray(image)
    background = background_colour(pixels)
    grey_image = image.convert("L")
    grey = np.asarray(grey_image)
    text = text_share(grey_image)
    kind, score = kind_of(kind_features(image, background, text))
    return Measurements(
        phash=perceptual_hash(grey_image),
        ink=float(far_from(pixels, background).mean()),
        kind=kind,
        kind_score=score,
        text=text,
        sharpness=sharpness(grey),
        lossless=picture.vector or picture.data.startswith(b"\x89PNG"),
        language=language_of(caption),
        caption_words=count_words(caption),
        caption_chars=len(caption),
        ocr_words=_read_words(image) if ocr else -1,
    )


def count_words(caption: str) -> int:
    """Words of two letters or more outside of math; in scripts without spaces every two characters are one."""
    text = without_math(caption)
    dense = len(_CJK.findall(text))
    return len(_WORD.findall(_CJK.sub(" ", text) if dense else text)) + dense // 2


def perceptual_hash(image: Image.Image) -> bytes:
    """256 bits that hardly change when a picture is scaled, compressed again or given another margin or paper colour.

    Signs of 16 x 16 low frequencies (DCT, without the mean's row and column) of the grey picture, cut to what is
    drawn and scaled to 64 x 64 (after Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash
    Functions"). The cut is where 0.1 % of the ink lies outside: a first inked pixel would move with every JPEG.
    Figures on white are alike, so the usual 64 bits are too few; benchmarks/run_duplicates.py measures this hash.
    """
    grey = image.convert("L")
    values = np.asarray(grey)
    background = int(np.argmax(grey.histogram()))
    ink_of = np.abs(np.arange(256) - background)
    ink = np.where(ink_of < _FAINT, 0, ink_of).astype(np.uint8)[values]
    left, right = _span(ink.sum(axis=0, dtype=np.int64))
    top, bottom = _span(ink.sum(axis=1, dtype=np.int64))
    before = (max(0, math.ceil(-left)), max(0, math.ceil(-top)))
    beyond = (max(0, math.ceil(right - grey.width)), max(0, math.ceil(bottom - grey.height)))
    if any(before + beyond):  # as if the picture lay on more of its background
        whole = Image.new("L", (grey.width + before[0] + beyond[0], grey.height + before[1] + beyond[1]), background)
        whole.paste(grey, before)
        grey = whole
    box = (left + before[0], top + before[1], right + before[0], bottom + before[1])
    small = np.asarray(grey.resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.BICUBIC, box=box)).astype(np.float64)
    dct = _dct()
    return np.packbits((dct @ small @ dct.T) > 0).tobytes()


def _span(ink: NDArray[np.int64]) -> tuple[float, float]:
    """Where what is drawn begins and ends along an axis, with a margin; may lie outside of the picture."""
    sums = np.concatenate([[0], np.cumsum(ink)]).astype(np.float64)
    if not sums[-1]:
        return 0.0, float(len(ink))
    begin, end = np.interp([_OUTSIDE * sums[-1], (1 - _OUTSIDE) * sums[-1]], sums, np.arange(len(sums)))
    margin = _MARGIN * max(end - begin, 4)
    return begin - margin, end + margin


@lru_cache(maxsize=1)
def _dct() -> NDArray[np.float64]:
    """(16, 64) rows 1 to 16 of the DCT-II."""
    k, n = np.arange(1, _HASH_BITS + 1)[:, None], np.arange(_HASH_SIDE)[None]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * _HASH_SIDE))


def sharpness(grey: NDArray[np.uint8]) -> float:
    """How much of an edge's height its steepest pixel takes, 0 to 1, over the strong edges along every fourth row.

    Drawn at its size a picture is near 1; scaled up to twice its size and more it falls. 1 where there are no edges.
    """
    lines = grey[::4].astype(np.int16)
    if lines.shape[1] < 6:
        return 1.0
    rise = np.abs(lines[:, 4:] - lines[:, :-4])
    strong = rise > 96
    if not strong.any():
        return 1.0
    step = np.abs(np.diff(lines, axis=1))
    steepest = np.maximum(np.maximum(step[:, :-3], step[:, 1:-2]), np.maximum(step[:, 2:-1], step[:, 3:]))
    return float(min(1.0, (steepest[strong] / rise[strong]).mean()))


def _read_words(image: Image.Image) -> int:
    """Words that OCR reads."""
    from OpenSciDraw.reading.ocr import read_lines

    return sum(count_words(line.text) for line in read_lines(image))
