"""Texts: which reading of them counts, and the size and place at which a font covers their ink.

Labels are read letter by letter (reading/glyphs.py), which knows one font and is best for letters that stand alone, or by
OCR, which is best for words. What glyphs read is drawn again in their font: where that does not look like the picture's ink,
it was no text of that font.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
from PIL import Image, ImageDraw

from OpenSciDraw.drawn.canvas import font
from OpenSciDraw.reading.figure import Work
from OpenSciDraw.reading.glyphs import line_bands, read_text
from OpenSciDraw.reading.ocr import Line, read_lines
from OpenSciDraw.vectorize.figure import Box, Rgb, TextLine, clean

_LEAST_SURE = 0.55  # correlation with the drawn font below which letters are no text; OCR's own confidence likewise
_AT = 100  # px, font size of measurements
_TALL = 1.5  # height / width from which a line of several letters reads upwards
_ARROWS = "→←↑↓↔⇒⇐▶◀► "  # which OCR may take into the line beside them
_ONE_FORM = "cCkKoOpPsSuUvVwWxXzZ"  # letters whose cases differ in height alone
_ONE_SIZE = 0.12  # sizes that differ by less than this share are one


def has_ocr() -> bool:
    return find_spec("rapidocr") is not None and find_spec("onnxruntime") is not None


def ocr_lines(picture: Image.Image) -> list[Line]:
    """Lines that OCR is sure of, with visible text."""
    found = [replace(line, text=clean(line.text.strip(_ARROWS))) for line in read_lines(picture)]
    return [line for line in found if line.text and line.confidence >= _LEAST_SURE]


@lru_cache(maxsize=4096)
def extents(text: str) -> tuple[float, float, float, float]:
    """The ink of a line about its baseline, in font sizes: left, top (up is negative), right, bottom."""
    x0, y0, x1, y1 = font(_AT).getbbox(text, anchor="ls")
    return x0 / _AT, y0 / _AT, max(x1, x0 + 1) / _AT, max(y1, y0 + 1) / _AT


def placed(text: str, ink: Box, color: Rgb, by: str) -> TextLine:
    """A line of text that covers the box of its ink: size by its height, or less where it would become too wide."""
    upward = len(text) > 1 and ink[3] - ink[1] > _TALL * (ink[2] - ink[0])
    left, top, right, bottom = extents(text)
    across, high = ink[2] - ink[0], ink[3] - ink[1]
    if upward:
        across, high = high, across
    size = high / (bottom - top)
    if len(text) > 1:
        size = min(size, 1.08 * across / (right - left))
    if upward:
        baseline = ink[0] + (high - (bottom - top) * size) / 2 - top * size
        return TextLine(text, (ink[1] + ink[3]) / 2, baseline, size, color, ink, by, True)
    middle = (ink[1] + ink[3]) / 2
    return TextLine(text, (ink[0] + ink[2]) / 2, middle - (top + bottom) / 2 * size, size, color, ink, by)


def of_one_size(lines: Sequence[TextLine]) -> list[TextLine]:
    """The lines, with sizes that hardly differ made equal: a figure has few font sizes."""
    order = sorted(range(len(lines)), key=lambda k: lines[k].size)
    out, group = list(lines), list[int]()
    for k in [*order, -1]:
        if group and (k < 0 or lines[k].size > (1 + _ONE_SIZE) * lines[group[0]].size):
            size = float(np.median([lines[i].size for i in group]))
            for i in group:
                out[i] = replace(lines[i], size=size, y=_baseline(lines[i], size))
            group = []
        group.append(k)
    return out


def _baseline(line: TextLine, size: float) -> float:
    """The baseline at another size with the ink's middle where it was."""
    _, top, _, bottom = extents(line.text)
    return line.y + (top + bottom) / 2 * (line.size - size)


def by_glyphs(ink: np.ndarray, corner: tuple[float, float], work: Work) -> tuple[list[TextLine], float]:
    """Lines of text that `ink` (h, w, 0..1, in work pixels, whose box begins at `corner`) shows, and how sure they are.

    Sure is the least correlation, over the lines, of the ink with the text drawn in the font of the glyphs.
    """
    lines, sure = [], 1.0
    for top, bottom in line_bands(ink):
        text = clean(read_text(ink[top:bottom]))
        columns = np.flatnonzero((ink[top:bottom] > 0.4).any(0))
        rows = np.flatnonzero((ink[top:bottom] > 0.4).any(1))
        if not text or not len(columns):
            continue
        part = ink[top + rows[0] : top + rows[-1] + 1, columns[0] : columns[-1] + 1]
        text, like = _in_case(text, part)
        sure = min(sure, like)
        x, y = corner[0] + columns[0], corner[1] + top + rows[0]
        box = (x, y, x + part.shape[1], y + part.shape[0])
        lines.append(placed(text, _scaled(box, work.scale), ink_color(work, box), "glyphs"))
    return lines, sure if lines else 0.0


