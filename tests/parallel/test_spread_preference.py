"""Training on preferences on two processes, as on one: DDP with the adapter off as reference, FSDP2 with a dealt frozen copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import merged, write_config
from test_spread import FSDP2, assert_close, finish, launch

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.parallel import zero
from OpenSciDraw.training.run import Training
from train_OpenSciDraw_loop import train

SHARED = {
    "data_sampler": {"drop_last": True}, "max_train_steps": 2, "checkpointing_steps": 1, "adam_epsilon": 1e-4,
    "held_out_examples": 0, "preference": {"winner_weight": 1.0},
}  # fmt: skip


def metrics(folder: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "loss" in row}


@pytest.mark.parametrize(("way", "lora"), [("DDP", True), ("FSDP2", True), ("FSDP2", False)])
def test_two_processes_prefer_as_one(way: str, lora: bool, group_config: dict, tmp_path: Path, fresh_accelerate: Any) -> None:
    """The same losses, numbers by axis and weights; and what two began against a dealt reference goes on in one."""
    values = merged(merged(group_config, **SHARED), use_lora=lora)
    one, two = tmp_path / "one", tmp_path / "two"
    fresh_accelerate()
    assert train(Training(Config.model_validate(merged(values, train_batch_size=2, model_output_dir=str(one))))) == 0
    config = write_config(tmp_path / "c.py", merged(values, train_batch_size=1, model_output_dir=str(two)))
    said = finish(launch(config, FSDP2 if way == "FSDP2" else {}))
    assert f"2 rank(s) ({way})" in said and ("adapter off" if lora else "dealt over the devices") in said
    for step, row in metrics(one).items():
        for name, value in row.items():
            if name.startswith(("train_loss", "preference_")):
                assert metrics(two)[step][name] == pytest.approx(value, rel=1e-3, abs=2e-6), (step, name)
    assert_close(one, two, lora)
    if not lora:
        (two / "checkpoint-2").rename(tmp_path / "whole")
        fresh_accelerate()
        again = merged(values, train_batch_size=2, model_output_dir=str(two), resume_from_checkpoint="latest")
        assert train(Training(Config.model_validate(again))) == 0
        assert_close(one, two, lora)


def test_deepspeed_is_refused_with_what_to_do(group_config: dict, tmp_path: Path, fresh_accelerate: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(zero, "take_request", lambda: zero.Zero(2, False))
    with pytest.raises(UserError, match="'mdpo' does not go with DeepSpeed.*FSDP2 or DDP"):
        Training(Config.model_validate(merged(group_config, model_output_dir=str(tmp_path))))
