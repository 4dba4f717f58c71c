"""The encoded store: sharded Parquet that knows how it was made (a shard: shard.py), read row by row.

    <store>/figures/00000.parquet    + 00000.index.arrow     one figure a row: latents
    <store>/references/00000.parquet + 00000.index.arrow     one picture a row that edits start from: latents
    <store>/text/00000.parquet       + 00000.index.arrow     one caption or instruction a row: prompt embeddings

Opening reads the numbers of all rows out of the indices into arrays (about 60 bytes a row and table), and where
their strings lie: afterwards a row costs one positional read of its tensor and short ones of its strings. No
file stays mapped and no object is kept for each row, so a million rows open in seconds, and are sent to a data
worker that is not forked as a few arrays.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from OpenSciDraw.errors import UserError
from OpenSciDraw.store.contract import Contract, from_bytes
from OpenSciDraw.store.files import Files, IsWhole, LocalFiles, OpenFiles, Span
from OpenSciDraw.store.shard import (
    CHECKSUMS,
    KEY_BYTES,
    ShardInfo,
    index_path,
    not_finite,
    open_index,
    read_shard_info,
    tensor_places,
)
from OpenSciDraw.utils.files import parse_json, sha256_of

KEY_TYPE = f"S{KEY_BYTES}"
_NUMBERS, _KEYS = {"bucket_w", "bucket_h", "offset", "nbytes", "loss_weight"}, {"text_key", "key"}
_STRINGS = ("id", "caption")  # of which, and of _BYTES, a row's place in the index file is kept
_BYTES = ("references", "edit_boxes", "captions", "caption_keys", "mask")
_IF_ABSENT = {"loss_weight": 1.0}  # in shards that have no such column; 0 or nothing of others


# -- a table -----------------------------------------------------------------------------------
class StoreTable:
    """All rows of one of the KINDS of a store; tensors and strings are read on demand.

    Raises:
        UserError: no shard, an unfinished shard, shards made in different ways.
    """

    def __init__(self, files: Files | Path, parts: Sequence[str]):
        self.files: Files = LocalFiles(files) if isinstance(files, Path) else files
        self.folder, self.shards = self.files.folder, self.files.shards()
        self._indices = OpenFiles([index_path(shard) for shard in self.shards])
        self._checksum_of: list[str] = []  # of each shard, its name
        self._is_finite: list[bool] = []  # of each shard, whether its statistics say that all its numbers are
        self.contract, self._columns = self._read_indices(parts)
        self._shard_of = self._columns["shard"]
        self._checked = np.zeros(len(self), dtype=bool)  # rows whose checksum this process has compared

    def _read_indices(self, parts: Sequence[str]) -> tuple[Contract, dict[str, np.ndarray]]:
        """The contract, and the numbers of all rows; of a string its first byte in the index file, and its size."""
        found: dict[str, bytearray] = {}  # one piece of memory a column: lists of small arrays leave holes in it
        empty: dict[str, np.ndarray] = {}
        known: dict[bytes, Contract] = {}
        for number, path in enumerate(self._indices.paths):
            reader, mapped = open_index(path)
            text = reader.schema.metadata[b"contract"]
            if text not in known:
                known[text] = Contract.from_json(text)
                next(iter(known.values())).require(known[text], parts, self.shards[number])
            self._is_finite.append(_is_finite(parse_json(reader.schema.metadata[b"facts"])))
            self._checksum_of.append(next(name for name in CHECKSUMS if name in reader.schema.names))
            for at in range(reader.num_record_batches):
                batch = reader.get_batch(at)
                if not len(batch):
                    continue
                rows = _numbers_of(batch, mapped.address, self._checksum_of[number])
                rows["shard"] = np.full(len(batch), number, dtype=np.int32)
                for name in rows.keys() - found.keys() if found else ():  # edits came after the figures of earlier shards
                    before = len(found["shard"]) // 4
                    found[name] = bytearray(np.full(before, _IF_ABSENT.get(name, 0), rows[name].dtype).tobytes())
                for name in found.keys() - rows.keys():
                    rows[name] = np.full(len(batch), _IF_ABSENT.get(name, 0), empty[name].dtype)
                for name, values in rows.items():
                    found.setdefault(name, bytearray()).extend(values.tobytes())
                    empty.setdefault(name, values[:0])
        if not found:
            raise UserError(f"{self.folder}: the shards here have no rows: every figure was rejected. See rejected.jsonl.")
        contract = next(iter(known.values()))
        return contract, {n: np.frombuffer(found[n], e.dtype).reshape(-1, *e.shape[1:]) for n, e in empty.items()}

    def __len__(self) -> int:
        return len(self._shard_of)

    @property
    def table(self) -> pa.Table:
        """All small columns, memory-mapped anew: for looking at many rows, not for reading one."""
        indices = [open_index(index_path(shard))[0].read_all() for shard in self.shards]
        return pa.concat_tables([index.replace_schema_metadata(None) for index in indices], promote_options="default")

    def batches(self, column: str) -> Iterator[pa.Array]:
        """The values of a small column, shard by shard."""
        for shard in self.shards:
            reader = open_index(index_path(shard))[0]
            for at in range(reader.num_record_batches if column in reader.schema.names else 0):
                yield reader.get_batch(at).column(column)

    @property
    def has_edits(self) -> bool:
        """Whether some shard names pictures that its figures were made from."""
        return "references" in self._columns

    @property
    def is_described(self) -> bool:
        """Whether some shard says more of its figures than a caption: several captions, masks, weights."""
        return "captions" in self._columns

    def bytes_of(self, column: str) -> bytes:
        """All rows' bytes in a column of bytes, one behind the other."""
        return b"".join(value for batch in self.batches(column) for value in batch.to_pylist())

    @property
    def infos(self) -> list[ShardInfo]:
        """What each shard says of itself, read anew."""
        return [info for shard in self.shards if (info := read_shard_info(shard)) is not None]

    def numbers(self, column: str) -> np.ndarray:
        """(rows, …) values of a column of numbers or keys."""
        return self._columns[column]

    def take(self, column: str) -> np.ndarray:
        """As `numbers`; the column is not kept."""
        return self._columns.pop(column)

    def lengths(self) -> np.ndarray:
        """(rows,) first dimension of each row's tensor."""
        return self._columns["shape"][:, 0]

    def value(self, column: str, row: int) -> Any:
        """A row's value in any small column."""
        shard = int(self._shard_of[row])
        if column in (*_STRINGS, *_BYTES) and column in self._columns:
            start, size = int(self._columns[column][row]), int(self._columns[f"{column}_bytes"][row])
            found = os.pread(self._indices[shard], size, start) if size else b""  # of nothing Arrow keeps no place
            return found.decode() if column in _STRINGS else found
        first = int(np.searchsorted(self._shard_of, shard))
        return open_index(index_path(self.shards[shard]))[0].read_all().column(column)[row - first].as_py()

    def shard_of(self, row: int) -> Path:
        return self.shards[self._shard_of[row]]

    def span(self, row: int) -> Span:
        """Where the bytes of a row's tensor lie."""
        return int(self._shard_of[row]), int(self._columns["offset"][row]), int(self._columns["nbytes"][row])

    def will_need(self, rows: Iterable[int]) -> None:
        """These rows are read next: begin to fetch them."""
        self.files.will_need(self.span(row) for row in rows)

    def tensor(self, row: int, check: bool = True) -> Tensor:
        """The tensor of a row, bf16, in its own memory; its checksum is compared the first time this process reads the row.

        (A view of the mapped file was measured slower than this copy: mapping pages of 4 kB costs more than copying
        them does, see benchmarks/RESULTS.md.)

        Raises:
            ValueError: the file is shorter than its index says, the bytes are not those that were written, or they are NaN or
                infinite numbers.
            OSError: the file cannot be read.
        """
        span = self.span(row)
        buffer = np.empty(span[2], dtype=np.uint8)  # 2 us sooner here than torch.empty
        is_whole = self._is_whole(row) if check and not self._checked[row] else None
        try:
            self.files.read_into(span, buffer.data, is_whole)
        except ValueError as error:
            raise ValueError(f"{self.folder}, row {row}: {error}") from error
        self._checked[row] |= check
        found = from_bytes(torch.from_numpy(buffer), self._columns["shape"][row].tolist(), self.contract)
        if not self._is_finite[span[0]] and (wrong := not_finite(found)):
            raise ValueError(f"{self.folder}, row {row}: numbers that are not finite: {wrong}")
        return found

    def _is_whole(self, row: int) -> IsWhole:
        checksum, expected = CHECKSUMS[self._checksum_of[self._shard_of[row]]], int(self._columns["checksum"][row])
        return lambda data: checksum(data) == expected

    def verify_shard(self, shard: int) -> None:
        """Raises ValueError when a shard's file is not the one that was written."""
        path, info = self.shards[shard], read_shard_info(self.shards[shard])
        assert info is not None  # it was there at opening
        size = path.stat().st_size
        if size != info.facts["bytes"]:
            raise ValueError(f"{path}: {size} bytes, {info.facts['bytes']} were written")
        if sha256_of(path) != info.facts["sha256"]:
            raise ValueError(f"{path}: sha256 differs from the one recorded when it was written")
        if not _index_agrees(info):
            raise ValueError(f"{index_path(path)}: the index is not that of its shard")
        if not self._is_finite[shard]:
            for row in np.flatnonzero(self._shard_of == shard).tolist():
                self.tensor(row, check=False)


