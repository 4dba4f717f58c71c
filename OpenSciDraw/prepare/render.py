"""A picture file of a paper -> PNG or JPEG. Bitmaps stay as they are; PDF, EPS and SVG are drawn.

The format is told by the file's first bytes, not by its name. Drawn pictures lie on white and are cut to what
is drawn on the page, with a small margin; nothing drawn is cut off.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from OpenSciDraw.datasets.decode import RejectedFigure, decode_picture
from OpenSciDraw.prepare.settings import Limits

_MARGIN = 0.01  # of the longer side, left around what is drawn
_PNG_LEVEL = 6
_POINT = 72.0  # PDF points an inch
_MAX_POINTS = 1e5  # of a page's side: no page is larger than 35 m
_SVG_BAD = re.compile(  # entities can be bombs; a file that it names could be any on this machine
    rb"<!ENTITY|<!DOCTYPE[^>]*\[|<(?:\w+:)?(?:image|use|feImage)\b[^>]*href\s*=\s*[\"'](?!#|data:)|url\(\s*[\"']?(?!#|data:)",
    re.IGNORECASE,
)
_MAX_SVG_BYTES = 20 * 2**20


class RejectedPicture(ValueError):
    """A picture that cannot be used. The message is the reason: 'kind: details'."""


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG file's bytes, its pixels (RGB) and whether it was drawn from a vector file."""

    data: bytes
    image: Image.Image
    vector: bool

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height


def render(path: Path, *, dpi: int, max_side: int, limits: Limits, scratch: Path, page: int = 1, options: str = "") -> Picture:
    """The picture of a file. `page` and `options` (trim, viewport, angle) are \\includegraphics' own; trim counts with clip.

    Raises:
        RejectedPicture: damaged, encrypted, empty, too large, or a format that needs a program that is not here.
    """
    if path.stat().st_size > limits.file_bytes:
        raise RejectedPicture(f"too large: a file of {path.stat().st_size} bytes, over {limits.file_bytes}")
    with path.open("rb") as file:
        head = file.read(1024)
    if b"%PDF-" in head:
        return _from_pdf(path, dpi, max_side, page, options)
    if head.startswith((b"%!", b"\xc5\xd0\xd3\xc6", b"\x04%!")):
        return _from_pdf(_eps_to_pdf(path, scratch, limits), dpi, max_side, 1, options)
    if b"<svg" in head or head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<?xml", b"<!DOCTYPE svg", b"<!--")):
        return _from_svg(path, dpi, max_side)
    return _from_bitmap(path.read_bytes(), max_side, limits)


# -- bitmaps -----------------------------------------------------------------------------------
def _from_bitmap(data: bytes, max_side: int, limits: Limits) -> Picture:
    """PNG and JPEG unchanged, where every viewer shows the same and they are not too large; else a PNG of what is seen."""
    try:
        image = decode_picture(data, limits.image_pixels, min_side=1, max_aspect_ratio=float("inf"))
    except RejectedFigure as error:
        raise RejectedPicture(str(error)) from error
    if max(image.size) > max_side:
        return _as_png(_shrunk(image, max_side), vector=False)
    if data.startswith((b"\x89PNG", b"\xff\xd8\xff")):
        return Picture(data, image, vector=False)
    return _as_png(image, vector=False)


def _shrunk(image: Image.Image, max_side: int) -> Image.Image:
    scale = max_side / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)


def _as_png(image: Image.Image, vector: bool) -> Picture:
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return Picture(buffer.getvalue(), image, vector)


# -- PDF -----------------------------------------------------------------------------------------
def _from_pdf(path: Path, dpi: int, max_side: int, page: int, options: str) -> Picture:
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(path)
        if not 1 <= page <= len(document):
            raise RejectedPicture(f"PDF: page {page} of {len(document)}")
        sheet = document[page - 1]
        width, height = sheet.get_size()
        if not (0 < width < _MAX_POINTS and 0 < height < _MAX_POINTS):
            raise RejectedPicture(f"PDF: a page of {width:.0f} x {height:.0f} points")
        crop = _crop(options, width, height)
        shown = (width - crop[0] - crop[2], height - crop[1] - crop[3])
        scale = min(dpi / _POINT, max_side / max(shown))
        if min(shown) * scale < 1:
            raise RejectedPicture(f"PDF: a page of {width:.0f} x {height:.0f} points")
        image = sheet.render(scale=scale, crop=crop, fill_color=(255, 255, 255, 255)).to_pil().convert("RGB")
    except pypdfium2.PdfiumError as error:
        raise RejectedPicture(f"damaged or encrypted PDF: {error}") from error
    return _as_png(_turned(_trimmed(image), options), vector=True)


def _crop(options: str, width: float, height: float) -> tuple[float, float, float, float]:
    """Points to leave away (left, bottom, right, top) by \\includegraphics' trim and viewport; all kept when they are odd."""
    values = None
    if re.search(r"(?:^|,)\s*clip(?:\s*=\s*true)?\s*(?:,|$)", options) or "viewport" in options:
        if found := re.search(r"(trim|viewport|bb)\s*=\s*\{?\s*((?:-?[\d.]+\s*[a-z]*\s+){3}-?[\d.]+\s*[a-z]*)", options):
            values = [_points(word) for word in re.findall(r"-?[\d.]+\s*[a-z]*", found[2])]
            if len(values) == 4 and found[1] != "trim":
                values = [values[0], values[1], width - values[2], height - values[3]]
    if not values or len(values) != 4:
        return 0.0, 0.0, 0.0, 0.0
    left, bottom, right, top = (max(0.0, value) for value in values)
    return (left, bottom, right, top) if left + right < width and bottom + top < height else (0.0, 0.0, 0.0, 0.0)


