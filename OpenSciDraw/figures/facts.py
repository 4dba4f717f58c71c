"""What lists and tables say of their rows beside captions: the quality tier and the kind, by the place of a row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.figures.found import IMAGE_COLUMNS
from OpenSciDraw.figures.rows import ARROW_ERRORS, columns_of, resolve, schema_of
from OpenSciDraw.figures.sources import LIST_NAMES, list_rows

TIERS, KINDS = ("quality", "quality_tier"), ("kind",)
Facts = tuple[str, str]  # tier, kind; '' where nothing is said


def row_facts(source: Path) -> dict[str, Facts]:
    """Tier and kind of the rows of a source's lists and tables: by 'file#row' of a table, by the picture's path of either.

    Lists and tables that cannot be read say nothing here; `list_figures` says why.
    """
    found: dict[str, Facts] = {}
    for file in _files(source):
        try:
            if file.suffix.lower() in (".parquet", ".arrow"):
                schema = schema_of(file)
                names = [name for name in schema.names if name in (*TIERS, *KINDS)]
                paths = [name for name in schema.names if name in IMAGE_COLUMNS and "string" in str(schema.field(name).type)]
                if names:
                    for number, values in enumerate(columns_of(file, [*names, *paths[:1]])):
                        row = dict(zip([*names, *paths[:1]], values, strict=True))
                        found[f"{file}#{number}"] = _facts(row)
                        _by_path(found, file, row, paths[:1])
            else:
                for _, listed in list_rows(file):
                    if not isinstance(listed, RejectedFigure):
                        _by_path(found, file, listed, IMAGE_COLUMNS)
        except ARROW_ERRORS:
            continue
    return {place: facts for place, facts in found.items() if any(facts)}


def _files(source: Path) -> Iterator[Path]:
    if source.is_file():
        yield from [source] if source.suffix.lower() in (".parquet", ".arrow", ".jsonl", ".csv") else []
        return
    for directory, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower() in LIST_NAMES or name.lower().endswith((".parquet", ".arrow")):
                yield Path(directory, name)


def _by_path(found: dict[str, Facts], file: Path, row: Mapping[str, Any], columns: tuple[str, ...] | list[str]) -> None:
    name = next((row[column] for column in columns if row.get(column)), None)
    try:
        if any(facts := _facts(row)):
            found[str(resolve(file.parent, name))] = facts
    except RejectedFigure:
        pass  # listing says so of the row


def _facts(row: Mapping[str, Any]) -> Facts:
    def text(names: tuple[str, ...]) -> str:
        value = next((row[name] for name in names if row.get(name)), "")
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

    return text(TIERS), text(KINDS)
