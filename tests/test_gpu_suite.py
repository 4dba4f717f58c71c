"""`make gpu`, rehearsed on the CPU: cases run, results are written at once, and what hangs or dies takes nothing with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO

SUITE = REPO / "benchmarks" / "gpu"
sys.path.insert(0, str(SUITE))

from suite_catalogue import CATALOGUE, PARTS, chosen  # noqa: E402
from suite_process import Job, Late, Loss, run_all, time_limit  # noqa: E402
from suite_results import append, environment, newest, read, results_file, table  # noqa: E402

HERE = {"card": "card", "driver": "1", "commit": "abc", "command": "make gpu", "versions": {"torch": "2.6"}}
# A worker without torch: each case's name says what becomes of it.
WORKER = """
import os, signal, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
say = lambda text: os.write(int(given["--events"]), (text + chr(10)).encode())
for name in given["--cases"].split(","):
    say("start " + name)
    print("worker", os.getpid(), name, flush=True)
    if name.startswith("hang"):
        time.sleep(60)
    if name.startswith("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    say("end " + name)
    if name.startswith("last"):
        sys.exit(0)
"""


def line(case: str, status: str = "ok", **values: object) -> dict:
    return {"case": case, "part": "p", "status": status, "seconds": 1.0, "reason": None, "values": values, **HERE}


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Run jobs with the worker above: (names not reached, losses, lines of the log)."""
    monkeypatch.setattr("suite_process.GRACE_SECONDS", 0.2)
    (tmp_path / "worker.py").write_text(WORKER)

    def go(*jobs: Job, seconds: float = 30) -> tuple[list[str], list[Loss], list[list[str]]]:
        losses: list[Loss] = []
        log = tmp_path / "log"
        left = run_all(lambda: [sys.executable, str(tmp_path / "worker.py")], jobs, log, time.monotonic() + seconds, losses.append)
        return [job.name for job in left], losses, [text.split() for text in log.read_text().splitlines()]

    return go


def test_a_case_that_hangs_or_dies_is_named_and_the_others_run(watched) -> None:  # type: ignore[no-untyped-def]
    left, losses, log = watched(Job("a", 5), Job("hang", 0.3), Job("b", 5), Job("die", 5), Job("c", 5))
    assert left == []
    assert [(loss.name, loss.status) for loss in losses] == [("hang", "late"), ("die", "died")]
    assert "-9" in losses[1].reason
    assert [words[2] for words in log] == ["a", "hang", "b", "die", "c"]  # each once
    assert len({words[1] for words in log}) == 3  # and a new process after each loss


def test_a_case_that_wants_to_be_alone_gets_a_process_of_its_own(watched) -> None:  # type: ignore[no-untyped-def]
    left, losses, log = watched(Job("a", 5), Job("b", 5), Job("own", 5, alone=True), Job("last", 5), Job("c", 5))
    assert (left, losses) == ([], [])
    numbers = {words[2]: words[1] for words in log}
    assert numbers["a"] == numbers["b"]
    assert len({numbers[name] for name in ("a", "own", "last", "c")}) == 4  # a worker may also end by itself, as `last` does


def test_when_the_time_is_over_the_rest_is_not_started(watched, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("suite_process.LEAST_SECONDS", 0.5)
    start = time.monotonic()
    left, losses, _ = watched(Job("hang", 60), Job("a", 5), seconds=1)
    assert (left, [loss.name for loss in losses]) == (["a"], ["hang"])
    assert time.monotonic() - start < 10


def test_a_worker_that_cannot_start_loses_one_case_at_a_time(tmp_path: Path) -> None:
    losses: list[Loss] = []
    broken = [sys.executable, "-c", "raise SystemExit('no torch')"]
    left = run_all(lambda: broken, [Job("a", 5), Job("b", 5)], tmp_path / "log", time.monotonic() + 30, losses.append)
    assert (left, [(loss.name, loss.status) for loss in losses]) == ([], [("a", "died"), ("b", "died")])
    assert "no torch" in losses[0].reason


def test_the_limit_stops_code_that_catches_exceptions() -> None:
    with pytest.raises(Late), time_limit(0.1):
        while True:
            try:
                time.sleep(1)
            except Exception:  # what a library may do
                pass
    time.sleep(0.15)  # and no alarm is left


def test_results_are_lines_that_survive_a_cut(tmp_path: Path) -> None:
    path = results_file(tmp_path, "NVIDIA H100 80GB HBM3")
    assert path.name.endswith("-nvidia-h100-80gb-hbm3.jsonl")
    append(path, line("a", images_per_second=5.0))
    with path.open("a") as file:
        file.write('{"case": "b", "sta')  # the machine went away here
    append(path, line("c", "skipped"))
    assert [record["case"] for record in read(path)] == ["a", "c"]
    assert all(set(HERE) <= set(record) and "time" in record for record in read(path))
    assert path.with_suffix(".md").read_text() == table(read(path))


def test_the_table_shows_the_newest_of_each_case_and_why_one_has_none() -> None:
    records = [line("a", images_per_second=2.0), line("b", "late") | {"reason": "not done after 9 s"}]
    records += [line("a", images_per_second=5.25), line("a", "not reached")]
    records += [line("c", "not reached") | {"reason": "the time was over"}]
    text = table(records)
    assert [record["case"] for record in newest(records)] == ["a", "b", "c"]
    assert "| a | 5.25 |" in text and "| 2 |" not in text
    assert "**late**: not done after 9 s" in text and "**not reached**" in text
    assert "card, driver 1, commit abc: `make gpu`. torch 2.6." in text


def test_parts_and_cases_are_chosen_by_name() -> None:
    names = [case.name for case in CATALOGUE]
    assert len(set(names)) == len(names)
    assert chosen([], set()) == (True, CATALOGUE)
    assert [case.name for case in chosen(["start", "card"], set())[1]] == ["card", "first_step_4b"]
    tests, rest = chosen(["rest"], {"tests", *names[2:]})
    assert (tests, [case.name for case in rest]) == (False, names[:2])
    with pytest.raises(ValueError, match="klein4c: no such part or case. Parts: tests, klein4b"):
        chosen(["klein4c"], set())
    assert PARTS[0] == "tests"


def test_what_was_run_is_in_every_line() -> None:
    found = environment("make gpu", rehearse=True)
    assert found["card"] == "cpu" and found["versions"]["torch"] and found["versions"]["OpenSciDraw"]


def suite(folder: Path, part: str) -> dict[str, dict]:
    command = [sys.executable, str(SUITE / "suite.py"), "--rehearse", "--results", str(folder), "--part", part, "--seconds", "900"]
    variables = {**os.environ, "PEER": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=variables)
    file = next(folder.glob("*.jsonl"))
    records = {record["case"]: record for record in map(json.loads, file.read_text().splitlines())}
    assert done.returncode == 0, (done.stderr[-2000:], {name: row["reason"] for name, row in records.items()})
    return records


def test_the_cases_run_on_a_cpu(tmp_path: Path) -> None:
    cases = "card,encode_4b,bare_4b_bf16,train_4b,profile_4b,train_9b_batch4,checkpoint_4b,draw_4b,nf4_4b,peer_4b,full_4b_bf16_8bit"
    records = suite(tmp_path, cases)
    assert list(records) == [case.name for case in CATALOGUE if case.name in cases.split(",")]
    assert [name for name, row in records.items() if row["status"] == "skipped"] == ["peer_4b", "nf4_4b"]
    assert all(row["status"] == "ok" for name, row in records.items() if name not in ("peer_4b", "nf4_4b"))
    values = {name: row["values"] for name, row in records.items()}
    assert {"images_per_second", "share", "of_bare", "plan_gb"} <= set(values["train_4b"])
    assert values["profile_4b"]["dtype_copies"] > 0
    assert values["checkpoint_4b"]["checkpoint_gb"] > 0


@pytest.mark.slow
def test_every_case_runs_on_a_cpu(tmp_path: Path) -> None:
    records = suite(tmp_path, ",".join([*PARTS, "compile_4b"]))
    assert {name for name, row in records.items() if row["status"] != "ok"} <= {"tests", "peer_4b", "peer_4b_recomputed", "nf4_4b"}


# -- pytest --device cuda -----------------------------------------------------------------------------
ON_A_CARD = """
import pytest, time, torch
torch.cuda.is_available = lambda: True  # this machine may have none: only what runs, and what is printed when, is looked at
"""
TESTS_THERE = """
import pytest, time

@pytest.mark.gpu
def test_bad(device):
    assert device.type == "cpu"

@pytest.mark.gpu
def test_slow(device):
    time.sleep(30)

def test_of_the_cpus_bits():
    pass
"""


def test_tests_see_no_card_unless_they_are_asked_to(device) -> None:  # type: ignore[no-untyped-def]
    assert device.type == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_on_a_card_only_tests_that_mean_it_run_and_failures_are_printed_at_once(tmp_path: Path) -> None:
    (tmp_path / "pretend.py").write_text(ON_A_CARD)
    (tmp_path / "conftest.py").write_text((REPO / "tests" / "conftest.py").read_text())
    (tmp_path / "test_there.py").write_text(TESTS_THERE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    command = [sys.executable, "-m", "pytest", "-p", "pretend", "-p", "no:cacheprovider", "--device", "cuda"]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)]), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=variables)
    assert process.stdout is not None
    said = ""
    while "AssertionError" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    process.kill()  # long before its end
    process.wait()
    assert "FAILED test_there.py::test_bad (call)" in said and "1 deselected" in said
