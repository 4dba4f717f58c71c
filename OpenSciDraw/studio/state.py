"""What the studio keeps in memory: nothing that cannot be read from the folder again."""

from __future__ import annotations

import threading
from pathlib import Path

from OpenSciDraw.studio.curves import Curves
from OpenSciDraw.studio.jobs import Queue
from OpenSciDraw.studio.places import Places
from OpenSciDraw.studio.run_state import RunState, state_of

_MOST_CURVES = 64  # runs whose curves stay in memory


class Studio:
    """Of one folder."""

    def __init__(self, root: Path):
        self.places = Places(root)
        self.queue = Queue(self.places.own / "queue")
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

    def runs(self) -> list[RunState]:
        """All runs, those at work first, then the newest."""
        jobs = [(job, self.queue.state(job)) for job in self.queue.jobs()]
        found = [state_of(self.places, folder, self.curves(folder), jobs) for folder in self.places.runs()]
        live = ("starting", "running", "stopping")
        return sorted(found, key=lambda run: (run.status in live, run.started or "", run.name), reverse=True)
