"""A picture file of a paper -> PNG or JPEG. Bitmaps stay as they are; PDF, EPS and SVG are drawn.

The format is told by the file's first bytes, not by its name. Drawn pictures lie on white and are cut to what
is drawn on the page, with a small margin; nothing drawn is cut off.
"""

from __future__ import annotations

import ctypes
import errno
import gzip
import os
import re
import shutil
import stat
import time
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from OpenSciDraw.figures.decode import RejectedFigure, decode_picture
from OpenSciDraw.prepare.isolation import TooMuch, run_program
from OpenSciDraw.prepare.pictures.picture import Picture, RejectedPicture
from OpenSciDraw.prepare.settings import Limits

_MARGIN = 0.01  # of the longer side of what is drawn, left around it
_PNG_LEVEL = 6
_JPEG = {"quality": 95, "subsampling": 0}
_POINT = 72.0  # PDF points an inch
_MAX_POINTS = 1e5  # of a page's side: no page is larger than 35 m
_BITMAPS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
_MAX_STARTS = 1024  # bytes in which a file must say what it is
_SHARE = 4  # a picture may take 1 / 4 of its paper's time
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
_UNITS = {"in": 72.0, "cm": 72 / 2.54, "mm": 72 / 25.4, "pt": 72 / 72.27, "pc": 12 * 72 / 72.27, "bp": 1.0, "": 1.0}
_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)\s*(?:[a-z]{2}\b)?)"
_BOX = re.compile(rf"(?:^|,)\s*(trim|viewport|bb)\s*=\s*\{{?\s*{_NUMBER}\s+{_NUMBER}\s+{_NUMBER}\s+{_NUMBER}\s*\}}?\s*(?:,|$)")
_GHOSTSCRIPT = (
    "-q", "-dSAFER", "-dBATCH", "-dNOPAUSE", "-dEPSCrop", "-sDEVICE=pdfwrite", "-dAutoRotatePages=/None",
    *(f"-dAutoFilter{kind}Images=false" for kind in ("Color", "Gray")),  # pictures inside stay as they are, no JPEG of them
    *(f"-d{kind}ImageFilter=/FlateEncode" for kind in ("Color", "Gray")),
    *(f"-dDownsample{kind}Images=false" for kind in ("Color", "Gray", "Mono")),
)  # fmt: skip


def render(path: Path, *, dpi: int, max_side: int, limits: Limits, scratch: Path, page: int = 1, options: str = "") -> Picture:
    """The picture of a file, without transparency, its longer side at most `max_side`.

    `page` and `options` are \\includegraphics' own; of these trim and viewport count, with clip, and an angle of
    quarter turns. `scratch` is a folder for files on the way; it need not exist.

    Raises:
        RejectedPicture: damaged, encrypted, too large, too slow, or a format that needs a program that is not here.
    """
    try:
        path = _plain(path, limits, scratch)
        with path.open("rb") as file:
            head = file.read(_MAX_STARTS)
        if head.startswith(_BITMAPS):  # first: their metadata may quote the marks of the others
            return _from_bitmap(path.read_bytes(), max_side, limits, options)
        if b"%PDF-" in head:
            return _from_pdf(path, dpi, max_side, page, options, limits.seconds / _SHARE)
        if head.startswith((b"%!", b"\xc5\xd0\xd3\xc6")) or b"%!PS" in head:
            pdf = _eps_to_pdf(path, scratch, limits)
            return _from_pdf(pdf, dpi, max_side, 1, options, limits.seconds / _SHARE)
        if b"<svg" in head or head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<?xml", b"<!DOCTYPE svg", b"<!--")):
            from OpenSciDraw.prepare.pictures.svg import draw_svg

            image = draw_svg(path.read_bytes(), dpi, max_side)
            return _as_png(_turned(_cut(image, _drawn_box(image)), options), vector=True)
        return _from_bitmap(path.read_bytes(), max_side, limits, options)
    except OSError as error:
        if error.errno == errno.ENOSPC:  # on the way to a picture: not the picture's fault
            raise
        raise RejectedPicture(f"unreadable file: {error.strerror or error}") from error
    except MemoryError as error:
        raise RejectedPicture("too large: not enough memory to draw it") from error


