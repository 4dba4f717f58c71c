"""The loop: exact resume, crashes, signals, precision, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO, merged, write_config
from safetensors.torch import load_file

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.training import checkpoint
from OpenSciDraw.training.run import EXIT_PREEMPTED, Training
from OpenSciDraw.weights.files import list_checkpoints

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def losses(folder: Path) -> dict[int, dict]:
    """Metrics by step: the last line of a step counts, as after a crash and resume."""
    out: dict[int, dict] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "loss" in values:
            out[values["step"]] = values
    return out


def assert_same_run(a: Path, b: Path, step: int) -> None:
    """Weights, optimizer state and losses of two runs, bit for bit."""
    for name in ("pytorch_lora_weights.safetensors", "optimizer.safetensors"):
        left, right = load_file(a / f"checkpoint-{step}" / name), load_file(b / f"checkpoint-{step}" / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name
    left_log, right_log = losses(a), losses(b)
    assert left_log.keys() == right_log.keys()
    for at in left_log:
        for key in ("loss", "train_loss", "lr", "grad_norm"):
            assert left_log[at][key] == right_log[at][key], (at, key)


EXACT = {
    "gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "lora_dropout": 0.1, "lr_scheduler": "cosine",
    "checkpointing_steps": 3, "max_train_steps": 6,
}  # fmt: skip


def test_2n_steps_equal_n_steps_resume_and_n_steps_bit_for_bit(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run(**EXACT, model_output_dir=str(tmp_path / "whole"))
    half = run(**EXACT, model_output_dir=str(tmp_path / "parts"))
    # take the end away: what is left is a run that stopped after step 3
    import shutil

    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    assert half.step == 6
    resumed = run(**EXACT, model_output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest")
    assert resumed.resume_from is not None and resumed.resume_from.name == "checkpoint-3"
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 6)


def start(config: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPO / "train_OpenSciDraw_loop.py"), str(config)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=REPO)


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.0005)


@pytest.mark.slow
def test_kill_9_between_saves_and_during_a_save_loses_nothing(run, store_config, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    values = merged(store_config, **EXACT, resume_from_checkpoint="latest")
    run(**EXACT, model_output_dir=str(tmp_path / "whole"))
    out = tmp_path / "killed"
    config = write_config(tmp_path / "c.py", merged(values, model_output_dir=str(out)))

    process = start(config)
    wait_for(lambda: (out / ".checkpoint-3.tmp").exists() or (out / "checkpoint-3").exists(), process)
    process.kill()  # during the first save
    process.wait()
    process = start(config)
    wait_for(lambda: 4 in losses(out) if (out / "metrics.jsonl").exists() else False, process)
    process.kill()  # between saves
    process.wait()
    process = start(config)
    assert process.wait() == 0, process.stderr.read()
    assert_same_run(tmp_path / "whole", out, 6)


def test_sigterm_saves_one_checkpoint_and_leaves_with_its_own_code(store_config, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "run"
    config = write_config(tmp_path / "c.py", merged(store_config, model_output_dir=str(out), max_train_steps=5000))
    process = start(config)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(losses(out)) > 1, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_PREEMPTED
    saved = list_checkpoints(out)
    assert len(saved) == 1
    checkpoint.check(saved[0])
    assert int(saved[0].name.split("-")[1]) == max(losses(out))


def test_a_damaged_latest_is_named_and_the_one_before_is_used(run, tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "run"
    run(model_output_dir=str(out), checkpointing_steps=2)
    weights = out / "checkpoint-4" / "pytorch_lora_weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    found = checkpoint.find_checkpoint(out, "latest")
    assert found is not None and found.name == "checkpoint-2"
    assert "checkpoint-4/pytorch_lora_weights.safetensors" in caplog.text
    with pytest.raises(UserError, match="damaged"):
        checkpoint.find_checkpoint(out, "checkpoint-4")
    resumed = run(model_output_dir=str(out), checkpointing_steps=2, resume_from_checkpoint="latest")
    assert resumed.step == 4
    checkpoint.check(out / "checkpoint-4")  # written anew


def test_a_checkpoint_that_does_not_exist_is_an_error(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="checkpoint-5000.*There: none"):
        run(model_output_dir=str(tmp_path), resume_from_checkpoint="checkpoint-5000")


def test_a_folder_with_checkpoints_is_not_started_over(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run(model_output_dir=str(tmp_path))
    with pytest.raises(UserError, match="resume_from_checkpoint = 'latest'"):
        run(model_output_dir=str(tmp_path))


def test_old_checkpoints_go_within_the_limit(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run(model_output_dir=str(tmp_path), checkpointing_steps=1, checkpoints_total_limit=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_the_base_stays_frozen_and_the_adapter_learns_in_fp32_also_under_bf16(run, tmp_path: Path, tiny) -> None:  # type: ignore[no-untyped-def]
    training = run(model_output_dir=str(tmp_path), mixed_precision="bf16", gradient_checkpointing=True)
    transformer = training.accelerator.unwrap_model(training.model.transformer)
    own = {k.replace(".base_layer", ""): v for k, v in transformer.state_dict().items() if "lora_" not in k}
    for name, value in tiny.transformer.state_dict().items():
        assert own[name].dtype == torch.bfloat16 and torch.equal(own[name], value.to(torch.bfloat16)), name
    assert {p.dtype for p in training.parameters.values()} == {torch.float32}
    moments = [t for s in training.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    assert {t.dtype for t in moments} == {torch.float32}
    assert all(0 < values["loss"] < 10 for values in losses(tmp_path).values())


def test_lora_a_is_the_same_for_the_same_seed_and_gradients_move_b(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run(model_output_dir=str(tmp_path))
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(v.abs().sum() > 0 for v in saved.values()) and {v.dtype for v in saved.values()} == {torch.float32}


def test_gradient_accumulation_takes_the_mean_over_micro_steps(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    training = run(model_output_dir=str(tmp_path), gradient_accumulation_steps=3, max_train_steps=2)
    assert training.micro_step == 6 and training.effective_batch == 6
    assert set(losses(tmp_path)) == {1, 2}


def test_prodigy_logs_its_effective_rate(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    training = run(model_output_dir=str(tmp_path), optimizer="prodigy", learning_rate=0.5, max_train_steps=3)
    group = training.optimizer.param_groups[0]
    assert losses(tmp_path)[3]["lr"] == group["d"] * 0.5 and group["lr"] == 0.5


def test_metrics_hold_what_the_readme_promises(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run(model_output_dir=str(tmp_path), report_to="tensorboard", validation_steps=2)
    values = losses(tmp_path)[4]
    assert {"loss", "train_loss", "lr", "grad_norm", "images_per_second", "data_wait_share", "memory_gb"} <= values.keys()
    assert any(key.startswith("loss_sigma_") for key in values)
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert len(held_out) == 3  # before the first step, at 2, at 4


def test_caption_dropout_uses_the_encoded_empty_prompt(run, store_config, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """With dropout 1 every row sees the empty prompt: the captions' embeddings make no difference at all."""
    from OpenSciDraw.train_iteration_funcs.flow_matching import Place, flow_matching_loss

    training = run(model_output_dir=str(tmp_path))
    config = Config.model_validate(merged(store_config, caption_dropout=1.0))
    batch = training.dataset.batch(training.sampler.rows[:1].tolist())
    place = Place(0, 0, 0, 1)
    loss = flow_matching_loss(training.model, batch, place, config, training.empty_text).loss
    from dataclasses import replace

    same = replace(batch, text=[training.empty_text] * len(batch.text))
    kept = Config.model_validate(merged(store_config, caption_dropout=0.0))
    assert torch.equal(loss, flow_matching_loss(training.model, same, place, kept, training.empty_text).loss)
    assert not torch.equal(loss, flow_matching_loss(training.model, batch, place, kept, training.empty_text).loss)
    assert training.empty_text.abs().sum() > 0


