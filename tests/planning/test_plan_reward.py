"""`scienceflow plan` of training on rewards: pictures that are drawn, the old policy, the model at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import merged

from OpenSciDraw.config import Config
from OpenSciDraw.datasets.batch import Drawn
from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.sample import sample_normalized
from OpenSciDraw.planning.plan import format_plan, make_plan
from OpenSciDraw.planning.step_cost import count_flops, norms_as_on_a_gpu
from OpenSciDraw.train_iteration_funcs.flow_matching import Place
from OpenSciDraw.training.run import Training

DRAWS = {
    "train_iteration_func_name": "reward", "train_batch_size": 2, "guidance_scale": 3.0,
    "reward": {"group_size": 2, "draw_steps": 3, "processes": 0, "steps_per_round": 2, "figures": "drawn:8:style=small"},
}  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, None])
def test_flops_are_those_of_drawing_and_of_the_objective(
    guidance: float | None, group_config: dict, tmp_path: Path, fresh_accelerate: Any
) -> None:
    """Counted on a batch whose groups all differ: within 3 %. Figures of one size, of a store of groups."""
    figures = merged(group_config, dataset={"type": "ArXiVParquetDatasetV2"}, held_out_examples=2)
    values = merged(merged(figures, **DRAWS), reward={"draw_guidance": guidance}, model_output_dir=str(tmp_path))
    config = Config.model_validate(values)
    step = make_plan(config, "H100-80GB").steps[-1]
    run = Training(config)
    batch, model = run.dataset.batch([0, 1]), run.model
    clean = torch.randn(4, *model.normalize(batch.latents[:1]).shape[1:])
    drawn = Drawn(clean, torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]] * 2))
    object.__setattr__(batch, "drawn", drawn)
    text = model.collate_text([batch.text[0]] * 4)
    with norms_as_on_a_gpu(), count_flops() as drawing:
        sample_normalized(model, text, text, clean, 3, 3.0 if guidance is None else guidance)
    with norms_as_on_a_gpu(), count_flops() as learning:
        run.objective(model, batch, Place(0, 0, 0, 1), config, run.empty_text).loss.backward()
    assert step.drawing == pytest.approx(drawing.get_total_flops() / 2, rel=0.03)
    assert step.flops == pytest.approx(learning.get_total_flops() + drawing.get_total_flops() / 2, rel=0.03)


def test_the_old_policy_is_in_memory_and_in_checkpoints_and_the_start_of_all_weights_too(store_config: dict) -> None:
    config = Config.model_validate(merged(merged(store_config, **DRAWS), use_lora=False))
    plan = make_plan(config, "H100-80GB")
    plain = make_plan(config.model_copy(update={"train_iteration_func_name": "flow_matching"}), "H100-80GB")
    assert plan.memory["old policy"] == 8 * plan.trainable and plain.memory["old policy"] == 0
    assert plan.checkpoint - plain.checkpoint == 4 * plan.trainable
    assert plan.cpu_memory > 0 == plain.cpu_memory and "drawing takes" in format_plan(plan) and "drawing" not in format_plan(plain)
    free = config.model_copy(update={"reward": config.reward.model_copy(update={"pull": 0.0})})
    without = make_plan(free, "H100-80GB")
    assert without.cpu_memory == 0 and without.steps[0].flops < plan.steps[0].flops
    with pytest.raises(UserError, match="'reward' does not run under DeepSpeed"):
        make_plan(config, "H100-80GB", 2, "zero2")
