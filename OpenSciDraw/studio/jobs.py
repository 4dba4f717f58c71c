"""The queue: one folder for each command that waits, runs or ran, in files, so that it is there whatever happens to the studio.

    .studio/queue/000007/job.json        the command, its config's name, what it waits for; written once
                         config.py       values alone: what the command is run with
                         launched.json   the device that it was given, and when
                         started.json    its processes (number, and when they began), by keeper.py
                         stop            it was asked to stop
                         ended.json      its exit code, by keeper.py
                         log.txt         what it said

A command runs in a session of its own, watched by a keeper in another one: the studio's end reaches neither. What state a job is in
follows from these files and from whether its processes live, so another studio in the folder finds everything again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from OpenSciDraw.config import Config, save_config
from OpenSciDraw.errors import UserError
from OpenSciDraw.utils.files import make_folder, parse_json, write_json
from OpenSciDraw.utils.sole_user import born, kernel

COMMANDS = ("encode", "train", "evaluate", "report", "export", "illustrate", "bench")
EXIT_PREEMPTED = 75
_LAUNCH_SECONDS = 60.0  # in which a keeper says that it is there
_LOG_BYTES = 64 << 10  # of the log's end that the page shows


@dataclass(frozen=True)
class Job:
    """`run` and `title` name, for the page, the run that it makes (relative to the studio's folder) and what it is."""

    number: int
    command: str
    arguments: list[str]
    title: str
    run: str | None = None
    after: int | None = None  # it waits until this one is done
    created: float = 0.0
    folder: str = ""  # the working directory


@dataclass(frozen=True)
class JobState:
    """`name`: waiting, blocked, running, stopping, done, stopped, failed, killed."""

    name: str
    reason: str = ""
    device: str | None = None
    pid: int | None = None
    since: float | None = None
    until: float | None = None
    code: int | None = None

    @property
    def is_over(self) -> bool:
        return self.name in ("done", "stopped", "failed", "killed")

    @property
    def is_live(self) -> bool:
        return self.name in ("running", "stopping")


@dataclass
class Queue:
    """All jobs of a folder `.studio/queue`."""

    folder: Path
    _ended: dict[int, JobState] = field(default_factory=dict)  # what cannot change any more
    _adding: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        make_folder(self.folder)

    def place(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def jobs(self) -> list[Job]:
        """In the order in which they were added."""
        found = []
        for path in sorted(self.folder.glob("[0-9]*/job.json")):
            with suppress(ValueError, TypeError, OSError):
                found.append(Job(**parse_json(path.read_bytes())))
        return found

    def job(self, number: int) -> Job:
        found = next((job for job in self.jobs() if job.number == number), None)
        if found is None:
            raise UserError(f"There is no job {number} in the queue.")
        return found

    def add(
        self, command: str, arguments: list[str], title: str, *, config: Config | None = None, run: str | None = None,
        after: int | None = None,
    ) -> Job:  # fmt: skip
        """Queue `scienceflow COMMAND [its config] ARGUMENTS`. A config is written as values, so that none of its code runs."""
        if command not in COMMANDS:
            raise UserError(f"The queue runs {', '.join(COMMANDS)}, and not {command!r}.")
        number, place = self._new_place()
        if config is not None:
            save_config(config, place / "config.py")
            arguments = [str(place / "config.py"), *arguments]
        job = Job(number, command, arguments, title, run, after, time.time(), os.getcwd())
        write_json(place / "job.json", asdict(job))  # last: without it there is no job
        return job

    def _new_place(self) -> tuple[int, Path]:
        with self._adding:
            numbers = [int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdecimal()]
            number = max(numbers, default=0) + 1
            return number, make_folder(self.place(number))

    def remove(self, number: int) -> None:
        """Take a job out that does not run; the run that it made stays."""
        state = self.state(self.job(number))
        if state.is_live:
            raise UserError(f"Job {number} runs. Stop it first.")
        shutil.rmtree(self.place(number))
        self._ended.pop(number, None)

    # -- what state a job is in --------------------------------------------------------------------
    def state(self, job: Job) -> JobState:
        if job.number in self._ended:
            return self._ended[job.number]
        state = self._state(job)
        if state.is_over:
            self._ended[job.number] = state
        return state

    def _state(self, job: Job) -> JobState:
        place = self.place(job.number)
        launched, started, ended = (_read(place / f"{name}.json") for name in ("launched", "started", "ended"))
        asked = (place / "stop").exists()
        device, since = launched.get("device"), launched.get("time")
        if ended:
            code = int(ended.get("code", 1))
            name = "done" if code == 0 else "stopped" if code == EXIT_PREEMPTED or (asked and code < 0) else "failed"
            return JobState(name, _meaning(code), device, None, since, ended.get("time"), code)
        if started and started.get("kernel") == kernel():
            if _lives(started, "process"):
                return JobState("stopping" if asked else "running", "", device, int(started["process"]), since)
            if _lives(started, "keeper"):  # it is about to write how it ended
                return JobState("stopping" if asked else "running", "", device, None, since)
        if started:
            words = "its process ended without a word: it was killed, or the machine went down"
            return JobState("killed", words, device, None, since, started.get("time"))
        if launched and time.time() - float(launched.get("time", 0)) < _LAUNCH_SECONDS:
            return JobState("running", "starting", device, None, since)
        if asked:
            return JobState("stopped", "taken back before it began", None, None, None, job.created)
        return self._waiting(job)

    def _waiting(self, job: Job) -> JobState:
        if job.after is None or not self.place(job.after).is_dir():
            return JobState("waiting")
        before = self.state(self.job(job.after))
        if before.name == "done":
            return JobState("waiting")
        if before.is_over:
            return JobState("blocked", f"job {job.after}, which it needs, has {before.name}: start that again")
        return JobState("blocked", f"waits for job {job.after}")

    def log(self, number: int) -> str:
        """The end of what a job said; of a progress bar its last line."""
        try:
            with (self.place(number) / "log.txt").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
                text = file.read(_LOG_BYTES).decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))

    # -- starting and stopping -----------------------------------------------------------------------
    def launch(self, job: Job, device: str) -> None:
        """Start a job's keeper in a session of its own, on a device of devices.py."""
        place = self.place(job.number)
        write_json(place / "launched.json", {"device": device, "time": time.time()})
        environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": device} if device.isdecimal() else {})
        with (place / "keeper.txt").open("ab") as said:
            subprocess.Popen(
                [sys.executable, "-m", "OpenSciDraw.studio.keeper", str(place)], stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                cwd=job.folder, env=environment, start_new_session=True, close_fds=True,
            )  # fmt: skip

    def stop(self, number: int) -> None:
        """SIGTERM to the job's process group: training saves a checkpoint, from which it goes on when it is started again."""
        job = self.job(number)
        state = self.state(job)
        if state.is_over:
            raise UserError(f"Job {number} does not run: it has {state.name}.")
        (self.place(number) / "stop").touch()
        started = _read(self.place(number) / "started.json")
        if state.is_live and _lives(started, "process"):
            with suppress(ProcessLookupError):
                os.killpg(int(started["process"]), signal.SIGTERM)

    def again(self, number: int) -> Job:
        """Queue the same command once more: a training goes on from its last checkpoint."""
        job = self.job(number)
        state = self.state(job)
        if not state.is_over:
            raise UserError(f"Job {number} is {state.name}. It can be started again when it is over.")
        new, place = self._new_place()
        old = str(self.place(number))
        for file in [path for path in [self.place(number) / "config.py"] if path.is_file()]:
            shutil.copy(file, place / file.name)
        arguments = [argument.replace(old, str(place)) for argument in job.arguments]
        copy = Job(new, job.command, arguments, job.title, job.run, None, time.time(), job.folder)
        write_json(place / "job.json", asdict(copy))
        return copy


def _lives(started: dict[str, Any], name: str) -> bool:
    """Whether a process of started.json is still that process: its number may be another one's by now."""
    return bool(started) and started.get(f"{name}_born") is not None and started[f"{name}_born"] == born(started.get(name))


def _meaning(code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"ended by signal {-code}"
    known = {0: "", 1: "the loss was not finite, or a bug: see the log", 2: "something to mend: see the log",
             EXIT_PREEMPTED: "stopped after a checkpoint: start it again to go on"}  # fmt: skip
    return known.get(code, f"exit code {code}")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
