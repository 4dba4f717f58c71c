"""Layouts of encoded rows on disk, against reading the same bytes from a flat file.

Command:  python benchmarks/run_layouts.py

Rows of bf16 numbers of 1.05, 4.59 and 12.58 MB (a latent, a mean sample, a caption at klein-9B's width), about 0.3 GB of each,
in every layout whose package is installed, uncompressed where nothing else is said. A read ends when the row's bytes can be
used: it gives an array, of which one byte of every page is touched. "Our store" is `StoreTable.tensor`.

All take turns in one process with one thread on files in the page cache: in random order, and in the order of the batch
sampler. Cold: pages dropped (posix_fadvise) and readers opened anew before each pass, random order; the disk under it is a
shared one. The numbers in these three columns are times over those of `os.preadv` from a flat file in the same round: lower is
better. Then the time to open all files of a layout, and its size on disk over that of the tensors.

Remote: read requests and bytes for one row at random, and in brackets to open, as the filesystem (fsspec, nothing read ahead
or kept) or the library itself counts them. Our store fetches the place that its index says.
"""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from layouts import FLAT, MDS, NPZ, SAFETENSORS, STORE, Fetched, Layout, Reader, installed, layouts, widened
from report import Result, in_turn
from run_store import sampler_order

from OpenSciDraw.store.shard import FIGURE_PARTS
from OpenSciDraw.store.table import StoreTable

REPETITIONS, COLD_REPETITIONS = 5, 2
READS = 24  # rows of a pass
REMOTE_READS = 8
CASES = {  # shape, rows, and rows of the larger row groups
    "1.05 MB": ((32, 128, 128), 256, (16, 128)), "4.59 MB": ((140, 128, 128), 64, (16, 64)),
    "12.58 MB": ((512, 12288), 24, (16,)),
}  # fmt: skip


def reading(reader: Reader, order: Sequence[int]) -> float:
    start = time.perf_counter()
    for row in order:
        reader.read(row).view(np.uint8).reshape(-1)[::4096].sum()
    return time.perf_counter() - start


def drop_pages(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def cold(layout: Layout, folder: Path, order: Sequence[int]) -> float:
    gc.collect()
    drop_pages(folder)
    reader = layout.open(folder)
    seconds = reading(reader, order)
    reader.close()
    return seconds


def opening(layout: Layout, folder: Path) -> float:
    start = time.perf_counter()
    reader = layout.open(folder)
    seconds = time.perf_counter() - start
    reader.close()
    return seconds


def fetched(found: Fetched | str, rows: int) -> str:
    if isinstance(found, str):
        return found
    at_opening, later = found
    return f"{len(later) / rows:.1f}, {sum(later) / rows / 1e6:.2f} MB ({len(at_opening)}, {sum(at_opening) / 1e3:.0f} kB)"


def slow_as(layout: Layout, seconds: dict[str, list[float]]) -> str:
    return f"{median(s / r for s, r in zip(seconds[layout.name], seconds[FLAT], strict=True)):.2f}"


def measure(case: str, folder: Path, result: Result) -> None:
    shape, rows, groups = CASES[case]
    generator = torch.Generator().manual_seed(0)
    arrays = [torch.randn(shape, generator=generator).bfloat16().view(torch.uint16).numpy() for _ in range(rows)]
    size = arrays[0].nbytes
    (folder / "row.json").write_text(json.dumps({"bytes": size}))
    found, lacking = layouts(groups)
    result.notes = [f"Not installed, so not measured: {', '.join(lacking)}."] if lacking else []
    places = {layout.name: folder / f"{number}" for number, layout in enumerate(found)}
    for layout in found:
        places[layout.name].mkdir()
        layout.write(places[layout.name], [array.reshape(-1) for array in arrays])
        reader = layout.open(places[layout.name])
        for row in (0, rows // 2, rows - 1):
            values = reader.read(row).view(np.uint8).reshape(-1)
            expected = arrays[row].reshape(-1) if len(values) == size else widened(arrays[row].reshape(-1))
            assert np.array_equal(values, expected.view(np.uint8)), layout.name
        reader.close()
    shuffled = np.random.default_rng(0).permutation(rows)[:READS].tolist()
    by_bucket = sampler_order(StoreTable(places[STORE], FIGURE_PARTS))[:READS]
    readers = {layout.name: layout.open(places[layout.name]) for layout in found}
    times = {}
    for way, order in (("random", shuffled), ("sampler", by_bucket)):
        ways: dict[str, Callable[[], float]] = {name: partial(reading, reader, order) for name, reader in readers.items()}
        times[way] = in_turn(ways, REPETITIONS)
    for reader in readers.values():
        reader.close()
    readers.clear()
    times["cold"] = {layout.name: [] for layout in found}
    for _, layout in itertools.product(range(COLD_REPETITIONS), found):
        times["cold"][layout.name].append(cold(layout, places[layout.name], shuffled))
    ways = {layout.name: partial(opening, layout, places[layout.name]) for layout in found}
    times["open"] = in_turn(ways, REPETITIONS)
    remote = {layout.name: layout.fetches(places[layout.name], shuffled[:REMOTE_READS]) for layout in found}
    sizes = {name: sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) for name, place in places.items()}
    for layout in found:
        each = 1e3 * median(times["random"][layout.name]) / len(shuffled)
        result.rows.append([
            case, layout.name, f"{each:.2f} ms", *(slow_as(layout, times[name]) for name in ("random", "sampler", "cold")),
            f"{1e3 * median(times['open'][layout.name]):.1f} ms", f"{sizes[layout.name] / size / rows:.2f}",
            fetched(remote[layout.name], REMOTE_READS),
        ])  # fmt: skip
    result.numbers[case] = {"rows": rows, "bytes_a_row": size, "seconds": times, "bytes_on_disk": sizes, "fetched": remote}


def conclusion(numbers: dict[str, Any]) -> str:
    """What the table says of our layout, from its numbers."""

    def span(name: str, ways: Sequence[str]) -> str:
        """Least and largest median over the cases, where the layout was measured."""
        times = [case["seconds"][way] for case in numbers.values() for way in ways if name in case["seconds"][way]]
        ratios = [median(s / r for s, r in zip(t[name], t[FLAT], strict=True)) for t in times]
        return f"{min(ratios):.1f} to {max(ratios):.1f}" if ratios else "not measured"

    warm, cold = ("random", "sampler"), ("cold",)
    found = "; ".join(f"{name} {span(name, warm)}, cold {span(name, cold)}" for name in (STORE, SAFETENSORS, MDS, NPZ))
    return (
        f"The layout stays. Times of a flat read: {found}. Our store alone is read by any Parquet reader, keeps its small columns "
        "beside the tensors, checks what it reads, and fetches a row from afar by one request of just its bytes, all in one."
    )


def main() -> None:
    torch.set_num_threads(1)
    columns = ["rows of", "layout", "a row", "random", "sampler", "cold", "opening", "size", "remote: requests, bytes a row (open)"]
    result = Result("layouts", "python benchmarks/run_layouts.py", columns)
    for case in CASES:
        folder = Path(tempfile.mkdtemp())
        try:
            measure(case, folder, result)
        finally:
            shutil.rmtree(folder)
    packages = ("pyarrow", "safetensors", "numpy", "mosaicml-streaming", "pylance")
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages if installed(p))
    result.notes += [conclusion(result.numbers), f"Versions: {versions}."]
    result.save()


if __name__ == "__main__":
    main()
