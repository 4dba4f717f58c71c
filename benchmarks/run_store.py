"""Reading of encoded rows from a store, against reading the same bytes from a flat file.

Command:  python benchmarks/run_store.py

1 GB: 512 latents of 1 MB and 128 captions' embeddings of 4 MB, written by `write_shard`, lying in the page cache. Each row is
read into memory of its own, in random order and in the order of the batch sampler (latents), by `StoreTable.tensor` with and
without its checksum, by `os.preadv` from a flat file of the same bytes, and by pyarrow's
`ParquetFile.read_row_group`, in turn in one process with one thread. Then: how fast the same tensors are written, and the time
and memory to open an index of 100,000 rows with captions of 3.5 kB.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from report import Result, in_turn, ratio

from OpenSciDraw.datasets.mix_scale_sampler import ArXiVMixScaleBatchSampler
from OpenSciDraw.store.contract import Contract
from OpenSciDraw.store.shard import (
    FIGURE_PARTS,
    FIGURE_SCHEMA,
    TEXT_PARTS,
    TEXT_SCHEMA,
    Row,
    index_schema,
    text_key,
    write_index,
    write_shard,
)
from OpenSciDraw.store.table import StoreTable

REPETITIONS = 5
BUCKETS = ((896, 1152), (1024, 1024), (1152, 896))
LATENTS, TEXT = (32, 128, 128), (512, 4096)  # bf16: 1.05 MB and 4.19 MB
LATENT_ROWS, LATENTS_A_SHARD = 512, 128
TEXT_ROWS, TEXTS_A_SHARD = 128, 64
CONTRACT = Contract("Flux2Klein", {"source": "benchmark"}, {"vae": "V"}, {"layers": [9, 18, 27]})


def figure_columns(row: int, caption: str) -> dict[str, Any]:
    width, height = BUCKETS[row % len(BUCKETS)]
    return {
        "id": f"paper{row}/figure.png", "caption": caption, "text_key": text_key(caption), "bucket_w": width,
        "bucket_h": height, "aspect_ratio": height / width, "placement": [0, 0, width, height],
    }  # fmt: skip


def latent_rows(start: int) -> Iterator[Row]:
    for row in sorted(range(start, start + LATENTS_A_SHARD), key=lambda row: row % len(BUCKETS)):
        yield Row(figure_columns(row, f"caption {row}"), torch.randn(LATENTS, generator=torch.Generator().manual_seed(row)))


def text_rows(start: int) -> Iterator[Row]:
    for row in range(start, start + TEXTS_A_SHARD):
        tensor = torch.randn(TEXT, generator=torch.Generator().manual_seed(row))
        yield Row({"key": text_key(f"caption {row}"), "caption": f"caption {row}"}, tensor)


class Rows:
    """One table of the store, and the same tensors as one flat file."""

    def __init__(self, table: StoreTable, flat: Path):
        self.table = table
        self.size = int(table.numbers("nbytes")[0])
        with flat.open("wb") as file:
            for row in range(len(table)):
                file.write(table.tensor(row).view(torch.uint8).numpy().data)
        self.flat = os.open(flat, os.O_RDONLY)
        self.parquet = [pq.ParquetFile(path, memory_map=False) for path in table.shards]
        counts = [file.metadata.num_row_groups for file in self.parquet]
        self.place = [(shard, group) for shard, count in enumerate(counts) for group in range(count)]

    def raw(self, order: Sequence[int]) -> float:
        start = time.perf_counter()
        for row in order:
            buffer = torch.empty(self.size, dtype=torch.uint8)
            os.preadv(self.flat, [buffer.numpy().data], row * self.size)
        return time.perf_counter() - start

    def ours(self, order: Sequence[int], check: bool) -> float:
        start = time.perf_counter()
        for row in order:
            self.table.tensor(row, check)
        return time.perf_counter() - start

    def arrow(self, order: Sequence[int]) -> float:
        """The bytes as pyarrow hands them over, in an Arrow buffer; making a tensor of them is not counted."""
        start = time.perf_counter()
        for row in order:
            shard, group = self.place[row]
            self.parquet[shard].read_row_group(group, columns=["tensor"], use_threads=False)
        return time.perf_counter() - start


def measure_reading(what: str, rows: Rows, order: Sequence[int], result: Result) -> None:
    ways = {
        "flat file, os.preadv": lambda: rows.raw(order),
        "StoreTable.tensor, no checksum": lambda: rows.ours(order, check=False),
        "StoreTable.tensor": lambda: rows.ours(order, check=True),
        "pyarrow read_row_group": lambda: rows.arrow(order),
    }
    seconds = in_turn(ways, REPETITIONS)
    reference = seconds["flat file, os.preadv"]
    for way, taken in seconds.items():
        rate = len(order) * rows.size / median(taken) / 1e9
        milliseconds = 1e3 * median(taken) / len(order)
        result.rows.append([what, way, f"{rate:.2f} GB/s", f"{milliseconds:.3f} ms", f"{ratio(reference, taken):.2f}"])
    result.numbers[what] = {"seconds": seconds, "rows": len(order), "bytes_a_row": rows.size}


def measure_writing(folder: Path, result: Result) -> None:
    """write_shard of rows that lie in memory, until they are on the disk, against write and fsync of the same bytes."""
    rows = [Row(row.columns, row.tensor.bfloat16()) for row in text_rows(0)][:32]
    size = sum(2 * row.tensor.numel() for row in rows)

    def raw() -> float:
        start = time.perf_counter()
        with (folder / "flat.bin").open("wb") as file:
            for row in rows:
                file.write(row.tensor.view(torch.uint8).numpy().data)
            os.fsync(file.fileno())
        return time.perf_counter() - start

    def ours() -> float:
        start = time.perf_counter()
        write_shard(folder / "shard.parquet", TEXT_SCHEMA, rows, CONTRACT, {})
        return time.perf_counter() - start

    seconds = in_turn({"flat file, write and fsync": raw, "write_shard": ours}, REPETITIONS)
    reference = seconds["flat file, write and fsync"]
    for way, taken in seconds.items():
        rate, milliseconds = size / median(taken) / 1e9, 1e3 * median(taken) / len(rows)
        row = ["captions, written", way, f"{rate:.2f} GB/s", f"{milliseconds:.3f} ms", f"{ratio(reference, taken):.2f}"]
        result.rows.append(row)
    result.numbers["writing"] = {"seconds": seconds, "bytes": size}


def measure_opening(folder: Path, result: Result) -> None:
    """391 shards of 256 rows as `encode` leaves their indices; must come first: memory is the process's peak."""
    caption = "The figure illustrates a pipeline. " * 100
    row = {**figure_columns(0, caption), "shape": list(LATENTS), "xxh3": 0, "offset": 0, "nbytes": 1}
    schema = index_schema(FIGURE_SCHEMA, CONTRACT, {"rows": 256})
    folder.mkdir()
    for shard in range(391):
        path = folder / f"{shard:05d}.parquet"
        path.touch()
        write_index(path, pa.Table.from_pylist([{**row, "id": f"{shard}/{n}"} for n in range(256)], schema=schema))
    unit = 1 if sys.platform == "darwin" else 1024
    before, allocated = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, pa.total_allocated_bytes()
    start = time.perf_counter()
    table = StoreTable(folder, FIGURE_PARTS)
    np.stack([table.numbers("bucket_h"), table.numbers("bucket_w")])
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / 1e6
    on_disk = sum(path.stat().st_size for path in folder.glob("*.index.arrow")) / 1e6
    result.notes.append(
        f"Opening an index of {len(table):,} rows in 391 shards ({on_disk:.0f} MB on disk, mapped): {seconds:.2f} s (limit 2 s), "
        f"the process's peak memory grew by {grown:.0f} MB."
    )
    result.numbers["opening"] = {
        "rows": len(table), "seconds": seconds, "peak_memory_grew_mb": grown, "index_mb": on_disk,
        "arrow_allocated_mb": (pa.total_allocated_bytes() - allocated) / 1e6,
    }  # fmt: skip


