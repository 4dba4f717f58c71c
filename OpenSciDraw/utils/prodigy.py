"""Prodigy, over any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from OpenSciDraw.utils.sharding import local


class Prodigy(torch.optim.Optimizer):
    """Adam whose rate is `lr` times its own estimate d of the distance to the solution (arXiv:2306.06101, algorithm 4).

    The same steps as the authors' `prodigyopt.Prodigy` (a test compares them). That one cannot read dealt parameters
    (FSDP2), whose d must come from sums over all ranks, and waits for the GPU twice per tensor; this one sums over the
    ranks and waits once per step.

    `decouple`: weight decay as in AdamW; `safeguard_warmup`: leave the rate out of d's denominator.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], beta3: float | None,
        weight_decay: float, eps: float, decouple: bool, use_bias_correction: bool, safeguard_warmup: bool, d0: float = 1e-6,
    ):  # fmt: skip
        beta3 = math.sqrt(betas[1]) if beta3 is None else beta3
        options: dict[str, Any] = {
            "lr": lr, "betas": betas, "beta3": beta3, "weight_decay": weight_decay, "eps": eps, "decouple": decouple,
            "use_bias_correction": use_bias_correction, "safeguard_warmup": safeguard_warmup,
        }  # fmt: skip
        super().__init__(parameters, options | {"d": d0, "d0": d0, "d_numerator": 0.0, "k": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        (group,) = self.param_groups
        trained = [(p, p.grad) for p in group["params"] if p.grad is not None]
        if group["lr"] == 0 or not trained:
            return loss
        beta1, beta2 = group["betas"]
        d, k = group["d"], group["k"]
        correction = math.sqrt(1 - beta2 ** (k + 1)) / (1 - beta1 ** (k + 1)) if group["use_bias_correction"] else 1.0
        rate = d * group["lr"] * correction
        delta, denominator = self._take_in(trained, group, rate)
        if denominator == 0:
            return loss
        group["d_numerator"] = group["beta3"] * group["d_numerator"] + delta
        group["d"] = max(d, group["d_numerator"] / denominator)
        for p, _ in trained:
            weight, state = local(p), self.state[p]
            if group["decouple"]:
                weight.add_(weight, alpha=-group["weight_decay"] * rate)
            root = local(state["exp_avg_sq"]).sqrt().add_(group["d"] * group["eps"])
            weight.addcdiv_(local(state["exp_avg"]), root, value=-rate)
        group["k"] = k + 1
        return loss

    def _take_in(self, trained: list[tuple[nn.Parameter, Tensor]], group: dict[str, Any], rate: float) -> tuple[float, float]:
        """Update the averages; returns this step's part of d's numerator, and d's denominator, over all ranks."""
        (beta1, beta2), beta3, d = group["betas"], group["beta3"], group["d"]
        scale = d / group["d0"]  # as the authors do, to stay clear of very small numbers
        sums = []
        for p, grad in trained:
            state = self.state[p]
            if not state:
                state |= {"start": p.detach().clone(), **{n: torch.zeros_like(p) for n in ("s", "exp_avg", "exp_avg_sq")}}
            gradient, weight, s = local(grad), local(p), local(state["s"])
            if not group["decouple"]:
                gradient = gradient.add(weight, alpha=group["weight_decay"])
            inner = (gradient * (local(state["start"]) - weight)).sum()
            local(state["exp_avg"]).mul_(beta1).add_(gradient, alpha=d * (1 - beta1))
            local(state["exp_avg_sq"]).mul_(beta2).addcmul_(gradient, gradient, value=d * d * (1 - beta2))
            s.mul_(beta3).add_(gradient, alpha=scale * (d if group["safeguard_warmup"] else rate))
            sums.append(torch.stack([inner, s.abs().sum()]))
        total = torch.stack(sums)
        first = trained[0][0]
        if isinstance(first, DTensor):
            torch.distributed.all_reduce(total, group=first.device_mesh.get_group())
        inner_sum, denominator = (math.fsum(column) for column in zip(*total.tolist(), strict=True))
        return scale * rate * inner_sum, denominator