def _plain(path: Path, limits: Limits, scratch: Path) -> Path:
    """The file itself, or what is gzipped in it (figure.eps.gz), not larger than a file may be."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise RejectedPicture("not a regular file")
    if not status.st_size:
        raise RejectedPicture("empty file")
    if status.st_size > limits.file_bytes:
        raise RejectedPicture(f"too large: a file of {status.st_size} bytes, over {limits.file_bytes}")
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return path
    try:
        with gzip.open(path) as inner:
            data = inner.read(limits.file_bytes + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RejectedPicture(f"damaged: {error}") from error
    if len(data) > limits.file_bytes:
        raise RejectedPicture(f"too large: more than {limits.file_bytes} bytes when decompressed")
    plain = _new_file(scratch, "plain", "")
    plain.write_bytes(data)
    return plain


def _new_file(scratch: Path, stem: str, suffix: str) -> Path:
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch / f"{stem}{sum(1 for _ in scratch.iterdir())}{suffix}"


# -- bitmaps -----------------------------------------------------------------------------------
def _from_bitmap(data: bytes, max_side: int, limits: Limits, options: str) -> Picture:
    """PNG and JPEG unchanged, where every viewer shows the same and they are not too large; else what is seen, anew."""
    try:
        seen = decode_picture(data, limits.image_pixels, min_side=1, max_aspect_ratio=float("inf"))
    except RejectedFigure as error:
        raise RejectedPicture(str(error)) from error
    with Image.open(BytesIO(data)) as file:
        kind, density = file.format, file.info.get("dpi", (_POINT, _POINT))
        plain = file.mode in ("RGB", "L", "P", "1") and not file.has_transparency_data and file.size == seen.size
        plain = plain and not getattr(file, "is_animated", False) and file.getexif().get(0x0112, 1) == 1
    image = _turned(_clipped(seen, density, options), options)
    if max(image.size) > max_side:
        image = _shrunk(image, max_side)
    if image is seen and plain and kind in ("PNG", "JPEG"):
        return Picture(data, seen, vector=False)
    return _as_jpeg(image) if kind == "JPEG" else _as_png(image, vector=False)


def _clipped(image: Image.Image, density: tuple[float, float], options: str) -> Image.Image:
    """Cut as \\includegraphics' options say, which count in points: a bitmap's size is that in its dots per inch."""
    scales = [dots / _POINT if 1 <= dots <= 1e5 else 1.0 for dots in map(float, density)]
    left, bottom, right, top = crop_of(options, image.width / scales[0], image.height / scales[1])
    if not (left or bottom or right or top):
        return image
    box = (left * scales[0], top * scales[1], image.width - right * scales[0], image.height - bottom * scales[1])
    x0, y0, x1, y1 = (round(value) for value in box)
    return image.crop((x0, y0, x1, y1)) if x1 > x0 and y1 > y0 else image


def _shrunk(image: Image.Image, max_side: int) -> Image.Image:
    scale = max_side / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)


def _as_png(image: Image.Image, vector: bool) -> Picture:
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return Picture(buffer.getvalue(), image, vector)


def _as_jpeg(image: Image.Image) -> Picture:
    buffer = BytesIO()
    image.save(buffer, "JPEG", **_JPEG)
    return Picture(buffer.getvalue(), image, vector=False)


# -- PDF -----------------------------------------------------------------------------------------
def _from_pdf(path: Path, dpi: int, max_side: int, page: int, options: str, seconds: float) -> Picture:
    import pypdfium2

    try:
        with pypdfium2.PdfDocument(path) as document:
            if not 1 <= page <= len(document):
                raise RejectedPicture(f"PDF: page {page} of {len(document)}")
            image = _draw_page(document[page - 1], dpi, max_side, options, seconds)
    except pypdfium2.PdfiumError as error:
        raise RejectedPicture(f"damaged or encrypted PDF: {error}") from error
    return _as_png(_turned(image, options), vector=True)


def _draw_page(sheet: Any, dpi: int, max_side: int, options: str, seconds: float) -> Image.Image:
    """What is drawn on a page, at `dpi`, or less where that is more than `max_side`."""
    width, height = sheet.get_size()
    if not (0 < width < _MAX_POINTS and 0 < height < _MAX_POINTS):
        raise RejectedPicture(f"PDF: a page of {width:.0f} x {height:.0f} points")
    deadline = time.monotonic() + seconds
    crop = crop_of(options, width, height)
    image, scale = _draw(sheet, dpi, max_side, crop, deadline)
    box = _drawn_box(image)
    if scale < dpi / _POINT and max(box[2] - box[0], box[3] - box[1]) < 0.8 * max(image.size):
        # A small drawing on a page too large for `dpi`: the page was found to be empty around it, so draw that part.
        left, top, right, bottom = (value / scale for value in box)
        shown = (width - crop[0] - crop[2], height - crop[1] - crop[3])
        crop = (crop[0] + left, crop[1] + shown[1] - bottom, crop[2] + shown[0] - right, crop[3] + top)
        image, _ = _draw(sheet, dpi, max_side, crop, deadline)
        box = _drawn_box(image)
    return _cut(image, box)


def _draw(
    sheet: Any, dpi: int, max_side: int, crop: tuple[float, float, float, float], deadline: float
) -> tuple[Image.Image, float]:
    """A part of a page on white, and its pixels a point. `crop`: points to leave away (left, bottom, right, top)."""
    import pypdfium2
    import pypdfium2.raw as pdfium

    width, height = sheet.get_size()
    shown = (width - crop[0] - crop[2], height - crop[1] - crop[3])
    scale = min(dpi / _POINT, max_side / max(shown))
    pixels = [min(max_side, round(side * scale)) for side in shown]
    if min(pixels) < 1:
        raise RejectedPicture(f"PDF: a page of {width:.0f} x {height:.0f} points")
    bitmap = pypdfium2.PdfBitmap.new_native(*pixels, pdfium.FPDFBitmap_BGR)
    bitmap.fill_rect((255, 255, 255, 255), 0, 0, *pixels)
    # pdfium asks now and then whether to go on. Annotations are not drawn: they are no part of an included page.
    ask = pdfium.IFSDK_PAUSE._fields_[1][1](lambda _: time.monotonic() > deadline)
    place = (-round(crop[0] * scale), -round(crop[3] * scale), round(width * scale), round(height * scale))
    state = pdfium.FPDF_RenderPageBitmap_Start(bitmap, sheet, *place, 0, 0, ctypes.byref(pdfium.IFSDK_PAUSE(1, ask, None)))
    pdfium.FPDF_RenderPage_Close(sheet)
    if state == pdfium.FPDF_RENDER_TOBECONTINUED:
        raise RejectedPicture("PDF: not drawn in time")
    if state != pdfium.FPDF_RENDER_DONE:
        raise RejectedPicture("damaged PDF: its page cannot be drawn")
    return bitmap.to_pil().convert("RGB"), scale


def crop_of(options: str, width: float, height: float) -> tuple[float, float, float, float]:
    """Points to leave away (left, bottom, right, top) by trim or viewport with clip; none when they are odd."""
    if not re.search(r"(?:^|,)\s*clip\s*(?:=\s*true\s*)?(?:,|$)", options):
        return 0.0, 0.0, 0.0, 0.0
    if (found := _BOX.search(options)) is None:
        return 0.0, 0.0, 0.0, 0.0
    left, bottom, right, top = (_points(found[n]) for n in range(2, 6))
    if found[1] != "trim":
        right, top = width - right, height - top
    left, bottom, right, top = (max(0.0, value) for value in (left, bottom, right, top))
    return (left, bottom, right, top) if left + right < width and bottom + top < height else (0.0, 0.0, 0.0, 0.0)


def _points(length: str) -> float:
    """A TeX length in PDF points; they are the unit where none is given, or none that is known."""
    number = length.rstrip("abcdefghijklmnopqrstuvwxyz \t\n")
    return float(number) * _UNITS.get(length[len(number) :].strip(), 1.0)


def _turned(image: Image.Image, options: str) -> Image.Image:
    """By the `angle` of quarter turns, counter-clockwise as in LaTeX."""
    found = re.search(r"(?:^|,)\s*angle\s*=\s*\{?\s*([-+]?\d{1,4})(?:\.0*)?\s*\}?\s*(?:,|$)", options)
    angle = int(found[1]) % 360 if found else 0
    return image.transpose(_TURNS[angle]) if angle in _TURNS else image


def _drawn_box(image: Image.Image) -> tuple[int, int, int, int]:
    """What is not the page's white, and a margin: left, top, right, bottom. All of a picture that is all white."""
    drawn = np.asarray(image).min(axis=2) < 250
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    if not len(rows):
        return 0, 0, image.width, image.height
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    margin = max(2, round(_MARGIN * max(right - left, bottom - top)))
    return max(0, left - margin), max(0, top - margin), min(image.width, right + margin), min(image.height, bottom + margin)


