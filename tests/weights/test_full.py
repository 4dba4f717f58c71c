"""Full fine-tuning and the average of the weights."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import REPO, merged, write_config
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file
from torch import nn

from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.export import export, find_trained
from OpenSciDraw.training.run import Training
from OpenSciDraw.utils.tensor_files import TensorReader
from OpenSciDraw.weights import files as weight_files
from OpenSciDraw.weights.average import WeightAverage

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
FULL = {"use_lora": False, "learning_rate": 1e-4}
EMA = {"use_ema": True, "ema_steps": 1, "ema_decay": 0.7}


@pytest.fixture
def run(run):  # type: ignore[no-untyped-def]
    """Fine-tune all weights on the session's store; returns the run, after its end."""
    return lambda **changes: run(**(FULL | changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_every_weight_trains_in_fp32_also_under_bf16_and_from_pretrained_reads_it(run, tiny_folder, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    training = run(mixed_precision="bf16", model_output_dir=str(tmp_path), checkpointing_steps=4)
    base = load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    masters, final = weights(tmp_path / "checkpoint-4"), weights(tmp_path)
    assert masters.keys() == final.keys() == base.keys()
    still = [name for name in base if torch.equal(masters[name], base[name])]
    assert not still
    assert {t.dtype for t in masters.values()} == {torch.float32} and {t.dtype for t in final.values()} == {torch.bfloat16}
    for folder, dtype in ((tmp_path / "checkpoint-4", torch.float32), (tmp_path, torch.bfloat16)):
        again = Flux2Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype).state_dict()
        own = training.model.transformer.state_dict()
        assert all(torch.equal(again[name], own[name].to(dtype)) for name in own)


def test_upcast_before_saving_keeps_fp32(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run(mixed_precision="bf16", model_output_dir=str(tmp_path), upcast_before_saving=True, max_train_steps=1)
    assert {t.dtype for t in weights(tmp_path).values()} == {torch.float32}


def test_large_weights_become_several_files_with_an_index(run, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(weight_files, "FILE_BYTES", 2_000_000)
    out = {"model_output_dir": str(tmp_path), "checkpointing_steps": 2}
    training = run(**out, max_train_steps=2)
    files = sorted(path.name for path in (tmp_path / "transformer").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "transformer" / name).stat().st_size < 2_500_000 for name in files)
    own = training.model.transformer.state_dict()
    again = Flux2Transformer2DModel.from_pretrained(tmp_path / "transformer").state_dict()
    assert all(torch.equal(again[name], own[name]) for name in own)
    run(**out, max_train_steps=3, resume_from_checkpoint="latest")  # its optimizer state lies in several files too
    assert len(list((tmp_path / "checkpoint-2").glob("optimizer-*"))) > 2


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(UserError, match="must lie in its own folder"):
        TensorReader(tmp_path, "x")


def test_resume_is_bitwise_with_average_and_accumulation(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    options = {
        **EMA, "gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "max_train_steps": 4, "mixed_precision": "bf16",
        "checkpointing_steps": 2,
    }  # fmt: skip
    run(**options, model_output_dir=str(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "must_stop", lambda self: self.step == 2)
        with pytest.raises(AssertionError):  # exit code 75
            run(**options, model_output_dir=str(tmp_path / "parts"))
    run(**options, model_output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest")
    full = "transformer/diffusion_pytorch_model.safetensors"
    for name in (full, f"ema/{full}", "optimizer.safetensors"):
        a, b = (load_file(tmp_path / kind / "checkpoint-4" / name) for kind in ("whole", "parts"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


def test_a_checkpoint_without_an_average_cannot_resume_one(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = {"model_output_dir": str(tmp_path), "checkpointing_steps": 2}
    run(**out, max_train_steps=2)
    with pytest.raises(UserError, match="use_ema = False there, True now"):
        run(**out, **EMA, max_train_steps=4, resume_from_checkpoint="latest")


def test_a_full_checkpoint_of_another_model_is_refused(run, store_config, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    other = tmp_path / "other"
    small = Flux2Transformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=32, axes_dims_rope=(8, 8, 8, 8),
        joint_attention_dim=64,
    )  # fmt: skip
    small.save_pretrained(other / "transformer")
    with pytest.raises(UserError, match="does not fit what this config trains"):
        run(model_output_dir=str(tmp_path / "run"), pretrained_full_ckpt_path=str(other))


# -- the average ------------------------------------------------------------------------------
def by_hand(values: list[float], decay: float, start: int) -> float:
    """The average after len(values) steps, from a weight that was `values[0]` before the first."""
    average = values[0]
    for step, value in enumerate(values[1:], 1):
        n = step - start
        d = 0.0 if n <= 0 else min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * value
    return average


@pytest.mark.parametrize("start", [0, 3])
def test_the_average_is_the_one_written_by_hand(start: int) -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage({"w": weight}, decay=0.9, every=1, start=start)
    values = [1.0]
    for step in range(1, 120):
        with torch.no_grad():
            weight.add_(0.1 * step)
        values.append(weight.item())
        average.update(step)
    assert average.tensors["w"].item() == pytest.approx(by_hand(values, 0.9, start), rel=1e-5)


def test_updates_every_k_steps_use_the_product_of_the_decays() -> None:
    weight = nn.Parameter(torch.tensor([0.0]))
    often, rarely = (WeightAverage({"w": weight}, decay=0.99, every=k, start=0) for k in (1, 5))
    for step in range(1, 51):  # the weight moves where both look, so both averages must agree
        if step % 5 == 1:
            with torch.no_grad():
                weight.add_(1.0)
        often.update(step)
        rarely.update(step)
    assert rarely.tensors["w"].item() == pytest.approx(often.tensors["w"].item(), rel=1e-5)


def test_a_bf16_weights_average_is_fp32_and_the_weights_come_back_to_the_bit() -> None:
    weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    average = WeightAverage({"w": weight}, decay=0.9999, every=1, start=-100_000)  # past the ramp
    with torch.no_grad():
        weight.fill_(1.125)
    for step in range(1, 11):  # each moves the average by 1e-4 of the distance: lost in bf16
        average.update(step)
    assert average.tensors["w"].dtype == torch.float32
    assert average.tensors["w"][0].item() == pytest.approx(1 + 0.125 * (1 - 0.9999**10), abs=1e-6)
    held = weight.detach().clone()
    with average.applied():
        assert not torch.equal(weight, held)
    assert torch.equal(weight, held)


@pytest.mark.slow
def test_validation_uses_the_average_by_choice(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import json

    def held_out(name: str, **changes) -> float:  # type: ignore[no-untyped-def]
        run(model_output_dir=str(tmp_path / name), learning_rate=1e-3, **changes)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line["held_out_loss"] for line in lines if "held_out_loss" in line][-1]

    plain = held_out("plain")
    assert held_out("average", **EMA) != plain
    assert held_out("last", **EMA, validate_with_ema=False) == plain


@pytest.mark.parametrize("lora", [False, True])
def test_the_average_is_exported_and_drawn(run, lora: bool, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.inference.sample import main

    training = run(**EMA, use_lora=lora, learning_rate=1e-3, model_output_dir=str(tmp_path / "run"))
    assert training.average is not None
    paths = {ema: export(str(tmp_path / "run"), tmp_path / f"out{ema}", ("diffusers",), "fp32", ema)[0] for ema in (False, True)}
    for ema, source in ((False, training.parameters), (True, training.average.tensors)):
        file = paths[ema] if lora else paths[ema] / "diffusion_pytorch_model.safetensors"
        saved = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
        for name, tensor in source.items():
            assert torch.equal(saved[name.replace(".default.", ".")], tensor.detach()), name
    common = {"image": [], "lora": [], "base": None, "run": str(tmp_path / "run"), "prompt": ["a box"], "negative_prompt": None,
              "width": 64, "height": 64, "steps": 2, "guidance": None, "seed": 0, "num": 1, "out": None}  # fmt: skip
    assert main(Namespace(**common, ema=False)) == 0 and main(Namespace(**common, ema=True)) == 0
    own, average = (tmp_path / "run" / "samples" / part / "00_seed0.png" for part in (".", "ema"))
    assert own.read_bytes() != average.read_bytes()


def test_a_full_run_draws_what_its_exported_transformer_draws(run, tiny_folder, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import numpy as np
    from diffusers import Flux2KleinPipeline
    from PIL import Image

    run(model_output_dir=str(tmp_path / "run"), learning_rate=1e-3, validation_prompts=["a red box"], resolution_list=[[64, 64]])
    folder, file = export(str(tmp_path / "run"), None, ("diffusers", "comfyui"), None)
    assert file.name.endswith("_comfyui.safetensors")
    pipe = Flux2KleinPipeline.from_pretrained(tiny_folder, transformer=Flux2Transformer2DModel.from_pretrained(folder))
    pipe.set_progress_bar_config(disable=True)
    image = pipe(prompt="a red box", width=64, height=64, num_inference_steps=2, guidance_scale=1.0, max_sequence_length=64,
                 generator=torch.Generator("cpu").manual_seed(42)).images[0]  # fmt: skip
    shown = Image.open(tmp_path / "run" / "validation_images" / "step_000004" / "00.png")
    assert np.abs(np.asarray(image).astype(int) - np.asarray(shown).astype(int)).max() <= 1


def test_weights_are_found_in_a_run_a_checkpoint_and_a_folder(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run(model_output_dir=str(tmp_path), checkpointing_steps=2)
    for target in (tmp_path, tmp_path / "transformer", tmp_path / "checkpoint-2", tmp_path / "checkpoint-2" / "transformer"):
        trained = find_trained(str(target))
        assert trained.run == tmp_path and not trained.is_lora and trained.path.name == "transformer"
    assert find_trained(str(tmp_path / "checkpoint-2")).output_folder("export") == tmp_path / "export" / "checkpoint-2"
    with pytest.raises(UserError, match="was use_ema set"):
        find_trained(str(tmp_path), ema=True)


@pytest.mark.slow
def test_the_entry_of_earlier_scripts_trains_all_weights_whatever_the_config_leaves_out(store_config: dict, tmp_path: Path) -> None:
    values = merged(store_config, model_output_dir=str(tmp_path / "run"), max_train_steps=1, lora_layers=None)
    config = write_config(tmp_path / "c.py", values)
    command = [sys.executable, "train_OpenSciDraw_fulltune.py", str(config)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "all weights" in done.stderr, done.stderr[-2000:]
    assert (tmp_path / "run" / "transformer" / "config.json").is_file()
