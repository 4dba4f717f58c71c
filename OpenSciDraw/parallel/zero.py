"""DeepSpeed's ZeRO-2 and ZeRO-3, called directly: accelerate's file says which, and the config says all else.

accelerate's own DeepSpeed path is not used: on a CPU it is DDP without a word, and it takes accumulation, clipping and precision
from two places. Its wish is read here and accelerate runs as in DDP, for everything but the model. Checkpoints are
those of every other way: whole tensors, gathered one at a time, no pickle; any number of ranks reads them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Zero:
    """What accelerate's file asks for; see accelerate_cfg/1m8g_zero2.yaml."""

    stage: int
    offload_optimizer: bool


def take_request() -> Zero | None:
    """The launcher's wish for DeepSpeed, taken out of the environment, so that accelerate does not act on it as well.

    Raises:
        UserError: DeepSpeed is not installed, or another stage than 2 or 3.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("true", "1"):
        return None
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("2", "3"):
        raise UserError(f"accelerate's file asks for zero_stage: {stage}. Allowed: 2 and 3, as in accelerate_cfg/1m8g_zero2.yaml.")
    if os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none") != "none":
        raise UserError("accelerate's file sets offload_param_device, which is not used here. Set it to none.")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("accelerate's file asks for DeepSpeed, which is not installed: pip install 'OpenSciDraw[deepspeed]'.")
    offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") == "cpu"
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") and "DEEPSPEED" in name]:
        del os.environ[name]
    return None if int(os.environ.get("WORLD_SIZE", "1")) == 1 else Zero(int(stage), offload)


def settings(config: Config, zero: Zero) -> dict[str, Any]:
    """DeepSpeed's own configuration: the stage is the file's, every number the config's."""
    optimization: dict[str, Any] = {"stage": zero.stage}
    if zero.offload_optimizer:
        optimization["offload_optimizer"] = {"device": "cpu"}
    half = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if config.mixed_precision == "bf16" else {}
    return {
        "zero_optimization": optimization, "gradient_clipping": config.max_grad_norm, "steps_per_print": 10**9,
        "gradient_accumulation_steps": config.gradient_accumulation_steps, "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": config.train_batch_size, "zero_force_ds_cpu_optimizer": False, **half,
    }  # fmt: skip


class ZeroOptimizer:
    """The engine's optimizer, with the loop's verbs: DeepSpeed clips, steps and clears in `step_engine`."""

    step_was_skipped = False

    def __init__(self, transformer: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer,
                 config: Config, zero: Zero):  # fmt: skip
        import deepspeed

        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())
        self.stage, self.optimizer, self.parameters = zero.stage, optimizer, parameters
        self.engine, self._inner, _, _ = deepspeed.initialize(
            model=transformer, optimizer=optimizer, config=settings(config, zero), dist_init_required=False
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-step; DeepSpeed divides by the accumulation. Between steps it only counts."""
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step_engine(self) -> Tensor:
        """Clip, step, clear; returns the gradients' L2 norm before clipping."""
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def step(self) -> None:
        """Nothing: `step_engine` has done it."""

    def zero_grad(self) -> None:
        """Nothing, as `step`."""

    # -- state, in the form of torch's AdamW ------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """As AdamW's; moments are functions that gather a whole fp32 tensor, to be called on every rank in turn."""
        from deepspeed.utils import safe_get_full_optimizer_state

        (step, *_) = (state["step"] for state in self._inner.optimizer.state.values())
        count = torch.as_tensor(float(step))
        state = {
            index: {"step": count.clone(), **{m: lambda p=p, m=m: safe_get_full_optimizer_state(p, m) for m in _MOMENTS}}
            for index, p in enumerate(self.parameters.values())
        }
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return {"state": state, "param_groups": [{**groups[0], "params": list(range(len(state)))}]}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Put whole moments back; the weights are those that the engine was made with."""
        from deepspeed.utils import safe_set_full_optimizer_state

        stage_two = self.stage == 2
        flats = self._inner.single_partition_of_fp32_groups if stage_two else self._inner.fp32_partitioned_groups_flat
        step = torch.as_tensor(float(tree["state"][0]["step"]))
        for flat in flats:
            moments = {name: torch.zeros_like(flat) for name in _MOMENTS}
            self._inner.optimizer.state[flat] = {"step": step.clone(), **moments}
        if stage_two:
            self._inner._lazy_init_hp_params_optimizer_state()
        for index, parameter in enumerate(self.parameters.values()):
            for name in _MOMENTS:
                safe_set_full_optimizer_state(parameter, tree["state"][index][name], name)
        for name, value in tree["param_groups"][0].items():
            if name != "params":
                self.optimizer.param_groups[0][name] = value

    def resume_at(self, step: int, micro_step: int) -> None:
        self.engine.global_steps, self.engine.micro_steps = step, micro_step


def set_masters(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """The fp32 weights that DeepSpeed keeps, exactly as saved (the engine made its own from bf16)."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, value in values.items():
        safe_set_full_fp32_param(parameters[name], value)


def gathered_master(parameter: Tensor) -> Tensor | None:
    """The whole fp32 weight of a parameter that DeepSpeed holds; None for any other tensor. Every rank must ask."""
    if not (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)