def _cut(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    return image if box == (0, 0, *image.size) else image.crop(box)


# -- EPS -------------------------------------------------------------------------------------------
def _eps_to_pdf(path: Path, scratch: Path, limits: Limits) -> Path:
    """By ghostscript, which may read nothing but the file and write nothing but the PDF (-dSAFER)."""
    ghostscript = shutil.which("gs")
    if ghostscript is None:
        raise RejectedPicture("EPS: ghostscript (gs) is not here: install it to have EPS drawn")
    eps = _new_file(scratch, "eps", ".eps")
    eps.write_bytes(_with_box_first(path.read_bytes()))
    pdf = eps.with_suffix(".pdf").absolute()
    command = [ghostscript, *_GHOSTSCRIPT, f"-sOutputFile={pdf}", "-f", str(eps.absolute())]
    environment = {"PATH": os.environ.get("PATH", ""), "TMPDIR": str(scratch.absolute())}
    try:
        code, printed = run_program(
            command, seconds=limits.seconds / _SHARE, folder=scratch, environment=environment, file_bytes=limits.file_bytes
        )
    except TooMuch as error:
        raise RejectedPicture(f"EPS: ghostscript was {error}") from error
    if code or not pdf.exists():
        lines = [line for line in printed.splitlines() if line.strip()]
        raise RejectedPicture(f"EPS: ghostscript: {lines[0][:200] if lines else f'exit code {code}'}")
    return pdf


def _with_box_first(data: bytes) -> bytes:
    """An EPS as ghostscript sees its box: nothing stands before %!, and the box not at the end."""
    if data.startswith(b"\xc5\xd0\xd3\xc6"):  # it knows this header
        return data
    data = data[data.index(b"%!") :]
    later = rb"%%((?:HiRes)?BoundingBox):[ \t]*\(atend\)"
    boxes = dict(re.findall(rb"^%%((?:HiRes)?BoundingBox):[ \t]*([-+.\d][-+.\d \t]*)", data, re.MULTILINE))
    return re.sub(later, lambda found: b"%%" + found[1] + b": " + boxes.get(found[1], b"(atend)"), data)
