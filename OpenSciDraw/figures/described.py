"""What a source says of a figure beside its picture: captions with weights, an edit's boxes, its weight, notes about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.figures.edits import Boxes, boxes_in
from OpenSciDraw.figures.refs import FigureRef
from OpenSciDraw.utils.files import parse_json

CAPTION_COLUMNS = ("caption", "text", "prompt", "captions")
CAPTION_WEIGHTS = "caption_weights"  # of a row, beside a column with a list of captions
_MOST_CAPTIONS = 64


@dataclass(frozen=True)
class Wanted:
    """Which columns, or keys of a caption's .json, the config names. Nothing named: `caption` by CAPTION_COLUMNS, no weight."""

    captions: tuple[str, ...] = ()
    caption_weights: tuple[float, ...] = ()  # one for each of `captions`, or none
    lines: bool = False  # each line of a .txt or .caption is a caption
    weight: str | None = None
    optional: bool = False  # a figure without a caption is listed too, with "" as its caption
    notes: tuple[str, ...] = ()  # further columns or keys with texts about a figure

    def names(self, found: Iterable[str]) -> tuple[str, ...]:
        """The columns with captions among those found: all that are named, or the first that is known."""
        present = set(found)
        known = self.captions or tuple(name for name in CAPTION_COLUMNS if name in present)[:1]
        return tuple(name for name in known if name in present)


@dataclass(frozen=True)
class Described:
    """`captions` are at least one, each once; `weights` are theirs, of sum 1; `notes` are (column, text)."""

    captions: tuple[str, ...]
    weights: tuple[float, ...]
    boxes: Boxes = ()
    weight: float = 1.0
    notes: tuple[tuple[str, str], ...] = ()

    def of(self, ref: FigureRef) -> FigureRef:
        """`ref` with what is said of it; with one caption alone nothing is said of several."""
        ref = replace(ref, caption=self.captions[0], edit_boxes=self.boxes, weight=self.weight, notes=self.notes)
        return ref if len(self.captions) == 1 else replace(ref, captions=self.captions, caption_weights=self.weights)

NOTHING = Described(("",), (1.0,))  # of a figure that may be without a caption


class NoCaption(RejectedFigure):
    """There is none, or it is empty."""


def described_row(row: Mapping[str, Any], names: Sequence[str], wanted: Wanted) -> Described:
    """What a row of a list or table, or a caption's .json, says. Raises RejectedFigure with the reason."""
    try:
        captions, weights = _captions(row, names, wanted)
    except NoCaption:
        if not wanted.optional:
            raise
        captions, weights = NOTHING.captions, NOTHING.weights
    return Described(captions, weights, boxes_in(row), weight_in(row, wanted.weight), tuple(_notes(row, wanted.notes)))


def described_text(data: bytes, wanted: Wanted) -> Described:
    """What a caption's .txt says. Raises RejectedFigure."""
    try:
        text = clean_caption(data)
    except NoCaption:
        if not wanted.optional:
            raise
        return NOTHING
    lines = [line for line in text.split("\n") if line.strip()] if wanted.lines else [text]
    return Described(*_merged([(line, 1.0) for line in lines]))


def described_json(name: str, data: bytes, wanted: Wanted) -> Described:
    """What x.json says of x.png. Raises RejectedFigure."""
    try:
        values = parse_json(data)
    except UnicodeDecodeError as error:
        raise RejectedFigure(f"caption not UTF-8: {name}: {error}") from error
    except ValueError as error:
        raise RejectedFigure(f"caption unreadable: {name}: {error}") from error
    names = wanted.names(values) if isinstance(values, dict) else ()
    if not names and not (wanted.optional and isinstance(values, dict)):
        raise RejectedFigure(f"no caption: {name} has no key {' or '.join(wanted.captions or CAPTION_COLUMNS)}")
    return described_row(values, names, wanted)


def weight_in(row: Mapping[str, Any], column: str | None) -> float:
    """The weight of a figure in the loss; 1 where its row has none. Raises RejectedFigure when it is no number of at least 0."""
    value = row.get(column) if column is not None else None
    if value is None or value in ("", b""):
        return 1.0
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise RejectedFigure(f"weight: {column} = {value!r:.80} is no number") from error
    if not (math.isfinite(number) and number >= 0):
        raise RejectedFigure(f"weight: {column} = {number:g}, and a weight is a number of at least 0")
    return number


def _notes(row: Mapping[str, Any], columns: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in columns:
        cell = row.get(name)
        values = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value
                  for value in (cell if isinstance(cell, (list, tuple)) else [cell])]  # fmt: skip
        texts = [text.strip() for text in values if isinstance(text, str) and text.strip()]
        if texts:
            yield name, "; ".join(texts)


def _captions(row: Mapping[str, Any], names: Sequence[str], wanted: Wanted) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """All captions of the columns `names`; empty cells count for nothing where there are others."""
    of_column = dict(zip(wanted.captions, wanted.caption_weights, strict=False))
    found: list[tuple[str, float]] = []
    problem: RejectedFigure | None = None
    for name in names:
        cell = row.get(name)
        if not isinstance(cell, (list, tuple)):
            texts, shares = [cell], [1.0]
        else:
            texts, shares = list(cell), _own_weights(row.get(CAPTION_WEIGHTS) if len(names) == 1 else None, len(cell))
        for text, share in zip(texts, shares, strict=True):
            try:
                found.append((clean_caption(text), share * of_column.get(name, 1.0)))
            except RejectedFigure as error:
                problem = problem or error
    if not found:
        raise problem or NoCaption("no caption")
    return _merged(found)


def _own_weights(value: object, count: int) -> list[float]:
    """Weights of a list of captions, of sum 1: alike, or as the row's caption_weights say."""
    if value is None:
        return [1 / count] * count
    try:
        weights = [float(number) for number in value]  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise RejectedFigure(f"{CAPTION_WEIGHTS}: {value!r:.80} is no list of numbers") from error
    total = sum(weights)
    if len(weights) != count or not math.isfinite(total) or min(weights, default=0) < 0 or total <= 0:
        raise RejectedFigure(f"{CAPTION_WEIGHTS}: {weights!r:.80} for {count} captions: one number >= 0 for each, not all 0")
    return [weight / total for weight in weights]


def _merged(found: Sequence[tuple[str, float]]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Each caption once, with weights of sum 1; those of weight 0 are none."""
    if len(found) > _MOST_CAPTIONS:
        raise RejectedFigure(f"captions: {len(found)} of them, at most {_MOST_CAPTIONS}")
    weights: dict[str, float] = {}
    for text, weight in found:
        weights[text] = weights.get(text, 0.0) + weight
    kept = {text: weight for text, weight in weights.items() if weight > 0} or dict.fromkeys(weights, 1.0)
    total = sum(kept.values())
    return tuple(kept), tuple(weight / total for weight in kept.values())


def clean_caption(raw: object) -> str:
    """A caption, as a text or UTF-8 bytes, without blanks around it; lines end as on Unix, whatever wrote the file.

    Raises RejectedFigure when there is no text or it is not Unicode.
    """
    try:
        caption = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
        if not isinstance(caption, str):
            raise NoCaption("no caption") if raw is None else RejectedFigure(f"no caption: {type(raw).__name__}, not a text")
        caption.encode()
    except UnicodeError as error:
        raise RejectedFigure(f"caption not UTF-8: {error.reason}") from error  # type: ignore[attr-defined]
    if not (caption := caption.replace("\r\n", "\n").replace("\r", "\n").strip()):
        raise NoCaption("empty caption")
    return caption
