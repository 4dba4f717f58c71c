"""`scienceflow plan` of distillation, whose teacher runs beside the student, and of another base in validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import merged

from OpenSciDraw.config import Config
from OpenSciDraw.planning.plan import format_plan, make_plan
from OpenSciDraw.planning.step_cost import count_flops, forwards_beside, norms_as_on_a_gpu
from OpenSciDraw.train_iteration_funcs.flow_matching import Place
from OpenSciDraw.training.run import Training

DISTILL = {"train_iteration_func_name": "trajectory_distillation", "num_inference_steps": 8, "guidance_scale": 3.0}


@pytest.mark.slow  # counts a whole step
def test_the_flops_are_those_of_a_real_step(store_config: dict, tmp_path: Path, fresh_accelerate: Any) -> None:
    """The whole objective, counted: within 3 %."""
    values = merged(store_config, model_output_dir=str(tmp_path), distill={"inputs": "data"}, train_batch_size=1, **DISTILL)
    config = Config.model_validate(values)
    step = make_plan(config, "H100-80GB").steps[0]
    run = Training(config)
    sizes = [tuple(size) for size in run.dataset.buckets.tolist()]
    batch = run.dataset.batch([sizes.index((step.shape.height, step.shape.width))])
    with norms_as_on_a_gpu(), count_flops() as counter:
        run.objective(run.model, batch, Place(0, 0, 0, 1), config, run.empty_text).loss.backward()
    assert step.flops == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_forwards_of_teacher_and_student() -> None:
    def of(**changes: Any) -> float:
        start = {"pretrained_model_name_or_path": "embedded:flux2_klein_tiny_random", "dataset": {"base_dir": "."}}
        return forwards_beside(Config.model_validate({**start, **DISTILL, **changes}))

    assert of(distill={"inputs": "data"}) == 4  # two steps with and without the prompt
    assert of(distill={"inputs": "student"}) == 5.5  # and 0, 1, 2 or 3 of its own
    assert of(distill={"inputs": "data", "guidance": 1.0}) == 2
    assert of(train_iteration_func_name="flow_matching") == 0
    assert of(train_iteration_func_name="dpo", dataset={"base_dir": ".", "type": "PreferenceGroups"}) == 1


@pytest.mark.slow  # two plans
def test_a_second_transformer_is_counted_where_it_lies(store_config: dict) -> None:
    """Of all weights the teacher is a frozen copy; of a LoRA `validation_model` lies in CPU memory, of one process."""
    full = make_plan(Config.model_validate(merged(store_config, use_lora=False, **DISTILL)), "H100-80GB")
    assert full.cpu_memory > 0 and full.memory["frozen reference"] > 0
    values = merged(store_config, validation_model="other", validation_prompts=["a box"])
    lora = make_plan(Config.model_validate(values), "H100-80GB")
    assert lora.cpu_memory == full.cpu_memory and lora.memory["validation_model"] == full.memory["frozen reference"]
    assert "CPU memory of a process, 2nd base" in format_plan(lora)
