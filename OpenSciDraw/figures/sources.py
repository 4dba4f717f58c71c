"""How each kind of figure source is listed: folders with captions beside pictures, JSON lines, CSV, Parquet, Arrow."""

from __future__ import annotations

import csv
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.figures.described import NOTHING, Described, Wanted, described_json, described_text
from OpenSciDraw.figures.edits import beside, masks_beside
from OpenSciDraw.figures.found import (
    OTHER,
    PICTURES,
    VECTOR,
    Listing,
    add_path_row,
    names_in,
)
from OpenSciDraw.figures.tables import add_table
from OpenSciDraw.figures.tars import CAPTION_FILES, COMPRESSED, add_tar
from OpenSciDraw.utils.files import parse_json

_LOG = logging.getLogger("OpenSciDraw")
LIST_NAMES = ("metadata.jsonl", "metadata.csv", "captions.jsonl", "captions.csv")
_MAX_CSV_FIELD = 1 << 24  # characters


def scan(listing: Listing, path: Path) -> None:
    """List a file or folder. Raises UserError when it cannot be read or is of a kind that is not a source."""
    try:
        if path.is_dir():
            _scan_folder(listing, path)
        elif path.suffix.lower() == ".jsonl":
            _add_rows(listing, path, jsonl_rows(path))
        elif path.suffix.lower() == ".csv":
            _add_rows(listing, path, _csv_rows(path))
        elif path.suffix.lower() in (".parquet", ".arrow"):
            add_table(listing, path)
        elif path.name.lower().endswith((".tar", *COMPRESSED)):
            add_tar(listing, path)
        else:
            raise UserError(f"{path} is not a list of figures. Allowed: a folder, .jsonl, .csv, .parquet, .arrow or .tar.")
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}.") from error


# -- folders -------------------------------------------------------------------------------------
def _scan_folder(listing: Listing, folder: Path) -> None:
    """Lists and tables first: pictures that one of them names need no caption beside them."""
    contents = list(_walk(folder))
    for directory, names in contents:
        lists = [name for name in names if name.lower() in LIST_NAMES or name.lower().endswith((".tar", *COMPRESSED))]
        for name in _tables(directory, names) + lists:
            scan(listing, directory / name)
    several: list[tuple[Path, list[str]]] = []  # captions that count for more than one picture
    for directory, names in contents:
        captions = {(stem, end.lower()): name for name in names for stem, end in [os.path.splitext(name)]}
        shared: dict[str, list[str]] = defaultdict(list)
        pictures = [name for name in names if os.path.splitext(name)[1].lower() in PICTURES | VECTOR | OTHER]
        stems = {os.path.splitext(name)[0] for name in pictures}
        made_of = {stem: sources for stem, sources in beside(pictures).items() if stem in stems}
        masks = {stem: mask for stem, mask in masks_beside(pictures).items() if stem in stems}
        sources_of_others = {name for sources in made_of.values() for name in sources} | set(masks.values())
        for name in pictures:
            path = Path(os.path.abspath(directory / name))
            if str(path) not in listing.named and name not in sources_of_others:
                listing.filter.require_none(directory)
                record = next((captions[key] for end in CAPTION_FILES if (key := (path.stem, end)) in captions), None)
                references = [path.with_name(source) for source in made_of.get(path.stem, ())]
                mask = path.with_name(masks[path.stem]) if path.stem in masks else None
                listing.add_file(path, _sidecar(path, record, listing.wanted), references=references, mask=mask)
                if record is not None and path.suffix.lower() in PICTURES:
                    shared[record].append(name)
        several += [(directory / caption, pictures) for caption, pictures in shared.items() if len(pictures) > 1]
    if several:
        caption, pictures = several[0]
        _LOG.warning("%d caption(s) lie beside several pictures of their name, and count for each of them; the first: %s beside %s",
                     len(several), caption, ", ".join(pictures))  # fmt: skip


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders and the names of their files, sorted; links are followed, each folder is visited once."""
    visited: set[str] = set()
    for directory, subfolders, names in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(directory)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(directory), sorted(name for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out folders that it may not read


def _tables(directory: Path, names: list[str]) -> list[str]:
    """Parquet and Arrow files; where `datasets` left a state.json it says which Arrow files count."""
    parquet = [name for name in names if name.lower().endswith(".parquet")]
    if "state.json" in names and "dataset_info.json" in names:
        try:
            saved = parse_json((directory / "state.json").read_bytes())
            return parquet + sorted(str(entry["filename"]) for entry in saved["_data_files"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{directory / 'state.json'} is not what `datasets` saves: {error!r}.") from error
    return parquet + [name for name in names if name.lower().endswith(".arrow") and not name.startswith("cache-")]


def _sidecar(path: Path, beside: str | None, wanted: Wanted) -> Described | RejectedFigure:
    """What the file `beside` a picture says of it, or why it says nothing."""
    if beside is None:
        return NOTHING if wanted.optional else RejectedFigure(f"no caption: expected {path.stem}.txt, .caption or .json beside it")
    try:
        data = path.with_name(beside).read_bytes()
        return described_json(beside, data, wanted) if beside.lower().endswith(".json") else described_text(data, wanted)
    except OSError as error:
        return RejectedFigure(f"caption unreadable: {error}")
    except RejectedFigure as error:
        return error


# -- lists ---------------------------------------------------------------------------------------
def _add_rows(listing: Listing, file: Path, rows: Iterator[tuple[int, dict[str, Any] | RejectedFigure]]) -> None:
    """Rows of a list with paths. The first row that has such a column decides which one it is."""
    keys: dict[str, None] = {}
    columns: dict[str, str | None] = dict.fromkeys(("image", "reference", "mask", "weight"))
    for number, row in rows:
        where = f"{listing.id_of(file)}#{number}"
        if isinstance(row, RejectedFigure):
            listing.reject(where, f"{file}#{number}", str(row))
            continue
        keys.update(dict.fromkeys(row))
        for kind in columns:
            columns[kind] = columns[kind] or listing.column(kind, row)
        if (reason := listing.filter.reason(row)) is not None:
            names = names_in(row.get(columns["reference"] or ""))
            listing.leave_out(where, f"{file}#{number}", reason, file.parent, row.get(columns["image"] or ""), *names)
            continue
        add_path_row(listing, file, where, f"{file}#{number}", row, columns)
    if keys:
        listing.require_columns(columns, keys, file)
        listing.filter.columns(keys, file)


def list_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | RejectedFigure]]:
    """(number, row) of a .jsonl or .csv list, as `jsonl_rows`. Raises UserError when a .csv is none."""
    return _csv_rows(file) if file.suffix.lower() == ".csv" else jsonl_rows(file)


def jsonl_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | RejectedFigure]]:
    """(line number, object) of every line that is not empty, or why it is none."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                yield number, RejectedFigure(f"not JSON: {error}")
                continue
            yield number, row if isinstance(row, dict) else RejectedFigure("not JSON: a line must be an object {…}")


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | RejectedFigure]]:
    previous = csv.field_size_limit(_MAX_CSV_FIELD)  # 131,072 characters otherwise; captions may be longer
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            reader = csv.DictReader(lines, restkey="(beyond the last column)", strict=True)
            for row in reader:
                yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: not CSV: {error}.") from error
    finally:
        csv.field_size_limit(previous)