def sampler_order(table: StoreTable) -> list[int]:
    """Rows as the sampler gives them to training: batches of one bucket."""
    sizes = np.stack([table.numbers("bucket_h"), table.numbers("bucket_w")], axis=1)
    bucket_of = np.unique(sizes, axis=0, return_inverse=True)[1].reshape(-1)
    rows = np.arange(len(table))
    sampler = ArXiVMixScaleBatchSampler(
        bucket_of, rows=rows, batch_size=8, num_replicas=1, rank=0, drop_last=False, shuffle=True, seed=0
    )
    return [row for batch in sampler for row in batch]


def main() -> None:
    torch.set_num_threads(1)
    result = Result("store", "python benchmarks/run_store.py", ["rows", "way", "rate", "a row", "ratio to the flat file"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure_opening(folder / "index", result)
        for shard, start in enumerate(range(0, LATENT_ROWS, LATENTS_A_SHARD)):
            write_shard(folder / "figures" / f"{shard:05d}.parquet", FIGURE_SCHEMA, latent_rows(start), CONTRACT, {})
        for shard, start in enumerate(range(0, TEXT_ROWS, TEXTS_A_SHARD)):
            write_shard(folder / "text" / f"{shard:05d}.parquet", TEXT_SCHEMA, text_rows(start), CONTRACT, {})
        latents = Rows(StoreTable(folder / "figures", FIGURE_PARTS), folder / "latents.bin")
        text = Rows(StoreTable(folder / "text", TEXT_PARTS), folder / "text.bin")
        shuffle = np.random.default_rng(0)
        measure_reading("latents, random", latents, shuffle.permutation(LATENT_ROWS).tolist(), result)
        measure_reading("latents, sampler's order", latents, sampler_order(latents.table), result)
        measure_reading("captions, random", text, shuffle.permutation(TEXT_ROWS).tolist(), result)
        measure_writing(folder, result)
    result.save()


if __name__ == "__main__":
    main()
