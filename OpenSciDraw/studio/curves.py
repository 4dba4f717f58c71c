"""The curves of metrics.jsonl: what was added since is read, and as many points are given as a screen can show."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from OpenSciDraw.utils.files import json_objects, parse_json

Array = NDArray[np.float64]
POINTS = 600  # of a line
_AT_ONCE, _PIECE = 4 << 20, 1 << 18  # bytes that are read while a page waits, and at a time
_LINE = 64 << 10  # of a line
_MOST_BYTES, _MOST_KEYS = 4 << 30, 400


@dataclass
class Series:
    """One number over the steps, in the order of the file."""

    steps: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)

    def whole(self) -> tuple[Array, Array]:
        """(n,) steps, rising, and their values; of a step that was trained twice, before and after a resume, the last counts."""
        steps, values = np.concatenate(self.steps), np.concatenate(self.values)
        self.steps, self.values = [steps], [values]
        if (np.diff(steps) <= 0).any():
            order = np.argsort(steps, kind="stable")
            steps, values = steps[order], values[order]
            last = np.append(np.diff(steps) > 0, True)
            steps, values = steps[last], values[last]
        is_number = np.isfinite(values)
        return steps[is_number], values[is_number]


class Curves:
    """One metrics.jsonl, which a run adds to. Whoever wrote it: a line that is none is counted and left out.

    What is new is read when it is asked for; of a long file at first its end and a sample, evenly over it, while a thread reads the
    whole. `is_whole` says which of both `lines` gives.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._reader: threading.Thread | None = None
        self._begin()

    def _begin(self) -> None:
        self._place, self._file, self._looked_at = 0, -1, -1
        self.is_whole = True
        self.series: dict[str, Series] = {}
        self._whole: dict[str, Series] = {}  # what the thread has read so far
        self.broken = 0
        self.step = 0  # of the newest line
        self.last: dict[str, float] = {}  # the newest value of each number
        self.times: list[tuple[int, float]] = []  # (step, seconds since the epoch) of the newest lines
        self.resumed: list[int] = []  # steps from which the run went on

    def update(self) -> Curves:
        """Read the lines that were added, whole ones alone; begin anew where the file is another one, or shorter."""
        with self._lock:
            try:
                status = self.path.stat()
            except OSError:
                self._begin()
                return self
            size = min(status.st_size, _MOST_BYTES)
            if status.st_ino != self._file or size < self._place:
                self._begin()
                self._file = status.st_ino
            if self._looked_at == size:
                return self
            self._looked_at = size
            if self._reader is None and size - self._place <= _AT_ONCE:
                while (lines := self._next(size)) is not None:
                    self._add(lines, self.series)
                return self
            if self._reader is None:
                self.is_whole, self._whole = False, self.series
                self.series = {}
                self._sample(size)
                self._reader = threading.Thread(target=self._read_all, daemon=True, name="curves")
                self._reader.start()
            self._add(_tail(self.path, size), {})
        return self

    def _next(self, size: int) -> bytes | None:
        """The next whole lines, some of them; None where there are none."""
        if self._place >= size:
            return None
        with self.path.open("rb") as file:
            piece = os.pread(file.fileno(), min(_PIECE, size - self._place), self._place)
        whole = piece[: piece.rfind(b"\n") + 1]
        self._place += len(whole)
        return whole or None

    def _read_all(self) -> None:
        """The thread: all lines, piece by piece, so that calls are answered meanwhile."""
        while True:
            start = time.perf_counter()
            with self._lock:
                lines = self._next(self._looked_at)
                if lines is None:
                    self.series, self._whole, self.is_whole, self._reader = self._whole, {}, True, None
                    return
                self._add(lines, self._whole, newest=False)
            time.sleep(time.perf_counter() - start)  # half of the time is the others': Python runs one thread at a time

    def _sample(self, size: int) -> None:
        """Lines from evenly over the file, and those with a held-out loss, which are few."""
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped:
            places = {int(place) for place in np.linspace(0, size - 1, POINTS)}
            places |= {match.start() for match, _ in zip(re.finditer(rb'"held_out_loss"', mapped), range(POINTS), strict=False)}
            spans = {(mapped.rfind(b"\n", 0, place) + 1, mapped.find(b"\n", place)) for place in places}
            lines = b"".join(mapped[start : end + 1] for start, end in sorted(spans) if 0 < end - start < _LINE)
            self._add(lines, self.series, newest=False)

    def _add(self, lines: bytes, series: dict[str, Series], newest: bool = True) -> None:
        """Add lines to `series`; the `newest` also say where the run is."""
        try:  # one call for all lines: a third of the time of one for each
            rows = parse_json(b"[" + b",".join(line for line in lines.split(b"\n") if line.strip()) + b"]")
            broken = sum(not isinstance(row, dict) for row in rows)
            rows = [row for row in rows if isinstance(row, dict)]
        except (ValueError, json.JSONDecodeError):
            rows, broken = json_objects(lines)
        self.broken += broken if newest or series is self._whole else 0
        if newest:
            self.resumed += [row["step"] for row in rows if row.get("event") == "resumed" and isinstance(row.get("step"), int)]
        alike: list[dict[str, Any]] = []
        for row in rows:
            if type(row.get("step")) is not int or not 0 <= row["step"] < 1 << 53 or "event" in row:
                continue
            if alike and row.keys() != alike[0].keys():
                self._add_alike(alike, series, newest)
                alike = []
            alike.append(row)
        if alike:
            self._add_alike(alike, series, newest)

    def _add_alike(self, rows: list[dict[str, Any]], series: dict[str, Series], newest: bool) -> None:
        """Lines with the same keys, as a run writes them: column by column."""
        steps = np.array([row["step"] for row in rows], np.float64)
        if newest:
            self.step = int(steps[-1])
        for key in rows[0].keys() - {"step"}:
            column, at = [row[key] for row in rows], steps
            if not set(map(type, column)) <= {int, float}:  # texts, or lines of strangers
                is_number = [type(value) in (int, float) for value in column]
                column, at = [value for value, good in zip(column, is_number, strict=True) if good], steps[is_number]
            if not column:
                continue
            if key == "time":
                if newest:
                    pairs = zip(at[-50:].tolist(), column[-50:], strict=True)
                    self.times = [*self.times, *((int(step), float(seconds)) for step, seconds in pairs)][-50:]
            elif key in series or len(series) < _MOST_KEYS:
                try:
                    values = np.array(column, np.float64)
                except OverflowError:  # a whole number of hundreds of digits
                    values = np.array([value if abs(value) < 1e300 else np.nan for value in column], np.float64)
                found = series.setdefault(key, Series())
                found.steps.append(at)
                found.values.append(values)
                if newest:
                    self.last[key] = float(values[-1])

    def seconds_left(self, total: int) -> float | None:
        """By the pace of the newest lines of one session; None where nothing is known, or nothing is left."""
        pairs = [pair for pair in self.times[-20:] if not self.resumed or pair[0] > self.resumed[-1]]
        if len(pairs) < 2 or total <= pairs[-1][0]:
            return None
        (first, since), (last, until) = pairs[0], pairs[-1]
        return (until - since) / (last - first) * (total - last) if last > first and until > since else None

    def lines(self, keys: list[str], smooth: bool = True) -> dict[str, dict[str, list[list[float]]]]:
        """Of each key that is there: `points`, at most POINTS, and where there are many `smooth`, a running mean of them."""
        found: dict[str, dict[str, list[list[float]]]] = {}
        with self._lock:
            for key in keys:
                if key not in self.series:
                    continue
                steps, values = self.series[key].whole()
                found[key] = {"points": thinned(steps, values)}
                if smooth and len(values) >= 40:
                    found[key]["smooth"] = thinned(steps, running_mean(values), extremes=False)
        return found


