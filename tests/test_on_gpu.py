"""What training does on a GPU as on a CPU, at small width: the same bodies run on both.

On the CPU they run with all other tests; `pytest --device cuda` (or `make gpu PART=tests`) runs them on the card, and where there
is one the last test of this file does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO, VISIBLE, VISIBLE_BEFORE
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from OpenSciDraw.figures.buckets import best_bucket, fit
from OpenSciDraw.figures.listing import list_figures, load_figure
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.models.flux2_klein import Flux2Klein
from OpenSciDraw.models.qwen_image import QwenImage
from OpenSciDraw.models.source import ModelSource
from OpenSciDraw.store.encoded import EncodedStore
from OpenSciDraw.training.optimizers.prodigy import Prodigy

sys.path.insert(0, str(REPO / "benchmarks" / "gpu"))

from suite_process import time_limit  # noqa: E402

ADAPTER = "pytorch_lora_weights.safetensors"
EXACT = {"deterministic": True, "mixed_precision": "bf16"}
RECOMPUTED = {"gradient_checkpointing": True, "activation_memory_gb": None}
FULL = {"use_lora": False, "learning_rate": 1e-4, "mixed_precision": "bf16"}
SECONDS = 60  # of a test, on a card
WIDTH, HEIGHT, LENGTH, STEPS, GUIDANCE = 64, 96, 64, 2, 3.0
PROMPT = "A flowchart with a box labelled 'Encoder'."

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_accelerate", "deterministic", "in_time")]


@pytest.fixture
def in_time(device: torch.device) -> Iterator[None]:
    """A test that hangs on a card is one failure."""
    with time_limit(SECONDS if device.type == "cuda" else float("inf")):
        yield


@pytest.fixture
def trained(run, device: torch.device, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Train two steps (or as told) into a folder of that name; the run must be on the device."""

    def go(name: str, **changes: Any) -> Any:
        training = run(**{"model_output_dir": str(tmp_path / name), "max_train_steps": 2, **changes})
        assert training.accelerator.device.type == device.type
        if not changes.get("offload"):
            assert {p.device.type for p in training.parameters.values()} == {device.type}
        return training

    return go


def losses(training: Any) -> list[float]:
    lines = (training.output_dir / "metrics.jsonl").read_text().splitlines()
    return [row["train_loss"] for row in map(json.loads, lines) if "train_loss" in row]


def held_out(training: Any) -> list[float]:
    """The held-out loss at each validation, the one before the first step included: like is compared with like."""
    lines = (training.output_dir / "metrics.jsonl").read_text().splitlines()
    return [row["held_out_loss"] for row in map(json.loads, lines) if "held_out_loss" in row]


@dataclass
class Outcome:
    losses: list[float]
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, training: Any) -> Outcome:
        return cls(losses(training), {name: p.detach().clone() for name, p in training.parameters.items()})

    def same(self, other: Outcome) -> bool:
        """Whether two runs trained the same bits."""
        equal = all(torch.equal(value, other.weights[name]) for name, value in self.weights.items())
        return equal and self.losses == other.losses


_PLAIN: list[Outcome] = []  # once a session


@pytest.fixture
def plain(trained) -> Outcome:  # type: ignore[no-untyped-def]
    """A LoRA in bf16, nothing recomputed, nothing special: what the others are held against."""
    if not _PLAIN:
        _PLAIN.append(Outcome.of(trained("plain", **EXACT)))
    return _PLAIN[0]


# -- the data and the model ----------------------------------------------------------------------
def test_encoded_rows_are_what_the_vae_gives_in_fp32_on_a_cpu(store_config: dict, tiny: FigureModel) -> None:
    """Within the error that encode.vae_precision = "auto" may make: that of rounding to bf16, and the rounding itself."""
    store = EncodedStore(Path(store_config["dataset"]["base_dir"]) / "store", with_text=True)
    refs = {ref.id: ref for ref in list_figures(store_config["encode"]["figures"])[0]}
    for row in range(4):
        image = load_figure(refs[store.figures.value("id", row)])
        fitted, _ = fit(image, best_bucket(image.width, image.height, 128))
        pixels = torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        direct = tiny.encode_images(pixels)[0]
        assert (store.figures.tensor(row).float() - direct).norm() < 0.01 * direct.norm()


class Recorder:
    """What a pipeline's transformer was called with, and what it answered."""

    def __init__(self, transformer: nn.Module):
        self.calls: list[tuple[dict[str, Any], Tensor]] = []
        transformer.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.calls.append(({k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}, output[0].clone()))


FAMILIES: dict[str, tuple[type[FigureModel], str]] = {
    "klein": (Flux2Klein, "flux2_klein_tiny_random"), "qwen": (QwenImage, "qwen_image_tiny")
}  # fmt: skip


