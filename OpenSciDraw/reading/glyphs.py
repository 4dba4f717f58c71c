"""Reading labels of drawn figures: each letter is compared with the letters of the drawing font at its own height.

Made for labels of one letter or a short word at 8 to 20 pixels, where OCR made for lines of text reads little. It knows no
expected text. Its bias: it knows one font, that of drawn/canvas.py, so it says nothing of text in other fonts.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from OpenSciDraw.drawn.canvas import font

ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits + "?<-()"
_SIDE = 20  # of the square that a glyph is compared in
_MIN_LIKENESS = 0.55  # correlation below which a mark is no letter
_FAINT = 0.3  # ink of a thin stroke, which still joins the strokes of one letter
_RARE = 0.04  # what a digit or sign must be more alike than a letter
# Letters that the font draws alike, or that differ in height alone, which one letter does not show.
_ALIKE = str.maketrans({"0": "O", "1": "I", "l": "I", "|": "I"})


def same_text(read: str, wanted: str) -> bool:
    """Equal, but for case, spaces and the look-alikes 0 and O, 1, l and I."""
    return _plain(read) == _plain(wanted)


def _plain(text: str) -> str:
    return "".join(text.split()).translate(_ALIKE).casefold()


def _square(ink: np.ndarray) -> np.ndarray:
    """(h, w) ink in 0..1, cut to its box -> (_SIDE, _SIDE) in a square of the longer side, mean 0 and norm 1."""
    height, width = ink.shape
    side = max(height, width)
    canvas = np.zeros((side, side), np.float32)
    y, x = (side - height) // 2, (side - width) // 2
    canvas[y : y + height, x : x + width] = ink
    small = np.asarray(Image.fromarray((canvas * 255).astype(np.uint8)).resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32)
    small -= small.mean()
    return (small / max(float(np.linalg.norm(small)), 1e-6)).ravel()


@lru_cache(maxsize=1)
def _templates() -> tuple[str, np.ndarray, np.ndarray]:
    """Letters, their squares (n, _SIDE^2) and their width over height."""
    face, rows, aspects = font(96), [], []
    for letter in ALPHABET:
        x0, y0, x1, y1 = face.getbbox(letter)
        image = Image.new("L", (round(x1 - x0) + 8, round(y1 - y0) + 8), 0)
        ImageDraw.Draw(image).text((4 - x0, 4 - y0), letter, fill=255, font=face)
        ink = np.asarray(image, np.float32) / 255
        ys, xs = np.nonzero(ink > 0.5)
        ink = ink[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        rows.append(_square(ink))
        aspects.append(ink.shape[1] / ink.shape[0])
    return ALPHABET, np.stack(rows), np.array(aspects)


@lru_cache(maxsize=1)
def _rare() -> np.ndarray:
    return np.array([letter.isdigit() or not letter.isalnum() for letter in ALPHABET], np.float32)


def read_letter(ink: np.ndarray) -> str:
    """The letter whose shape `ink` (h, w in 0..1, cut to its box) has most, or '' for a mark that is none."""
    letters, templates, aspects = _templates()
    likeness = templates @ _square(ink)
    ratio = ink.shape[1] / ink.shape[0]
    likeness = likeness - 0.15 * np.abs(np.log(aspects / ratio)) - _RARE * _rare()
    best = int(likeness.argmax())
    return letters[best] if likeness[best] >= _MIN_LIKENESS else ""


def read_text(ink: np.ndarray) -> str:
    """The words that `ink` (h, w in 0..1) shows, line by line; letters are parted at columns without ink.

    Letters that touch are parted at their thinnest column when the piece is wider than any letter.
    """
    return " ".join(filter(None, ("".join(_read_piece(rows[:, x0:x1]) for x0, x1 in _pieces(rows)) for rows in _lines(ink))))


def _lines(ink: np.ndarray) -> Sequence[np.ndarray]:
    return [ink[top:bottom] for top, bottom in line_bands(ink)]


def line_bands(ink: np.ndarray) -> list[tuple[int, int]]:
    """First and end of the rows of each line; a band too low for a line is the dots of the one below it."""
    bands = _runs(ink, 0.5, 1)
    tallest = max((y1 - y0 for y0, y1 in bands), default=0)
    lines: list[tuple[int, int]] = []
    top = None
    for y0, y1 in bands:
        top = y0 if top is None else top
        if y1 - y0 > 0.4 * tallest:
            lines.append((top, y1))
            top = None
    return lines


def _runs(ink: np.ndarray, above: float, axis: int) -> list[tuple[int, int]]:
    """First and end of every run of rows (axis 1) or columns (axis 0) that have ink above `above`."""
    marked = np.any(ink > above, axis=axis).astype(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marked, [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _read_piece(piece: np.ndarray) -> str:
    """One letter, or two that touch where the piece is none and wide enough for two."""
    own = np.nonzero((piece > 0.5).any(1))[0]
    if not len(own):
        return ""
    letter = read_letter(piece[own.min() : own.max() + 1])
    width = piece.shape[1]
    if letter or width < 0.9 * piece.shape[0]:
        return letter
    cut = width // 4 + int(piece[:, width // 4 : width - width // 4].sum(0).argmin())
    halves = (piece[:, :cut], piece[:, cut:])
    cropped = [half[(half > 0.5).any(1)][:, (half > 0.5).any(0)] for half in halves]
    return "".join(read_letter(half) if half.size else "" for half in cropped)


def _pieces(ink: np.ndarray) -> Sequence[tuple[int, int]]:
    pieces: list[tuple[int, int]] = []
    for x0, x1 in _runs(ink, _FAINT, 0):
        parts = max(1, round((x1 - x0) / (0.95 * ink.shape[0]))) if x1 - x0 > 1.45 * ink.shape[0] else 1
        cuts = [x0]
        for k in range(1, parts):
            middle, reach = x0 + (x1 - x0) * k / parts, (x1 - x0) / parts / 3
            low, high = int(middle - reach), int(middle + reach) + 1
            cuts.append(low + int(ink[:, low:high].sum(0).argmin()))
        pieces += list(zip(cuts, [*cuts[1:], x1], strict=True))
    return pieces
