"""Text fidelity: the words that a caption puts in quotes, against the words that OCR reads in the picture.

A caption names the texts of its figure in quotes: 'Encoder', "Encoder", typographic quotes or LaTeX ``Encoder''. How
often it repeats a name says nothing of how often the name is drawn, so every phrase counts once. Phrases and readings
are split into words in one way (`words_of`) and compared as multisets T (caption) and R (read), without regard to order
or place:

    word_recall      sum |T & R| / sum |T|: words found, of those asked for (the measure of LongText-Bench)
    word_precision   words asked for, of those read. Numbers that the caption does not quote are left out: captions
                     rarely name the ticks of an axis.
    edit_similarity  1 - D(t, r) / max(|t|, |r|), the mean over the words t asked for, D the Levenshtein distance and r
                     the word read that was paired with t (0 without one): a word with a wrong letter earns the rest.
                     The formula is the "1 - N.E.D." of the ICDAR 2019 text competitions (Chng et al. 2019, RRC-ArT),
                     word by word. Pairs are one to one, most similar first.

`benchmarks/run_text_fidelity.py` measures what the readers themselves miss in faultless pictures.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from OpenSciDraw.evaluation.base import PictureMetric, Scores
from OpenSciDraw.reading.ocr import check_reader, read_lines, version_of
from OpenSciDraw.registry import METRICS

if TYPE_CHECKING:
    from OpenSciDraw.config import EvaluateConfig
    from OpenSciDraw.evaluation.examples import Example

# A straight quote opens where a word may begin and closes behind a word; between letters it is an apostrophe. So
# don't, users' and '90s open nothing. No phrase is longer than _LONGEST: a lone mark must not swallow a caption.
_LONGEST = 200
_OPENS = r"(?<![^\s(\[{<>/=\u2013\u2014-])"
_QUOTED = re.compile(
    "|".join(
        rf"{opening}(?=\S)((?:{inside}){{1,{_LONGEST}}})(?<=\S){closing}"
        for opening, inside, closing in (
            (r"``\s?", r"[^'`]|(?<=\w)'(?=\w)", r"''"),
            (r"(?<!`)`", r"[^'`]|(?<=\w)'(?=\w)", r"'"),
            (rf"{_OPENS}'", r"[^']|(?<=\w)'(?=\w)", r"'"),
            (rf'{_OPENS}"', r'[^"]', r'"'),
            ("\u201c", "[^\u201d]", "\u201d"),
            ("\u2018", "[^\u2019]|(?<=\\w)\u2019(?=\\w)", "\u2019"),
            ("\u201e", "[^\u201c\u201d]", "[\u201c\u201d]"),
            ("\u00ab\\s?", "[^\u00bb]", "\\s?\u00bb"),
        )
    )
)
_DENSE = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # scripts without spaces: every character is a word
_WORD = re.compile(rf"{_DENSE}|\d+(?:[.,]\d+)+(?![^\W_])|(?:(?!{_DENSE})[^\W_])+")
_DENSE_WORD, _NUMBER = re.compile(_DENSE), re.compile(r"\d+(?:[.,]\d+)*")
_LOOK_ALIKES = str.maketrans("1l0", "iio")


def quoted_phrases(caption: str) -> list[str]:
    """Every phrase that the caption has in quotes, as it stands there, once, in order."""
    found = (next(group for group in match.groups() if group) for match in _QUOTED.finditer(caption))
    return list(dict.fromkeys(found))


def words_of(text: str) -> list[str]:
    """Words of a text as they are compared: compatibility forms as usual letters (NFKC), without case, cut at everything
    that is neither letter nor digit. Numbers keep the point or comma between their digits; in scripts without spaces
    every character is a word."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def similarity(a: str, b: str) -> float:
    """1 - D / max(len): D is the Levenshtein distance, the fewest characters to insert, delete or replace; 1 for equal
    texts, two empty ones too."""
    if a == b:
        return 1.0
    above = list(range(len(b) + 1))
    for row, character in enumerate(a, 1):
        line = [row]
        for column, other in enumerate(b, 1):
            line.append(min(above[column] + 1, line[-1] + 1, above[column - 1] + (character != other)))
        above = line
    return 1 - above[-1] / max(len(a), len(b))


def compared(phrases: Sequence[str], lines: Sequence[str]) -> Scores:
    """(hits, total) of word_recall, word_precision and edit_similarity: `phrases` asked for, `lines` read.

    Where nothing is read, precision counts as many wrong words as were asked for: a blank picture is no better than a
    wrong one.
    """
    asked = [word for phrase in phrases for word in words_of(phrase)]
    read = [word for line in lines for word in words_of(line)]
    if not any(map(_DENSE_WORD.fullmatch, asked)):  # readers take squares and crosses for such characters
        read = [word for word in read if not _DENSE_WORD.fullmatch(word)]
    wanted, found = Counter(map(_alike, asked)), Counter(map(_alike, read))
    both = wanted & found
    extra = Counter(map(_alike, (word for word in read if not _NUMBER.fullmatch(word) or _alike(word) in wanted)))
    near = both.total() + _paired(list((wanted - both).elements()), list((found - both).elements()))
    return {
        "word_recall": (float(both.total()), float(wanted.total())),
        "word_precision": (float(both.total()), float(extra.total() or wanted.total())),
        "edit_similarity": (near, float(wanted.total())),
    }


def _alike(word: str) -> str:
    """Letters that many fonts draw alike are one: l, I and 1; o and 0."""
    return word.translate(_LOOK_ALIKES)


def _paired(asked: Sequence[str], read: Sequence[str]) -> float:
    """Sum of similarities of pairs, one to one, most similar first; ties by the words themselves, so that no order counts."""
    pairs = ((similarity(a, b), a, b, i, j) for i, a in enumerate(asked) for j, b in enumerate(read))
    total, taken_asked, taken_read = 0.0, set(), set()
    for value, _, _, i, j in sorted(pairs, reverse=True):
        if i not in taken_asked and j not in taken_read:
            total += value
            taken_asked.add(i)
            taken_read.add(j)
    return total


def text_fidelity(picture: Image.Image | None, caption: str, reader: str = "rapidocr") -> Scores:
    """(hits, total) of word_recall, word_precision and edit_similarity of an RGB picture for its caption.

    {} for a caption that has no words in quotes; a picture None has 0 hits of as many words as the caption asks for.

    Raises:
        UserError: the reader is unknown or not there.
    """
    phrases = quoted_phrases(caption)
    if not any(words_of(phrase) for phrase in phrases):
        return {}
    return compared(phrases, [] if picture is None else [line.text for line in read_lines(picture, reader)])


@METRICS.register("text")
class TextFidelity(PictureMetric):
    """word_recall, word_precision and edit_similarity by the reader `settings.reader`."""

    def __init__(self, settings: EvaluateConfig, folder: Path):
        super().__init__(settings, folder)
        check_reader(settings.reader)

    def identity(self) -> dict[str, Any]:
        return {"version": 1, "reader": version_of(self.settings.reader)}

    def score(self, picture: Image.Image | None, example: Example) -> Scores:
        return text_fidelity(picture, example.prompt, self.settings.reader)
