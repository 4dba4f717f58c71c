"""Trajectory distillation against a sampler written by hand; what a distilled run draws with; its training resumed to the bit."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import merged
from safetensors.torch import load_file
from torch import Tensor

from OpenSciDraw import flow
from OpenSciDraw.config import Config, Drawing, drawing_of_run
from OpenSciDraw.config.drawing import drawing_of_teacher
from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.train_iteration_funcs.distillation import trajectory_distillation_loss
from OpenSciDraw.train_iteration_funcs.flow_matching import Place
from OpenSciDraw.training.run import Training
from train_OpenSciDraw_loop import train

DISTILL = {"train_iteration_func_name": "trajectory_distillation", "num_inference_steps": 8, "guidance_scale": 3.0}


# -- noise levels ---------------------------------------------------------------------------------------------------
def test_the_levels_between_two_steps_are_those_of_the_finer_schedule() -> None:
    """Where the student's levels lie on the teacher's, the teacher walks exactly its own; the ends are the student's to the bit."""
    fine = torch.tensor([1.0, 0.98, 0.95, 0.9, 0.8, 0.6, 0.0])
    found = flow.between(fine[::2], fine, 2)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.98, 0.95], [0.95, 0.9, 0.8], [0.8, 0.6, 0.0]]))
    other = torch.tensor([1.0, 0.97, 0.7, 0.0])
    found = flow.between(other, fine, 4)
    assert torch.equal(found[:, 0], other[:-1]) and torch.equal(found[:, -1], other[1:])
    assert (found[:, 1:] < found[:, :-1]).all()
    # 0.97 is at place 1 + 1/3 of `fine`, 0.7 at 4.5: the first of four steps between them ends at 1 1/3 + 19/24 = 2.125
    assert found[1, 1].item() == pytest.approx(0.95 + 0.125 * (0.9 - 0.95))


# -- the loss -------------------------------------------------------------------------------------------------------
def built(store_config: dict, folder: Path, **changes: Any) -> Training:
    """A run that has not trained, whose adapter does something."""
    run = Training(Config.model_validate(merged(store_config, **{**DISTILL, "model_output_dir": str(folder), **changes})))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return run


def batch_of(run: Training, count: int) -> Batch:
    """The first figures of the commonest size."""
    sizes = run.dataset.bucket_of.tolist()
    common = max(set(sizes), key=sizes.count)
    return run.dataset.batch([row for row, size in enumerate(sizes) if size == common][:count])


def walked(run: Training, start: Tensor, levels: list[float], text: Tensor, guidance: float) -> Tensor:
    """Euler steps of one picture, in float64, with the transformer as it is."""
    model, x = run.model, start.double()
    wanted, empty = model.collate_text([text]), model.collate_text([run.empty_text])
    for sigma, following in zip(levels[:-1], levels[1:], strict=True):
        level = (1000 * torch.tensor([sigma])).to(torch.float32) / 1000
        with torch.no_grad():
            velocity = model.velocity(x.float(), level, wanted).double()
            if guidance > 1:
                unwanted = model.velocity(x.float(), level, empty).double()
                velocity = unwanted + guidance * (velocity - unwanted)
        x = x + (following - sigma) * velocity
    return x


@pytest.mark.parametrize(("inputs", "guidance"), [("data", 3.0), ("student", 3.0), ("student", 1.0)])
def test_the_loss_is_the_distance_to_the_straight_line_along_the_teachers_path(
    inputs: str, guidance: float, store_config: dict, tmp_path: Path, fresh_accelerate: Any
) -> None:
    """Sample by sample: the teacher without the adapter and with guidance, the student with it and without guidance."""
    settings = {"steps": 4, "guidance": guidance, "inputs": inputs}
    run = built(store_config, tmp_path, distill=settings, train_batch_size=4)
    batch, place, model = batch_of(run, 4), Place(3, 5, 0, 1), run.model
    found = trajectory_distillation_loss(model, batch, place, run.config, run.empty_text)
    clean = model.normalize(batch.latents)
    levels = model.inference_sigmas(clean.shape[-1] * clean.shape[-2], 4).tolist()
    finer = flow.between(torch.tensor(levels), model.inference_sigmas(clean.shape[-1] * clean.shape[-2], 8), 2)
    noise = flow.keyed_noise(3, 5, batch.sample_ids, clean.shape[1:])
    steps = (flow.stratified_quantiles(3, 5, batch.sample_ids, 0, 4) * 4).long().tolist()
    assert sorted(steps) == [0, 1, 2, 3]  # dealt evenly
    for at, step in enumerate(steps):
        text, one = batch.text[at], slice(at, at + 1)  # type: ignore[index]
        sigma, following = levels[step], levels[step + 1]
        start = ((1 - sigma) * clean[one] + sigma * noise[one]).double()
        if inputs == "student":
            start = walked(run, noise[one], levels[: step + 1], text, 1.0)
        model.transformer.disable_adapters()  # PEFT's own switch
        reached = walked(run, start, finer[step].tolist(), text, guidance)
        model.transformer.enable_adapters()
        target = (reached - start) / (following - sigma)
        with torch.no_grad():
            velocity = model.velocity(start.float(), torch.tensor([sigma]), model.collate_text([text]))
        expected = (velocity.double() - target).pow(2).mean().item()
        assert found.per_sample[at].item() == pytest.approx(expected, rel=2e-3)
        assert found.sigma[at].item() == pytest.approx(sigma)  # type: ignore[index]
    assert found.loss.item() == pytest.approx(found.per_sample.mean().item())


