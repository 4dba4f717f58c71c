"""The encoded store: sharded Parquet that knows how it was made.

    <store>/figures/00000.parquet + 00000.index.arrow     one figure a row: latents
    <store>/text/00000.parquet    + 00000.index.arrow     one caption a row: prompt embeddings

One row per row group, uncompressed, tensors as bf16 bytes in a non-null `large_binary` column: the
bytes of a tensor then lie in one piece of the file. The index keeps where, so that a row is read by
one positional read, as fast as a raw file; any Parquet reader can read the shards as well. The index
holds all small columns; it is written last, so a shard with an index is whole, and one without is not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from OpenSciDraw.errors import UserError
from OpenSciDraw.utils.files import sha256_of, sync_to_disk

SCHEMA_VERSION = 1
EMPTY_PROMPT = ""
KEY_BYTES = 16
_KEY_TYPE = f"S{KEY_BYTES}"
_MAX_OPEN_FILES = 128
FIGURE_PARTS, TEXT_PARTS = ("latents", "picture"), ("text",)  # what a shard's contract says

_TENSOR_FIELDS = [
    pa.field("tensor", pa.large_binary(), nullable=False),  # bf16, C order
    pa.field("shape", pa.list_(pa.int32()), nullable=False),
    pa.field("crc32", pa.uint32(), nullable=False),
]
FIGURE_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("text_key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("bucket_w", pa.int32(), nullable=False),
        pa.field("bucket_h", pa.int32(), nullable=False),
        pa.field("aspect_ratio", pa.float32(), nullable=False),  # height / width of the source picture
        pa.field("placement", pa.list_(pa.int32()), nullable=False),  # x0, y0, x1, y1 of the picture in its bucket
        *_TENSOR_FIELDS,
    ]
)
TEXT_SCHEMA = pa.schema(
    [pa.field("key", pa.binary(KEY_BYTES), nullable=False), pa.field("caption", pa.string(), nullable=False), *_TENSOR_FIELDS]
)


@dataclass(frozen=True)
class Contract:
    """How encoded rows were made. `origin` informs; every other field must agree before rows are used."""

    family: str
    origin: dict[str, Any]
    latents: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    picture: dict[str, Any] = field(default_factory=dict)  # resolution and fit: of a store, not of a model
    schema: int = SCHEMA_VERSION

    def differences(self, other: Contract, parts: Iterable[str]) -> list[str]:
        """Fields that differ, as text; a fingerprint counts only where both sides know it."""
        found = [f"{name}: {getattr(self, name)!r} here, {getattr(other, name)!r} there"
                 for name in ("schema", "family") if getattr(self, name) != getattr(other, name)]  # fmt: skip
        for part in parts:
            mine, theirs = getattr(self, part), getattr(other, part)
            for key in sorted(mine.keys() | theirs.keys()):
                a, b = mine.get(key), theirs.get(key)
                if a != b and not (key == "fingerprint" and (a is None or b is None)):
                    found.append(f"{part}.{key}: {a!r} here, {b!r} there")
        return found

    def require(self, other: Contract, parts: Iterable[str], where: Path | str) -> None:
        """Raises UserError, naming each field, when `other` (of `where`) was made in another way."""
        found = self.differences(other, parts)
        if found:
            raise UserError(
                f"{where} was encoded in another way than this config asks for ('here' is the config):\n  "
                + "\n  ".join(found)
                + "\nUse the model and settings it was encoded with, or encode into another folder."
            )

    @classmethod
    def from_json(cls, text: str | bytes) -> Contract:
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def text_key(caption: str) -> bytes:
    """Captions are stored once: the key is a hash of the exact text."""
    return hashlib.sha256(caption.encode()).digest()[:KEY_BYTES]


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.arrow")


# -- writing -----------------------------------------------------------------------------------
@dataclass
class Row:
    """One row to write: the small columns and the tensor."""

    columns: dict[str, Any]
    tensor: Tensor


def write_shard(
    path: Path, schema: pa.Schema, rows: Iterable[Row], contract: Contract, facts: dict[str, Any]
) -> int:
    """Write a shard and then its index, each under a temporary name first. Returns the number of rows.

    `facts` (JSON-able: what work the shard holds, which figures were rejected) goes into the metadata.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.tmp")
    small: list[dict[str, Any]] = []
    total = np.zeros(3)  # values, sum, sum of squares
    with pq.ParquetWriter(
        building, schema, compression="NONE", use_dictionary=False, write_statistics=False, data_page_size=2**30
    ) as writer:
        for row in rows:
            values = row.tensor.detach().cpu().to(torch.bfloat16).contiguous()
            data = values.view(torch.uint8).numpy().tobytes()
            columns = {**row.columns, "shape": list(values.shape), "crc32": zlib.crc32(data)}
            writer.write_table(pa.Table.from_pylist([{**columns, "tensor": data}], schema=schema), row_group_size=1)
            small.append(columns)
            numbers = values.float()  # a row in fp32, the rows in fp64: all in fp64 took a third of the time of writing
            total += (numbers.numel(), numbers.sum().item(), numbers.square_().sum().item())
        facts = {**facts, "rows": len(small), "statistics": _statistics(total)}
        writer.add_key_value_metadata({"contract": contract.to_json(), "facts": json.dumps(facts)})
    sync_to_disk(building)
    places = _tensor_places(pq.read_metadata(building), schema, [columns["shape"] for columns in small])
    for columns, (offset, size) in zip(small, places, strict=True):
        columns |= {"offset": offset, "nbytes": size}
    facts["sha256"], facts["bytes"] = sha256_of(building), building.stat().st_size
    index_path(path).unlink(missing_ok=True)  # of a shard that is written anew: no moment with another one's index
    os.replace(building, path)
    _write_index(path, schema, small, contract, facts)
    return len(small)


