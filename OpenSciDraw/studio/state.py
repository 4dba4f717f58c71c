"""What the studio keeps in memory: nothing that cannot be read from the folder again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from OpenSciDraw.reporting.run_data import is_run
from OpenSciDraw.studio.curves import Curves
from OpenSciDraw.studio.figures_index import Indices
from OpenSciDraw.studio.jobs import Queue
from OpenSciDraw.studio.places import Places
from OpenSciDraw.studio.run_state import RunState, state_of
from OpenSciDraw.studio.thumbnails import Thumbnails
from OpenSciDraw.studio.workers import Worker
from OpenSciDraw.utils.files import make_folder

_SECONDS = 10.0  # between two looks at all configs, or at all folders for runs
_MOST_CURVES = 64  # runs whose curves stay in memory


class Studio:
    """Of one folder."""

    def __init__(self, root: Path):
        self.places = Places(root)
        self.queue = Queue(self.places.own / "queue")
        self.look = Worker(self.places.own, "look", {"HF_HUB_OFFLINE": "1"})  # no store of strangers makes it download a model
        self.lister = Worker(self.places.own, "list")
        self.draw = Worker(self.places.own, "draw")
        self.drawing: dict[str, dict[str, Any]] = {}  # what is being drawn, by its id
        self.indices = Indices(self.places.own / "cache" / "lists", self.places.root, self.lister)
        self.thumbnails = Thumbnails(self.places.own / "cache" / "thumbs")
        self.latents = make_folder(self.places.own / "cache" / "latents")
        self._figures: tuple[float, dict[Path, Path]] = (-_SECONDS, {})
        self._runs: tuple[float, list[Path]] = (-_SECONDS, [])
        self._curves: dict[Path, Curves] = {}
        self._lock = threading.Lock()

    def curves(self, run: Path) -> Curves:
        """A run's curves, as far as it has written them. A link that leads out of the folder is no file."""
        file = run / "metrics.jsonl"
        if not self.places.has(file):
            file = self.places.own / "none.jsonl"
        with self._lock:
            curves = self._curves.pop(file, None) or Curves(file)
            self._curves[file] = curves  # the newest last
            while len(self._curves) > _MOST_CURVES:
                del self._curves[next(iter(self._curves))]
        return curves.update()

    def figures_of(self, store: Path, look: Callable[[], dict[Path, Path]]) -> Path | None:
        """The figures that a store is of; `look` finds those of all stores, now and then."""
        if time.monotonic() - self._figures[0] > _SECONDS:
            self._figures = (time.monotonic(), look())
        return self._figures[1].get(store)

    def close(self) -> None:
        """End what belongs to the page alone."""
        for worker in (self.look, self.lister, self.draw):
            worker.stop()

    def runs(self) -> list[RunState]:
        """All runs, those at work first, then the newest."""
        jobs = [(job, self.queue.state(job)) for job in self.queue.jobs()]
        if time.monotonic() - self._runs[0] > _SECONDS:  # a look at all folders; those of the queue are known without
            self._runs = (time.monotonic(), self.places.runs())
        own = {self.places.root / job.run for job, _ in jobs if job.run is not None}
        folders = sorted(folder for folder in {*self._runs[1], *own} if is_run(folder) and self.places.has(folder))
        found = [state_of(self.places, folder, self.curves(folder), jobs) for folder in folders]
        live = ("starting", "running", "stopping")
        return sorted(found, key=lambda run: (run.status in live, run.started or "", run.name), reverse=True)
