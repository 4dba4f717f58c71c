"""Scores from processes beside the training: the numbers of the metric itself, in order; no process outlives its parent."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import BASE, REPO
from PIL import Image

from OpenSciDraw.config import Config
from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.structure import score_structure
from OpenSciDraw.training.scorers import Scorers, example_of, known_figures

NAMES = ["structure.labels", "structure.components", "structure.trend"]
VALUES = {
    **BASE, "train_iteration_func_name": "reward", "dataset": {"type": "FigureDataset", "figures": "drawn:8:seed=5:style=small"},
    "reward": {"metrics": dict.fromkeys(NAMES, 1.0), "processes": 2},
}  # fmt: skip


def test_processes_give_the_scores_of_the_metric_in_order(tmp_path: Path) -> None:
    config = Config.model_validate({**VALUES, "model_output_dir": str(tmp_path)})
    known = known_figures(config)
    ids = [name for name in known for _ in range(2)]
    pictures = np.stack([np.asarray(draw_figure(5, k // 2 + k % 2, 128, style="small").image.convert("RGB")) for k in range(16)])
    with Scorers(config, known) as scorers:
        first, second = scorers.submit(pictures, ids), scorers.submit(pictures[:1], ids[:1])
        found = first.wait()
        np.testing.assert_array_equal(second.wait(), found[:1])
        with pytest.raises(UserError, match="Nothing is known of 'other'"):
            scorers.submit(pictures[:1], ["other"])
    for row, picture, name in zip(found, pictures, ids, strict=True):
        scores = score_structure(Image.fromarray(picture), example_of(known[name]))
        expected = [scores[key][0] / scores[key][1] if key in scores else np.nan for key in ("labels", "components", "trend")]
        np.testing.assert_allclose(row, expected, rtol=1e-6)
    assert np.nanmean(found[::2, 0]) > 0.9 > np.nanmean(found[1::2, 0]), "every second picture is another figure's"


PARENT = """
import time
from pathlib import Path
import numpy as np
from OpenSciDraw.config import Config
from OpenSciDraw.training.scorers import Scorers, known_figures

if __name__ == "__main__":
    config = Config.model_validate(VALUES)
    scorers = Scorers(config, known_figures(config))
    scorers.submit(np.zeros((2, 128, 128, 3), np.uint8), list(known_figures(config))[:2]).wait()
    Path(config.model_output_dir, "ready").write_text("")
    time.sleep(600)
"""


def test_scoring_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT.replace("VALUES", repr({**VALUES, "model_output_dir": str(tmp_path)})))
    parent = subprocess.Popen([sys.executable, str(script)], cwd=REPO, env={"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 120
    while not (tmp_path / "ready").exists():
        assert parent.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 2
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(family, timeout=30)[1]