def _points(length: str) -> float:
    """A TeX length in PDF points; big points where no unit is given."""
    units = {"in": 72.0, "cm": 72 / 2.54, "mm": 72 / 25.4, "pt": 72 / 72.27, "pc": 12 * 72 / 72.27, "bp": 1.0, "": 1.0}
    found = re.fullmatch(r"(-?\d*\.?\d*)\s*([a-z]*)", length.strip())
    if found is None or found[1] in ("", "-", ".", "-."):
        return 0.0
    return float(found[1]) * units.get(found[2], 1.0)


def _turned(image: Image.Image, options: str) -> Image.Image:
    """By the `angle` of quarter turns, counter-clockwise as in LaTeX."""
    found = re.search(r"(?:^|,)\s*angle\s*=\s*(-?\d+)", options)
    quarter = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    return image.transpose(quarter[int(found[1]) % 360]) if found and int(found[1]) % 360 in quarter else image


def _trimmed(image: Image.Image) -> Image.Image:
    """Cut to what is not the page's white, and a margin. A picture that is all white stays."""
    drawn = np.asarray(image).min(axis=2) < 250
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    if not len(rows):
        return image
    margin = max(2, round(_MARGIN * max(columns[-1] - columns[0], rows[-1] - rows[0])))
    left, top = max(0, int(columns[0]) - margin), max(0, int(rows[0]) - margin)
    right, bottom = min(image.width, int(columns[-1]) + 1 + margin), min(image.height, int(rows[-1]) + 1 + margin)
    return image.crop((left, top, right, bottom))


# -- EPS and SVG -----------------------------------------------------------------------------------
def _eps_to_pdf(path: Path, scratch: Path, limits: Limits) -> Path:
    """By ghostscript, which may read nothing but the file (-dSAFER)."""
    ghostscript = shutil.which("gs")
    if ghostscript is None:
        raise RejectedPicture("EPS: ghostscript (gs) is not here: install it to have EPS drawn")
    scratch.mkdir(parents=True, exist_ok=True)
    pdf = scratch / f"eps{sum(1 for _ in scratch.glob('eps*.pdf'))}.pdf"
    command = [
        ghostscript,
        "-q",
        "-dSAFER",
        "-dBATCH",
        "-dNOPAUSE",
        "-dEPSCrop",
        "-sDEVICE=pdfwrite",
        f"-sOutputFile={pdf}",
        str(path),
    ]
    try:
        done = subprocess.run(
            command,
            timeout=limits.seconds / 4,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RejectedPicture("EPS: ghostscript was not done in time") from error
    if done.returncode or not pdf.exists():
        lines = done.stdout.decode("utf-8", "replace").splitlines()
        raise RejectedPicture(f"EPS: ghostscript: {lines[0][:200] if lines else done.returncode}")
    return pdf


def _from_svg(path: Path, dpi: int, max_side: int) -> Picture:
    import resvg_py

    if path.stat().st_size > _MAX_SVG_BYTES:
        raise RejectedPicture(f"SVG: larger than {_MAX_SVG_BYTES} bytes")
    data = path.read_bytes()
    if _SVG_BAD.search(data):
        raise RejectedPicture("SVG: it defines entities or refers to other files")
    try:
        text = data.decode("utf-8-sig")
        width, height = _svg_size(text)
        scale = min(dpi / 96, max_side / max(width, height))  # CSS: 96 px an inch
        drawn = resvg_py.svg_to_bytes(svg_string=text, background="white", width=max(1, round(width * scale)))
    except ValueError as error:
        raise RejectedPicture(f"SVG: {str(error)[:200]}") from error
    image = Image.open(BytesIO(bytes(drawn))).convert("RGB")
    return _as_png(_trimmed(_shrunk(image, max_side) if max(image.size) > max_side else image), vector=True)


def _svg_size(text: str) -> tuple[float, float]:
    """Width and height in CSS pixels, by the root's attributes or its viewBox; a guess of 1024 where it says neither."""
    root = re.search(r"<svg\b[^>]*>", text)
    tag = root[0] if root else ""
    units = {"": 1.0, "px": 1.0, "pt": 96 / 72, "in": 96.0, "cm": 96 / 2.54, "mm": 96 / 25.4, "pc": 16.0}
    sides = [re.search(rf"\b{name}\s*=\s*[\"']\s*([\d.]+)\s*([a-z]*)\s*[\"']", tag) for name in ("width", "height")]
    if all(side is not None and side[2] in units for side in sides):
        width, height = (float(side[1]) * units[side[2]] for side in sides if side is not None)
    elif box := re.search(r"viewBox\s*=\s*[\"']\s*[-\d.eE]+[\s,]+[-\d.eE]+[\s,]+([\d.eE]+)[\s,]+([\d.eE]+)", tag):
        width, height = float(box[1]), float(box[2])
    else:
        width = height = 1024.0
    if not (0 < width < 1e6 and 0 < height < 1e6):
        raise ValueError(f"a size of {width:g} x {height:g}")
    return width, height
