"""Optimizers and schedules by the README's names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError


def build_optimizer(config: Config, parameters: Iterable[nn.Parameter], effective_batch: int) -> torch.optim.Optimizer:
    """AdamW, 8-bit AdamW (bitsandbytes, CUDA) or Prodigy.

    `scale_lr` multiplies the rate by the effective batch (samples of an optimizer step over all ranks),
    as the diffusers scripts do.

    Raises:
        UserError: 8-bit AdamW is not available here.
    """
    rate = config.learning_rate * (effective_batch if config.scale_lr else 1)
    common: dict[str, Any] = {
        "lr": rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer.lower() == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            parameters,
            beta3=config.prodigy_beta3,
            decouple=config.prodigy_decouple,
            use_bias_correction=config.prodigy_use_bias_correction,
            safeguard_warmup=config.prodigy_safeguard_warmup,
            **common,
        )
    if config.use_8bit_adam:
        if not torch.cuda.is_available():
            raise UserError("use_8bit_adam = True needs a CUDA GPU. Set use_8bit_adam = False here.")
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError("use_8bit_adam = True needs bitsandbytes: pip install 'OpenSciDraw[8bit]'.") from error
        return AdamW8bit(parameters, **common)
    return torch.optim.AdamW(parameters, **common)


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
