"""A run's adapter on another base of its family: trained on the base model, drawn on its distilled sibling in few steps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel, build_model
from OpenSciDraw.utils.tensor_files import open_tensors
from OpenSciDraw.weights.trainable import resolve_lora_layers

Shapes = Mapping[str, tuple[int, int]]  # of an adapted layer's weight: features out, features in


def config_on(config: Config, base: str) -> Config:
    """`config` with another base; what a run fused into its base is fused into this one too.

    Raises:
        UserError: the run trained no adapter, or one of weights that replaced its base.
    """
    if not config.use_lora:
        raise UserError(
            f"{base}: another base is for an adapter, and this run trained all weights (use_lora = False), which are a base."
        )
    if config.pretrained_full_ckpt_path is not None:
        raise UserError(
            f"{base}: the adapter was trained on pretrained_full_ckpt_path = {config.pretrained_full_ckpt_path!r}, in place of "
            f"{config.pretrained_model_name_or_path}'s weights. It belongs to those, not to another base."
        )
    return config.model_copy(update={"pretrained_model_name_or_path": base, "revision": None, "variant": None})


def base_name(base: str) -> str:
    """A base's name as part of a folder's or file's: the last part of its path, hub id or `embedded:` name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", re.split(r"[/:]", base.rstrip("/"))[-1]).strip("-.") or "base"


def layer_shapes(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Shapes of an adapter's tensors, A (rank, in) and B (out, rank) by name -> of the layers' weights, by the layers' names."""
    found: dict[str, tuple[int, int]] = {}
    for name, shape in tensors.items():
        layer, is_b, _ = name.partition(".lora_B.")
        if is_b:
            found[layer] = (shape[0], tensors[f"{layer}.lora_A.{name.rsplit('.lora_B.', 1)[1]}"][1])
    return found


def require_fit(adapter: Shapes, own: FigureModel, other: FigureModel, config: Config, key: str) -> None:
    """Raises UserError, which says what differs, unless the adapter has the layers of `other` that `lora_layers` names.

    `own` is the model that it was trained on; `key` names what the user gave.
    """
    index, names = other.pipeline_index(), (other.requested_source.name, own.requested_source.name)
    kind = index.get("_class_name", other.pipeline_class.__name__)
    if kind != other.pipeline_class.__name__:
        raise UserError(
            f"{key}: {names[0]} is a model of {kind}, and the adapter is of {other.pipeline_class.__name__}. An adapter "
            "goes with models of its own family."
        )
    empty = other.empty_transformer()
    weights = {name: tuple(module.weight.shape) for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear)}
    found = [f"{layer}: {weights.get(layer, 'no such layer')} there, {shape} in the adapter"
             for layer, shape in adapter.items() if weights.get(layer) != shape]  # fmt: skip
    missing = [layer for layer in resolve_lora_layers(empty, config.lora_layers) if layer not in adapter]
    found += [f"{layer}: {weights[layer]} there, not in the adapter" for layer in missing]
    if not found:
        return
    settings = ""
    if own.is_on_this_machine(own.trained_part):
        settings = _different(other.transformer_config(), own.transformer_config())
    more = f" and {len(found) - 3} layers more" if len(found) > 3 else ""
    raise UserError(
        f"{key}: {names[0]} has other shapes than {names[1]}, on which the adapter was trained. "
        f"{'; '.join(found[:3])}{more}.{settings} Give a base of the same size."
    )


def _different(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    names = sorted(name for name in {*there, *here} if not name.startswith("_") and there.get(name) != here.get(name))
    differences = [f"{name} = {there.get(name)!r} there, {here.get(name)!r} here" for name in names]
    return f" transformer/config.json: {'; '.join(differences)}." if differences else ""


def config_of_adapter(file: Path, config: Config, base: str, key: str = "--base") -> Config:
    """The config of a run's adapter in `file`, with `base` in place of the base that it was trained on; no weights are loaded.

    Raises:
        UserError: no adapter, or one of other shapes; says what differs.
    """
    if not file.is_file():
        raise UserError(f"{key} {base}: {file} holds all weights, which are a base. Another base is for an adapter.")
    other = config_on(config, base)
    with open_tensors(file) as tensors:
        names = list(tensors.keys())
        shapes = {name.removeprefix("transformer."): tuple(tensors.get_slice(name).get_shape()) for name in names}
    model = build_model(other, draws_only=True)
    require_fit(layer_shapes(shapes), build_model(config, draws_only=True), model, other, f"{key} {base}")
    return other
