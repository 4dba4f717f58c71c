"""`make soak`, in its short form: one run of each kind of stage, stopped at random moments, ends with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO


@pytest.mark.parametrize("stage", ["train with workers", "repack"])
def test_a_stage_that_is_stopped_again_and_again_makes_the_same_bits_and_leaves_nothing(stage: str, tmp_path: Path) -> None:
    results = tmp_path / "soak.json"
    command = [sys.executable, str(REPO / "benchmarks" / "run_soak.py"), "--kills", "3", "--seed", "5", "--results", str(results)]
    done = subprocess.run([*command, "--stages", stage], capture_output=True, text=True, timeout=600, cwd=REPO, check=False)
    found = json.loads(results.read_text())
    assert done.returncode == 0 and found["failures"] == [] and found["kills"] >= 3, done.stdout + done.stderr[-2000:]
