"""The layouts that run_layouts.py compares: how each writes rows, reads one of them, and fetches them from afar."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from run_store import CONTRACT
from safetensors import safe_open
from safetensors.numpy import save_file

from OpenSciDraw.store.shard import FIGURE_PARTS, FIGURE_SCHEMA, Row, index_path, text_key, write_shard
from OpenSciDraw.store.table import StoreTable

FLAT, STORE, SAFETENSORS = "flat file, os.preadv", "our store", "safetensors shards"
MDS, NPZ = "MosaicML MDS", "npz, one a row (V2)"
SHARDS = 4
BUCKETS = ((896, 1152), (1024, 1024), (1152, 896))
Fetched = tuple[list[int], list[int]]  # bytes of each request to open, and of each to read the rows


class Reader(Protocol):
    """Reads rows of one layout; `read` gives the bytes of a row as an array of any type."""

    def read(self, row: int) -> np.ndarray: ...
    def close(self) -> None: ...


@dataclass
class Layout:
    """`write` makes the files in a folder, `open` a reader of them; `fetches` says what the rows asked for cost afar."""

    name: str
    write: Callable[[Path, Sequence[np.ndarray]], None]
    open: Callable[[Path], Reader]
    fetches: Callable[[Path, Sequence[int]], Fetched | str]


@dataclass
class Function:
    """A reader of one function."""

    read: Callable[[int], np.ndarray]
    held: list[Any] = field(default_factory=list)

    def close(self) -> None:
        self.held.clear()


def shard_of(row: int, rows: int) -> tuple[int, int]:
    """Shard, and row inside it."""
    size = rows // SHARDS
    return row // size, row % size


def parts(arrays: Sequence[np.ndarray]) -> list[Sequence[np.ndarray]]:
    size = len(arrays) // SHARDS
    return [arrays[start : start + size] for start in range(0, len(arrays), size)]


# -- reads that are counted ----------------------------------------------------------------------
class CountingFileSystem(LocalFileSystem):
    """Counts what a remote filesystem would be asked for; nothing is read ahead or kept."""

    cachable = False  # fsspec gives each its own counts

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[int] = []  # bytes of each

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> Any:
        return CountedFile(self, path, mode, cache_type="none", size=os.path.getsize(path))


class CountedFile(fsspec.spec.AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(start)
            data = file.read(end - start)
        self.fs.requests.append(len(data))
        return data


def counted(opening: Callable[[CountingFileSystem], Callable[[int], Any]], rows: Sequence[int]) -> Fetched:
    """Bytes of each request to open, and of each to read `rows` afterwards."""
    fs = CountingFileSystem()
    read = opening(fs)
    at_opening = list(fs.requests)
    fs.requests.clear()
    for row in rows:
        read(row)
    return at_opening, list(fs.requests)


# -- layouts -------------------------------------------------------------------------------------
def write_flat(folder: Path, arrays: Sequence[np.ndarray]) -> None:
    with (folder / "flat.bin").open("wb") as file:
        for array in arrays:
            file.write(array.data)


def open_flat(folder: Path) -> Reader:
    size = json.loads((folder.parent / "row.json").read_text())["bytes"]
    handle = os.open(folder / "flat.bin", os.O_RDONLY)

    def read(row: int) -> np.ndarray:
        buffer = np.empty(size, np.uint8)
        os.preadv(handle, [buffer.data], row * size)
        return buffer

    reader = Function(read)
    reader.close = lambda: os.close(handle)  # type: ignore[method-assign]
    return reader


def fetch_flat(folder: Path, rows: Sequence[int]) -> Fetched:
    size = json.loads((folder.parent / "row.json").read_text())["bytes"]
    name = str(folder / "flat.bin")
    return counted(lambda fs: lambda row: fs.cat_file(name, row * size, (row + 1) * size), rows)


def write_store(folder: Path, arrays: Sequence[np.ndarray]) -> None:
    for shard, part in enumerate(parts(arrays)):
        rows = []
        for number, array in enumerate(part):
            height, width = BUCKETS[number * len(BUCKETS) // len(part)]
            columns = {
                "id": f"paper{shard}-{number}/figure.png", "caption": f"caption {number}", "text_key": text_key(f"{number}"),
                "bucket_w": width, "bucket_h": height, "aspect_ratio": height / width, "placement": [0, 0, width, height],
            }  # fmt: skip
            rows.append(Row(columns, torch.from_numpy(array).view(torch.bfloat16)))
        write_shard(folder / f"{shard:05d}.parquet", FIGURE_SCHEMA, rows, CONTRACT, {})


def open_store(check: bool) -> Callable[[Path], Reader]:
    def opening(folder: Path) -> Reader:
        table = StoreTable(folder, FIGURE_PARTS)
        return Function(lambda row: table.tensor(row, check).view(torch.uint8).numpy(), [table])

    return opening


def fetch_store(folder: Path, rows: Sequence[int]) -> Fetched:
    """The indexes whole, then each row by the place that they say."""
    table = StoreTable(folder, FIGURE_PARTS)
    offset, size = table.numbers("offset"), table.numbers("nbytes")

    def opening(fs: CountingFileSystem) -> Callable[[int], Any]:
        for shard in table.shards:
            fs.cat_file(str(index_path(shard)))
        return lambda row: fs.cat_file(str(table.shard_of(row)), int(offset[row]), int(offset[row] + size[row]))

    return counted(opening, rows)


def write_parquet(kind: pa.DataType, group: int, **options: Any) -> Callable[[Path, Sequence[np.ndarray]], None]:
    def write(folder: Path, arrays: Sequence[np.ndarray]) -> None:
        pieces = parts(arrays) if group <= len(arrays) // SHARDS else [arrays]
        for shard, part in enumerate(pieces):
            if pa.types.is_list(kind):
                numbers: Any = [a if pa.types.is_uint16(kind.value_type) else widened(a) for a in part]
            else:
                numbers = [a.tobytes() for a in part]
            table = pa.table({"tensor": pa.chunked_array([pa.array([n], kind) for n in numbers])})
            pq.write_table(table, folder / f"{shard}.parquet", row_group_size=group, use_dictionary=False,
                           write_statistics=False, **options)  # fmt: skip

    return write


def widened(array: np.ndarray) -> np.ndarray:
    """fp32 of bf16 bits, as a list<float> column would have them."""
    return (array.astype(np.uint32) << 16).view(np.float32)


def parquet_reader(files: Sequence[pq.ParquetFile], size: int) -> Callable[[int], np.ndarray]:
    """As pyarrow users read a row of a group: the group, of it the row."""
    starts = np.cumsum([0, *[f.metadata.num_rows for f in files]])

    def read(row: int) -> np.ndarray:
        shard = int(np.searchsorted(starts, row, side="right")) - 1
        group_size = files[shard].metadata.row_group(0).num_rows
        group, place = divmod(row - int(starts[shard]), group_size)
        column = files[shard].read_row_group(group, columns=["tensor"], use_threads=False).column("tensor").slice(place, 1)
        array = column.chunk(0)
        if pa.types.is_list(array.type):
            return array.flatten().to_numpy()
        return np.frombuffer(array[0].as_buffer(), np.uint8, size)

    return read


def open_parquet(folder: Path) -> Reader:
    size = json.loads((folder.parent / "row.json").read_text())["bytes"]
    files = [pq.ParquetFile(path) for path in sorted(folder.glob("*.parquet"))]
    reader = Function(parquet_reader(files, size))
    reader.close = lambda: [file.close(force=True) for file in files]  # type: ignore[method-assign, assignment]
    return reader


def fetch_parquet(folder: Path, rows: Sequence[int]) -> Fetched:
    size = json.loads((folder.parent / "row.json").read_text())["bytes"]

    def opening(fs: CountingFileSystem) -> Callable[[int], Any]:
        arrow = PyFileSystem(FSSpecHandler(fs))
        names = sorted(folder.glob("*.parquet"))
        return parquet_reader([pq.ParquetFile(arrow.open_input_file(str(name)), pre_buffer=True) for name in names], size)

    return counted(opening, rows)


def write_safetensors(folder: Path, arrays: Sequence[np.ndarray]) -> None:
    for shard, part in enumerate(parts(arrays)):
        save_file({f"{number}": array for number, array in enumerate(part)}, folder / f"{shard}.safetensors")


def open_safetensors(folder: Path) -> Reader:
    files: list[Any] = [safe_open(path, framework="numpy") for path in sorted(folder.glob("*.safetensors"))]
    rows = sum(len(file.keys()) for file in files)

    def read(row: int) -> np.ndarray:
        shard, number = shard_of(row, rows)
        return files[shard].get_tensor(f"{number}")

    return Function(read, files)


def write_npz(folder: Path, arrays: Sequence[np.ndarray]) -> None:
    for row, array in enumerate(arrays):
        np.savez(folder / f"{row:05d}.npz", latents=array)


def open_npz(folder: Path) -> Reader:
    def read(row: int) -> np.ndarray:
        with np.load(folder / f"{row:05d}.npz") as data:
            return data["latents"]

    return Function(read)


def fetch_npz(folder: Path, rows: Sequence[int]) -> Fetched:
    def opening(fs: CountingFileSystem) -> Callable[[int], Any]:
        def read(row: int) -> Any:
            with fs.open(str(folder / f"{row:05d}.npz")) as file, np.load(file) as data:
                return data["latents"]

        return read

    return counted(opening, rows)


def write_mds(folder: Path, arrays: Sequence[np.ndarray]) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"tensor": "bytes"}) as writer:  # its default: shards of 64 MB
        for array in arrays:
            writer.write({"tensor": array.tobytes()})


def open_mds(folder: Path) -> Reader:
    from streaming import LocalDataset

    dataset = LocalDataset(local=str(folder))
    return Function(lambda row: np.frombuffer(dataset[row]["tensor"], np.uint8), [dataset])


def fetch_mds(folder: Path, rows: Sequence[int]) -> str:
    sizes = [shard["raw_data"]["bytes"] for shard in json.loads((folder / "index.json").read_text())["shards"]]
    return f"a whole shard: 1, {np.mean(sizes) / 1e6:.1f} MB"


def write_lance(version: str) -> Callable[[Path, Sequence[np.ndarray]], None]:
    def write(folder: Path, arrays: Sequence[np.ndarray]) -> None:
        import lance

        schema = pa.schema([pa.field("tensor", pa.large_binary())])
        batches = (pa.record_batch([pa.array([array.tobytes()], pa.large_binary())], schema=schema) for array in arrays)
        reader = pa.RecordBatchReader.from_batches(schema, batches)
        lance.write_dataset(reader, str(folder / "rows.lance"), data_storage_version=version)

    return write


def open_lance(folder: Path) -> Reader:
    import lance

    dataset = lance.dataset(str(folder / "rows.lance"))

    def read(row: int) -> np.ndarray:
        return np.frombuffer(dataset.take([row], columns=["tensor"]).column("tensor").chunk(0)[0].as_buffer(), np.uint8)

    return Function(read, [dataset])


def fetch_lance(folder: Path, rows: Sequence[int]) -> Fetched:
    """As Lance counts them itself; its opening includes the first row, which reads the files' own metadata."""
    import lance

    dataset = lance.dataset(str(folder / "rows.lance"))
    spent = []
    for row in [rows[0], *rows]:
        dataset.take([row], columns=["tensor"])
        stats = dataset.io_stats_incremental()
        spent.append((stats.read_iops, stats.read_bytes))
    flat = [[size // max(1, count)] * count for count, size in spent]
    return flat[0], [size for sizes in flat[1:] for size in sizes]


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def layouts(groups: Sequence[int]) -> tuple[list[Layout], list[str]]:
    """Those whose package is installed, with parquet also in these numbers of rows a group; and the packages that are not."""
    def parquet(what: str, kind: pa.DataType, group: int, **options: Any) -> Layout:
        return Layout(f"parquet, {what}", write_parquet(kind, group, **options), open_parquet, fetch_parquet)

    binary, plain = pa.large_binary(), {"compression": "none", "data_page_size": 2**30}
    found = [
        Layout(FLAT, write_flat, open_flat, fetch_flat),
        Layout(STORE, write_store, open_store(True), fetch_store),
        Layout("our store, no checksum", write_store, open_store(False), fetch_store),
        Layout("our store's files, pyarrow", write_store, open_parquet, fetch_parquet),
        *[parquet(f"{group} rows a group", binary, group, **plain) for group in groups],
        parquet("1 row a group, zstd-1", binary, 1, compression="zstd", compression_level=1),
        parquet("1 row a group, list&lt;uint16&gt;", pa.list_(pa.uint16()), 1, **plain),
        parquet("1 row a group, list&lt;float&gt;", pa.list_(pa.float32()), 1, **plain),
        Layout(SAFETENSORS, write_safetensors, open_safetensors, lambda folder, rows: "whole files"),
        Layout(NPZ, write_npz, open_npz, fetch_npz),
    ]  # fmt: skip
    optional = {
        "mosaicml-streaming": [Layout(MDS, write_mds, open_mds, fetch_mds)],
        "pylance": [Layout(f"Lance {v}", write_lance(v), open_lance, fetch_lance) for v in ("2.0", "2.1")],
    }
    for package, more in optional.items():
        found += more if installed(package) else []
    return found, [package for package in optional if not installed(package)]
