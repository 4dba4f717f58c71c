"""AdamW whose weights and state live in CPU memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw


class HostAdamW(torch.optim.Optimizer):
    """fp32 weights and both moments in CPU memory, where the step is taken; the device holds its weights and gradients.

    A step copies each gradient to the CPU, updates the fp32 weight there and copies it back, rounded to the type that
    the device computes in: nothing is lost, because the fp32 weight is what trains.

    torchao's CPUOffloadOptimizer copies gradients during the backward pass, that is before they are clipped, so it
    would train on unclipped ones; it also runs on CUDA and XPU only.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float, eps: float
    ):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            weight = parameter.detach().cpu().float().clone()
            state["step"] = torch.zeros(())
            state |= {"weight": weight, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        adamw(
            [state["weight"]], [gradient.cpu().float()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            fused=True, amsgrad=False, maximize=False, beta1=group["betas"][0], beta2=group["betas"][1],
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
        parameter.copy_(state["weight"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's would move the state to the device and cast it to the weights' type there."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, values in state_dict["state"].items():
            self.state[parameters[index]] = {key: value.cpu() for key, value in values.items()}
