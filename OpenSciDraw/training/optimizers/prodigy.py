"""Prodigy, over any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from OpenSciDraw.parallel.sharding import local

BATCH = 2**24  # values of the parameters that go together: two temporary copies of them, 134 MB


class Prodigy(torch.optim.Optimizer):
    """Adam whose rate is `lr` times its own estimate d of the distance to the solution (arXiv:2306.06101, algorithm 4).

    The same steps as the authors' `prodigyopt.Prodigy` (a test compares them). That one cannot read dealt parameters
    (FSDP2), whose d must come from sums over all ranks, and waits for the GPU twice per tensor; this one sums over the
    ranks and waits once per step. Small parameters go together, so that a GPU gets few kernels.

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
        for batch in _batches(trained):
            weights, averages, squares = (_parts(batch, self.state, key) for key in (None, "exp_avg", "exp_avg_sq"))
            if group["decouple"]:
                torch._foreach_add_(weights, weights, alpha=-group["weight_decay"] * rate)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_add_(roots, group["d"] * group["eps"])
            torch._foreach_addcdiv_(weights, averages, roots, value=-rate)
        group["k"] = k + 1
        return loss

    def _take_in(self, trained: list[tuple[nn.Parameter, Tensor]], group: dict[str, Any], rate: float) -> tuple[float, float]:
        """Update the averages; returns this step's part of d's numerator, and d's denominator, over all ranks."""
        (beta1, beta2), beta3, d = group["betas"], group["beta3"], group["d"]
        scale = d / group["d0"]  # as the authors do, to stay clear of very small numbers
        for p, _ in trained:
            if not self.state[p]:
                empty = {name: torch.zeros_like(p) for name in ("s", "exp_avg", "exp_avg_sq")}
                self.state[p] |= {"start": p.detach().clone(), **empty}
        sums = [local(trained[0][0]).new_zeros(2)]
        for batch in _batches(trained):
            weights, starts, s = (_parts(batch, self.state, key) for key in (None, "start", "s"))
            averages, squares = (_parts(batch, self.state, key) for key in ("exp_avg", "exp_avg_sq"))
            gradients = [local(grad) for _, grad in batch]
            if not group["decouple"]:
                gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
            products = torch._foreach_sub(starts, weights)
            torch._foreach_mul_(products, gradients)
            inner = torch.cat([product.flatten() for product in products]).sum()
            torch._foreach_mul_(averages, beta1)
            torch._foreach_add_(averages, gradients, alpha=d * (1 - beta1))
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, gradients, gradients, value=d * d * (1 - beta2))
            torch._foreach_mul_(s, beta3)
            torch._foreach_add_(s, gradients, alpha=scale * (d if group["safeguard_warmup"] else rate))
            sums.append(torch.stack([inner, torch.stack(torch._foreach_norm(s, 1)).sum()]))
        total = torch.stack(sums)
        first = trained[0][0]
        if isinstance(first, DTensor):
            torch.distributed.all_reduce(total, group=first.device_mesh.get_group())
        inner_sum, denominator = (math.fsum(column) for column in zip(*total.tolist(), strict=True))
        return scale * rate * inner_sum, denominator


def _batches(trained: list[tuple[nn.Parameter, Tensor]]) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
    """Parameters of which this rank has rows, in order, in lists of at most BATCH values or one parameter."""
    batch: list[tuple[nn.Parameter, Tensor]] = []
    size = 0
    for p, grad in trained:
        count = local(p).numel()
        if batch and size + count > BATCH:
            yield batch
            batch, size = [], 0
        if count:
            batch.append((p, grad))
            size += count
    if batch:
        yield batch


def _parts(batch: list[tuple[nn.Parameter, Tensor]], state: Mapping[Any, dict[str, Any]], key: str | None) -> list[Tensor]:
    """This rank's rows of the parameters (key None) or of their state, in shared memory."""
    return [local(p if key is None else state[p][key]) for p, _ in batch]
