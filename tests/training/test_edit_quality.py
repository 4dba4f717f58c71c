"""A short form of how the small model learns edits: first to copy its reference (mosaics), then to change what is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


@pytest.mark.slow  # minutes: 180 steps of all weights
def test_a_model_that_learned_to_copy_mosaics_and_find_letters_soon_learns_edits(tmp_path: Path, fresh_accelerate: None) -> None:
    def given(name: str) -> dict[str, Any]:
        return load_config(REPO / "configs" / "tiny" / f"{name}.py").model_dump(exclude_unset=True)

    def train(name: str, **values: object) -> list[float]:
        """The held-out losses, from before the first step on."""
        values = given(name) | {
            "mixed_precision": "bf16" if cpu_has_bf16() else "no", "train_batch_size": 16, "held_out_examples": 16,
            "lr_warmup_steps": 10, "validation_steps": 60, "max_train_steps": 60,
            "model_output_dir": str(tmp_path / name), **values,
        }  # fmt: skip
        assert main(["train", str(write_config(tmp_path / f"{name}.py", values))]) == 0
        return held_out(tmp_path / name)

    copy = given("flux2klein_edit_copy")
    figures = {"edit_copy": "480:seed=5:style=mosaic", "edit": "480:seed=100", "repaint": "240:seed=11:style=repaint",
               "letters": "240:seed=21:style=letters"}  # fmt: skip
    for folder, what in figures.items():
        store = {**copy["dataset"], "base_dir": str(tmp_path / folder)}
        asked = {"encode": {**copy["encode"], "figures": f"drawn:{what}:edit"}, "dataset": store}
        assert main(["encode", str(write_config(tmp_path / f"{folder}_store.py", copy | asked))]) == 0

    copying = train("flux2klein_edit_copy", dataset={**copy["dataset"], "base_dir": str(tmp_path / "edit_copy")})
    assert copying[-1] < 0.5 * copying[0], copying
    sources = {**given("flux2klein_edit_letters")["dataset"], "base_dir": str(tmp_path)}
    finding = train("flux2klein_edit_letters", dataset=sources, pretrained_full_ckpt_path=str(tmp_path / "flux2klein_edit_copy"))
    assert finding[-1] < 0.85 * finding[0], finding  # measured: .421 to .313
    sources |= {"sources": [{"path": "edit/store", "share": 0.75}, {"path": "edit_copy/store", "share": 0.25}]}
    edits = train("flux2klein_edit", dataset=sources, pretrained_full_ckpt_path=str(tmp_path / "flux2klein_edit_letters"))
    assert edits[-1] < 0.8 * edits[0], edits  # measured: .199 to .138
