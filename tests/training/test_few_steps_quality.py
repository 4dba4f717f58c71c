"""A short distillation of the shipped base: in 4 steps without guidance it draws what the prompts ask for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import REPO, write_config

from OpenSciDraw.cli import main
from OpenSciDraw.config import load_config
from OpenSciDraw.models.embedded import SHIPPED

pytestmark = pytest.mark.skipif(not (SHIPPED / "flux2_klein_tiny").is_dir(), reason="no trained weights in this tree")
# Of 24 pictures after 40 steps; the floors lie below what configs/tiny/flux2klein_4steps.py has then (docs/few-steps.md).
FLOOR = {
    "structure/components": 0.85, "structure/colour": 0.90, "structure/arrows": 0.85, "structure/one_letter_labels": 0.45,
}  # fmt: skip


@pytest.mark.slow  # minutes: 40 steps of seven forwards and a backward
def test_forty_steps_teach_the_shipped_base_to_draw_in_four(tmp_path: Path, fresh_accelerate: None) -> None:
    values = load_config(REPO / "configs" / "tiny" / "flux2klein_4steps.py").model_dump(exclude_unset=True)
    values |= {
        "dataset": {**values["dataset"], "base_dir": str(tmp_path)},
        "encode": {**values["encode"], "figures": "drawn:640:seed=0:style=small"},
        "max_train_steps": 40, "validation_prompts": [], "resolution_list": [], "model_output_dir": str(tmp_path / "train"),
    }  # fmt: skip
    config = write_config(tmp_path / "short.py", values)
    assert main(["encode", str(config)]) == 0 and main(["train", str(config)]) == 0
    run, out = str(tmp_path / "train"), tmp_path / "scores"
    assert main(["evaluate", run, "--figures", "drawn:24:seed=9:style=small", "--out", str(out)]) == 0
    summary = json.loads((out / "evaluation.json").read_text())
    assert (summary["settings"]["steps"], summary["settings"]["guidance"]) == (4, 1.0)
    found = {name: item["value"] for name, item in summary["metrics"].items()}
    assert all(found[name] >= floor for name, floor in FLOOR.items()), found