def thinned(steps: Array, values: Array, extremes: bool = True) -> list[list[float]]:
    """At most POINTS of (step, value): of every stretch its lowest and highest, so that no spike is lost; both ends."""
    count = len(steps)
    if count > POINTS:
        each = math.ceil(count / ((POINTS - 4) // 2 if extremes else POINTS - 2))
        pieces = count // each
        square, rest = values[: each * pieces].reshape(pieces, each), values[each * pieces :]
        starts = np.arange(pieces) * each
        chosen = [starts + square.argmin(1), starts + square.argmax(1)] if extremes else [starts + each // 2]
        if extremes and len(rest):
            chosen.append(each * pieces + np.array([rest.argmin(), rest.argmax()]))
        at = np.unique(np.concatenate([*chosen, [0, count - 1]]))
        steps, values = steps[at], values[at]
    return np.stack([steps, values], 1).tolist() if len(steps) else []


def running_mean(values: Array, share: float = 0.05) -> Array:
    """Mean over a centred window of `share` of the values, as the report's."""
    half = max(1, round(len(values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low, high = np.maximum(np.arange(len(values)) - half, 0), np.minimum(np.arange(len(values)) + half + 1, len(values))
    mean: Array = (sums[high] - sums[low]) / (high - low)
    return mean


def _tail(path: Path, size: int) -> bytes:
    """The last whole lines."""
    with path.open("rb") as file:
        piece = os.pread(file.fileno(), _LINE, max(0, size - _LINE))
    begin = 0 if size <= _LINE else piece.find(b"\n") + 1
    return piece[begin : piece.rfind(b"\n") + 1]
