"""Training on rewards on two processes, as on one; stopped by kill -9 in the middle of a round, as in one go."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import BASE, REPO, merged, write_config
from safetensors.torch import load_file
from test_spread import FSDP2, assert_close, finish, launch

from OpenSciDraw.config import Config
from OpenSciDraw.training.run import Training
from train_OpenSciDraw_loop import train

pytestmark = pytest.mark.slow  # the trained base, which draws pictures that differ
VALUES = {
    **BASE, "pretrained_model_name_or_path": "embedded:flux2_klein_tiny", "max_sequence_length": 84,
    "dataset": {"type": "FigureDataset", "figures": "drawn:24:seed=5:style=small", "resolution": 128},
    "train_iteration_func_name": "reward", "held_out_examples": 0, "adam_epsilon": 1e-4, "data_sampler": {"drop_last": True},
    "max_train_steps": 4, "checkpointing_steps": 1, "lora_layers": "to_k,to_q,to_v",
    "reward": {"metrics": {"structure.labels": 1.0, "structure.components": 1.0}, "group_size": 4, "draw_steps": 3,
               "draw_guidance": 1.0, "steps_per_round": 2, "processes": 1, "watch": {}},
}  # fmt: skip


def metrics(folder: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "loss" in row}


@pytest.mark.parametrize(("way", "lora"), [("DDP", True), ("FSDP2", True), ("FSDP2", False)])
def test_two_processes_learn_as_one(way: str, lora: bool, tmp_path: Path, fresh_accelerate: Any) -> None:
    values = merged(VALUES, use_lora=lora, max_train_steps=3)
    one, two = tmp_path / "one", tmp_path / "two"
    fresh_accelerate()
    assert train(Training(Config.model_validate(merged(values, train_batch_size=2, model_output_dir=str(one))))) == 0
    config = write_config(tmp_path / "c.py", merged(values, train_batch_size=1, model_output_dir=str(two)))
    assert f"2 rank(s) ({way})" in finish(launch(config, FSDP2 if way == "FSDP2" else {}))
    assert any(row["reward_groups_that_differ"] for row in metrics(one).values())
    for step, row in metrics(one).items():
        for name, value in row.items():
            if name.startswith(("train_loss", "reward_")):
                assert metrics(two)[step][name] == pytest.approx(value, rel=2e-3, abs=2e-6), (step, name)
    assert_close(one, two, lora)


def test_kill_9_in_the_middle_of_a_round_loses_nothing_and_leaves_no_process(tmp_path: Path, fresh_accelerate: Any) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fresh_accelerate()
    assert train(Training(Config.model_validate(merged(VALUES, model_output_dir=str(whole))))) == 0
    again = merged(VALUES, model_output_dir=str(parts), resume_from_checkpoint="latest")
    config = write_config(tmp_path / "c.py", again)
    process = start(config)
    end = time.monotonic() + 240
    while not (parts / "checkpoint-1").is_dir():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert family and not psutil.wait_procs(family, timeout=30)[1], "the scoring process goes with its parent"
    assert start(config).wait() == 0
    for file in sorted((whole / "checkpoint-4").rglob("*.safetensors")):
        a, b = load_file(file), load_file(parts / file.relative_to(whole))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), file
    for step, row in metrics(whole).items():
        same = [name for name in row if name.startswith(("train_loss", "reward_", "grad_norm"))]
        assert all(metrics(parts)[step][name] == row[name] for name in same), step


def start(config: Path) -> Any:
    import subprocess
    import sys

    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    return subprocess.Popen([sys.executable, str(REPO / "train_OpenSciDraw_loop.py"), str(config)], cwd=REPO, env=env)