def test_a_student_that_is_the_teacher_has_nothing_to_learn_of_one_step(
    store_config: dict, tmp_path: Path, fresh_accelerate: Any
) -> None:
    """Without an adapter that does something, and one step of the teacher to one of the student without guidance: loss 0."""
    run = built(store_config, tmp_path, distill={"guidance": 3.0, "teacher_steps": 4}, mixed_precision="no")
    for name, parameter in run.parameters.items():
        if "lora_B" in name:
            parameter.data.zero_()
    config = run.config.model_copy(update={"distill": run.config.distill.model_copy(update={"guidance": 1.0})})
    place = Place(3, 5, 0, 1)
    found = trajectory_distillation_loss(run.model, batch_of(run, 2), place, config, run.empty_text)
    assert found.loss.item() < 1e-8
    guided = trajectory_distillation_loss(run.model, batch_of(run, 2), place, run.config, run.empty_text)
    assert guided.loss.item() > 1e-4


def test_captions_are_never_dropped(store_config: dict, tmp_path: Path, fresh_accelerate: Any) -> None:
    run = built(store_config, tmp_path, caption_dropout=1.0, distill={"inputs": "data"})
    batch = batch_of(run, 2)

    def loss(of: Batch) -> float:
        return trajectory_distillation_loss(run.model, of, Place(3, 5, 0, 1), run.config, run.empty_text).loss.item()

    assert loss(batch) != loss(replace(batch, text=[run.empty_text] * 2))


# -- training -------------------------------------------------------------------------------------------------------
@pytest.fixture
def distil(fresh_accelerate: Any, store_config: dict) -> Any:
    def go(**changes: Any) -> Training:
        fresh_accelerate()
        training = Training(Config.model_validate(merged(store_config, **{**DISTILL, **changes})))
        assert train(training) == 0
        return training

    return go


@pytest.mark.parametrize("changes", [{}, {"use_lora": False, "learning_rate": 1e-4}], ids=["LoRA", "full"])
def test_a_resumed_run_is_the_whole_one_bit_for_bit(changes: dict[str, Any], distil: Any, tmp_path: Path) -> None:
    options = {**changes, "checkpointing_steps": 1, "max_train_steps": 2, "held_out_examples": 0}
    options["distill"] = {"steps": 2, "inputs": "student"}
    distil(**options, model_output_dir=str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-2")
    resumed = distil(**options, model_output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest")
    assert resumed.resume_from.name == "checkpoint-1"
    files = list((tmp_path / "whole" / "checkpoint-2").rglob("*.safetensors"))
    assert files
    for file in files:
        a, b = load_file(file), load_file(tmp_path / "parts" / file.relative_to(tmp_path / "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), file


def test_a_distilled_run_draws_in_its_few_steps_without_guidance(distil: Any, tmp_path: Path, caplog: Any) -> None:
    """In `sample` and `evaluate`, as nothing else is asked for; the base, before training, as the config says."""
    from OpenSciDraw.cli import main

    caplog.set_level(logging.INFO, "OpenSciDraw")
    out = tmp_path / "run"
    prompt = {"validation_prompts": ["two boxes"], "resolution_list": [[64, 64]]}
    run = distil(model_output_dir=str(out), max_train_steps=1, held_out_examples=0, **prompt)
    assert drawing_of_run(run.config) == Drawing(4, 1.0) and drawing_of_teacher(run.config) == Drawing(8, 3.0)
    asked = ["--width", "64", "--height", "64", "--seed", str(run.config.validation_seed), "--prompt", "two boxes"]
    assert main(["sample", str(out), *asked, "--out", str(tmp_path / "own")]) == 0
    assert "the run was distilled: drawing in 4 steps without guidance" in caplog.text
    assert main(["sample", str(out), *asked, "--steps", "4", "--guidance", "1", "--out", str(tmp_path / "said")]) == 0
    assert main(["sample", str(out), *asked, "--steps", "8", "--guidance", "3", "--out", str(tmp_path / "slow")]) == 0
    name = f"00_seed{run.config.validation_seed}.png"
    own, said, slow = ((tmp_path / folder / name).read_bytes() for folder in ("own", "said", "slow"))
    assert own == said != slow
    evaluated = ["evaluate", str(out), "--figures", "drawn:1:seed=9:style=small"]
    assert main([*evaluated, "--out", str(tmp_path / "scores")]) == 0
    settings = json.loads((tmp_path / "scores" / "evaluation.json").read_text())["settings"]
    assert (settings["steps"], settings["guidance"]) == (4, 1.0)
    assert main(["export", str(out), "--out", str(tmp_path / "export"), "--format", "diffusers"]) == 0
    assert "num_inference_steps = 4, guidance_scale = 1.0" in caplog.text
