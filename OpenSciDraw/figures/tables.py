"""How figures in Parquet and Arrow tables are listed: by path, or as bytes in their rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.figures.edits import BOX_COLUMN, boxes_in, named_in
from OpenSciDraw.figures.found import (
    Listing,
    add_path_row,
    changed,
    clean_caption,
    names_in,
)
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
    columns = {kind: listing.column(kind, schema.names) for kind in ("image", "caption", "reference")}
    for kind, column in columns.items():
        if column is None and (kind != "reference" or listing.asks_for(kind)):
            raise listing.no_column(kind, schema.names, file)
    image, caption, reference = str(columns["image"]), str(columns["caption"]), columns["reference"]
    by_path = _is_path(schema.field(image).type, file, image)
    reference_by_path = reference is not None and _is_path(_value_type(schema.field(reference).type), file, reference)
    own_id = name.decode() if (name := (schema.metadata or {}).get(ID_COLUMN)) is not None and not by_path else None
    needed = [caption, *([image] if by_path else []), *([own_id] if own_id else []), *({BOX_COLUMN} & set(schema.names))]
    needed += [reference] if reference is not None and reference_by_path else []
    names = list(dict.fromkeys([*needed, *listing.filter.columns(schema.names, file)]))
    try:
        for number, values in enumerate(columns_of(file, names)):
            row = dict(zip(names, values, strict=True))
            where, place = row[own_id].decode() if own_id else f"{identity}#{number:08d}", f"{file}#{number}"
            if (reason := listing.filter.reason(row)) is not None:
                named = [row[image] if by_path else None, *names_in(row.get(reference or ""))]
                listing.leave_out(where, place, reason, file.parent, *named)
            elif by_path:
                add_path_row(listing, file, where, place, row, columns)
            else:
                ref = RowRef(where, "", place, status.st_size, changed(status), str(file), image, number)
                _add_byte_row(listing, ref, row, caption, reference, reference_by_path)
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
    listing: Listing, ref: RowRef, row: Mapping[str, Any], caption: str, reference: str | None, reference_by_path: bool
) -> None:
    """A row of a table that holds its picture; a reference beside it may be a path, or the bytes of one picture."""
    references: list[FigureRef] = []
    try:
        if reference_by_path:
            references += [listing.reference(resolve(Path(ref.file).parent, name)) for name in named_in(row.get(reference or ""))]
        elif reference is not None:
            references.append(replace(ref, id=f"{ref.id}.{reference}", source=f"{ref.source}.{reference}", column=reference))
        made = replace(ref, caption=clean_caption(row[caption]), references=tuple(references), edit_boxes=boxes_in(row))
        listing.add(made)
    except RejectedFigure as error:
        listing.reject(ref.id, ref.source, str(error))
