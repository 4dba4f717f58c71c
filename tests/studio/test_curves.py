"""Curves: read as they grow, thinned without losing a spike, and whole whatever a line holds."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from OpenSciDraw.studio import curves
from OpenSciDraw.studio.curves import POINTS, Curves, running_mean, thinned


def write(path: Path, rows: list[object], how: str = "a") -> None:
    with path.open(how) as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def test_only_what_was_added_is_read_and_half_a_line_waits(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, [{"step": step, "loss": step / 2} for step in range(3)])
    found = Curves(file).update()
    place = found._place
    with file.open("a") as more:
        more.write('{"step": 3, "lo')
    assert found.update()._place == place and found.step == 2
    with file.open("a") as more:
        more.write('ss": 9}\n')
    assert found.update().lines(["loss"])["loss"]["points"] == [[0, 0], [1, 0.5], [2, 1], [3, 9]]
    write(file, [{"step": 0, "loss": 1}], "w")  # another file under the name
    assert found.update().lines(["loss"])["loss"]["points"] == [[0, 1]]


def test_a_step_that_was_trained_twice_counts_once_and_as_the_last(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    resumed = {"event": "resumed", "step": 1}
    write(file, [{"step": 1, "loss": 5}, {"step": 2, "loss": 6}, resumed, {"step": 2, "loss": 7}, {"step": 3, "loss": 8}])
    assert Curves(file).update().lines(["loss"])["loss"]["points"] == [[1, 5], [2, 7], [3, 8]]


def test_lines_of_strangers_are_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    texts = ["[" * 100_000, "no", '{"step": "x"}', '{"step": 1, "loss": "high"}', '{"step": 1e400}', "[1]"]
    steps = {-1: 1, 10**400: 1, 2: 10**400, 3: float("nan"), 4: 1}
    write(file, [*texts, *({"step": step, "loss": loss} for step, loss in steps.items())])
    found = Curves(file).update()
    assert found.lines(["loss", "none"]) == {"loss": {"points": [[4, 1]]}} and found.broken == 3


def test_thinning_keeps_every_spike_both_ends_and_the_order() -> None:
    for count in (POINTS, POINTS + 1, 801, 99_999):
        values = np.zeros(count)
        values[count // 3], values[-2] = 9, -7
        points = thinned(np.arange(count, dtype=float), values)
        assert len(points) <= POINTS and {9, -7} <= {value for _, value in points}
        assert points[0][0] == 0 and points[-1][0] == count - 1 and points == sorted(points)
    assert running_mean(np.array([1.0, 2, 3, 4])).tolist() == [1.5, 2, 3, 3.5]


def test_a_long_file_opens_by_a_sample_and_becomes_whole(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(curves, "_AT_ONCE", 1000)
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "time": 100.0 + s, "loss": 1.0, **({"held_out_loss": 2.0} if s % 500 == 0 else {})} for s in range(5000)]
    write(file, rows)
    found = Curves(file).update()
    first = found.lines(["loss", "held_out_loss"])
    assert found.step == 4999 and found.seconds_left(6000) == 1001 and len(first["loss"]["points"]) > 150
    assert len(first["held_out_loss"]["points"]) == 10  # rare lines are in the sample
    end = time.monotonic() + 20
    while not found.is_whole and time.monotonic() < end:
        time.sleep(0.01)
    assert sum(len(steps) for steps in found.series["loss"].steps) == 5000 and found.step == 4999


def test_the_time_left_is_by_the_pace_since_the_last_start(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, [{"step": 1, "time": 0.0, "loss": 1}, {"event": "resumed", "step": 1}, {"step": 2, "time": 9000.0, "loss": 1}])
    found = Curves(file).update()
    assert found.seconds_left(10) is None  # the pause between two starts is no pace
    write(file, [{"event": "resumed", "step": 2}, {"step": 3, "time": 9100.0, "loss": 1}, {"step": 4, "time": 9102.0, "loss": 1}])
    assert found.update().seconds_left(14) == 2.0 * 10
    assert found.seconds_left(4) is None
