"""One config on one process and on two: DDP and FSDP2 on gloo, through the launchers that users run.

Two processes sum gradients in another order than one: losses agree to 1e-4, weights as `assert_close` says (AdamW turns
rounding of an almost zero gradient into a step).
"""

from __future__ import annotations

import json
import os
import re
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
from OpenSciDraw.parallel.sharding import take_request
from OpenSciDraw.training.run import Training
from train_OpenSciDraw_loop import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what `accelerate launch` sets from 1m8g_fsdp2.yaml
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}  # from 1m8g_zero2.yaml
WAYS = {"DDP": {}, "FSDP2": FSDP2, "ZeRO-2": ZERO, "ZeRO-3": {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launch(config: Path, environment: dict[str, str], **options) -> subprocess.Popen:  # type: ignore[no-untyped-def]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [*LAUNCH, str(REPO / "train_OpenSciDraw_loop.py"), str(config)]
    return subprocess.Popen(command, cwd=REPO, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **options)


def finish(process: subprocess.Popen) -> str:
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said[-4000:]
    return said


def curve(folder: Path, key: str = "train_loss") -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def trained(folder: Path, lora: bool) -> dict[str, torch.Tensor]:
    return load_file(folder / ("pytorch_lora_weights.safetensors" if lora else "transformer/diffusion_pytorch_model.safetensors"))


def assert_close(a: Path, b: Path, lora: bool) -> None:
    """Weights: hardly any differs by more than a hundredth of a step of AdamW (the rate), none by more than two."""
    left, right = trained(a, lora), trained(b, lora)
    assert left.keys() == right.keys()
    for name in left:
        apart = (left[name] - right[name]).abs()
        assert (apart > 0.01 * RATE).float().mean() < 0.01 and apart.max() < 2 * RATE, name


RATE = 1e-3
SHARED = {
    "train_batch_size": 2, "data_sampler": {"drop_last": True}, "max_train_steps": 4, "checkpointing_steps": 2,
    "learning_rate": RATE, "adam_epsilon": 1e-4, "use_ema": True, "ema_steps": 1, "validate_with_ema": False,
    "caption_dropout": 0.5,
    "validation_prompts": ["a", "b", "c"], "resolution_list": [[64, 64]], "held_out_examples": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def square_store(tmp_path_factory) -> dict:  # type: ignore[no-untyped-def]
    """Square figures: one bucket, so that batches of 2 x 2 and of 4 hold the same rows."""
    from conftest import BASE

    from OpenSciDraw.drawn.figure import draw_figure
    from OpenSciDraw.encode import run as encode

    figures, store = tmp_path_factory.mktemp("figures"), tmp_path_factory.mktemp("store")
    for index in range(23):
        drawn = draw_figure(0, index, 128)
        drawn.image.resize((128, 128)).save(figures / f"{index:02d}.png")
        (figures / f"{index:02d}.txt").write_text(drawn.caption)
    values = {
        **BASE,
        "dataset": {"type": "ArXiVParquetDatasetV2", "base_dir": str(store), "parquet_base_path": "store"},
        "encode": {"figures": str(figures), "resolution": 128, "num_workers": 0, "batch_size": 8},
    }
    assert encode.main(Config.model_validate(values)) == 0
    return merged(values, **SHARED)


@pytest.fixture(scope="module")
def single(square_store, tmp_path_factory):  # type: ignore[no-untyped-def]
    """Runs of one process with the batch of both, LoRA and full."""
    from accelerate.state import AcceleratorState, GradientState

    folders = {}
    for lora in (True, False):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        folders[lora] = tmp_path_factory.mktemp("single")
        values = merged(square_store, train_batch_size=4, use_lora=lora, model_output_dir=str(folders[lora]))
        assert train(Training(Config.model_validate(values))) == 0
    return folders


@pytest.mark.parametrize(
    ("way", "lora"),  # with every change: a sharded LoRA, and all weights on each rank
    [
        pytest.param(way, lora, marks=[] if (way, lora) in {("FSDP2", True), ("DDP", False)} else [pytest.mark.slow])
        for way in WAYS
        for lora in (True, False)
    ],
)
def test_two_processes_train_as_one(way: str, lora: bool, square_store, single, tmp_path: Path, fresh_accelerate) -> None:  # type: ignore[no-untyped-def]
    """The same curve, weights, average and held-out loss; then the checkpoint of two goes on in one, and in two."""
    zero = way.startswith("ZeRO")
    if zero:
        pytest.importorskip("deepspeed")
    out, environment = tmp_path / "two", WAYS[way]
    values = merged(square_store, use_lora=lora, use_ema=not zero, model_output_dir=str(out))
    said = finish(launch(write_config(tmp_path / "c.py", values), environment))
    assert f"effective batch 4 = 2 a rank x 1 accumulated x 2 rank(s) ({way})" in said
    for key in ("train_loss", "held_out_loss"):
        assert curve(out, key) == pytest.approx(curve(single[lora], key), rel=1e-4)
    assert_close(single[lora], out, lora)
    if not zero:
        assert_close(single[lora] / "ema", out / "ema", lora)
    assert len(list((out / "validation_images" / "step_000004").glob("0*.png"))) == 3

    (out / "checkpoint-4").rename(tmp_path / "whole")  # go on from step 2
    resumed = merged(values, resume_from_checkpoint="latest")
    if way != "DDP":
        finish(launch(write_config(tmp_path / "again.py", resumed), environment))
        whole, parts = (load_file(folder / "optimizer.safetensors") for folder in (tmp_path / "whole", out / "checkpoint-4"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole)  # two -> two: to the bit
        (out / "checkpoint-4").rename(tmp_path / "parts")
    fresh_accelerate()
    assert train(Training(Config.model_validate(merged(resumed, train_batch_size=4)))) == 0  # two -> one
    assert curve(out)[-2:] == pytest.approx(curve(single[lora])[-2:], rel=1e-4)
    assert_close(single[lora], out, lora)


@pytest.mark.slow
def test_bf16_is_sharded_too_with_fp32_weights(square_store, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "run"
    values = merged(
        square_store, use_lora=False, mixed_precision="bf16", gradient_accumulation_steps=2, gradient_checkpointing=True,
        max_train_steps=2, model_output_dir=str(out),
    )  # fmt: skip
    finish(launch(write_config(tmp_path / "c.py", values), FSDP2))
    assert {t.dtype for t in trained(out / "checkpoint-2", lora=False).values()} == {torch.float32}
    assert {t.dtype for t in trained(out, lora=False).values()} == {torch.bfloat16}


def test_a_killed_rank_ends_the_job_and_the_last_checkpoint_goes_on(square_store, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "run"
    values = merged(square_store, max_train_steps=500, checkpointing_steps=1, checkpoints_total_limit=2, model_output_dir=str(out),
                    validation_prompts=[], resume_from_checkpoint="latest")  # fmt: skip
    config = write_config(tmp_path / "c.py", values)
    process = launch(config, {"PYTHONUNBUFFERED": "1"})
    end = time.monotonic() + 120
    while not (out / "checkpoint-2").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed < 45 and "Signal 9" in said
    done = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    finish(launch(write_config(tmp_path / "c.py", merged(values, max_train_steps=done + 2)), {}))
    assert (out / f"checkpoint-{done + 2}").exists()


def test_ranks_see_disjoint_rows_other_noise_and_other_noise_levels(square_store, fresh_accelerate, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw import flow
    from OpenSciDraw.datasets.mix_scale_sampler import ArXiVMixScaleBatchSampler

    fresh_accelerate()
    run = Training(Config.model_validate(merged(square_store, model_output_dir=str(tmp_path))))
    ranks = [
        list(ArXiVMixScaleBatchSampler(run.sampler.bucket_of, rows=run.sampler.rows, batch_size=2, num_replicas=2, rank=r, seed=42))
        for r in (0, 1)
    ]
    assert not set(sum(ranks[0], [])) & set(sum(ranks[1], []))
    step = next(at for at, pair in enumerate(zip(*ranks, strict=True)) if len(pair[0]) == len(pair[1]) == 2)
    levels, noises = [], []
    for rank in (0, 1):
        ids = [run.dataset.rows.sample_id(row) for row in ranks[rank][step]]
        levels.append(flow.stratified_quantiles(42, 0, ids, 2 * rank, 4))
        noises.append(flow.keyed_noise(42, 0, ids, (2, 2)))
    assert not torch.isclose(levels[0], levels[1]).any()
    assert sorted((torch.cat(levels) * 4).long().tolist()) == [0, 1, 2, 3]  # a stratum for each sample of both ranks
    assert not torch.equal(noises[0], noises[1])


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 2"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "gradient_checkpointing"),
    ],
)
def test_an_accelerate_file_that_asks_for_what_is_not_here_is_refused(environment, said: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        take_request()


def test_fsdp2_with_fp16_is_refused_by_name(square_store, monkeypatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name, value in {**FSDP2, "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="does not go with mixed_precision = 'fp16'"):
        Training(Config.model_validate(merged(square_store, mixed_precision="fp16", model_output_dir=str(tmp_path))))


ACCELERATE_FILES = sorted(path for path in (REPO / "accelerate_cfg").glob("*.yaml") if not path.is_symlink())


@pytest.mark.parametrize("file", ACCELERATE_FILES, ids=lambda path: path.stem)
def test_accelerates_own_launcher_reads_each_file(file: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """What `accelerate launch --config_file` would start: processes, machines, way of spreading."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    given = launch_command_parser().parse_args(["--config_file", str(file), "train_OpenSciDraw_loop.py", "c.py"])
    arguments, _, _ = _validate_launch_command(given)
    machines, gpus = (int(number) for number in re.fullmatch(r"(\d+)m(\d+)g.*", file.stem).groups())  # type: ignore[union-attr]
    assert (int(arguments.num_machines), int(arguments.num_processes)) == (machines, machines * gpus)
    precision = re.search("bf16|fp16", file.stem)
    assert str(arguments.mixed_precision) == (precision[0] if precision else "no" if gpus == 1 else "bf16")
    if "zero" in file.stem:
        assert arguments.use_deepspeed
        return
    environment = prepare_simple_launcher_cmd_env(arguments)[1] if gpus == 1 else prepare_multi_gpu_env(arguments)
    for name in ("ACCELERATE_USE_FSDP", *(name for name in environment if name.startswith("FSDP_"))):
        if name in environment:
            monkeypatch.setenv(name, environment[name])
    monkeypatch.setenv("WORLD_SIZE", str(machines * gpus))
    assert (take_request() is not None) == ("fsdp2" in file.stem)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_fp16_without_a_gpu_is_refused_not_run_without_autocast(square_store, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for use_lora in (True, False):
        with pytest.raises(UserError, match="mixed_precision = 'fp16' needs a GPU"):
            keys = dict(mixed_precision="fp16", use_lora=use_lora, model_output_dir=str(tmp_path))
            Training(Config.model_validate(merged(square_store, **keys)))


def test_the_config_wins_over_accelerates_file(square_store, fresh_accelerate, monkeypatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The launcher's environment asks for other accumulation and precision: what runs is the config's, and is printed."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    fresh_accelerate()
    run = Training(Config.model_validate(merged(square_store, gradient_accumulation_steps=2, model_output_dir=str(tmp_path))))
    assert run.accelerator.gradient_accumulation_steps == 2 and run.accelerator.mixed_precision == "no"
    assert run.effective_batch == 4