def _is_finite(facts: dict[str, Any]) -> bool:
    """Whether a shard's statistics were computed and are finite: then so is each of its numbers."""
    statistics = facts.get("statistics", {})
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in statistics.values()) and bool(statistics)


def _numbers_of(batch: pa.RecordBatch, address: int, checksum: str) -> dict[str, np.ndarray]:
    """The columns that are kept: numbers, keys, and the places of figures' strings in the file mapped at `address`."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    found: dict[str, np.ndarray] = {"checksum": columns[checksum].to_numpy().astype(np.uint64)}
    for name in _NUMBERS & columns.keys():
        found[name] = columns[name].to_numpy()
    for name in _KEYS & columns.keys():
        found[name] = np.frombuffer(columns[name].buffers()[1], KEY_TYPE, len(batch))
    found["shape"] = columns["shape"].flatten().to_numpy().reshape(len(batch), -1)
    for name in [name for name in (*_STRINGS, *_BYTES) if name in columns] if "id" in columns else ():
        offsets, data = columns[name].buffers()[1:]
        ends = np.frombuffer(offsets, np.int32, len(batch) + 1)
        found[name] = ends[:-1].astype(np.int64) + (data.address - address if data is not None else 0)
        found[f"{name}_bytes"] = np.diff(ends)
    return found


def _index_agrees(info: ShardInfo) -> bool:
    """Whether contract, small columns and places in the index are those of the (unharmed) shard."""
    index = open_index(index_path(info.path))[0].read_all()
    metadata, schema = pq.read_metadata(info.path), pq.read_schema(info.path)
    small = [name for name in schema.names if name != "tensor"]
    places = list(zip(index.column("offset").to_pylist(), index.column("nbytes").to_pylist(), strict=True))
    return (
        Contract.from_json(metadata.metadata[b"contract"]) == info.contract
        and pq.read_table(info.path, columns=small).to_pylist() == index.select(small).to_pylist()
        and tensor_places(metadata, schema, index.column("shape").to_pylist(), info.contract) == places
    )
