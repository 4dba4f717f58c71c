"""`make soak`, in its short form: two stages, stopped at random moments, end with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import REPO


def test_stages_that_are_stopped_again_and_again_make_the_same_bits_and_leave_nothing(tmp_path: Path) -> None:
    results = tmp_path / "soak.json"
    command = [sys.executable, str(REPO / "benchmarks" / "run_soak.py"), "--kills", "4", "--seed", "5", "--results", str(results)]
    done = subprocess.run(
        [*command, "--stages", "repack,train with workers"], capture_output=True, text=True, timeout=600, cwd=REPO, check=False
    )
    found = json.loads(results.read_text())
    assert done.returncode == 0 and found["failures"] == [] and found["kills"] >= 4, done.stdout + done.stderr[-2000:]
    assert all(count.get("runs") for count in found["stages"].values()), found
