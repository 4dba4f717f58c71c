"""Where jobs of the queue run: this machine's GPUs, one job on each, or the CPU; and the thread that starts them."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from OpenSciDraw.studio.jobs import Queue
from OpenSciDraw.utils.sole_user import holder_of

_LOG = logging.getLogger("OpenSciDraw")
_QUERY = "index,name,memory.used,memory.total"
_BUSY = 0.1  # of a GPU's memory, from which on another program is at work there


@dataclass(frozen=True)
class Device:
    """`name`: a GPU's number as CUDA_VISIBLE_DEVICES has it, or 'cpu'; memory in GB."""

    name: str
    what: str
    used: float = 0.0
    total: float = 0.0

    @property
    def is_busy(self) -> bool:
        return self.total > 0 and self.used > _BUSY * self.total


def gpus_in(listing: str) -> list[Device]:
    """What `nvidia-smi --query-gpu=index,name,memory.used,memory.total --format=csv,noheader,nounits` says."""
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines() if line.count(",") == 3]
    numbers = [row for row in rows if row[0].isdecimal() and row[2].isdecimal() and row[3].isdecimal()]
    return [Device(row[0], row[1], int(row[2]) * 1.048576e-3, int(row[3]) * 1.048576e-3) for row in numbers]


def devices() -> list[Device]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves visible; where there are none, the CPU as one device."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found: list[Device] = []
    if shutil.which("nvidia-smi") and visible not in ("", "-1"):
        command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        found = gpus_in(said.stdout)
        if visible is not None:
            found = [device for device in found if device.name in [name.strip() for name in visible.split(",")]]
    return found or [Device("cpu", f"CPU, {os.cpu_count()} cores")]


class Scheduler(threading.Thread):
    """Starts the first job that can run wherever a device is free, until `stop` is called. The jobs go on without it."""

    def __init__(self, queue: Queue, root: Path, seconds: float = 1.0):
        super().__init__(daemon=True, name="queue")
        self.queue, self.root, self.seconds = queue, root, seconds
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(self.seconds):
            try:
                self.tick()
            except Exception:  # the next look may find the disk, or nvidia-smi, well again; the queue must not die of it
                _LOG.exception("the queue could not be looked at")

    def stop(self) -> None:
        self._over.set()

    def tick(self) -> None:
        """One look at the queue."""
        jobs = [(job, self.queue.state(job)) for job in self.queue.jobs()]
        waiting = [job for job, state in jobs if state.name == "waiting"]
        if not waiting:
            return
        taken = {state.device for _, state in jobs if state.is_live}
        runs = {job.run for job, state in jobs if state.is_live}
        for device in devices():
            if device.name in taken or device.is_busy:
                continue
            free = [job for job in waiting if job.run not in runs and not (job.run and holder_of(self.root / job.run)[1])]
            if not free:
                return
            self.queue.launch(free[0], device.name)
            waiting.remove(free[0])
            runs.add(free[0].run)
