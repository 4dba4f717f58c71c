"""A store of a million rows: opening, epoch order, data workers; and reading it bucket by bucket, warm and cold.

Command:  python benchmarks/run_million.py

Opening: 1,000,000 figures and as many captions of 500 to 2000 characters, with shards of 256 (the default) and of 1024 rows; the
indices are as `encode` writes them, the tensors are 64 bytes. Each way of opening is a process of its own. Memory is what the
process has for itself (private) and what it shares with others (libraries; pages of files), less what it had after its imports.

Reading: 1024 latents of 1 MB and 256 embeddings of 4 MB, written by `write_shard`, bucket by bucket as `encode` does. The
reference reads the same shards from their first byte to their last into 1 MB of memory that is used again and again. Ours are
rows in the order they lie in (bucket by bucket), rows in the order of the sampler (batches of one bucket, shuffled), and whole
batches of the data set, in memory of their own. A process compares a row's checksum the first time it reads the row; "mapped" is
a row as a view of the mapped file, with its checksum, for comparison. Cold: the shards' pages are given back to the system before
each repetition (posix_fadvise), and every row is read for the first time.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import torch
from report import Result, in_turn, ratio

from OpenSciDraw.datasets.ahead import BatchReader, Numbered, ReadAhead
from OpenSciDraw.datasets.arxiv_parquet import ArXiVParquetDatasetV2
from OpenSciDraw.datasets.mix_scale_sampler import ArXiVMixScaleBatchSampler
from OpenSciDraw.figures.buckets import buckets
from OpenSciDraw.store.contract import Contract
from OpenSciDraw.store.shard import (
    CHECKSUMS,
    FIGURE_SCHEMA,
    TEXT_SCHEMA,
    Row,
    index_schema,
    text_key,
    write_index,
    write_shard,
)
from OpenSciDraw.store.table import StoreTable

ROWS, ROWS_A_SHARD = 1_000_000, (256, 1024)
TENSOR = [1, 4, 8]  # 64 bytes
LATENT_CHANNELS, TEXT = 40, (512, 4096)  # 768-px buckets: 0.7 to 0.9 MB; 4.2 MB
LATENT_ROWS, TEXT_ROWS, SHARD = 1024, 256, 256
BATCH, REPETITIONS = 8, 5
CONTRACT = Contract("Flux2Klein", {"source": "benchmark"}, {"vae": "V"}, {"layers": [9, 18, 27]})


# -- a million rows ------------------------------------------------------------------------------
class Synthetic:
    """Index files of many rows, made from arrays; all tensors are the same zeros."""

    def __init__(self, folder: Path, rows: int, rows_a_shard: int, caption_chars: tuple[int, int] = (500, 2000)):
        self.folder, self.rows, self.rows_a_shard, self.caption_chars = folder, rows, rows_a_shard, caption_chars
        self.random = np.random.default_rng(0)
        self.letters = self.random.integers(97, 123, 2 * caption_chars[1] * rows_a_shard, dtype=np.uint8).tobytes()
        self.zeros = bytes(2 * int(np.prod(TENSOR)))

    def write(self) -> None:
        sides = np.array([(bucket.width, bucket.height) for bucket in buckets(768)], dtype=np.int32)
        keys = self.random.integers(0, 256, (self.rows, 16), dtype=np.uint8)
        for shard, first in enumerate(range(0, self.rows, self.rows_a_shard)):
            some = keys[first : first + self.rows_a_shard]
            figures = sides[np.sort(self.random.integers(0, len(sides), len(some)))]
            self._shard("figures", shard, FIGURE_SCHEMA, self._figures(first, figures, some))
        keys = np.concatenate([np.frombuffer(text_key(""), np.uint8)[None], keys])
        for shard, first in enumerate(range(0, len(keys), self.rows_a_shard)):
            some = keys[first : first + self.rows_a_shard]
            self._shard("text", shard, TEXT_SCHEMA, {"key": _fixed(some), "caption": self._captions(len(some))})
        (self.folder / "rejected.jsonl").touch()

    def _figures(self, first: int, sides: np.ndarray, keys: np.ndarray) -> dict[str, pa.Array | np.ndarray]:
        width, height = sides.T
        names = [f"{1000 + row // 700}.{row // 7:05d}/figure{row % 7}.png" for row in range(first, first + len(keys))]
        return {
            "id": pa.array(names), "caption": self._captions(len(keys)), "text_key": _fixed(keys), "bucket_w": width,
            "bucket_h": height, "aspect_ratio": (height / width).astype(np.float32),
            "placement": _lists(np.stack([0 * width, 0 * width, width, height], axis=1)),
        }  # fmt: skip

    def _captions(self, count: int) -> pa.StringArray:
        ends = np.concatenate([[0], np.cumsum(self.random.integers(*self.caption_chars, count))]).astype(np.int32)
        return pa.StringArray.from_buffers(count, pa.py_buffer(ends.tobytes()), pa.py_buffer(self.letters[: ends[-1]]))

    def _shard(self, kind: str, number: int, schema: pa.Schema, columns: dict[str, pa.Array | np.ndarray]) -> None:
        path, count = self.folder / kind / f"{number:05d}.parquet", len(columns["caption"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.zeros * count)  # tensors alone: it is only read by its index here
        facts = {"work": "0" * 16, "rejected": [], "rows": count, "sha256": "0" * 64, "bytes": path.stat().st_size,
                 "statistics": {"values": 1, "mean": 0.0, "std": 1.0}}  # fmt: skip
        checksums = np.full(count, CHECKSUMS["xxh3"](self.zeros), np.uint64)
        offsets, sizes = np.arange(count) * len(self.zeros), np.full(count, len(self.zeros))
        columns = {**columns, "shape": _lists(np.tile(TENSOR, (count, 1))), "xxh3": checksums, "offset": offsets, "nbytes": sizes}
        if kind == "figures":
            columns["content"] = pa.nulls(count, pa.binary(16))
        write_index(path, pa.table(columns, schema=index_schema(schema, CONTRACT, facts)))


def _fixed(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(values.shape[1]), len(values), [None, pa.py_buffer(values.tobytes())])


def _lists(values: np.ndarray) -> pa.Array:
    ends = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values.ravel().astype(np.int32)))


def memory() -> tuple[float, float]:
    """(private, resident) MB of this process (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) / 1000 for line in lines}
    return found["Private_Dirty"] + found["Private_Clean"], found["Rss"]


