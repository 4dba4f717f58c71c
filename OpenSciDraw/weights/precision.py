"""In which type the transformer computes: bf16 throughout, as the released pipelines run it, with fp32 where it trains.

torch's autocast runs norms, modulations and residuals in fp32 and casts back before each product: slower, and not what a pipeline
computes. Here the transformer computes in bf16 from end to end. What trains is fp32 outside of it: a LoRA's factors
(weights/adapters.py) or all weights, whose bf16 copies are made before each forward. Interpolation, target and loss are fp32 too.
fp16 keeps autocast: without fp32 in between it overflows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from OpenSciDraw.config import Config
from OpenSciDraw.models.base import DTYPES, FigureModel
from OpenSciDraw.models.direct_loading import kept_in_fp32
from OpenSciDraw.weights.adapters import Adapters


def autocast_type(config: Config, model: FigureModel) -> str:
    """accelerate's `mixed_precision`: what autocast does. "no" under bf16, but for parts that are no transformer (pretraining)."""
    throughout = config.mixed_precision == "bf16" and model.trained_part == "transformer"
    return "no" if throughout else config.mixed_precision


def compute_throughout(model: FigureModel, transformer: nn.Module, config: Config) -> Adapters | ComputeCopies | None:
    """Have `transformer`, whose trained weights are whole on this device, compute in `mixed_precision`'s type.

    FSDP2 and DeepSpeed make their copies themselves and do not need this.
    """
    bf16 = autocast_type(config, model) != config.mixed_precision
    if config.mixed_precision != "fp16":
        model.use_few_kernels(transformer)
    if config.use_lora:
        return Adapters(transformer, model.shared_inputs, DTYPES["bf16"] if bf16 else None)
    if bf16 and any(p.dtype == torch.float32 for p in transformer.parameters()):
        return ComputeCopies(transformer, DTYPES["bf16"])
    return None


def cast_inputs(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Have a transformer whose parameters show another type than it computes in take its states in `dtype`.

    A pipeline gives latents in the parameters' type: fp32 for trained weights.
    """

    def cast(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = {k: v.to(dtype) for k, v in kwargs.items() if isinstance(v, Tensor) and k.endswith("hidden_states")}
        return args, kwargs | states

    transformer.register_forward_pre_hook(cast, with_kwargs=True)


class ComputeCopies:
    """A forward with `dtype` copies of fp32 parameters, whose gradients arrive in fp32.

    A copy is an attribute of its module that stands before the parameter of the same name: `parameters()`, the optimizer and the
    files know the parameter, the module's forward (also one that is recomputed in the backward) finds the copy. What the released
    pipeline keeps in fp32 (norms of Krea 2) has none.
    """

    def __init__(self, transformer: nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        kept = kept_in_fp32(type(transformer))
        self._places = [
            (module, name) for prefix, module in transformer.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dtype == torch.float32 and not kept & set(prefix.split("."))
        ]  # fmt: skip
        transformer.register_forward_pre_hook(lambda *_: self._renew())
        cast_inputs(transformer, dtype)

    def _renew(self) -> None:
        for owner, name in self._places:
            owner.__dict__[name] = owner._parameters[name].to(self.dtype)  # type: ignore[union-attr]