def _tensor_places(metadata: pq.FileMetaData, schema: pa.Schema, shapes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(offset, bytes) of each row's tensor: a PLAIN page ends with its value, so it is the tail of its column chunk."""
    column = schema.get_field_index("tensor")
    chunks = [metadata.row_group(group).column(column) for group in range(metadata.num_row_groups)]
    sizes = [2 * math.prod(shape) for shape in shapes]
    return [(c.data_page_offset + c.total_compressed_size - size, size) for c, size in zip(chunks, sizes, strict=True)]


def _statistics(total: np.ndarray) -> dict[str, float]:
    count, first, second = total.tolist()
    if not count:
        return {"values": 0}
    mean = first / count
    return {"values": int(count), "mean": mean, "std": math.sqrt(max(0.0, second / count - mean**2))}


def _write_index(
    shard: Path, schema: pa.Schema, small: list[dict[str, Any]], contract: Contract, facts: dict[str, Any]
) -> None:
    fields = [f for f in schema if f.name != "tensor"]
    fields += [pa.field("offset", pa.int64(), nullable=False), pa.field("nbytes", pa.int64(), nullable=False)]
    index_schema = pa.schema(fields, metadata={"contract": contract.to_json(), "facts": json.dumps(facts)})
    building = shard.with_name(f".{shard.name}.index.tmp")
    with pa.OSFile(str(building), "wb") as sink, pa.ipc.new_file(sink, index_schema) as writer:
        writer.write_table(pa.Table.from_pylist(small, schema=index_schema))
    sync_to_disk(building)
    os.replace(building, index_path(shard))
    sync_to_disk(shard.parent)


# -- reading -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class ShardInfo:
    path: Path
    contract: Contract
    facts: dict[str, Any]


def read_shard_info(shard: Path) -> ShardInfo | None:
    """What a shard says of itself, from its index; None when it has none (it was never finished)."""
    index = index_path(shard)
    if not index.exists():
        return None
    table = _open_index(index)
    metadata = table.schema.metadata or {}
    return ShardInfo(shard, Contract.from_json(metadata[b"contract"]), json.loads(metadata[b"facts"]))


def _open_index(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path}: the index of this shard cannot be read ({error}). Delete it and run `scienceflow encode` again: "
            "only this shard is encoded anew."
        ) from error


