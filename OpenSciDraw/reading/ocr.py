"""The words in a picture, by OCR: one reader for all that the project reads.

Two readers, by name:

    rapidocr   PP-OCR by onnxruntime; the networks come with the package (the extra 'ocr')
    tesseract  the program of this name on PATH: several times faster on large pictures, misses much more

The first is made for lines of text in photos and pages. Figures have more: text that runs upwards, and single letters.
So tall lines are read again, turned both ways, and marks of a letter's size that belong to no line are read one by one.
docs/text-and-distribution-metrics.md says what that gains, and by what factors small pictures are enlarged.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from OpenSciDraw.errors import UserError

READERS = ("rapidocr", "tesseract")
Box = tuple[float, float, float, float]
_SMALL = 512  # px: rapidocr gains by twice the size where the shorter side is less
_TESSERACT_SIDE, _TESSERACT_MOST = 900, 4  # px, times: it wants letters of about 30 px
_TALL = 1.5  # height / width of a line that may run upwards
_MARKS = 24  # with more marks than this a picture has hatching or a cloud of points, not letters
_ALIKE = 4  # more marks of one size are dashes or nodes
_LETTER_SURE = 0.6  # confidence from which a mark is a letter; lower takes arrow heads for letters
_SECONDS = 120  # for one picture


@dataclass(frozen=True)
class Line:
    """Text that stands together, as read; box = (x0, y0, x1, y1) in pixels of the picture; confidence 0 to 1."""

    text: str
    box: Box
    confidence: float


def check_reader(reader: str) -> None:
    """Raises UserError, with what to install, for a reader that is unknown or not there."""
    if reader not in READERS:
        raise UserError(f"Unknown reader of text {reader!r}. Known: {', '.join(READERS)}.")
    if reader == "rapidocr":
        if missing := [name for name in ("rapidocr", "onnxruntime") if find_spec(name) is None]:
            raise UserError(
                f"Reading text in pictures needs {' and '.join(missing)}: pip install 'OpenSciDraw[ocr]'. "
                "Or read with the program tesseract (reader 'tesseract'), which misses more."
            )
    elif shutil.which("tesseract") is None:
        raise UserError(
            "There is no program 'tesseract' on PATH. Install it (Debian and Ubuntu: apt install tesseract-ocr), or read "
            "with rapidocr: pip install 'OpenSciDraw[ocr]'."
        )


def version_of(reader: str) -> str:
    """Name and version of an installed reader, as in 'rapidocr 3.10.0': another version reads other words."""
    if reader == "rapidocr":
        return f"rapidocr {version('rapidocr')}"
    check_reader(reader)
    return subprocess.run(["tesseract", "--version"], capture_output=True, text=True).stdout.split("\n")[0]


def read_lines(image: Image.Image, reader: str = "rapidocr") -> list[Line]:
    """What `reader` (one of READERS) finds in an RGB picture, in its order.

    The last pictures are remembered, so that several metrics of one picture read it once.

    Raises:
        UserError: a reader that is unknown or not there.
    """
    image = image.convert("RGB")
    return list(_read(image.tobytes(), image.size, reader))


@lru_cache(maxsize=4)
def _read(data: bytes, size: tuple[int, int], reader: str) -> tuple[Line, ...]:
    check_reader(reader)
    image = Image.frombytes("RGB", size, data)
    factor = 2 if min(size) < _SMALL else 1
    if reader == "tesseract":
        factor = min(_TESSERACT_MOST, max(1, round(_TESSERACT_SIDE / min(size))))
    if factor > 1:
        image = image.resize((size[0] * factor, size[1] * factor), Image.Resampling.BICUBIC)
    lines = _by_rapidocr(image, factor) if reader == "rapidocr" else _by_tesseract(image)
    return tuple(Line(line.text, _scaled(line.box, 1 / factor), line.confidence) for line in lines)


def _scaled(box: Box, by: float) -> Box:
    return box[0] * by, box[1] * by, box[2] * by, box[3] * by


def _by_rapidocr(image: Image.Image, factor: int) -> list[Line]:
    pixels = np.ascontiguousarray(np.asarray(image)[..., ::-1])  # BGR, as its networks were trained
    found = _engine()(pixels, use_det=True, use_cls=False, use_rec=True, text_score=0.5)
    lines: list[Line] = []
    if found.txts is not None and getattr(found, "boxes", None) is not None:
        for text, corners, score in zip(found.txts, found.boxes, found.scores, strict=True):
            (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
            line = Line(text, (left, top, right, bottom), float(score))
            lines.append(_turned(pixels, line) if bottom - top >= _TALL * (right - left) else line)
    marks = _marks(pixels, factor, [line.box for line in lines])
    if len(marks) <= _MARKS:
        around = 2 * factor
        letters = (_recognised(pixels, mark, around) for mark in marks)
        lines += [letter for letter in letters if len(letter.text) == 1 and letter.confidence >= _LETTER_SURE]
    return lines


def _turned(pixels: NDArray[np.uint8], line: Line) -> Line:
    """A tall line as it is read best: upright (one letter, or letters under each other) or turned either way."""
    return max((line, *(_recognised(pixels, line.box, 0, turns) for turns in (0, 1, 3))), key=lambda each: each.confidence)


def _recognised(pixels: NDArray[np.uint8], box: Box, around: int, turns: int = 0) -> Line:
    """What stands in a box, with `around` px about it, turned by `turns` times 90 degrees against the clock."""
    left, top, right, bottom = (int(value) for value in box)
    part = pixels[max(0, top - around) : bottom + around + 1, max(0, left - around) : right + around + 1]
    part = np.ascontiguousarray(np.rot90(part, turns))
    found = _engine()(part, use_det=False, use_cls=False, use_rec=True, text_score=0.0)
    return Line(found.txts[0], box, float(found.scores[0])) if found.txts else Line("", box, 0.0)


def _marks(pixels: NDArray[np.uint8], factor: int, lines: Sequence[Box]) -> list[Box]:
    """Dark marks of a letter's size (6 to 40 px before enlarging) whose middle lies in no line, few of a size."""
    import cv2

    grey = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
    near = 24 * factor + 1  # px: what is darker by 40 of 255 than the mean of so much around it is ink
    dark = cv2.adaptiveThreshold(grey, 255, cv2.ADAPTIVE_THRESH_MEAN_C, cv2.THRESH_BINARY_INV, near, 40)
    marks = []
    for left, top, width, height, area in cv2.connectedComponentsWithStats(dark, connectivity=8)[2][1:].tolist():
        letter = 6 * factor <= height <= 40 * factor and 0.1 * height <= width <= 1.6 * height
        solid = width > 0.4 * height and area > 0.75 * width * height  # an arrow head, a marker
        x, y = left + width / 2, top + height / 2
        if letter and not solid and not any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in lines):
            marks.append((left, top, width, height))
    return [
        (float(left), float(top), float(left + width), float(top + height))
        for left, top, width, height in marks
        if sum(abs(width - w) <= factor and abs(height - h) <= factor for _, _, w, h in marks) <= _ALIKE
    ]


