"""Work beside the main thread: writing goes on while the device computes. One thread, in order, with bounded memory.

The model stays in the main thread, so that Ctrl-C stops it at once.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_LOOK_UP_SECONDS = 0.2  # how often one side that waits looks whether the other is still there


class Background:
    """Does jobs one after the other in a thread; at most `ahead` wait while one is done.

    A job's error is raised by the next `submit` or `check`, or at the end of the `with` block; no job is begun after it. When
    the block itself ends in an error (Ctrl-C is one), the job in hand is finished and the waiting ones are dropped.
    """

    def __init__(self, ahead: int = 1):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._jobs: deque[Future[None]] = deque()
        self._ahead, self._failed = ahead, False

    def submit(self, job: Callable[..., None], *arguments: Any) -> None:
        """Waits while `ahead` jobs wait."""
        self.check()
        while len(self._jobs) > self._ahead:
            self._jobs.popleft().result()
        self._jobs.append(self._pool.submit(self._do, job, arguments))

    def check(self) -> None:
        """Raises the error of a job that failed."""
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()

    def wait(self) -> None:
        """Until all jobs are done; raises the error of one that failed."""
        while self._jobs:
            self._jobs.popleft().result()

    def _do(self, job: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self._failed:
            return
        self._failed = True  # until it is done
        job(*arguments)
        self._failed = False

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)


class Abandoned(RuntimeError):
    """Whoever made the items ended before the last one."""


class Handover(Generic[T]):
    """Items that one thread puts and another one iterates over, in order; at most `size` lie between them.

    The putting side works in a `with` block, whose end ends the iteration: an error there raises Abandoned here. `check`
    raises what ended the other side.
    """

    def __init__(self, size: int, check: Callable[[], None]):
        self._queue: queue.Queue[T] = queue.Queue(size)
        self._check = check
        self._complete, self._abandoned = threading.Event(), threading.Event()

    def put(self, item: T) -> None:
        while True:
            self._check()
            try:
                return self._queue.put(item, timeout=_LOOK_UP_SECONDS)
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[T]:
        while True:
            complete = self._complete.is_set()  # looked at before the queue: nothing is put after it
            if self._abandoned.is_set():
                raise Abandoned
            try:
                yield self._queue.get(timeout=0 if complete else _LOOK_UP_SECONDS)
            except queue.Empty:
                if complete:
                    return

    def __enter__(self) -> Handover[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        (self._complete if kind is None else self._abandoned).set()


class HostCopies:
    """Copies of tensors in CPU memory; from a GPU they are on their way while the next batch is computed."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._arrived: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            self._tensors = [torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensors[0].device))
        else:
            self._tensors = [tensor.cpu() for tensor in tensors]

    def wait(self) -> list[Tensor]:
        """The copies, when they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


def stacked(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """`torch.stack` of CPU tensors, on its way to `device`."""
    if device.type != "cuda":
        return torch.stack(list(tensors)).to(device)
    together = torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype, pin_memory=True)
    return torch.stack(list(tensors), out=together).to(device, non_blocking=True)
