"""Adapters of each kind on two processes by FSDP2, as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import merged, write_config
from safetensors.torch import load_file
from test_spread import FSDP2, assert_close, curve, finish, launch, square_store

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.parallel import zero
from OpenSciDraw.training.run import Training
from train_OpenSciDraw_loop import train

__all__ = ["square_store"]  # a fixture
KINDS = {"dora": {}, "lokr": {"lokr_factor": 4}, "loha": {}, "oft": {"oft_block_size": 8}}


@pytest.mark.slow  # four processes start for each kind
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_an_adapter_as_one(kind: str, square_store: Any, tmp_path: Path, fresh_accelerate: Any) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    values = merged(square_store, adapter_type=kind, **KINDS[kind], validation_prompts=[], resolution_list=[], max_train_steps=2,
                    checkpointing_steps=1)  # fmt: skip
    fresh_accelerate()
    assert train(Training(Config.model_validate(merged(values, train_batch_size=4, model_output_dir=str(one))))) == 0
    values = merged(values, model_output_dir=str(two))
    finish(launch(write_config(tmp_path / "c.py", values), FSDP2))
    for key in ("train_loss", "held_out_loss"):
        assert curve(two, key) == pytest.approx(curve(one, key), rel=1e-4)
    assert_close(one, two, True)
    assert_close(one / "ema", two / "ema", True)
    (two / "checkpoint-2").rename(tmp_path / "whole")
    finish(launch(write_config(tmp_path / "again.py", merged(values, resume_from_checkpoint="latest")), FSDP2))
    whole, parts = (load_file(folder / "optimizer.safetensors") for folder in (tmp_path / "whole", two / "checkpoint-2"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_deepspeed_with_another_kind_is_refused(store_config: Any, tmp_path: Path, fresh_accelerate: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(zero, "take_request", lambda: zero.Zero(2, False))
    with pytest.raises(UserError, match="DeepSpeed .* does not go with adapter_type = 'lokr'"):
        Training(Config.model_validate(merged(store_config, adapter_type="lokr", model_output_dir=str(tmp_path))))
