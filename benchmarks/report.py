"""What the benchmarks share: measuring in turn, naming the machine, writing the numbers down."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
RESULTS = BENCHMARKS / "results"


def machine() -> dict[str, Any]:
    """CPU model, cores, threads of torch, versions, and how busy the machine was with other work."""
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": "none used",
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


@dataclass
class Result:
    """One benchmark's outcome: a table for people, and every number for machines."""

    name: str
    command: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def save(self) -> None:
        """Print the table; write results/<name>.json."""
        print("\n".join([self.table(), *(f"\n{note}" for note in self.notes)]))
        RESULTS.mkdir(exist_ok=True)
        content = {
            "name": self.name, "command": self.command, "date": datetime.date.today().isoformat(), "machine": machine(),
            "columns": list(self.columns), "rows": self.rows, "notes": self.notes, "numbers": self.numbers,
        }  # fmt: skip
        (RESULTS / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")


def in_turn(runs: dict[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn: A B A B …, so that a change of the machine's load meets all of them.

    Each run returns its own seconds. A first round warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            gc.collect()
            taken = run()
            if repetition:
                seconds[name].append(taken)
    return seconds


def ratio(reference: Sequence[float], ours: Sequence[float]) -> float:
    """Our rate over the reference's: the median over neighbouring pairs of seconds."""
    return median(r / o for r, o in zip(reference, ours, strict=True))
