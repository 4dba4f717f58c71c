"""A shard of the encoded store: how it is written, and what it says of itself. Reading many: table.py.

    00000.parquet        one row per row group, uncompressed, tensors in a non-null `large_binary` column
    00000.index.arrow    the small columns, where in the Parquet file each tensor lies, and behind all that its own checksum

The bytes of a tensor lie in one piece of the file, so that a row is read by one positional read, as fast as
a raw file; any Parquet reader can read the shards as well. The index is written last: a shard with an index
is whole, and one without is not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from torch import Tensor

from OpenSciDraw.errors import UserError
from OpenSciDraw.store.contract import Contract, bytes_of_shape, to_bytes
from OpenSciDraw.utils.arrow import validated
from OpenSciDraw.utils.files import parse_json, sha256_of, sync_to_disk

_LOG = logging.getLogger("OpenSciDraw")
KEY_BYTES = 16
MASK_CELL = 8  # pixels of a side of a cell of a mask
_SEAL = b"SFindex1"  # ends an index, behind the xxh3 of all before it; those before 0.5.0 have none
FIGURE_PARTS, TEXT_PARTS = ("latents", "picture"), ("text",)  # what a shard's contract says

# A column that is named as a checksum holds that of the tensor's bytes.
CHECKSUMS: dict[str, Callable[[memoryview | bytes], int]] = {"xxh3": xxhash.xxh3_64_intdigest, "crc32": zlib.crc32}
_CHECKSUM = "xxh3"

_TENSOR_FIELDS = [
    pa.field("tensor", pa.large_binary(), nullable=False),  # `to_bytes`
    pa.field("shape", pa.list_(pa.int32()), nullable=False),
    pa.field(_CHECKSUM, pa.uint64(), nullable=False),
]
_PICTURE_FIELDS = [
    pa.field("bucket_w", pa.int32(), nullable=False),
    pa.field("bucket_h", pa.int32(), nullable=False),
    pa.field("aspect_ratio", pa.float32(), nullable=False),  # height / width of the source picture
    pa.field("placement", pa.list_(pa.int32()), nullable=False),  # x0, y0, x1, y1 of the picture in its bucket
    pa.field("content", pa.binary(KEY_BYTES)),  # xxh3 of the picture's file; null for drawn ones, and before 0.5.0
]
_FIGURE_FIELDS = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("caption", pa.string(), nullable=False),
    pa.field("text_key", pa.binary(KEY_BYTES), nullable=False),
    *_PICTURE_FIELDS,
]
_EDIT_FIELDS = [
    pa.field("references", pa.binary(), nullable=False),  # keys of the pictures that it starts from, one behind the other
    pa.field("edit_boxes", pa.binary(), nullable=False),  # float32 x0, y0, x1, y1 of each, as fractions of the bucket
]
_DESCRIBED_FIELDS = [  # nothing in a cell: one caption, no mask
    pa.field("captions", pa.binary(), nullable=False),  # JSON: all captions and their weights, of which `caption` is the first
    pa.field("caption_keys", pa.binary(), nullable=False),  # of each the row of text/, as text_key
    pa.field("mask", pa.binary(), nullable=False),  # zlib of uint8 (bucket_h / 8, bucket_w / 8)
    pa.field("loss_weight", pa.float32(), nullable=False),
]
FIGURE_SCHEMA = pa.schema([*_FIGURE_FIELDS, *_TENSOR_FIELDS])
EDIT_SCHEMA = pa.schema([*_FIGURE_FIELDS, *_EDIT_FIELDS, *_TENSOR_FIELDS])  # figures of a list in which some are edits
DESCRIBED_SCHEMA = pa.schema([*_FIGURE_FIELDS, *_DESCRIBED_FIELDS, *_TENSOR_FIELDS])  # some have several captions, a mask, a weight
DESCRIBED_EDIT_SCHEMA = pa.schema([*_FIGURE_FIELDS, *_EDIT_FIELDS, *_DESCRIBED_FIELDS, *_TENSOR_FIELDS])
REFERENCE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        *_PICTURE_FIELDS,
        *_TENSOR_FIELDS,
    ]
)
TEXT_SCHEMA = pa.schema(
    [pa.field("key", pa.binary(KEY_BYTES), nullable=False), pa.field("caption", pa.string(), nullable=False), *_TENSOR_FIELDS]
)

EDIT_TEXT_SCHEMA = pa.schema(  # of a text encoder that reads pictures
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),  # `instruction_key`
        pa.field("caption", pa.string(), nullable=False),
        pa.field("seen", pa.binary(), nullable=False),  # `content` of the pictures, one behind the other; nothing for drawn ones
        *_TENSOR_FIELDS,
    ]
)

KINDS = ("figures", "references", "text")  # folders of a store
SCHEMAS = (
    FIGURE_SCHEMA, EDIT_SCHEMA, DESCRIBED_SCHEMA, DESCRIBED_EDIT_SCHEMA, REFERENCE_SCHEMA, TEXT_SCHEMA, EDIT_TEXT_SCHEMA,
)  # fmt: skip


def figure_schema(edits: bool, described: bool) -> pa.Schema:
    """Of a shard of figures, where some are `edits`, or have more said of them than a caption; others keep the plain columns."""
    if described:
        return DESCRIBED_EDIT_SCHEMA if edits else DESCRIBED_SCHEMA
    return EDIT_SCHEMA if edits else FIGURE_SCHEMA


def text_key(caption: str) -> bytes:
    """Captions, and pictures that edits start from, are stored once: the key is a hash of the exact text, or of the id."""
    return hashlib.sha256(caption.encode()).digest()[:KEY_BYTES]


def instruction_key(caption: str, references: bytes) -> bytes:
    """Of a caption that was read with pictures, whose keys are `references`, one behind the other; without any, `text_key`."""
    both = hashlib.sha256(caption.encode()).digest() + references
    return hashlib.sha256(both).digest()[:KEY_BYTES] if references else text_key(caption)


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
            data = to_bytes(row.tensor, contract)
            columns = {**row.columns, "shape": list(row.tensor.shape), _CHECKSUM: CHECKSUMS[_CHECKSUM](data)}
            writer.write_table(pa.Table.from_pylist([{**columns, "tensor": data}], schema=schema), row_group_size=1)
            small.append(columns)
            # a row in fp32, the rows in fp64: all in fp64 took a third of the time of writing
            numbers = row.tensor.detach().cpu().to(torch.bfloat16).float()
            total += (numbers.numel(), numbers.sum().item(), numbers.square_().sum().item())
            if not math.isfinite(total[1]) and (wrong := not_finite(row.tensor)):  # sums overflow where no number does
                raise ValueError(f"{path}: {name_row(row.columns)} has numbers that are not finite: {wrong}")
        facts = {**facts, "rows": len(small), "statistics": _statistics(total), "small_columns": _digest(small, schema)}
        writer.add_key_value_metadata({"contract": contract.to_json(), "facts": json.dumps(facts)})
    sync_to_disk(building)
    table = _index_of(building, schema, small, contract, facts)
    index_path(path).unlink(missing_ok=True)  # of a shard that is written anew: no moment with another one's index
    os.replace(building, path)
    write_index(path, table)
    return len(small)


def not_finite(tensor: Tensor) -> str | None:
    """How many numbers of a tensor are not finite; None where all are."""
    wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
    return f"{wrong} of {tensor.numel()}" if wrong else None


def name_row(columns: dict[str, Any]) -> str:
    return f"the figure {columns['id']!r}" if "id" in columns else f"the caption {columns['caption'][:80]!r}"


def _index_of(
    file: Path, schema: pa.Schema, small: list[dict[str, Any]], contract: Contract, facts: dict[str, Any]
) -> pa.Table:
    """The index of a shard whose Parquet file is `file`, with the small columns of its rows."""
    places = tensor_places(pq.read_metadata(file), schema, [columns["shape"] for columns in small], contract)
    rows = [{**columns, "offset": at, "nbytes": size} for columns, (at, size) in zip(small, places, strict=True)]
    facts = {**facts, "sha256": sha256_of(file), "bytes": file.stat().st_size}
    return pa.Table.from_pylist(rows, schema=index_schema(schema, contract, facts))


def _digest(small: list[dict[str, Any]], schema: pa.Schema) -> str:
    """Of the small columns, in the types of the file."""
    table = pa.Table.from_pylist(small, schema=pa.schema([field for field in schema if field.name != "tensor"]))
    return xxhash.xxh3_128_hexdigest(repr(table.to_pylist()).encode())


def rebuild_index(shard: Path) -> bool:
    """Write the index of a whole shard anew, from the shard alone; False where the shard is not whole, or too old to tell."""
    try:
        file = pq.ParquetFile(shard)
        metadata, found = file.metadata.metadata, file.schema_arrow.names
        schema = next(schema for schema in SCHEMAS if schema.names == found)
        contract, facts = Contract.from_json(metadata[b"contract"]), parse_json(metadata[b"facts"])
        small = file.read(columns=[name for name in schema.names if name != "tensor"]).to_pylist()
        whole = _digest(small, schema) == facts.get("small_columns") and len(small) == facts["rows"]
        for at, columns in enumerate(small if whole else []):
            data = file.read_row_group(at, columns=["tensor"]).column("tensor")[0].as_buffer()
            whole = whole and CHECKSUMS[_CHECKSUM](memoryview(data)) == columns[_CHECKSUM]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, StopIteration):
        return False
    if whole:
        write_index(shard, _index_of(shard, schema, small, contract, facts))
    return whole


def tensor_places(
    metadata: pq.FileMetaData, schema: pa.Schema, shapes: Sequence[Sequence[int]], contract: Contract
) -> list[tuple[int, int]]:
    """(offset, bytes) of each row's tensor: a PLAIN page ends with its value, so it is the tail of its column chunk."""
    column = schema.get_field_index("tensor")
    chunks = [metadata.row_group(group).column(column) for group in range(metadata.num_row_groups)]
    sizes = [bytes_of_shape(shape, contract) for shape in shapes]
    return [(c.data_page_offset + c.total_compressed_size - size, size) for c, size in zip(chunks, sizes, strict=True)]


