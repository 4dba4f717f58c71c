"""Run another training script as it is, and note when each of its optimizer steps ends: suite_peer.py SCRIPT ARGUMENTS…

Times (after the device is done) and the peak of memory go into the file that the environment variable STAMPS names.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

stamps: list[float] = []
_step = AcceleratedOptimizer.step


def step(self: Any, *arguments: Any, **named: Any) -> Any:
    answer = _step(self, *arguments, **named)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    stamps.append(time.perf_counter())
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    Path(os.environ["STAMPS"]).write_text(json.dumps({"stamps": stamps, "peak_gb": peak}))
    return answer


if __name__ == "__main__":
    AcceleratedOptimizer.step = step
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