def loaded(family: str, device: torch.device) -> FigureModel:
    kind, name = FAMILIES[family]
    model = kind(ModelSource(f"embedded:{name}"), LENGTH, torch.bfloat16)
    model.device = device
    model.load_text_encoder()
    model.load_vae()
    model.load_transformer()
    return model


def pipeline(family: str, device: torch.device) -> Any:
    kind, name = FAMILIES[family]
    pipe = kind.pipeline_class.from_pretrained(embedded_folder(name), torch_dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(family: str, pipe: Any) -> Image.Image:
    guidance = {"true_cfg_scale": GUIDANCE, "negative_prompt": ""} if family == "qwen" else {"guidance_scale": GUIDANCE}
    return pipe(
        prompt=PROMPT, width=WIDTH, height=HEIGHT, num_inference_steps=STEPS, max_sequence_length=LENGTH,
        generator=torch.Generator("cpu").manual_seed(5), **guidance,
    ).images[0]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_velocity_and_pictures_in_bf16_are_the_pipelines(family: str, device: torch.device) -> None:
    """Velocity bit for bit at every step of its sampling, with and without the prompt; the picture pixel for pixel."""
    pipe, model = pipeline(family, device), loaded(family, device)
    recorder = Recorder(pipe.transformer)
    theirs = drawn(family, pipe)
    rows = [model.encode_prompts([prompt])[0] for prompt in (PROMPT, "")]
    assert len(recorder.calls) == 2 * STEPS
    for number, (given, answer) in enumerate(recorder.calls):
        noisy, velocity = (
            tokens.transpose(1, 2).reshape(1, -1, HEIGHT // 8, WIDTH // 8) for tokens in (given["hidden_states"], answer)
        )
        with torch.no_grad():
            ours = model.velocity(noisy, given["timestep"], model.collate_text([rows[number % 2]]))
        assert ours.device.type == device.type and torch.equal(ours, velocity), f"call {number}"
    ours_drawn = model.sample(
        model.pipeline(model.transformer), rows[:1], rows[1], width=WIDTH, height=HEIGHT, steps=STEPS, guidance=GUIDANCE, seeds=[5]
    )[0]
    assert np.array_equal(np.asarray(ours_drawn), np.asarray(theirs))


@pytest.mark.slow
# -- training ---------------------------------------------------------------------------------------
def test_a_lora_learns_and_its_base_stands_still(trained) -> None:  # type: ignore[no-untyped-def]
    training = trained("lora", max_train_steps=6, mixed_precision="bf16", learning_rate=2e-3, validation_steps=6)
    before, after = held_out(training)
    assert after < before - 0.01
    assert {p.dtype for p in training.parameters.values()} == {torch.float32}
    assert all(p.grad is None for p in training.model.transformer.parameters() if not p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"master_weights": "bf16", "use_8bit_adam": True}], ids=["fp32", "bf16-8bit"])
def test_all_weights_learn(changes: dict, trained) -> None:  # type: ignore[no-untyped-def]
    before, after = held_out(trained("full", **FULL, **changes, max_train_steps=3, validation_steps=3))
    assert after < before - 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"use_lora": False, "master_weights": "bf16", "use_8bit_adam": True}], ids=["lora", "full-bf16-8bit"]
)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(changes: dict, trained) -> None:  # type: ignore[no-untyped-def]
    given = {**EXACT, **changes, "checkpointing_steps": 1}
    whole = Outcome.of(trained("whole", **given, max_train_steps=2))
    trained("parts", **given, max_train_steps=1)
    resumed = trained("parts", **given, max_train_steps=2, resume_from_checkpoint="latest")
    assert resumed.resume_from is not None and resumed.resume_from.name == "checkpoint-1"
    assert whole.same(Outcome.of(resumed))


def test_a_checkpoint_holds_the_weights_in_training(trained) -> None:  # type: ignore[no-untyped-def]
    training = trained("saved", checkpointing_steps=2)
    saved = load_file(training.output_dir / "checkpoint-2" / ADAPTER)
    own = sorted((p.detach().cpu() for p in training.parameters.values()), key=lambda p: (tuple(p.shape), float(p.sum())))
    assert len(saved) == len(own)
    for mine, theirs in zip(own, sorted(saved.values(), key=lambda p: (tuple(p.shape), float(p.sum()))), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
# -- memory ----------------------------------------------------------------------------------------
def test_recomputing_all_some_or_none_gives_the_same_bits(trained, plain: Outcome) -> None:  # type: ignore[no-untyped-def]
    some = trained("some", **EXACT, gradient_checkpointing=True, activation_memory_gb=0.004)
    assert some.activations is not None and 0 < some.activations.kept < 4
    assert plain.same(Outcome.of(some)) and plain.same(Outcome.of(trained("recomputed", **EXACT, **RECOMPUTED)))


@pytest.mark.slow
def test_blocks_in_cpu_memory_train_to_the_same_bits(trained, plain: Outcome) -> None:  # type: ignore[no-untyped-def]
    assert plain.same(Outcome.of(trained("away", **EXACT, **RECOMPUTED, offload=True, resident_blocks=2)))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "fp8", "nf4")])