def _statistics(total: np.ndarray) -> dict[str, float]:
    count, first, second = total.tolist()
    if not count:
        return {"values": 0}
    mean = first / count
    return {"values": int(count), "mean": mean, "std": math.sqrt(max(0.0, second / count - mean**2))}


def index_schema(schema: pa.Schema, contract: Contract, facts: dict[str, Any]) -> pa.Schema:
    """Columns of the index of a shard with the columns `schema`, and its metadata."""
    fields = [f for f in schema if f.name != "tensor"]
    fields += [pa.field("offset", pa.int64(), nullable=False), pa.field("nbytes", pa.int64(), nullable=False)]
    return pa.schema(fields, metadata={"contract": contract.to_json(), "facts": json.dumps(facts)})


def write_index(shard: Path, table: pa.Table) -> None:
    """The index of `shard`, its table as `index_schema` says."""
    building = shard.with_name(f".{shard.name}.index.tmp")
    with pa.OSFile(str(building), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with building.open("ab") as file:
        file.write(_checksum_of(building.read_bytes()) + _SEAL)
    sync_to_disk(building)
    os.replace(building, index_path(shard))
    sync_to_disk(shard.parent)


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


# -- what a shard says of itself ------------------------------------------------------------------
@dataclass(frozen=True)
class ShardInfo:
    path: Path
    contract: Contract
    facts: dict[str, Any]


def content_of_rows(shard: Path) -> dict[str, bytes]:
    """Hashes of the files of a shard's figures by their ids, and of those that were rejected; not of those without one."""
    index = open_index(index_path(shard))[0].read_all()
    rejected = parse_json(index.schema.metadata[b"facts"])["rejected"]
    columns = [index.column(name).to_pylist() for name in ("id", "content") if name in index.column_names]
    found = dict(zip(*columns, strict=True)) if len(columns) == 2 else {}
    found |= {r["id"]: bytes.fromhex(r["content"]) for r in rejected if r.get("content")}
    return {identity: content for identity, content in found.items() if content is not None}


def pictures_seen(shard: Path) -> dict[bytes, bytes]:
    """Of a shard of texts that were read with pictures: `seen` by `key`."""
    index = open_index(index_path(shard))[0].read_all()
    columns = [index.column(name).to_pylist() for name in ("key", "seen")]
    return dict(zip(*columns, strict=True))


class DamagedIndex(UserError):
    """The index of a shard is not the one that was written."""


def open_index(path: Path) -> tuple[pa.ipc.RecordBatchFileReader, pa.Buffer]:
    """The index of a shard, mapped into memory, and the map itself. Raises DamagedIndex, before anything of it is believed."""
    try:
        mapped = pa.memory_map(str(path)).read_buffer()
        content = _unsealed(mapped)
        reader = pa.ipc.open_file(content)
        if content is mapped:  # nothing vouches for what it says
            for at in range(reader.num_record_batches):
                for column in reader.get_batch(at).columns:
                    validated(column)
        return reader, mapped
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedIndex(
            f"{path}: the index of this shard is damaged ({error}). Run the same `scienceflow encode` or `repack` command again: "
            "it is made anew from its shard."
        ) from error


def what_is_damaged(index: Path) -> DamagedIndex | None:
    """The error of opening an index that has not the bytes that were written."""
    try:
        open_index(index)
    except DamagedIndex as error:
        return error
    return None


def _unsealed(index: pa.Buffer) -> pa.Buffer:
    """An index without its seal. Raises ValueError when that says something else."""
    size = index.size - len(_SEAL) - 8
    if size >= 0 and index.slice(size + 8).to_pybytes() == _SEAL:
        if index.slice(size, 8).to_pybytes() != _checksum_of(index.slice(0, size)):
            raise ValueError("its checksum is another one")
        return index.slice(0, size)
    if index.size < 6 or index.slice(index.size - 6).to_pybytes() != b"ARROW1":
        raise ValueError("it has no end")
    return index  # of a version that wrote no seal


def _checksum_of(data: Any) -> bytes:
    return xxhash.xxh3_64_digest(memoryview(data))


def mended_shard_info(shard: Path) -> ShardInfo | None:
    """As `read_shard_info`; a damaged index is made anew. None also where that cannot be done: the shard is to be written again."""
    try:
        return read_shard_info(shard)
    except DamagedIndex as error:
        if not rebuild_index(shard):
            _LOG.warning("%s: index and shard are damaged: it is written again", shard)
            return None
        _LOG.warning("%s was damaged (%s) and is made anew from its shard", index_path(shard), error.__cause__)
    return read_shard_info(shard)


def read_shard_info(shard: Path) -> ShardInfo | None:
    """What a shard says of itself, from its index; None when it has none (it was never finished)."""
    index = index_path(shard)
    if not index.exists():
        return None
    metadata = open_index(index)[0].schema.metadata or {}
    return ShardInfo(shard, Contract.from_json(metadata[b"contract"]), parse_json(metadata[b"facts"]))