class StoreTable:
    """All rows of one kind ('figures' or 'text') of a store; small columns are memory-mapped, tensors read on demand.

    Raises:
        UserError: no shard, an unfinished shard, shards made in different ways.
    """

    def __init__(self, folder: Path, parts: Sequence[str]):
        self.folder = folder
        shards = sorted(p for p in folder.glob("*.parquet") if not p.name.startswith("."))
        unfinished = [p.name for p in shards if not index_path(p).exists()]
        if unfinished:
            raise UserError(
                f"{folder}: {len(unfinished)} shard(s) were not finished ({', '.join(unfinished[:5])}): encoding was "
                "interrupted. Run the same `scienceflow encode` command to finish it."
            )
        if not shards:
            raise UserError(f"{folder}: no encoded shard here. Run `scienceflow encode CONFIG.py` first.")
        self.shards = shards
        tables = [_open_index(index_path(shard)) for shard in shards]
        self.infos = [
            ShardInfo(s, Contract.from_json(t.schema.metadata[b"contract"]), json.loads(t.schema.metadata[b"facts"]))
            for s, t in zip(shards, tables, strict=True)
        ]
        self.contract = self.infos[0].contract
        for info in self.infos[1:]:
            self.contract.require(info.contract, parts, info.path)
        self.table = pa.concat_tables([t.replace_schema_metadata(None) for t in tables])
        self._shard_of = np.repeat(np.arange(len(shards)), [t.num_rows for t in tables]).astype(np.int32)
        self._offset, self._nbytes = self.numbers("offset"), self.numbers("nbytes")
        self._crc = self.numbers("crc32")
        self._files: OrderedDict[int, FileIO] = OrderedDict()

    def __len__(self) -> int:
        return self.table.num_rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # file handles stay in their process

    def numbers(self, column: str) -> np.ndarray:
        return self.table.column(column).to_numpy()

    def lengths(self) -> np.ndarray:
        """(rows,) first dimension of each row's tensor."""
        shapes = self.table.column("shape").combine_chunks()
        return shapes.flatten().to_numpy().reshape(len(self), -1)[:, 0]

    def value(self, column: str, row: int) -> Any:
        return self.table.column(column)[row].as_py()

    def shard_of(self, row: int) -> Path:
        return self.shards[self._shard_of[row]]

    def tensor(self, row: int, check: bool = True) -> Tensor:
        """The tensor of a row, bf16, in its own memory.

        Raises:
            ValueError: the file is shorter than its index says, or the bytes are not those that were written.
        """
        size = int(self._nbytes[row])
        buffer = torch.empty(size, dtype=torch.uint8)
        view = buffer.numpy().data
        file = self._file(int(self._shard_of[row]))
        # a positional read: data workers are forked, and share the place of a file that was open before
        got = os.preadv(file.fileno(), [view], int(self._offset[row]))
        if got != size:
            raise ValueError(f"{self.shard_of(row)}: row {row} has {got} of {size} bytes (the file is cut short)")
        if check and zlib.crc32(view) != int(self._crc[row]):
            raise ValueError(f"{self.shard_of(row)}: row {row} does not match its checksum (the file was damaged)")
        return buffer.view(torch.bfloat16).view(self.value("shape", row))

    def _file(self, shard: int) -> FileIO:
        """The shard's file, unbuffered; the least recently used one is closed when there are many."""
        file = self._files.pop(shard, None)
        if file is None:
            file = FileIO(self.shards[shard])
            if len(self._files) >= _MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files[shard] = file
        return file

    def verify_shard(self, shard: int) -> None:
        """Raises ValueError when a shard's file is not the one that was written."""
        facts = self.infos[shard].facts
        size = self.shards[shard].stat().st_size
        if size != facts["bytes"]:
            raise ValueError(f"{self.shards[shard]}: {size} bytes, {facts['bytes']} were written")
        if sha256_of(self.shards[shard]) != facts["sha256"]:
            raise ValueError(f"{self.shards[shard]}: sha256 differs from the one recorded when it was written")
        if not self._index_agrees(shard):
            raise ValueError(f"{index_path(self.shards[shard])}: the index is not that of its shard")

    def _index_agrees(self, shard: int) -> bool:
        """Whether contract, small columns and places in the index are those of the (unharmed) shard."""
        path = self.shards[shard]
        first, last = np.searchsorted(self._shard_of, [shard, shard + 1])
        index = self.table.slice(first, last - first)
        metadata, schema = pq.read_metadata(path), pq.read_schema(path)
        small = [name for name in schema.names if name != "tensor"]
        places = list(zip(index.column("offset").to_pylist(), index.column("nbytes").to_pylist(), strict=True))
        return (
            Contract.from_json(metadata.metadata[b"contract"]) == self.infos[shard].contract
            and pq.read_table(path, columns=small).to_pylist() == index.select(small).to_pylist()
            and _tensor_places(metadata, schema, index.column("shape").to_pylist()) == places
        )


