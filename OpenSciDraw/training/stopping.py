"""How a run ends when it is told to: signals, the data workers that must not die of them, the launcher that may die first.

Slurm, Azure ML, Kubernetes and Ctrl-C signal a process, its whole group, or only its launcher. Whoever of them gets it, training
saves and leaves; its data workers go when it goes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from types import FrameType

AGAIN_SECONDS = 2.0  # a launcher and the terminal may both pass on one Ctrl-C: a second one that is meant comes later
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # set by torchrun and by `accelerate launch`
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


class StopRequest(BaseException):
    """The run was told to stop, at a place where it can do so at once. No Exception: nothing on the way may take it for one."""


class StopSignals:
    """`with StopSignals() as signals`: `signals.number` is that of the first SIGTERM or SIGINT, 0 before.

    Where `interruptible` says so, the first one raises StopRequest. Another SIGTERM changes nothing; Ctrl-C again, two seconds
    after the first or later, raises KeyboardInterrupt. Afterwards handlers are as they were; in a program that ends now
    (`ends_process`) and was told to, both signals are ignored instead: one that is passed on late must not change its exit code.
    """

    def __init__(self) -> None:
        self.number, self._since, self._interrupts, self.ends_process = 0, 0.0, False, False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            if number == signal.SIGINT and time.monotonic() - self._since > AGAIN_SECONDS:
                raise KeyboardInterrupt
            return
        self.number, self._since = number, time.monotonic()
        if self._interrupts:
            raise StopRequest

    @contextmanager
    def interruptible(self, allowed: bool) -> Iterator[None]:
        """Raises StopRequest in the block, or before it, when a signal came and `allowed`."""
        self._interrupts = allowed
        try:
            if allowed and self.number:
                raise StopRequest
            yield
        finally:
            self._interrupts = False

    def __enter__(self) -> StopSignals:
        if any(name in os.environ for name in LAUNCHED):
            _signal_when_parent_dies(signal.SIGTERM)
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.number and self.ends_process else handler)


def _signal_when_parent_dies(number: int) -> None:
    """On Linux; elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(number), 0, 0, 0)


class ShieldedWorker:
    """A DataLoader's worker_init_fn: a worker that no signal to the group ends, but the end of its parent does, or `ending`."""

    def __init__(self, ending: Event):
        self.ending, self.parent = ending, os.getpid()

    def __call__(self, number: int) -> None:
        _signal_when_parent_dies(signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._leave)
        if os.getppid() != self.parent:
            os._exit(1)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if self.ending.is_set() or os.getppid() != self.parent:
            os._exit(0)
