"""The GPU suite: on a machine with one NVIDIA card and no network, one command of at most 8 minutes.

    make gpu                              tests first, then the cases, the important ones first
    make gpu PART=klein4b,resume          parts or cases by name; PART=rest: what this card and commit have no result of
    python benchmarks/gpu/suite.py --rehearse     the cases on a CPU at tiny shapes, to see that they work

Each case has a time limit and each result is written at once to benchmarks/results/gpu/<date>-<card>.jsonl, with a table beside it
(.md), so that a cut run keeps what it had. The Python that runs it needs torch 2.6 or newer and the packages of pyproject.toml; a
case whose package is missing is skipped and says so. With PEER=path of diffusers' train_dreambooth_lora_flux2_klein.py that script
is measured beside ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from suite_catalogue import TESTS, Case, chosen
from suite_process import Loss, run_all, stop
from suite_results import FOLDER, REPO, append, environment, newest, read, results_file, table

TOTAL_SECONDS, TEST_SECONDS = 480.0, 180.0
DISK_BYTES = 40e9  # of models and stores, on a disk in memory where there is room
HERE = Path(__file__).resolve().parent


class Suite:
    """One call: what runs, where, and until when."""

    def __init__(self, given: argparse.Namespace):
        self.rehearse: bool = given.rehearse
        self.until = time.monotonic() + given.seconds
        command = "make gpu" if given.part is None else f"make gpu PART={given.part}"
        self.environment = environment(f"{command} (rehearsed)" if given.rehearse else command, given.rehearse)
        self.folder = Path(given.results) if given.results else FOLDER
        self.results = results_file(self.folder, self.environment["card"])
        done = {row["case"] for row in newest(read(self.results)) if row["status"] == "ok" and self._is_ours(row)}
        names = [name for name in (given.part or "").split(",") if name]
        self.tests, cases = chosen(names, done)
        self.cases = [case for case in cases if not (case.slow and given.rehearse) or case.name in names]
        self.work = Path(given.work) if given.work else Path(tempfile.mkdtemp(prefix="scienceflow-gpu-", dir=self._disk()))
        self.keep = given.work is not None
        self.work.mkdir(parents=True, exist_ok=True)

    def _is_ours(self, row: dict[str, Any]) -> bool:
        return all(row[name] == self.environment[name] for name in ("card", "commit"))

    def _disk(self) -> str | None:
        """A disk in memory is as good as files in the page cache, and sure to be one."""
        memory = Path("/dev/shm")
        large = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > DISK_BYTES
        return str(memory) if large and not self.rehearse else None

    def write(
        self, case: str, part: str, status: str, seconds: float, reason: str | None, values: dict[str, Any] | None = None
    ) -> None:
        what = {"case": case, "part": part, "status": status, "seconds": round(seconds, 1)}
        append(self.results, what | {"reason": reason, "values": values or {}} | self.environment)

    # -- the tests --------------------------------------------------------------------------------
    def run_tests(self) -> int:
        """pytest on the tests that mean the GPU; failures are printed when they happen. Returns its exit code."""
        if self.rehearse:
            self.write(TESTS, TESTS, "skipped", 0.0, "a rehearsal: pytest runs them on the CPU anyway")
            return 0
        if subprocess.run([sys.executable, "-c", "import pytest"], capture_output=True).returncode:
            self.write(TESTS, TESTS, "skipped", 0.0, "pytest is not installed")
            return 0
        start, limit = time.monotonic(), min(TEST_SECONDS, self.until - time.monotonic())
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "tests/test_on_gpu.py", "--device", "cuda", "-m", "gpu", "-p", "no:cacheprovider"],
            cwd=REPO, env=self._variables(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        code, text = _shown(process, limit)
        counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", text[-2000:])}
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
        status = "late" if code is None else "ok" if code == 0 else "failed"
        reason = None if code == 0 else f"not done after {limit:.0f} s" if code is None else ", ".join(dict.fromkeys(failed))
        self.write(TESTS, TESTS, status, time.monotonic() - start, reason, counts)
        return 1 if code is None else code

    def _variables(self) -> dict[str, str]:
        path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

    # -- the cases --------------------------------------------------------------------------------
    def run_cases(self) -> None:
        os.environ.update(self._variables())
        parts = {case.name: case.part for case in self.cases}

        def command() -> list[str]:
            words = [sys.executable, str(HERE / "suite_worker.py"), "--work", str(self.work), "--results", str(self.results)]
            words += ["--environment", json.dumps(self.environment), "--until", str(self.until)]
            return [*words, *(["--rehearse"] if self.rehearse else [])]

        def lost(loss: Loss) -> None:
            self.write(loss.name, parts[loss.name], loss.status, loss.seconds, loss.reason)

        jobs = [case.job(self.rehearse) for case in self.cases]
        for job in run_all(command, jobs, self.work / "worker.log", self.until, lost):
            self.write(job.name, parts[job.name], "not reached", 0.0, f"the time was over: make gpu PART={job.name}")

    def close(self) -> None:
        log = self.work / "worker.log"
        if log.exists():
            shutil.copy(log, self.results.with_suffix(".log"))
        if not self.keep:
            shutil.rmtree(self.work, ignore_errors=True)


def _shown(process: subprocess.Popen[bytes], limit_seconds: float) -> tuple[int | None, str]:
    """Print what a process says while it says it. (exit code, or None when it was killed after its time; all of the text)."""
    import selectors

    assert process.stdout is not None
    end, text = time.monotonic() + limit_seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0:
            if not selector.select(left):
                break
            piece = os.read(process.stdout.fileno(), 65536)
            if not piece:
                return process.wait(), text.decode(errors="replace")
            sys.stdout.write(piece.decode(errors="replace"))
            sys.stdout.flush()
            text += piece
    stop(process)
    return None, text.decode(errors="replace")


def has_card() -> bool:
    """Whether a torch of this Python sees an NVIDIA card; asked in another process, which gives its memory back."""
    done = subprocess.run([sys.executable, "-c", "import torch; print(torch.cuda.is_available())"], capture_output=True, text=True)
    return done.stdout.strip() == "True"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", metavar="NAME,NAME", help="parts or cases (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny shapes, without a card")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="limit of the whole (default: 480)")
    parser.add_argument("--results", metavar="DIR", help="folder of the results (default: benchmarks/results/gpu)")
    parser.add_argument("--work", metavar="DIR", help="folder for models and stores, kept (default: a new one, deleted)")
    given = parser.parse_args(argv)
    if given.rehearse and given.results is None:
        parser.error("--rehearse measures nothing: give --results DIR, outside of benchmarks/results")
    if not given.rehearse and not has_card():
        print("error: torch sees no NVIDIA card here. --rehearse --results DIR runs the cases on the CPU.", file=sys.stderr)
        return 2
    try:
        suite = Suite(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    code = 0
    try:
        if suite.tests:
            code = suite.run_tests()
        if suite.cases:
            suite.run_cases()
    finally:
        suite.close()
    print(f"\n{table(read(suite.results))}\n{suite.results}")
    return code or _code(suite.results, suite.cases)


def _code(results: Path, cases: list[Case]) -> int:
    """1 when a case of this call failed, was late or died; one that was skipped or not reached says so in the table."""
    names = {case.name for case in cases}
    bad = [row["case"] for row in newest(read(results)) if row["case"] in names and row["status"] in ("failed", "late", "died")]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
