"""Processes beside the server for what takes seconds or much memory: the page answers meanwhile, also where one crashes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from OpenSciDraw.errors import UserError

_ENDS = 5.0  # seconds that a worker has to go


class Worker:
    """One process of worker.py, started when it is first asked for something; it does one thing after another.

    `environment` is added to this process's own. It ends with this process, whatever ends that: its input is closed then.
    """

    def __init__(self, folder: Path, name: str, environment: dict[str, str] | None = None):
        self.folder, self.name, self.environment = folder, name, environment or {}
        self._turn, self._numbers = threading.Lock(), itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, what: str, on_progress: Callable[[Any], None] | None = None, **given: Any) -> Any:
        """What a function of worker.TASKS returns. `on_progress` gets what it reports on the way.

        Raises:
            UserError: as the function does; the process ended, or the function has a bug (its log says which).
        """
        with self._turn:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            number = next(self._numbers)
            try:
                process.stdin.write(json.dumps({"number": number, "what": what, "given": given}).encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # what it said last is read below
            while line := process.stdout.readline():
                said = json.loads(line)
                if said["number"] != number:
                    continue
                if "progress" in said:
                    if on_progress is not None:
                        on_progress(said["progress"])
                elif "error" in said:
                    raise UserError(said["error"])
                else:
                    return said["result"]
            code = process.wait()
            self._process = None
            raise UserError(f"The process for this ended ({code}; a negative number is a signal, -9 often means no memory). "
                            f"Its log is {self._log}.")  # fmt: skip

    def stop(self) -> None:
        """End the process, whatever it does."""
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()
            process.wait(_ENDS)

    @property
    def _log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "OpenSciDraw.studio.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                    env={**os.environ, **self.environment}, start_new_session=True,
                )  # fmt: skip
        return self._process
