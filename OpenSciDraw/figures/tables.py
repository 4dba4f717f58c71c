"""How figures in Parquet and Arrow tables are listed: by path, or as bytes in their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.figures.described import CAPTION_WEIGHTS, described_row
from OpenSciDraw.figures.edits import BOX_COLUMN, named_in
from OpenSciDraw.figures.found import Listing, add_path_row, changed, names_in
from OpenSciDraw.figures.refs import FigureRef, RowRef
from OpenSciDraw.figures.rows import ARROW_ERRORS, columns_of, resolve, schema_of

ID_COLUMN = b"id_column"  # in a table's metadata: the column with ids of its own, as `scienceflow prepare` writes it


def add_table(listing: Listing, file: Path) -> None:
    """Rows of a Parquet or Arrow file; of its pictures only paths are read here."""
    identity = listing.id_of(file)
    try:
        status, schema = file.stat(), schema_of(file)
    except ARROW_ERRORS as error:
        return listing.reject(identity, file, f"unreadable: {error}")
    columns = {kind: listing.column(kind, schema.names) for kind in ("image", "reference", "mask", "weight")}
    listing.require_columns(columns, schema.names, file)
    captions, image = listing.wanted.names(schema.names), str(columns["image"])
    by_path = {
        column: _is_path(schema.field(column).type if kind == "image" else _value_type(schema.field(column).type), file, column)
        for kind, column in columns.items() if column is not None and kind != "weight"
    }  # fmt: skip
    own_id = name.decode() if (name := (schema.metadata or {}).get(ID_COLUMN)) is not None and not by_path[image] else None
    needed = [*captions, *(column for column, is_path in by_path.items() if is_path), *([own_id] if own_id else [])]
    needed += [name for name in (BOX_COLUMN, CAPTION_WEIGHTS, columns["weight"], *listing.wanted.notes) if name in schema.names]
    names = list(dict.fromkeys([*needed, *listing.filter.columns(schema.names, file)]))
    try:
        for number, values in enumerate(columns_of(file, names)):
            row = dict(zip(names, values, strict=True))
            where, place = row[own_id].decode() if own_id else f"{identity}#{number:08d}", f"{file}#{number}"
            if (reason := listing.filter.reason(row)) is not None:
                named = [row.get(image), *names_in(row.get(columns["reference"] or "")), *names_in(row.get(columns["mask"] or ""))]
                listing.leave_out(where, place, reason, file.parent, *named)
            elif by_path[image]:
                add_path_row(listing, file, where, place, row, columns)
            else:
                ref = RowRef(where, "", place, status.st_size, changed(status), str(file), image, number)
                _add_byte_row(listing, ref, row, captions, columns, by_path)
    except ARROW_ERRORS as error:
        listing.reject(identity, file, f"unreadable: {error}")


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind


def _is_path(kind: pa.DataType, file: Path, column: str) -> bool:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return True
    in_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if in_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return False
    raise UserError(
        f"{file}: column {column!r} is {kind}. A picture is binary, struct<bytes, path> or a path (string)."
        " Set encode.image_column to such a column."
    )


def _add_byte_row(
    listing: Listing, ref: RowRef, row: Mapping[str, Any], captions: Sequence[str], columns: Mapping[str, str | None],
    by_path: Mapping[str, bool],
) -> None:  # fmt: skip
    """A row of a table that holds its picture; what belongs to it may be paths, or the bytes of one picture."""

    def beside(kind: str) -> list[FigureRef]:
        column = columns[kind]
        if column is None:
            return []
        if by_path[column]:
            return [listing.beside(kind, resolve(Path(ref.file).parent, name)) for name in named_in(row.get(column))]
        return [replace(ref, id=f"{ref.id}.{column}", source=f"{ref.source}.{column}", column=column)]

    try:
        said = described_row(row, captions, listing.wanted)
        mask = next(iter(beside("mask")), None)
        listing.add(replace(said.of(ref), references=tuple(beside("reference")), mask=mask))
    except RejectedFigure as error:
        listing.reject(ref.id, ref.source, str(error))
