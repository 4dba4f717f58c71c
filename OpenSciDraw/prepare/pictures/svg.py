"""An SVG file -> its picture. What could make the drawing endless, or read other files, is refused beforehand."""

from __future__ import annotations

import re
from io import BytesIO
from xml.parsers import expat

from PIL import Image

from OpenSciDraw.prepare.pictures.picture import RejectedPicture

_MAX_BYTES = 20 * 2**20
_MAX_DEPTH = 200  # of elements: the library that draws follows them by recursion
_CSS_PIXEL = 96.0  # an inch
_UNITS = {"": 1.0, "px": 1.0, "pt": 96 / 72, "in": 96.0, "cm": 96 / 2.54, "mm": 96 / 25.4, "pc": 16.0}
_INSIDE = re.compile(r"\s*(#|data:image/(png|jpe?g|gif|webp)\b|$)", re.IGNORECASE)
_CSS_OUTSIDE = re.compile(r"@import|url\(\s*[\"']?\s*(?!#|data:)", re.IGNORECASE)
_LINKS = ("a", "title", "metadata")  # elements whose references lead a reader somewhere and draw nothing


def draw_svg(data: bytes, dpi: int, max_side: int) -> Image.Image:
    """The picture on white, RGB.

    Raises:
        RejectedPicture: not an SVG, too deep, with entities, or with references to other files.
    """
    import resvg_py

    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        width, height = _check(data)
        scale = min(dpi / _CSS_PIXEL, max_side / max(width, height))
        text = data.decode("utf-8-sig")
        drawn = resvg_py.svg_to_bytes(svg_string=text, background="white", width=max(1, round(width * scale)))
        image = Image.open(BytesIO(bytes(drawn))).convert("RGB")
    except expat.ExpatError as error:
        raise RejectedPicture(f"SVG: {expat.ErrorString(error.code)}, line {error.lineno}") from error
    except ValueError as error:
        raise RejectedPicture(f"SVG: {str(error)[:200]}") from error
    image.thumbnail((max_side, max_side))  # a pixel more by rounding
    return image


def _check(data: bytes) -> tuple[float, float]:
    """Width and height in CSS pixels. ValueError or ExpatError when the file is not to be drawn."""
    parser = expat.ParserCreate()
    depth = 0
    root: dict[str, str] | None = None

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, root
        depth += 1
        tag = name.rpartition(":")[2]
        if root is None:
            if tag != "svg":
                raise ValueError(f"its root element is <{name[:50]}>")
            root = attributes
        if depth > _MAX_DEPTH:
            raise ValueError(f"elements nested deeper than {_MAX_DEPTH}")
        for key, value in attributes.items():
            is_reference = key.rpartition(":")[2] == "href" and tag not in _LINKS
            if is_reference and not _INSIDE.match(value) or _CSS_OUTSIDE.search(value):
                raise ValueError("it refers to other files")

    def end(_: str) -> None:
        nonlocal depth
        depth -= 1

    def text(part: str) -> None:
        if _CSS_OUTSIDE.search(part):
            raise ValueError("it refers to other files")

    def entity(*_: object) -> None:
        raise ValueError("it defines entities, which can grow without end")

    parser.buffer_text = True
    parser.buffer_size = 2**16
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.EntityDeclHandler = text, entity
    parser.Parse(data, True)
    assert root is not None  # expat has found a document
    return _size(root)


def _size(root: dict[str, str]) -> tuple[float, float]:
    """By the root's width and height, or by its viewBox; 1024 px where it says neither."""
    number = r"\+?(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)"
    sides = [re.fullmatch(rf"\s*{number}\s*([a-z]*)\s*", root.get(name, "")) for name in ("width", "height")]
    box = re.fullmatch(rf"\s*\S+?[\s,]+\S+?[\s,]+{number}[\s,]+{number}\s*", root.get("viewBox", ""))
    known = [float(side[1]) * _UNITS[side[2]] if side and side[2] in _UNITS else None for side in sides]
    width, height = known
    if width is None or height is None:
        across, down = (float(box[1]), float(box[2])) if box else (1024.0, 1024.0)
        if not (across > 0 and down > 0):
            raise ValueError("its viewBox is empty")
        if width is not None:
            height = width * down / across
        elif height is not None:
            width = height * across / down
        else:
            width, height = across, down
    if not (0 < width < 1e6 and 0 < height < 1e6):
        raise ValueError(f"a size of {width:g} x {height:g}")
    return width, height