def _in_case(text: str, ink: np.ndarray) -> tuple[str, float]:
    """The text with each letter in the case that the line's ink bears out, and its likeness.

    One letter alone does not show its height; a capital is likelier in a figure, and its own comparison has been made.
    """
    if len(text) == 1:
        return (text.upper() if text in _ONE_FORM else text), 1.0
    best = likeness(text, ink) - _oddity(text)
    for k, letter in enumerate(text):
        alike = "Ili" if letter in "Ili" else letter.swapcase() if letter in _ONE_FORM else ""
        for other in alike.replace(letter, ""):
            changed = text[:k] + other + text[k + 1 :]
            like = likeness(changed, ink) - _oddity(changed)
            if like > best:
                text, best = changed, like
    return text, best + _oddity(text)


def _oddity(text: str) -> float:
    """What capitals inside a word of small letters cost, as few words have them."""
    words = text.split()
    return 0.02 * sum(letter.isupper() for word in words if any(map(str.islower, word)) for letter in word[1:])


def likeness(text: str, ink: np.ndarray) -> float:
    """Correlation of ink (h, w), cut to its box, with the text drawn in the glyphs' font into the same box."""
    x0, y0, x1, y1 = font(_AT).getbbox(text)
    drawn = Image.new("L", (max(1, round(x1 - x0)), max(1, round(y1 - y0))), 0)
    ImageDraw.Draw(drawn).text((-x0, -y0), text, fill=255, font=font(_AT))
    box = drawn.getbbox()
    small = drawn.crop(box).resize((ink.shape[1], ink.shape[0]), Image.Resampling.BOX)
    a, b = np.asarray(small, np.float32).ravel(), ink.astype(np.float32).ravel()
    if a.std() < 1e-3 or b.std() < 1e-3:  # a bar fills its box
        return 1.0 if abs(a.mean() / 255 - b.mean()) < 0.3 else 0.0
    return float(np.corrcoef(a, b)[0, 1])


def by_ocr(line: Line, work: Work) -> TextLine:
    """A line of OCR at the ink in its box, which OCR gives with some paper around it."""
    x0, y0, x1, y1 = (round(v * work.scale) for v in line.box)
    luma = work.luma[max(0, y0) : y1, max(0, x0) : x1]
    box = (float(x0), float(y0), float(x1), float(y1))
    if luma.size:
        ink = np.abs(luma - float(np.median(luma)))
        marked = ink > 0.4 * max(40.0, float(ink.max()))
        rows, columns = np.flatnonzero(marked.sum(1) > 1), np.flatnonzero(marked.sum(0) > 1)
        if len(rows) and len(columns):
            box = (max(0, x0) + float(columns[0]), max(0, y0) + float(rows[0]),
                   max(0, x0) + float(columns[-1] + 1), max(0, y0) + float(rows[-1] + 1))  # fmt: skip
    return placed(line.text, _scaled(box, work.scale), ink_color(work, box), "ocr")


def chosen(glyphs: tuple[list[TextLine], float], ocr: Sequence[TextLine]) -> list[TextLine]:
    """Of a shape's two readings the one that counts: words by OCR, where it was run, and letters that stand alone by glyphs."""
    lines, sure = glyphs
    if ocr and (sure < _LEAST_SURE or any(len(line.text) > 1 for line in ocr)):
        return sorted(ocr, key=lambda line: line.box[1])
    return lines if sure >= _LEAST_SURE else []


def ink_color(work: Work, box: Box) -> Rgb:
    """Colour of the text in a box of work pixels: that of the pixels farthest from the most frequent colour."""
    x0, y0, x1, y1 = (round(v) for v in box)
    pixels = work.rgb[max(0, y0) : max(1, y1), max(0, x0) : max(1, x1)].reshape(-1, 3)
    around = work.rgb[max(0, y0 - 3) : y1 + 3, max(0, x0 - 3) : x1 + 3].reshape(-1, 3)
    if not len(pixels):
        return 0, 0, 0
    apart = np.abs(pixels - np.median(around, axis=0)).max(1)
    return rgb(np.median(pixels[apart >= 0.85 * apart.max()], axis=0))


def rgb(color: np.ndarray) -> Rgb:
    red, green, blue = (int(v) for v in np.clip(np.round(color), 0, 255))
    return red, green, blue


def _scaled(box: Box, scale: float) -> Box:
    return box[0] / scale, box[1] / scale, box[2] / scale, box[3] / scale
