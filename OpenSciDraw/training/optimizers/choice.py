"""Optimizers and schedules by name. Which to choose: docs/optimizers.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from OpenSciDraw.config import Config
from OpenSciDraw.training.optimizers.host_adamw import HostAdamW
from OpenSciDraw.training.optimizers.lean_adamw import LeanAdamW
from OpenSciDraw.training.optimizers.prodigy import Prodigy


def build_optimizer(config: Config, parameters: Iterable[nn.Parameter], effective_batch: int) -> torch.optim.Optimizer:
    """AdamW (with 8-bit state, with bf16 weights, or in CPU memory) or Prodigy.

    `scale_lr` multiplies the rate by the effective batch (samples of an optimizer step over all ranks),
    as the diffusers scripts do.
    """
    parameters = list(parameters)
    common: dict[str, Any] = {
        "lr": config.learning_rate * (effective_batch if config.scale_lr else 1),
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "prodigy":
        return Prodigy(
            parameters,
            beta3=config.prodigy_beta3,
            decouple=config.prodigy_decouple,
            use_bias_correction=config.prodigy_use_bias_correction,
            safeguard_warmup=config.prodigy_safeguard_warmup,
            **common,
        )
    round_weights = not config.use_lora and config.master_weights == "bf16"
    if config.offload_optimizer:
        return HostAdamW(parameters, **common)
    if not (config.use_8bit_adam or round_weights):
        # A gradient scaler would leave it to the fused kernel to skip a step, and the loop would not notice that it did.
        on_gpu = {p.device.type for p in parameters} == {"cuda"}
        return adamw(parameters, fused=on_gpu and config.mixed_precision != "fp16", **common)
    return LeanAdamW(parameters, quantize=config.use_8bit_adam, seed=config.seed, **common)


def adamw(parameters: Iterable[nn.Parameter], fused: bool, **options: Any) -> torch.optim.AdamW:
    """torch's AdamW, in one kernel for many parameters (`fused`), or as torch chooses.

    A checkpoint says how it was made; here that does not change the choice, because it may come from another device.
    On a CPU the fused kernel rounds otherwise than the plain one.
    """
    optimizer = torch.optim.AdamW(parameters, fused=fused or None, **options)

    def keep_choice(own: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "param_groups": [group | {"fused": own.defaults["fused"]} for group in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(keep_choice)
    return optimizer


def optimizer_bytes(config: Config) -> float:
    """Bytes of optimizer state on the device for a trained parameter."""
    if config.offload_optimizer:
        return 0.0
    if config.optimizer == "prodigy":
        return 16.0  # two moments, s, and the first weights
    return 2 + 2 * 4 / 256 if config.use_8bit_adam else 8.0  # two moments of a byte each, with a scale for 256 values


def build_schedule(config: Config, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """The learning-rate schedule, stepped once per optimizer step, whatever the number of ranks."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=total_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def effective_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate that multiplies the update: for Prodigy its estimate d times lr."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) * float(group.get("d", 1.0))
