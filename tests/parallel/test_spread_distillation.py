"""Distillation on two processes, as on one; and another base in validation, drawn by the first of two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import merged, write_config
from PIL import Image
from test_spread import FSDP2, assert_close, finish, launch
from test_spread_preference import metrics

from OpenSciDraw.config import Config
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.training.run import Training
from train_OpenSciDraw_loop import train

SHARED = {
    "data_sampler": {"drop_last": True}, "max_train_steps": 2, "checkpointing_steps": 1, "adam_epsilon": 1e-4,
    "held_out_examples": 0, "train_iteration_func_name": "trajectory_distillation", "num_inference_steps": 4,
    "guidance_scale": 3.0, "distill": {"steps": 2, "inputs": "student"},
}  # fmt: skip


@pytest.mark.slow  # two processes each
@pytest.mark.parametrize(("way", "lora"), [("DDP", True), ("FSDP2", True), ("FSDP2", False)])
def test_two_processes_distil_as_one(way: str, lora: bool, store_config: dict, tmp_path: Path, fresh_accelerate: Any) -> None:
    """One rank's sample is at the first step and goes nowhere by itself, the other's has taken one: both make as many forwards."""
    values = merged(merged(store_config, **SHARED), use_lora=lora)
    one, two = tmp_path / "one", tmp_path / "two"
    fresh_accelerate()
    assert train(Training(Config.model_validate(merged(values, train_batch_size=2, model_output_dir=str(one))))) == 0
    config = write_config(tmp_path / "c.py", merged(values, train_batch_size=1, model_output_dir=str(two)))
    said = finish(launch(config, FSDP2 if way == "FSDP2" else {}))
    assert f"2 rank(s) ({way})" in said and ("adapter off" if lora else "dealt over the devices") in said
    for step, row in metrics(one).items():
        assert metrics(two)[step]["train_loss"] == pytest.approx(row["train_loss"], rel=1e-3, abs=2e-6), step
    assert_close(one, two, lora)


@pytest.mark.slow  # two processes
def test_a_dealt_adapter_is_drawn_on_the_other_base(store_config: dict, tmp_path: Path, fresh_accelerate: Any) -> None:
    """FSDP2 on two processes gives the pictures of one."""
    other = tmp_path / "klein"
    shutil.copytree(embedded_folder("flux2_klein_tiny_random"), other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    values = merged(
        store_config, validation_model=str(other), validation_prompts=["A red box."], resolution_list=[[64, 64]], max_train_steps=1,
        learning_rate=0.01, data_sampler={"drop_last": True}, held_out_examples=0, adam_epsilon=1e-4,
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    fresh_accelerate()
    assert train(Training(Config.model_validate(merged(values, train_batch_size=2, model_output_dir=str(one))))) == 0
    finish(launch(write_config(tmp_path / "c.py", merged(values, train_batch_size=1, model_output_dir=str(two))), FSDP2))
    first, second = (
        np.asarray(Image.open(run / "validation_images" / "step_000001" / "validation_model" / "00.png")).astype(int)
        for run in (one, two)
    )
    assert np.abs(first - second).max() <= 2
