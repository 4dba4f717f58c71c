"""Indices of sources on the server's side: opened, kept fresh, filtered. Rows stay in the file; what a grid shows is read."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from OpenSciDraw.errors import UserError
from OpenSciDraw.studio.workers import Worker
from OpenSciDraw.utils.files import make_folder, real

_KEPT = 8  # indices, and of each as many filters, that stay in memory
_LENGTHS = (0, 50, 100, 200, 400, 800, 1600)  # characters: the bins of the statistics


@dataclass(frozen=True)
class Filter:
    """Which rows a grid shows. '' and 0 mean: all. `out`: those that were left out, with the reason's first words as `reason`."""

    bucket: str = ""
    tier: str = ""
    kind: str = ""
    text: str = ""
    shortest: int = 0
    longest: int = 0
    out: bool = False
    reason: str = ""


class Index:
    """An index file (listing.py), mapped into memory."""

    def __init__(self, path: Path):
        with pa.memory_map(str(path)) as file:
            self.table = pa.ipc.open_file(file).read_all()
        metadata = self.table.schema.metadata or {}
        self.watched: dict[str, int] = json.loads(metadata[b"watched"])
        self.is_store = metadata[b"store"] == b"1"
        self._found: OrderedDict[Filter, np.ndarray] = OrderedDict()

    def is_fresh(self) -> bool:
        """Whether no figure came or went since, by the times of the folders and lists."""
        try:
            return all(os.stat(path).st_mtime_ns == changed for path, changed in self.watched.items())
        except OSError:
            return False

    def rows(self, wanted: Filter) -> np.ndarray:
        """Numbers of the rows that a filter lets through, (n,) int64."""
        if wanted not in self._found:
            self._found[wanted] = np.flatnonzero(self._mask(wanted).to_numpy(zero_copy_only=False))
            while len(self._found) > _KEPT:
                self._found.popitem(last=False)
        return self._found[wanted]

    def _mask(self, wanted: Filter) -> Any:
        column = self.table.column
        is_out = pc.not_equal(column("reason"), "")
        mask = is_out if wanted.out else pc.invert(is_out)
        for name in ("bucket", "tier", "kind"):
            if value := getattr(wanted, name):
                mask = pc.and_(mask, pc.equal(column(name), value))
        if wanted.reason:
            mask = pc.and_(mask, pc.starts_with(column("reason"), wanted.reason))
        if wanted.text:
            found = [pc.match_substring(column(name), wanted.text, ignore_case=True) for name in ("caption", "id")]
            mask = pc.and_(mask, pc.or_(*found))
        if wanted.shortest:
            mask = pc.and_(mask, pc.greater_equal(column("length"), wanted.shortest))
        if wanted.longest:
            mask = pc.and_(mask, pc.less_equal(column("length"), wanted.longest))
        return mask

    def take(self, rows: np.ndarray, columns: list[str]) -> list[dict[str, Any]]:
        found = self.table.select(columns).take(pa.array(rows)).to_pylist()
        return [{"row": int(row), **values} for row, values in zip(rows, found, strict=True)]

    def row(self, number: int) -> dict[str, Any]:
        """Raises UserError where there is no such row."""
        if not 0 <= number < len(self.table):
            raise UserError(f"There is no row {number} of {len(self.table)}: the source has changed. Open it again.")
        found: dict[str, Any] = self.table.slice(number, 1).to_pylist()[0]
        return found

    def row_of(self, identity: str) -> int | None:
        found = pc.index(self.table.column("id"), identity).as_py()
        return None if found < 0 else int(found)

    def statistics(self) -> dict[str, Any]:
        """Counts by bucket, tier, kind and length of the figures that are used, and by reason of the others."""
        used = self.table.filter(pc.equal(self.table.column("reason"), ""))
        counts = {name: _counts(used.column(name)) for name in ("bucket", "tier", "kind")}
        reasons = self.table.filter(pc.not_equal(self.table.column("reason"), "")).column("reason")
        kinds = pc.list_element(pc.split_pattern(reasons, ":"), 0)
        lengths = used.column("length").to_numpy()
        bins = np.histogram(lengths, [*_LENGTHS, max(int(lengths.max(initial=0)), _LENGTHS[-1]) + 1])[0].tolist()
        names = [f"{low} to {high - 1}" for low, high in zip(_LENGTHS, _LENGTHS[1:], strict=False)] + [f"{_LENGTHS[-1]} or more"]
        return {
            "used": len(used), "left_out": len(self.table) - len(used), **counts, "reason": _counts(kinds),
            "length": [[name, count] for name, count in zip(names, bins, strict=True)],
            "mean_length": float(lengths.mean()) if len(lengths) else None,
        }  # fmt: skip


def _counts(column: Any) -> list[list[Any]]:
    found = [(item["values"].as_py(), item["counts"].as_py()) for item in pc.value_counts(column)]
    return [[name, count] for name, count in sorted(found, key=lambda pair: -pair[1])[:60] if name]


class Indices:
    """All that were opened; they are made by a worker, and kept in files."""

    def __init__(self, folder: Path, root: Path, worker: Worker):
        self.folder, self.root, self.worker = make_folder(folder), root, worker
        self._open: OrderedDict[Path, Index] = OrderedDict()
        self._making: dict[Path, int] = {}  # sources that are being listed, and how many rows so far
        self._failed: dict[Path, str] = {}
        self._lock = threading.Lock()

    def get(self, source: Path, anew: bool = False) -> Index | int:
        """The index, or how many rows are listed so far. `anew`: list it again, also where nothing seems to have changed.

        Raises:
            UserError: it cannot be listed.
        """
        source = real(source)
        with self._lock:
            if source in self._making:
                return self._making[source]
            if source in self._failed:
                raise UserError(self._failed.pop(source))
            index = None if anew else self._open.pop(source, None) or self._stored(source)
            if index is not None and index.is_fresh():
                self._open[source] = index
                while len(self._open) > _KEPT:
                    self._open.popitem(last=False)
                return index
            self._making[source] = 0
            threading.Thread(target=self._make, args=(source,), daemon=True, name="listing").start()
            return 0

    def now(self, source: Path) -> Index:
        """As `get`, for what is open on the page. Raises UserError while it is being listed."""
        index = self.get(source)
        if isinstance(index, int):
            raise UserError(f"{source.name} has changed and is being listed again ({index} so far). Open it once more.")
        return index

    def _file(self, source: Path) -> Path:
        return self.folder / f"{blake2b(str(source).encode(), digest_size=12).hexdigest()}.arrow"

    def _stored(self, source: Path) -> Index | None:
        try:
            return Index(self._file(source))
        except (OSError, KeyError, ValueError, pa.ArrowException):  # none yet, or one of an earlier program: it is made anew
            return None

    def _make(self, source: Path) -> None:
        def said(progress: Any) -> None:
            self._making[source] = int(progress["rows"])

        failed = None
        try:
            self.worker.ask("list", said, root=str(self.root), source=str(source), out=str(self._file(source)))
        except UserError as error:
            failed = str(error)
        with self._lock:
            del self._making[source]
            if failed is not None:
                self._failed[source] = failed
