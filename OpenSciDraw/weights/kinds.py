"""Kinds of adapters (`adapter_type`): PEFT's config of each, how a new one starts, and how its tensors become an `Update`.

PEFT makes the layers and computes them; only of a plain LoRA the forward is our own (adapters.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig
from peft.tuners import loha, lokr
from peft.tuners.oft.layer import OFTRotationModule
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.flow import keyed_generator
from OpenSciDraw.parallel.sharding import copy_into, local
from OpenSciDraw.weights.adapters import ADAPTER, AdaptedLinear

MAGNITUDE = "lora_magnitude_vector"


def scale_of(config: Config) -> float:
    """What the difference is multiplied by: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
    return config.lora_alpha / (math.sqrt(config.rank) if config.use_rslora else config.rank)


def adapter_name(config: Config) -> str:
    """What the adapter is called, with what of the config does not act on it."""
    names = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa", "oft": "OFT (rank and lora_alpha do not act)"}
    return names[config.adapter_type]


def peft_config(config: Config, layers: Sequence[str]) -> Any:
    """PEFT's config of the adapter that `config` asks for, on exactly these layers."""
    targets = list(layers)
    if config.adapter_type == "lokr":
        return LoKrConfig(
            r=config.rank, alpha=config.lora_alpha, target_modules=targets, decompose_factor=config.lokr_factor,
            decompose_both=config.lokr_decompose_both,
        )  # fmt: skip
    if config.adapter_type == "loha":
        return LoHaConfig(r=config.rank, alpha=config.lora_alpha, target_modules=targets)
    if config.adapter_type == "oft":
        return OFTConfig(r=0, oft_block_size=config.oft_block_size, module_dropout=config.lora_dropout, target_modules=targets)
    made = LoraConfig(
        r=config.rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=targets,
        use_rslora=config.use_rslora, use_dora=config.adapter_type == "dora",
    )  # fmt: skip
    if config.adapter_type == "lora":
        made._register_custom_module({nn.Linear: AdaptedLinear})
    return made


class _Certain:
    """PEFT's layers of these kinds leave an adapter out by chance (`module_dropout`) also where the chance is 0: when a random
    number is exactly 0, one draw in 2^24. Here it never is, and no number is drawn."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        if layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER] or args or kwargs:
            out: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return out
        added: Tensor = layer.base_layer(x) + layer._get_delta_activations(ADAPTER, x)
        return added.to(x.dtype)


class KroneckerLinear(_Certain, lokr.Linear):
    """A LoKr layer without chance."""


class HadamardLinear(_Certain, loha.Linear):
    """A LoHa layer without chance."""


_CERTAIN: dict[type, type] = {lokr.Linear: KroneckerLinear, loha.Linear: HadamardLinear}


def without_chance(transformer: nn.Module) -> None:
    """Give new layers of PEFT their forward of above; PEFT has no way to be told of other classes for these kinds."""
    for layer in adapted_layers(transformer).values():
        layer.__class__ = _CERTAIN.get(type(layer), type(layer))


def require_fitting(transformer: nn.Module, layers: Sequence[str], config: Config) -> None:
    """Raises UserError for layers whose inputs `oft_block_size` does not divide: PEFT would silently take another size."""
    if config.adapter_type != "oft":
        return
    widths = {name: int(transformer.get_submodule(name).in_features) for name in layers}  # type: ignore[arg-type]
    wrong = {name: width for name, width in widths.items() if width % config.oft_block_size}
    if wrong:
        name, width = next(iter(wrong.items()))
        common = math.gcd(*widths.values())
        sizes = ", ".join(str(n) for n in range(2, common + 1) if common % n == 0)
        raise UserError(
            f"oft_block_size = {config.oft_block_size} does not divide the inputs of {len(wrong)} of {len(layers)} layers ({name}: "
            f"{width}). All of them are divided by {sizes}."
        )


def adapted_layers(transformer: nn.Module) -> dict[str, Any]:
    """PEFT's layers by name."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}


def initialise(transformer: nn.Module, seed: int) -> None:
    """A new adapter, keyed by (seed, parameter): the same on any number of devices, and no change of the model yet.

    LoRA: A ~ N(0, 1 / r^2), B = 0 (PEFT's "gaussian"). LoKr, LoHa: one factor 0, the others as in PEFT (uniform within
    1 / sqrt(columns); N(0, 1), LoHa's first N(0, .1^2)). OFT: 0, which is no rotation. DoRA's lengths: of the rows of the base
    weights, which must be there.
    """
    for module in transformer.modules():
        if isinstance(module, OFTRotationModule) and not module.weight.is_meta:
            side, device = module.block_size, local(module.weight).device
            module.rows, module.cols = torch.triu_indices(side, side, 1, device=device)  # a layer built on meta has none yet
    parameters = dict(transformer.named_parameters())
    split = {name.rsplit(".lokr_", 1)[0] for name in parameters if ".lokr_w1_a." in name}
    for name, parameter in parameters.items():
        if parameter.is_meta:
            continue
        shape, generator = parameter.shape, keyed_generator("lora", seed, name)
        if ".lora_A." in name:
            copy_into(parameter, torch.randn(shape, generator=generator) / shape[0])
        elif f".{MAGNITUDE}." in name:
            base = parameters[f"{name.partition(f'.{MAGNITUDE}.')[0]}.base_layer.weight"]
            with torch.no_grad():  # the lengths are dealt as the rows are
                local(parameter).copy_(torch.linalg.vector_norm(local(base).float(), dim=1))
        elif ".lokr_" in name:
            zero = "lokr_w1_a" if name.rsplit(".lokr_", 1)[0] in split else "lokr_w1"
            bound = 1 / math.sqrt(shape[1])
            noise = (2 * torch.rand(shape, generator=generator) - 1) * bound
            copy_into(parameter, torch.zeros(shape) if f".{zero}." in name else noise)
        elif ".hada_" in name:
            noise = torch.randn(shape, generator=generator)
            copy_into(parameter, torch.zeros(shape) if ".hada_w2_a." in name else noise * (0.1 if ".hada_w1_a." in name else 1.0))
        elif ".lora_B." in name or ".oft_R." in name:
            copy_into(parameter, torch.zeros(shape))


def file_name(parameter: str) -> str:
    """PEFT's parameter name -> the name in a file."""
    return parameter.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")


def layer_of(parameter: str) -> str:
    """The adapted layer of an adapter's parameter, or of its name in a file."""
    return next(parameter.partition(mark)[0] for mark in (".lora_", ".lokr_", ".hada_", ".oft_R") if mark in parameter)


@contextmanager
def switched_off(transformer: nn.Module) -> Iterator[None]:
    """Inside, each adapted layer is its base layer, to the bit.

    PEFT's own switch also marks adapters as frozen, which DDP and FSDP2, who counted them before, must not see.
    """
    layers = list(adapted_layers(transformer).values())
    for layer in layers:
        if isinstance(layer, AdaptedLinear):
            layer.is_off = True
        else:
            layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            if isinstance(layer, AdaptedLinear):
                layer.is_off = False
            else:
                layer._disable_adapters = False


def tensors_by_layer(values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """An adapter's tensors by layer and by the name after it (`lora_A.default.weight`, `lokr_w1.default`, …)."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in values.items():
        layer = layer_of(name)
        found.setdefault(layer, {})[name[len(layer) + 1 :]] = tensor
    return found
