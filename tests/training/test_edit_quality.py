"""A short form of how the small model learns edits: first to copy its reference (mosaics), then to change what is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import REPO, write_config

from OpenSciDraw.cli import main
from OpenSciDraw.config import load_config
from OpenSciDraw.models.embedded import SHIPPED
from OpenSciDraw.planning.machine import cpu_has_bf16

pytestmark = pytest.mark.skipif(not (SHIPPED / "flux2_klein_tiny").is_dir(), reason="no trained weights in this tree")


def held_out(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["held_out_loss"] for line in lines if "held_out_loss" in line]


@pytest.mark.slow  # minutes: 120 steps of all weights
def test_a_model_that_learned_to_copy_mosaics_soon_learns_edits(tmp_path: Path, fresh_accelerate: None) -> None:
    def train(name: str, **given: object) -> list[float]:
        """The held-out losses, from before the first step on."""
        values = load_config(REPO / "configs" / "tiny" / f"{name}.py").model_dump(exclude_unset=True)
        values |= {
            "mixed_precision": "bf16" if cpu_has_bf16() else "no", "train_batch_size": 16, "held_out_examples": 16,
            "model_output_dir": str(tmp_path / name), "validation_steps": 60, "max_train_steps": 60, **given,
        }  # fmt: skip
        config = str(write_config(tmp_path / f"{name}.py", values))
        if "sources" not in values["dataset"]:
            assert main(["encode", config]) == 0
            figures = ["encode.figures=drawn:480:seed=100:edit", f"dataset.base_dir={tmp_path / 'edit'}"]
            assert main(["encode", config, "--cfg_options", *figures]) == 0
            figures = ["encode.figures=drawn:240:seed=11:style=repaint:edit", f"dataset.base_dir={tmp_path / 'repaint'}"]
            assert main(["encode", config, "--cfg_options", *figures]) == 0
        assert main(["train", config]) == 0
        return held_out(tmp_path / name)

    store = load_config(REPO / "configs" / "tiny" / "flux2klein_edit_copy.py").model_dump(exclude_unset=True)
    copying = train(
        "flux2klein_edit_copy", dataset={**store["dataset"], "base_dir": str(tmp_path / "edit_copy")},
        encode={**store["encode"], "figures": "drawn:480:seed=5:style=mosaic:edit"},
    )  # fmt: skip
    assert copying[-1] < 0.5 * copying[0], copying
    both = load_config(REPO / "configs" / "tiny" / "flux2klein_edit.py").model_dump(exclude_unset=True)["dataset"]
    edits = train(
        "flux2klein_edit", dataset={**both, "base_dir": str(tmp_path)}, lr_warmup_steps=10,
        pretrained_full_ckpt_path=str(tmp_path / "flux2klein_edit_copy"),
    )  # fmt: skip
    assert edits[-1] < 0.8 * edits[0], edits  # measured: .204 to .137