class EncodedStore:
    """A store folder: figures and, where `text` was stored, their captions' embeddings.

    Raises:
        UserError: as StoreTable; captions without embeddings.
    """

    def __init__(self, folder: Path, with_text: bool):
        self.folder = folder
        self.figures = StoreTable(folder / "figures", FIGURE_PARTS)
        self.text: StoreTable | None = None
        if with_text:
            if not (folder / "text").is_dir():
                raise UserError(
                    f"{folder} holds latents only (it was encoded with text='online'). Set text = 'online', or encode "
                    "the captions too: text = 'stored' and `scienceflow encode`."
                )
            self.text = StoreTable(folder / "text", TEXT_PARTS)
            self.text_row = self._join()

    @staticmethod
    def is_store(folder: Path) -> bool:
        return (folder / "figures").is_dir()

    def _keys(self, table: StoreTable, column: str) -> np.ndarray:
        keys = [chunk.buffers()[1] for chunk in table.table.column(column).chunks if len(chunk)]
        return np.concatenate([np.frombuffer(buffer, dtype=_KEY_TYPE) for buffer in keys])

    def _join(self) -> np.ndarray:
        """Row of each figure's caption in the text table, (rows,) int64."""
        assert self.text is not None
        keys = self._keys(self.text, "key")
        order = np.argsort(keys, kind="stable")
        self._empty_row = self._lookup(keys, order, np.array([text_key(EMPTY_PROMPT)], dtype=_KEY_TYPE), "the empty prompt")[0]
        return self._lookup(keys, order, self._keys(self.figures, "text_key"), "figures")

    def _lookup(self, keys: np.ndarray, order: np.ndarray, wanted: np.ndarray, what: str) -> np.ndarray:
        place = np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)
        rows = order[place]
        missing = int((keys[rows] != wanted).sum())
        if missing:
            raise UserError(
                f"{self.folder}: the embeddings of {missing} caption(s) of {what} are missing in text/. "
                "Run the same `scienceflow encode` command to finish it."
            )
        return rows

    def empty_text(self) -> Tensor:
        """(L, D) embedding of the empty prompt."""
        assert self.text is not None
        return self.text.tensor(int(self._empty_row))


def require_space(folder: Path, needed: int, what: Sequence[str]) -> None:
    """Raises UserError when the disk of `folder` has less than `needed` bytes free (and 1 % to spare)."""
    import shutil

    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed * 1.01 > free:
        raise UserError(
            f"Encoding needs about {needed / 1e9:.2f} GB in {folder} ({'; '.join(what)}), and {free / 1e9:.2f} GB are "
            "free. Use another disk, text = 'online' (no embeddings on disk), a lower encode.resolution, or "
            "encode.max_figures."
        )