def test_text_online_trains_as_text_stored(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The same captions through the text encoder instead of the store: losses agree to bf16 storage."""
    run(model_output_dir=str(tmp_path / "stored"))
    run(model_output_dir=str(tmp_path / "online"), text="online")
    stored, online = losses(tmp_path / "stored"), losses(tmp_path / "online")
    for step in stored:
        assert online[step]["loss"] == pytest.approx(stored[step]["loss"], rel=2e-2)


def test_figures_train_without_any_store(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = {"type": "FigureDataset", "figures": "drawn:20", "resolution": 128, "base_dir": ".", "parquet_base_path": ""}
    training = run(model_output_dir=str(tmp_path), dataset=data, text="online", held_out_examples=1)
    assert training.objective.__name__ == "flow_matching_loss"
    assert all(values["loss"] > 0 for values in losses(tmp_path).values())


def test_a_store_of_another_encoder_is_refused_before_the_transformer_loads(run, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.models.flux2_klein import Flux2Klein

    def loading(self) -> None:  # type: ignore[no-untyped-def]
        raise AssertionError("the transformer was loaded")

    monkeypatch.setattr(Flux2Klein, "load_transformer", loading)
    with pytest.raises(UserError, match="max_sequence_length: 65 here, 64 there"):
        run(model_output_dir=str(tmp_path), max_sequence_length=65)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_step_and_rows(run, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw import flow

    exact = flow.velocity_target
    calls = []

    def poisoned(clean, noise):  # type: ignore[no-untyped-def]
        calls.append(1)
        return exact(clean, noise) * (float("nan") if len(calls) > 12 else 1.0)

    monkeypatch.setattr(flow, "velocity_target", poisoned)
    with pytest.raises(FloatingPointError, match=r"at step 2.*drawn-0-\d+"):
        run(model_output_dir=str(tmp_path), checkpointing_steps=1)
    saved = load_file(tmp_path / "checkpoint-2" / "pytorch_lora_weights.safetensors")
    assert all(torch.isfinite(v).all() for v in saved.values())


def test_too_many_unreadable_rows_stop_the_run(run, store_config, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(Path(store_config["dataset"]["base_dir"]), copy)
    for shard in sorted((copy / "store" / "figures").glob("*.parquet"))[:2]:
        data = bytearray(shard.read_bytes())
        data[: len(data) // 3] = bytes(len(data) // 3)
        shard.write_bytes(data)
    with pytest.raises(UserError, match="max_bad_rows_fraction"):
        run(model_output_dir=str(tmp_path / "run"), dataset={"base_dir": str(copy)}, max_train_steps=50)
    named = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert named and all("checksum" in row["reason"] and row["id"].startswith("drawn-") for row in named)


def test_the_effective_batch_is_the_configs_whatever_accelerates_environment_says(run, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    training = run(model_output_dir=str(tmp_path), max_train_steps=2)
    assert training.micro_step == 2 and training.accelerator.mixed_precision == "no"


def test_a_failed_upload_keeps_the_adapter_and_never_shows_the_token(run, tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    """No network here (HF_HUB_OFFLINE): the run ends well, the file is there, the log names it."""
    run(model_output_dir=str(tmp_path), push_to_hub=True, hub_model_id="owner/name", hub_token="hf_secret_value")
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()
    assert "was not uploaded" in caplog.text and "hf_secret_value" not in caplog.text
    assert "hf_secret_value" not in (tmp_path / "config.py").read_text()


def test_the_limit_that_is_set_ends_training_and_of_two_the_first(run, store_config, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def total(**given) -> int:  # type: ignore[no-untyped-def]
        values = {k: v for k, v in store_config.items() if k not in ("max_train_steps", "num_train_epochs")}
        config = Config.model_validate({**values, **given, "model_output_dir": str(tmp_path)})
        reset = Config.model_validate(config.model_dump())  # a saved config means the same
        assert (reset.max_train_steps, reset.num_train_epochs) == (config.max_train_steps, config.num_train_epochs)
        return Training(config).total_steps

    assert total(max_train_steps=1000) == 1000
    per_epoch = total(num_train_epochs=1)
    assert total(num_train_epochs=3) == 3 * per_epoch and 19 <= per_epoch <= 38
    assert total(num_train_epochs=3, max_train_steps=5) == 5
    with pytest.raises(ValueError, match="never end"):
        total(num_train_epochs=None, max_train_steps=None)


@pytest.mark.slow
def test_two_processes_share_the_work_and_keep_one_log(store_config, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """torchrun on gloo: disjoint data, the sum of both ranks in the effective batch, pictures shared out."""
    out = tmp_path / "run"
    values = merged(
        store_config, model_output_dir=str(out), validation_prompts=["a", "b", "c"], resolution_list=[[64, 64]],
        max_train_steps=3, checkpointing_steps=3,
    )  # fmt: skip
    config = write_config(tmp_path / "c.py", values)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(REPO / "train_OpenSciDraw_loop.py"), str(config)], capture_output=True, text=True, cwd=REPO, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "effective batch 4 = 2 a rank x 1 accumulated x 2 rank(s)" in done.stderr
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines() if "train_loss" in line]
    assert steps == [1, 2, 3]
    assert len(list((out / "validation_images" / "step_000003").glob("0*.png"))) == 3
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["effective_batch"] == 4 and state["sampler"]["parts"] == [[2, 2, 3]]


def test_online_encoding_is_the_same_inside_autocast_as_in_encode(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Encoders must not run in the training step's bf16 autocast: they would feed what no store holds."""
    from dataclasses import replace

    from OpenSciDraw.train_iteration_funcs.flow_matching import Place, flow_matching_loss

    training = run(model_output_dir=str(tmp_path), text="online", mixed_precision="bf16", max_train_steps=1)
    model, config = training.model, training.config
    batch = training.dataset.batch(training.sampler.rows[:1].tolist())
    pixels = model.decode(model.normalize(batch.latents)).clamp(-1, 1)
    bare = replace(batch, latents=None, pixels=pixels)
    encoded = replace(batch, latents=model.encode_images(pixels), text=model.encode_prompts(batch.captions))
    losses = []
    for one in (bare, encoded):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(flow_matching_loss(model, one, Place(0, 0, 0, 1), config, training.empty_text).loss)
    assert torch.equal(*losses)


def test_gradients_that_are_not_finite_stop_before_the_step(run, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from accelerate import Accelerator

    exact = Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda self, p, n: exact(self, p, n) * float("inf"))
    with pytest.raises(FloatingPointError, match="Gradient norm is inf at step 0"):
        run(model_output_dir=str(tmp_path))
    assert not list_checkpoints(tmp_path)


def test_a_held_out_row_that_cannot_be_read_is_named_and_no_other_stands_in(run, tmp_path: Path, monkeypatch, caplog) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.datasets.batch import BadRow
    from OpenSciDraw.validation_funcs.held_out_loss import held_out_loss

    training = run(model_output_dir=str(tmp_path))
    dataset, first = training.dataset, training.held_out[0]
    wanted = held_out_loss(training.model, dataset, training.held_out[1:], training.config, training.accelerator)
    read = dataset.read
    monkeypatch.setattr(dataset, "read", lambda row: BadRow("lost", "gone") if row == first else read(row))
    left = held_out_loss(training.model, dataset, training.held_out, training.config, training.accelerator)
    assert left == wanted and "held-out row lost cannot be read: gone" in caplog.text


@pytest.mark.parametrize("error", ["safetensors", "system"])
def test_a_full_disk_names_the_checkpoint_and_keeps_the_earlier_ones(run, error: str, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """What both raise was taken from a real full disk of 3 MB."""
    import errno

    from safetensors import SafetensorError

    exact = Training._save_weights
    full = {
        "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "system": OSError(errno.ENOSPC, "No space left on device"),
    }[error]

    def fails_at_two(self, folder: Path, *options) -> None:  # type: ignore[no-untyped-def]
        if folder.name == ".checkpoint-2.tmp":
            raise full
        exact(self, folder, *options)

    monkeypatch.setattr(Training, "_save_weights", fails_at_two)
    with pytest.raises(UserError, match="disk is full.*checkpoint-2"):
        run(model_output_dir=str(tmp_path), checkpointing_steps=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    checkpoint.check(tmp_path / "checkpoint-1")
    assert not list(tmp_path.glob(".checkpoint*"))


def test_a_full_disk_at_the_end_says_where_the_weights_are(run, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import errno

    def full(self, folder: Path, *options) -> None:  # type: ignore[no-untyped-def]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Training, "save_checkpoint", lambda self: None)
    monkeypatch.setattr(Training, "_save_weights", full)
    with pytest.raises(UserError, match="disk is full"):
        run(model_output_dir=str(tmp_path))