@lru_cache(maxsize=1)
def _engine() -> Any:
    from rapidocr import RapidOCR

    threads = int(os.environ.get("OMP_NUM_THREADS", -1))  # onnxruntime does not look there itself; -1: all cores
    return RapidOCR(params={"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": threads})


def _by_tesseract(image: Image.Image) -> list[Line]:
    png = io.BytesIO()
    image.save(png, "PNG", compress_level=1)
    command = ["tesseract", "stdin", "stdout", "--psm", "11", "--dpi", "150", "-l", "eng", "tsv"]  # 11: sparse text
    done = subprocess.run(
        command, input=png.getvalue(), capture_output=True, timeout=_SECONDS,
        env={**os.environ, "OMP_THREAD_LIMIT": os.environ.get("OMP_NUM_THREADS", "1")},
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"tesseract failed: {done.stderr.decode(errors='replace').strip()[-300:]}")
    rows = csv.DictReader(io.StringIO(done.stdout.decode()), delimiter="\t", quoting=csv.QUOTE_NONE)
    words: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        if row["text"] and row["text"].strip():
            words.setdefault((row["block_num"], row["par_num"], row["line_num"]), []).append(row)
    return [_line_of(group) for group in words.values()]


def _line_of(words: list[dict[str, str]]) -> Line:
    left, top, width, height = (np.array([float(word[key]) for word in words]) for key in ("left", "top", "width", "height"))
    return Line(
        " ".join(word["text"] for word in words),
        (float(left.min()), float(top.min()), float((left + width).max()), float((top + height).max())),
        float(np.mean([float(word["conf"]) for word in words])) / 100,
    )
