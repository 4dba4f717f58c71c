"""Single rows of Parquet files, and what reading one costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_IN_ROW = ("latents", "latent_shape", "text_embeds", "text_embeds_shape", "text_mask")  # of V1, read with the tensors
_TIMED_BYTES = 64_000_000  # how far into a row group its cost is timed
_BUFFER = 1 << 20  # bytes of a column that are read ahead: without one, Arrow reads a row group's whole column


class RowStream:
    """Rows of Parquet files, one at a time, in bounded memory.

    A row is reached by decoding its row group up to it; rows read in their order are decoded once.
    """

    def __init__(self) -> None:
        self._place: tuple[Path, int, int] | None = None  # file, row group, row that comes next
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def __getstate__(self) -> dict[str, Any]:
        return {"_place": None, "_batches": None}  # an open stream stays in its process

    def read(self, path: Path, row: int) -> pa.RecordBatch:
        """A batch of this one row. Raises OSError or ValueError when it cannot be read."""
        file, starts = _row_groups(path)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        here, self._place = self._place, None  # a stream that fails is not used again
        if here is None or here[:2] != (path, group) or here[2] > row:
            columns = [name for name in _IN_ROW if name in file.schema_arrow.names]
            self._batches = file.iter_batches(1, row_groups=[group], columns=columns, use_threads=False)
            here = (path, group, int(starts[group]))
        for _ in range(row - here[2]):
            next(self._batches)
        batch = next(self._batches)
        self._place = (path, group, row + 1)
        return batch


@lru_cache(maxsize=32)
def _row_groups(path: Path) -> tuple[pq.ParquetFile, np.ndarray]:
    file = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
    counts = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
    return file, np.cumsum([0, *counts])


@dataclass(frozen=True)
class _Cost:
    """Of reading one row at random: its own bytes, those of the file that are passed over, and the time."""

    row_bytes: int
    passed_bytes: float
    seconds: float
    plain_seconds: float  # to read row_bytes of the same file


def cost_of_a_row(path: Path) -> _Cost:
    """Of the mean row of the first row group, from the time to its first row and to one some way in; files in memory."""
    file, starts = _row_groups(path)
    rows, group = int(starts[1]), file.metadata.row_group(0)
    chunks = [group.column(c) for c in range(group.num_columns)]
    stored = sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] in _IN_ROW)
    row_bytes = RowStream().read(path, 0).nbytes
    far = min(rows - 1, max(1, _TIMED_BYTES // row_bytes))

    def timed(row: int) -> float:
        start = time.perf_counter()
        RowStream().read(path, row)
        return time.perf_counter() - start

    near_seconds, far_seconds = (min(timed(row) for _ in range(2)) for row in (0, far))
    each = max(0.0, far_seconds - near_seconds) / max(1, far)
    plain = min(_plain_seconds(path, row_bytes) for _ in range(3))
    return _Cost(row_bytes, stored * (rows + 1) / (2 * rows), near_seconds + each * (rows - 1) / 2, plain)


def _plain_seconds(path: Path, size: int) -> float:
    with path.open("rb", buffering=0) as file:
        start = time.perf_counter()
        got = len(file.read(size))
        return (time.perf_counter() - start) * size / got
