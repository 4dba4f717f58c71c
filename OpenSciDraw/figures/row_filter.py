"""Which rows of a list or table of figures count, by their own columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.edits import REFERENCE_COLUMNS

QUALITIES = ("low", "medium", "high")  # tiers of `scienceflow prepare`
_SPLIT, _QUALITY_COLUMNS = "split", ("quality", "quality_tier")


class RowFilter:
    """Which rows of lists and tables count, by their own columns: `where` (column: value, or values) and a least quality."""

    def __init__(self, min_quality: str | None, where: Mapping[str, Any]):
        self.min_quality, self.where = min_quality, where
        self._qualities = QUALITIES[QUALITIES.index(min_quality) :] if min_quality is not None else ()
        self._splits: Counter[str] = Counter()

    def columns(self, found: Iterable[str], file: Path) -> list[str]:
        """Those of the columns of `file` that decide. Raises UserError when one that the config asks for is not there."""
        present = list(found)
        quality = [name for name in _QUALITY_COLUMNS if name in present][:1] if self.min_quality else []
        if self.min_quality and not quality:
            raise self._missing(f"min_quality = {self.min_quality!r}", " or ".join(_QUALITY_COLUMNS), file, present)
        for name in self.where:
            if name not in present:
                raise self._missing(f"where = {dict(self.where)!r}", name, file, present)
        own = [_SPLIT] if _SPLIT in present else []
        own += [name for name in ("bucket_w", "bucket_h") if name in present]
        return list(dict.fromkeys([*quality, *self.where, *own]))

    @staticmethod
    def _missing(key: str, column: str, file: Path, present: Sequence[str]) -> UserError:
        there = f"It has: {', '.join(present)}. " if present else ""
        return UserError(f"encode.{key}: {file} has no column {column}. {there}Leave the key out, or name a column that is there.")

    def require_none(self, folder: Path) -> None:
        """Raises UserError when pictures without a list are to be filtered: nothing says what they are."""
        if self.min_quality or self.where:
            self.columns([], folder)

    def reason(self, row: Mapping[str, Any]) -> str | None:
        """Why a row is left out; None where it counts."""
        for name, wanted in self.where.items():
            if not any(_is_same(row.get(name), value) for value in (wanted if isinstance(wanted, (list, tuple)) else [wanted])):
                return f"{name}: {_as_text(row.get(name))}, encode.where asks for {wanted!r}"
        if self._qualities:
            found = next((row[name] for name in _QUALITY_COLUMNS if name in row), None)
            is_edit = any(row.get(name) not in (None, "", b"", []) for name in REFERENCE_COLUMNS)
            tier = _as_text(found)
            if tier.lower() not in self._qualities and not (is_edit and found in (None, "", b"")):  # published edits have no tier
                return f"quality: {tier}, under encode.min_quality"
        if row.get(_SPLIT) is not None:
            self._splits[_as_text(row[_SPLIT])] += 1
        return None

    def require_one_split(self, source: str | Path) -> None:
        """Raises UserError when the rows that count are of several splits, which nobody chose."""
        if len(self._splits) > 1 and _SPLIT not in self.where:
            counts = ", ".join(f"{name} ({count})" for name, count in self._splits.most_common())
            first = self._splits.most_common(1)[0][0]
            raise UserError(
                f"{source} holds several splits: {counts}. Choose: encode.where = dict(split={first!r}), or a list of names."
            )


def _as_text(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _is_same(value: object, wanted: object) -> bool:
    """CSV knows texts alone, and Parquet's come as bytes."""
    return value == wanted or _as_text(value).lower() == _as_text(wanted).lower()