def test_a_quantised_base_trains_close_to_its_own(kind: str, trained, plain: Outcome, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    package = "bitsandbytes" if kind == "nf4" else "torchao"
    if importlib.util.find_spec(package) is None or (kind == "nf4" and device.type != "cuda"):
        pytest.skip(f"{kind} needs {package}" + (" and a GPU" if kind == "nf4" else ""))
    found = losses(trained(kind, mixed_precision="bf16", **RECOMPUTED, quantization=kind))
    assert found == pytest.approx(plain.losses, rel=0.03) and found != plain.losses


@pytest.mark.slow
def test_products_in_8_bit_floats_train_close_to_bf16(trained, plain: Outcome, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no products of 8-bit floats")
    found = losses(trained("fp8_products", mixed_precision="bf16", fp8_products=True))
    assert found == pytest.approx(plain.losses, rel=0.03) and found != plain.losses


# -- optimizers --------------------------------------------------------------------------------------
def test_8_bit_state_follows_adamw(trained, plain: Outcome) -> None:  # type: ignore[no-untyped-def]
    assert losses(trained("8bit", mixed_precision="bf16", use_8bit_adam=True)) == pytest.approx(plain.losses, rel=0.01)


@pytest.mark.slow
def test_prodigy_finds_a_rate_and_trains(trained, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    weight = nn.Parameter(torch.zeros(64, 64, device=device))
    target = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    optimizer = Prodigy(
        [weight], lr=1.0, betas=(0.9, 0.999), beta3=None, weight_decay=0.0, eps=1e-8, decouple=True, use_bias_correction=True,
        safeguard_warmup=False,
    )  # fmt: skip
    for _ in range(150):
        optimizer.zero_grad()
        (weight - target).pow(2).mean().backward()
        optimizer.step()
    assert (weight - target).pow(2).mean() < 0.5 * target.pow(2).mean()
    training = trained("prodigy", optimizer="prodigy", learning_rate=1.0, mixed_precision="bf16")
    assert np.isfinite(losses(training)).all()


def test_the_average_lies_between_the_weights_of_the_steps(trained) -> None:  # type: ignore[no-untyped-def]
    """Of B, which starts at zero; the average holds that start too."""
    training = trained("ema", use_ema=True, ema_steps=1, ema_decay=0.7, checkpointing_steps=1)
    steps = [load_file(training.output_dir / f"checkpoint-{step}" / ADAPTER) for step in (1, 2)]
    average = load_file(training.output_dir / "checkpoint-2" / "ema" / ADAPTER)
    names = [name for name in average if "lora_B" in name]
    assert names and any(not torch.equal(average[name], steps[-1][name]) for name in names)
    for name in names:
        values = torch.stack([torch.zeros_like(average[name]), *(step[name] for step in steps)])
        assert (average[name] >= values.amin(0) - 1e-7).all() and (average[name] <= values.amax(0) + 1e-7).all()


@pytest.mark.slow
# -- pictures ---------------------------------------------------------------------------------------
def test_validation_and_sample_draw_the_same_picture(trained, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.inference import sample

    prompts = {"validation_prompts": [PROMPT], "resolution_list": [[WIDTH, HEIGHT]], "validation_steps": 2, "validation_seed": 7}
    training = trained("drawing", **prompts, mixed_precision="bf16")
    out = training.output_dir / "again"
    given = Namespace(
        lora=[], image=[], run=str(training.output_dir), ema=False, prompt=[PROMPT], negative_prompt=None, width=None, height=None,
        steps=None, guidance=None, seed=7, num=1, out=str(out), base=None,
    )  # fmt: skip
    assert sample.main(given) == 0
    shown = np.asarray(Image.open(training.output_dir / "validation_images" / "step_000002" / "00.png")).astype(int)
    again = np.asarray(Image.open(out / "00_seed7.png")).astype(int)
    assert shown.shape == (HEIGHT, WIDTH, 3) and np.abs(shown - again).max() <= 8  # the adapter is added in another order


# -- the card ----------------------------------------------------------------------------------------
def test_these_tests_pass_on_the_card_of_this_machine(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("this is that run")
    if not Path("/dev/nvidiactl").exists():
        pytest.skip("no NVIDIA card here")
    environment = dict(os.environ)
    before = environment.pop(VISIBLE_BEFORE, "all")
    environment.pop(VISIBLE)
    if before != "all":
        environment[VISIBLE] = before
    command = [sys.executable, "-m", "pytest", __file__, "--device", "cuda", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:]