def open_once(folder: str) -> None:
    """One process's measurements of a store, as a line of JSON."""
    before, start, used = memory(), time.perf_counter(), time.process_time()
    dataset = ArXiVParquetDatasetV2(base_dir=folder)
    lengths = dataset.text_lengths()
    opened, used = time.perf_counter(), time.process_time() - used
    after = memory()
    dataset.held_out(64)
    held_out = time.perf_counter()
    sampler = ArXiVMixScaleBatchSampler(dataset.bucket_of, lengths=lengths, batch_size=4, num_replicas=8)
    batches = len(sampler)
    order = time.perf_counter()
    workers = {}
    for way in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(
            BatchReader(dataset, 0), batch_size=None, sampler=Numbered(ReadAhead(sampler, 1, 1)), num_workers=1,
            multiprocessing_context=way,
        )
        begin = time.perf_counter()
        next(iter(loader))
        workers[way] = time.perf_counter() - begin
    import multiprocessing

    begin = time.perf_counter()
    process = multiprocessing.get_context("spawn").Process(target=_nothing)
    process.start()
    process.join()
    print(json.dumps({
        "rows": len(dataset), "batches": batches, "open_seconds": opened - start, "open_cpu_seconds": used,
        "held_out_seconds": held_out - opened,
        "order_seconds": order - held_out, "private_mb": after[0] - before[0], "resident_mb": after[1] - before[1],
        "resident_in_all_mb": after[1], "fork_worker_seconds": workers["fork"], "spawn_worker_seconds": workers["spawn"],
        "spawn_of_nothing_seconds": time.perf_counter() - begin,
    }))  # fmt: skip


def _nothing() -> None:
    """What a new process does that imports what a data worker does."""


