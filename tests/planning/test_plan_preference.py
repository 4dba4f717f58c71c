"""`scienceflow plan` of training on preferences: four pictures a sample, the reference's forward, the frozen copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import merged

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.parallel.sharding import repeated_blocks
from OpenSciDraw.planning.plan import format_plan, make_plan
from OpenSciDraw.planning.step_cost import count_flops, norms_as_on_a_gpu
from OpenSciDraw.train_iteration_funcs.flow_matching import Place
from OpenSciDraw.training.memory.activations import measure_saved_bytes
from OpenSciDraw.training.run import Training


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixed_precision": "bf16", "use_lora": False},
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "activation_memory_gb": None},
    ],
)  # fmt: skip
def test_flops_and_bytes_are_those_of_a_real_step(
    changes: dict[str, Any], group_config: dict, tmp_path: Path, fresh_accelerate: Any
) -> None:
    """The whole objective, counted: within 3 %."""
    config = Config.model_validate(merged(group_config, model_output_dir=str(tmp_path), **changes))
    step = make_plan(config, "H100-80GB").steps[-1]
    run = Training(config)
    batch = run.dataset.batch([0, 1])

    def loss() -> Any:
        return run.objective(run.model, batch, Place(0, 0, 0, 1), config, run.empty_text).loss

    with norms_as_on_a_gpu():
        loss()
        kept = measure_saved_bytes(loss, run.model.transformer)
    with count_flops() as counter:
        loss().backward()
    assert step.flops == pytest.approx(counter.get_total_flops(), rel=0.03)
    of_the_loss = 4 * 8 * run.model.normalize(batch.latents[:1]).nbytes  # eight pictures: noisy, predicted, target, error
    assert step.kept == pytest.approx(kept, rel=0.03, abs=of_the_loss)
    plain = make_plan(config.model_copy(update={"train_iteration_func_name": "flow_matching"}), "H100-80GB").steps[-1]
    forwards = (3, 4) if config.gradient_checkpointing else (2, 3)  # with a LoRA's backward of about one, that of all weights two
    assert 4 * (1 + 1 / forwards[1]) * 0.97 < step.flops / plain.flops < 4 * (1 + 1 / forwards[0]) * 1.03


def test_the_frozen_copy_is_counted_where_it_lies(group_config: dict, tmp_path: Path, fresh_accelerate: Any) -> None:
    values = merged(group_config, use_lora=False, mixed_precision="bf16", model_output_dir=str(tmp_path))
    config = Config.model_validate(values)
    plan, dealt = make_plan(config, "H100-80GB"), make_plan(config, "H100-80GB", 8, "fsdp2")
    run = Training(config)
    frozen = run.reference._frozen  # type: ignore[union-attr]
    with run.model.as_reference():
        run.model.velocity(*_inputs(run))
    blocks = [2 * sum(p.numel() for p in block.parameters()) for block in repeated_blocks(run.model.transformer)]
    assert plan.cpu_memory == sum(blocks)
    here = sum(p.nbytes for p in frozen.parameters())
    assert plan.memory["frozen reference"] == here - sum(blocks[-2:]) + sum(sorted(blocks)[-2:])  # there are the last two
    assert dealt.memory["frozen reference"] == 2 * plan.trainable / 8 and dealt.cpu_memory == 0
    lora = make_plan(Config.model_validate(merged(group_config)), "H100-80GB")
    assert lora.cpu_memory == 0 == lora.memory["validation_model"]
    plan.cpu_memory = 18.2e9
    assert "CPU memory of a process, reference" in format_plan(plan) and "18.20 GB" in format_plan(plan)


def _inputs(run: Training) -> tuple[Any, ...]:
    import torch

    batch = run.dataset.batch([0])
    return run.model.normalize(batch.latents), torch.tensor([0.5]), run.model.collate_text(batch.text)


def test_deepspeed_is_refused(group_config: dict) -> None:
    with pytest.raises(UserError, match="'mdpo' does not run under DeepSpeed"):
        make_plan(Config.model_validate(group_config), "H100-80GB", 8, "zero2")
