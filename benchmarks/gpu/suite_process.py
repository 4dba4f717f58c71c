"""Cases in processes that can be lost: each has a time limit, and what hangs, crashes or poisons CUDA takes no other case with it.

A worker runs cases one after the other, so that imports are paid once. A case that is late is stopped from inside by SIGALRM; one
that does not come back (a kernel that hangs, a deadlock) is killed with its process, and a new worker takes the cases that are
left.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

GRACE_SECONDS = 15.0  # between SIGALRM and the kill
IMPORT_SECONDS = 120.0  # until a worker starts its first case
LEAST_SECONDS = 8.0  # no case starts with less time left


class Late(BaseException):
    """The case's time is over. No Exception, so that code which catches those does not go on."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises Late in this (main) thread when the block takes longer; no limit where `seconds` is infinite."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Late

    if seconds == float("inf"):
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Job:
    """A case as the watcher sees it."""

    name: str
    limit_seconds: float
    alone: bool = False  # in a process of its own


@dataclass(frozen=True)
class Loss:
    """A case that its worker could not answer for: `status` is late or died."""

    name: str
    status: str
    reason: str
    seconds: float


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill the worker with everything that it started (it leads a process group)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended meanwhile, and all of its group
    process.wait()


def watch(command: Sequence[str], jobs: Sequence[Job], log: Path, until: float) -> tuple[list[str], Loss | None]:
    """Run one worker on `jobs`: (names that it answered for, the case that was lost with it).

    The worker gets `--events FD`, and writes there `start NAME` and `end NAME`. `until`: time.monotonic() when all must be over.
    """
    reader, writer = os.pipe()
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*command, "--cases", ",".join(job.name for job in jobs), "--events", str(writer)],
            stdout=out, stderr=subprocess.STDOUT, pass_fds=[writer], start_new_session=True,
        )  # fmt: skip
    os.close(writer)
    limits = {job.name: job.limit_seconds for job in jobs}
    ended: list[str] = []
    current, began, due, text = "", time.monotonic(), time.monotonic() + IMPORT_SECONDS, b""
    try:
        while True:
            left = min(due, until + GRACE_SECONDS) - time.monotonic()
            if left <= 0 or not select.select([reader], [], [], left)[0]:
                name = current or jobs[len(ended)].name
                return ended, Loss(name, "late", "did not stop: its process was killed", time.monotonic() - began)
            piece = os.read(reader, 4096)
            if not piece:
                break
            *lines, text = (text + piece).split(b"\n")
            for line in lines:
                word, _, name = line.decode().partition(" ")
                if word == "end":
                    ended.append(name)
                began = time.monotonic()
                current = name if word == "start" else ""
                due = began + (limits[name] + GRACE_SECONDS if current else IMPORT_SECONDS)
        code = process.wait()
        if current or (not ended and code):
            name = current or jobs[0].name
            return ended, Loss(name, "died", f"its process ended with {code}: {tail(log)}", time.monotonic() - began)
        return ended, None
    finally:
        os.close(reader)
        stop(process)


def run_all(
    command: Callable[[], Sequence[str]], jobs: Sequence[Job], log: Path, until: float, lost: Callable[[Loss], None]
) -> list[Job]:
    """All jobs in as few workers as they need; `lost` hears of each that no worker answered for. Returns those not reached."""
    queue = list(jobs)
    while queue and until - time.monotonic() > LEAST_SECONDS:
        count = next((at for at, job in enumerate(queue) if job.alone), len(queue)) or 1
        ended, loss = watch(command(), queue[:count], log, until)
        if loss is not None:
            lost(loss)
            ended.append(loss.name)
        elif not ended:
            break  # the worker found that no time is left
        queue = [job for job in queue if job.name not in ended]
    return queue


def tail(log: Path, characters: int = 600) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    return text[-characters:].strip()