def measure_opening(folder: Path, result: Result) -> None:
    for rows_a_shard in ROWS_A_SHARD:
        store = folder / f"of{rows_a_shard}"
        Synthetic(store, ROWS, rows_a_shard).write()
        os.sync()
        size = sum(path.stat().st_size for path in store.glob("*/*.index.arrow")) / 1e9
        for state in ("cold", "warm"):
            if state == "cold":
                forget(store.glob("*/*"))
            done = subprocess.run([sys.executable, __file__, str(store)], check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            result.numbers[f"opening, {rows_a_shard} rows a shard, {state}"] = found
            result.notes.append(_sentence(found, rows_a_shard, size, state))


def _sentence(found: dict[str, float], rows_a_shard: int, size: float, state: str) -> str:
    return (
        f"{found['rows']:,} rows, {rows_a_shard} a shard ({size:.2f} GB of indices), {state}: open {found['open_seconds']:.2f} s "
        f"(limit 3 s; {found['open_cpu_seconds']:.2f} s of a core), "
        f"{found['private_mb']:.0f} MB private and {found['resident_mb']:.0f} MB resident more than before (limit 400 "
        f"MB; the process then has {found['resident_in_all_mb']:.0f} MB in all), held-out rows {found['held_out_seconds']:.2f} s, "
        f"epoch order {found['order_seconds']:.2f} s (limit 2 s), a data worker's first batch {found['fork_worker_seconds']:.2f} s "
        f"forked, {found['spawn_worker_seconds']:.2f} s spawned (a spawned process that does nothing: "
        f"{found['spawn_of_nothing_seconds']:.2f} s)."
    )


# -- reading -----------------------------------------------------------------------------------
def forget(paths: Iterator[Path]) -> None:
    """Give the files' pages back to the system; they must be on the disk."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def write_store(folder: Path) -> None:
    """Rows of 13 buckets, in each shard bucket by bucket; each figure has one of the captions."""
    some = buckets(768)[::3]
    random = np.random.default_rng(0)
    for number in range(LATENT_ROWS // SHARD):
        rows = []
        for row, bucket in enumerate(some[at] for at in np.sort(random.integers(0, len(some), SHARD))):
            shape = (LATENT_CHANNELS, bucket.height // 8, bucket.width // 8)
            caption = f"caption {(number * SHARD + row) % TEXT_ROWS}"
            columns = {
                "id": f"{number}/{row}", "caption": caption, "text_key": text_key(caption), "bucket_w": bucket.width,
                "bucket_h": bucket.height, "aspect_ratio": 1.0, "placement": [0, 0, bucket.width, bucket.height],
            }  # fmt: skip
            rows.append(Row(columns, torch.from_numpy(random.standard_normal(shape, dtype=np.float32)).bfloat16()))
        write_shard(folder / "figures" / f"{number:05d}.parquet", FIGURE_SCHEMA, rows, CONTRACT, {})
    captions = ["", *(f"caption {n}" for n in range(TEXT_ROWS - 1))]
    captions += [f"caption {TEXT_ROWS - 1}"]
    for number, first in enumerate(range(0, len(captions), SHARD)):
        tensor = torch.from_numpy(random.standard_normal(TEXT, dtype=np.float32)).bfloat16()
        texts = [Row({"key": text_key(c), "caption": c}, tensor) for c in captions[first : first + SHARD]]
        write_shard(folder / "text" / f"{number:05d}.parquet", TEXT_SCHEMA, texts, CONTRACT, {})
    (folder / "rejected.jsonl").touch()


def plain(folder: Path) -> float:
    """Seconds to read the folder's shards from the first byte to the last, per byte."""
    memory, size = bytearray(1 << 20), 0
    start = time.perf_counter()
    for path in sorted(folder.glob("*.parquet")):
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(memory):
                size += got
    return (time.perf_counter() - start) / size


class Reader:
    """The ways to read the store; each returns its seconds for each byte of tensors."""

    def __init__(self, folder: Path):
        self.dataset = ArXiVParquetDatasetV2(base_dir=str(folder), with_text=False)
        self.whole = ArXiVParquetDatasetV2(base_dir=str(folder))
        sampler = ArXiVMixScaleBatchSampler(self.dataset.bucket_of, batch_size=BATCH)
        self.shuffled = [*ReadAhead(sampler, 1, 1)]
        in_place = [[*group] for _, group in itertools.groupby(range(LATENT_ROWS), key=lambda row: self.dataset.bucket_of[row])]
        self.in_place = [[*ReadAhead([g[at : at + BATCH] for at in range(0, len(g), BATCH)], 1, 1)] for g in in_place]
        store = self.whole.rows.store  # type: ignore[attr-defined]
        self.figures, self.text = store.figures, store.text

    def rows(self, table: StoreTable, rows: Sequence[int], first: bool) -> float:
        """Each row's tensor; for the `first` time or again."""
        table._checked[:] = not first
        start = time.perf_counter()
        for row in rows:
            table.tensor(row)
        return (time.perf_counter() - start) / int(table.numbers("nbytes")[rows].sum())

    def mapped(self) -> float:
        """Views of the mapped file instead of copies: what zero-copy would cost."""
        start = time.perf_counter()
        for row in range(LATENT_ROWS):
            shard, offset, size = self.figures.span(row)
            first = offset // mmap.PAGESIZE * mmap.PAGESIZE
            with self.figures.shards[shard].open("rb") as file:
                memory = mmap.mmap(file.fileno(), offset - first + size, access=mmap.ACCESS_COPY, offset=first)
            view = torch.frombuffer(memory, dtype=torch.uint8, offset=offset - first, count=size)
            CHECKSUMS["xxh3"](view.numpy().data)
        return (time.perf_counter() - start) / int(self.figures.numbers("nbytes").sum())

    def latents_ahead(self) -> float:
        """Rows in the sampler's order for the first time, those of the next batch asked for in time."""
        self.figures._checked[:] = False
        start = time.perf_counter()
        for now, coming in self.shuffled:
            self.dataset._announce([*now, *coming])
            for row in now:
                self.figures.tensor(row)
        return (time.perf_counter() - start) / int(self.figures.numbers("nbytes").sum())

    def batches(self, batches: Sequence[tuple[list[int], list[int]]]) -> float:
        self.dataset.rows.store.figures._checked[:] = False  # type: ignore[attr-defined]
        start = time.perf_counter()
        for now, coming in batches:
            self.dataset.batch(now, coming)
        return (time.perf_counter() - start) / int(self.figures.numbers("nbytes").sum())

    def ways(self, folder: Path) -> dict[str, dict[str, Callable[[], float]]]:
        in_order, shuffled = range(LATENT_ROWS), [row for now, _ in self.shuffled for row in now]
        texts = range(len(self.text))
        return {
            "latents": {
                "plain, sequential": lambda: plain(folder / "figures"),
                "rows bucket by bucket, first time": lambda: self.rows(self.figures, in_order, True),
                "rows bucket by bucket, again": lambda: self.rows(self.figures, in_order, False),
                "rows bucket by bucket, mapped": self.mapped,
                "rows in the sampler's order, first time": lambda: self.rows(self.figures, shuffled, True),
                "the same, read ahead": self.latents_ahead,
                "rows in the sampler's order, again": lambda: self.rows(self.figures, shuffled, False),
                "batches bucket by bucket, first time": lambda: self.batches([*itertools.chain(*self.in_place)]),
                "batches in the sampler's order, first time": lambda: self.batches(self.shuffled),
            },
            "text": {
                "plain, sequential": lambda: plain(folder / "text"),
                "rows in order, first time": lambda: self.rows(self.text, texts, True),
                "rows in order, again": lambda: self.rows(self.text, texts, False),
            },
        }


def measure_reading(folder: Path, result: Result) -> None:
    write_store(folder)
    os.sync()
    reader = Reader(folder)

    def cold(run: Callable[[], float]) -> Callable[[], float]:
        def forgotten() -> float:
            forget(folder.glob("*/*"))
            return run()

        return forgotten

    for state in ("warm", "cold"):
        for what, ways in reader.ways(folder).items():
            runs = {way: cold(run) for way, run in ways.items()} if state == "cold" else ways
            reference = runs.pop("plain, sequential")
            for way, run in runs.items():  # in pairs: what a shared disk gives changes from second to second
                seconds = in_turn({"plain": reference, way: run}, REPETITIONS)
                rates = [f"{1 / median(taken) / 1e9:.2f} GB/s" for taken in seconds.values()]
                result.rows.append([what, state, way, *rates, f"{ratio(seconds['plain'], seconds[way]):.2f}"])
                result.numbers[f"{what}, {state}, {way}: seconds a byte"] = seconds


def main() -> None:
    torch.set_num_threads(1)
    result = Result("million", "python benchmarks/run_million.py", ["rows", "pages", "way", "plain", "ours", "ratio"])
    with tempfile.TemporaryDirectory() as name:
        measure_reading(Path(name) / "reading", result)
        measure_opening(Path(name), result)
    result.save()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        open_once(sys.argv[1])
    else:
        main()
