"""Checkpoints are written by a thread: of their own step's state, whole before the run ends, and never in silence."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import merged
from safetensors.torch import load_file

from OpenSciDraw.config import Config
from OpenSciDraw.training import checkpoint
from OpenSciDraw.training.run import Training
from OpenSciDraw.training.snapshot import Snapshot
from OpenSciDraw.weights.files import LORA_FILE, list_checkpoints
from train_OpenSciDraw_loop import train


def slowed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[tuple[str, float]]:
    """Writing a checkpoint takes `seconds` more; notes when each began and ended."""
    exact, noted = Training._save_weights, []

    def slow(self: Training, folder: Path, *options: Any) -> None:
        if folder.name.startswith(".checkpoint"):
            noted.append((f"begin {folder.name}", time.perf_counter()))
            time.sleep(seconds)
        exact(self, folder, *options)
        noted.append((f"end {folder.name}", time.perf_counter()))

    monkeypatch.setattr(Training, "_save_weights", slow)
    return noted


def contents(folder: Path) -> dict[str, Any]:
    """Tensors and texts of a checkpoint (safetensors orders its metadata anew each time, so not the files' bytes)."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            found |= {f"{path.relative_to(folder)} {name}": t.numpy().tobytes() for name, t in load_file(path).items()}
        elif path.is_file() and path.name != "manifest.json":
            found[str(path.relative_to(folder))] = path.read_text()
    return found


@pytest.mark.parametrize("values", [{}, {"use_lora": False, "use_ema": True, "ema_steps": 1}])
def test_a_checkpoint_holds_its_own_step_though_training_went_on_and_is_the_one_that_waiting_writes(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]  # type: ignore[no-untyped-def]
) -> None:
    given = {"max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-2, **values}
    with monkeypatch.context() as patched:
        patched.setattr(Snapshot, "fits", lambda self, tree: False)
        run(model_output_dir=str(tmp_path / "waits"), **given)
    slowed(monkeypatch, 0.5)
    run(model_output_dir=str(tmp_path / "goes on"), **given)
    for name in ("checkpoint-2", "checkpoint-4"):
        checkpoint.check(tmp_path / "goes on" / name)
        assert contents(tmp_path / "goes on" / name) == contents(tmp_path / "waits" / name)


def test_training_goes_on_while_a_checkpoint_is_written_and_a_second_one_waits_for_the_first(run, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    steps, end_step = {}, Training.end_step

    def noted_step(self: Training) -> None:
        end_step(self)
        steps[self.step] = time.perf_counter()

    monkeypatch.setattr(Training, "end_step", noted_step)
    noted = slowed(monkeypatch, 2.0)
    run(model_output_dir=str(tmp_path), max_train_steps=4, checkpointing_steps=2)
    at = dict(noted)
    assert steps[3] < at["end .checkpoint-2.tmp"] < at["begin .checkpoint-4.tmp"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


def test_old_checkpoints_go_only_when_the_new_one_is_whole(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    seen: list[list[str]] = []
    exact = checkpoint.CheckpointWriter.__exit__

    def noted(self: Any, *error: Any) -> None:
        seen.append(sorted(path.name for path in list_checkpoints(tmp_path)))
        exact(self, *error)

    monkeypatch.setattr(checkpoint.CheckpointWriter, "__exit__", noted)
    run(model_output_dir=str(tmp_path), max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=1)
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"]]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_a_snapshot_that_does_not_fit_is_said_once_and_written_while_training_waits(run, tmp_path, monkeypatch, caplog) -> None:  # type: ignore[no-untyped-def]
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=memory.total // 10))
    training = run(model_output_dir=str(tmp_path), max_train_steps=2, checkpointing_steps=1)
    assert sum("no memory for copies" in message for message in caplog.messages) == 1
    assert not training.snapshot._buffers  # nothing was reserved either
    assert len(list_checkpoints(tmp_path)) == 2


def test_copies_use_the_same_memory_again_and_do_not_follow_their_tensors() -> None:
    snapshot, tree = Snapshot(), {"a": torch.arange(4.0), "b": [torch.ones(2, 2), 3, "x"]}
    first = snapshot.take(tree)
    tree["a"] += 1
    assert torch.equal(first["a"], torch.arange(4.0)) and first["b"][1:] == [3, "x"]
    second = snapshot.take(tree)
    reserved = Snapshot()
    reserved.reserve(tree)
    assert reserved.take(tree)["a"].data_ptr() == reserved._buffers[0].data_ptr() and torch.equal(reserved._buffers[0], tree["a"])
    assert second["a"].data_ptr() == first["a"].data_ptr() and torch.equal(second["a"], tree["a"])
    assert snapshot.take(tree, keep=False)["a"] is None


def test_a_run_that_is_stopped_leaves_when_its_checkpoint_is_whole(
    fresh_accelerate, store_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # type: ignore[no-untyped-def]
) -> None:
    slowed(monkeypatch, 0.5)
    training = Training(Config.model_validate(merged(store_config, model_output_dir=str(tmp_path), max_train_steps=5)))
    monkeypatch.setattr(Training, "must_stop", lambda self: self.step == 2)
    assert train(training) == 75
    checkpoint.check(tmp_path / "checkpoint-2")
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["step"] == 2
    assert load_file(tmp_path / "checkpoint-2" / LORA_FILE)
