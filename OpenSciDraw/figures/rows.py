"""Pictures inside Parquet and Arrow files, read one row at a time in bounded memory."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.utils.arrow import validated

ARROW_ERRORS = (OSError, ValueError, pa.ArrowException)
_BATCH_ROWS = 16
_BUFFER_BYTES = 1 << 20
_CAPTION_BATCH_ROWS = 4096


def _open_parquet(file: str | Path) -> pq.ParquetFile:
    """Reads through a small buffer; pyarrow would else read the columns of a whole row group ahead."""
    return pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)


class _ParquetColumn:
    """Reads forward through a row group and keeps the last batches: memory for a page, not for the group.

    Rows asked for in order cost one pass over the file; others start again at the beginning of their row group.
    (A page is the smallest thing to read; pyarrow puts up to 1024 rows on one.)
    """

    def __init__(self, file: str, column: str):
        self._file = _open_parquet(file)
        self._column = column
        groups = range(self._file.num_row_groups)
        self._starts = list(accumulate((self._file.metadata.row_group(g).num_rows for g in groups), initial=0))
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._next = self._end = 0  # rows that the batches still hold
        self._window: deque[tuple[int, Any]] = deque(maxlen=4)  # threads do not ask exactly in order
        self._lock = threading.Lock()

    def cell(self, row: int) -> Any:
        if row >= self._starts[-1]:
            raise IndexError(f"row {row} of {self._starts[-1]}")
        with self._lock:
            for start, values in self._window:
                if start <= row < start + len(values):
                    return values[row - start].as_py()
            if not self._next <= row < self._end:
                self._restart(bisect_right(self._starts, row) - 1)
            try:
                return self._forward(row)
            except ARROW_ERRORS:
                self._end = 0  # the iterator is spent
                raise

    def _restart(self, group: int) -> None:
        self._next, self._end = self._starts[group], self._starts[group + 1]
        # group by group: a batch over two groups would be lost with either
        self._batches = self._file.iter_batches(_BATCH_ROWS, [group], [self._column], use_threads=False)

    def _forward(self, row: int) -> Any:
        while True:
            start, values = self._next, next(self._batches).column(0)
            self._window.append((start, values))
            self._next += len(values)
            if row < self._next:
                return values[row - start].as_py()


class _ArrowColumn:
    """A column of an Arrow stream or file, mapped into memory: pages are read when touched."""

    def __init__(self, file: str, column: str):
        self._values = open_arrow(file).column(column)
        for chunk in self._values.chunks:
            validated(chunk)

    def cell(self, row: int) -> Any:
        return self._values[row].as_py()


def open_arrow(file: str | Path) -> pa.Table:
    """`datasets` writes Arrow streams; other programs files. Raises OSError or pa.ArrowInvalid."""
    mapped = pa.memory_map(str(file))
    try:
        return pa.ipc.open_stream(mapped).read_all()
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_file(mapped).read_all()


@lru_cache(maxsize=2)  # two: threads meet at the end of a file
def _open_column(file: str, column: str) -> _ParquetColumn | _ArrowColumn:
    return _ArrowColumn(file, column) if file.lower().endswith(".arrow") else _ParquetColumn(file, column)


def read_cell(file: str, column: str, row: int) -> bytes:
    """The picture's bytes in a row: from the cell, or from the file that its path names. Raises RejectedFigure."""
    try:
        cell = _open_column(file, column).cell(row)
        path = None
        if isinstance(cell, dict):
            cell, path = cell["bytes"], cell.get("path")
        if cell is None and path:
            return resolve(Path(file).parent, path).read_bytes()
    except RejectedFigure:
        raise
    except (*ARROW_ERRORS, LookupError) as error:
        raise RejectedFigure(f"unreadable: {error}") from error
    return cell or b""


def resolve(folder: Path, name: object) -> Path:
    """The file that a list in `folder` names. Raises RejectedFigure when a relative path leads out of the folder."""
    name = os.fsdecode(name) if isinstance(name, bytes) else name
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise RejectedFigure(f"no image path: {name!r:.80}")
    base = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(base, name))
    if not os.path.isabs(name) and os.path.commonpath([base, path]) != base:
        raise RejectedFigure(f"outside the folder: {name!r} leads out of {folder}")
    return Path(path)


def schema_of(file: Path) -> pa.Schema:
    """Column names and types of a Parquet or Arrow file. Raises one of ARROW_ERRORS."""
    return open_arrow(file).schema if file.suffix.lower() == ".arrow" else pq.read_schema(file)


def columns_of(file: Path, names: list[str]) -> Iterator[list[Any]]:
    """Rows of the named columns, without the others. Strings come as bytes: a broken one harms its row alone."""
    if file.suffix.lower() == ".arrow":
        batches = (_validated(batch) for batch in open_arrow(file).select(names).to_batches())
    else:
        batches = _open_parquet(file).iter_batches(_CAPTION_BATCH_ROWS, columns=names, use_threads=False)
    for batch in batches:
        columns = [_as_python(batch.column(name)) for name in names]
        yield from (list(values) for values in zip(*columns, strict=True))


def _validated(batch: pa.RecordBatch) -> pa.RecordBatch:
    for column in batch.columns:
        validated(column)
    return batch


def _as_python(column: pa.Array) -> list[Any]:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    elif pa.types.is_list(column.type) and pa.types.is_string(column.type.value_type):  # captions
        column = column.cast(pa.list_(pa.binary()))
    return column.to_pylist()
