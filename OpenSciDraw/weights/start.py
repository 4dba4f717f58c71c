"""Weights to start from: a whole transformer, and adapters of any program, added to the base or continued."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.parallel.sharding import copy_into, gathered
from OpenSciDraw.utils.tensor_files import open_tensors
from OpenSciDraw.weights.adapter_files import AdapterFile, adapter_path, read_adapter_file
from OpenSciDraw.weights.files import lora_config
from OpenSciDraw.weights.kinds import scale_of, tensors_by_layer
from OpenSciDraw.weights.other_programs import open_weights
from OpenSciDraw.weights.trainable import inject, load_lora_state, read_full, read_lora
from OpenSciDraw.weights.updates import Update, changed, to_rank

_LOG = logging.getLogger("OpenSciDraw")
_KEY = "pretrained_lora_ckpt_path"
_SCALED = {"lokr": ("lokr_w1", "lokr_w1_a"), "loha": ("hada_w1_a",), "lora": ("up",)}  # what another scale is multiplied into
_NAMES = {"down": "lora_A.default.weight", "up": "lora_B.default.weight", "oft_R": "oft_R.default.weight"}


def load_pretrained(model: FigureModel, config: Config) -> None:
    """Weights to start from, before the new adapter: a full checkpoint, an adapter added to the base of `model.transformer`.

    Raises:
        UserError: the path is missing, or does not fit the model.
    """
    transformer = model.transformer
    if config.pretrained_full_ckpt_path is not None:
        given, parameters = config.pretrained_full_ckpt_path, dict(transformer.named_parameters())
        read_full(parameters, open_weights(given, parameters, config.huggingface_token, model.original_place), given)
    if config.pretrained_lora_ckpt_path is not None and config.fuse_pretrained_lora:
        add_to_base(transformer, [(read_adapter_file(adapter_path(config.pretrained_lora_ckpt_path, _KEY), model), 1.0)])
    transformer.eval()


@torch.no_grad()
def add_to_base(transformer: nn.Module, adapters: Sequence[tuple[AdapterFile, float]]) -> None:
    """Change the weights of `transformer` as adapters with their strengths do, computed in fp32 and rounded once."""
    for layer in sorted({layer for adapter, _ in adapters for layer in adapter.updates}):
        weight = transformer.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        own = [(adapter.updates[layer], strength) for adapter, strength in adapters if layer in adapter.updates]
        weight.copy_(changed(weight, own))
    for adapter, strength in adapters:
        _LOG.info("%s (%s): %d layers changed, strength %g", adapter.path, adapter.format, len(adapter.updates), strength)


def attach_adapter(model: FigureModel, pipe: Any, path: Path) -> None:
    """Draw with an adapter: our own files as adapters beside the base, as in training; those of other programs added to it."""
    with open_tensors(path) if path.suffix == ".safetensors" else open(path, "rb"):
        pass  # a damaged one is named, before anything looks at it
    stated = lora_config(path) if path.suffix == ".safetensors" else {}
    if stated.get("peft_type") == "LORA" and all(name.startswith("transformer.") for name in _names(path)):
        model.load_lora(pipe, path)
    elif stated.get("peft_type") in PEFT_TYPE_TO_CONFIG_MAPPING:
        inject(pipe.transformer, stated)
        state = read_lora(path)
        load_lora_state({name: p for name, p in pipe.transformer.named_parameters() if p.requires_grad}, state, path)
        pipe.transformer.requires_grad_(False)
    else:
        add_to_base(pipe.transformer, [(read_adapter_file(path, model), 1.0)])
    pipe.transformer.eval()  # diffusers makes layers in training mode, with dropout active


def _names(path: Path) -> list[str]:
    with open_tensors(path) as handle:
        return list(handle.keys())


# -- the new adapter begins as a saved one ---------------------------------------------------------
def load_pretrained_adapter(model: FigureModel, parameters: Mapping[str, Tensor], config: Config) -> None:
    """Start the new adapter from a saved one of any program (unless it was added to the base).

    It keeps its effect where the scale differs. A LoRA of another rank comes to the config's: a smaller one is kept whole, a
    larger one, and what is no LoRA, becomes the nearest product of that rank. Layers that the file lacks start as new ones.

    Raises:
        UserError: it adapts layers that do not train here, or is of another kind than an adapter that is no LoRA.
    """
    if config.pretrained_lora_ckpt_path is None or config.fuse_pretrained_lora:
        return
    found = read_adapter_file(adapter_path(config.pretrained_lora_ckpt_path, _KEY), model)
    own = tensors_by_layer(parameters)
    extra = sorted(found.updates.keys() - own.keys())
    if extra:
        endings = sorted({".".join(part for part in name.split(".")[2:]) or name for name in extra})
        raise UserError(
            f"{found.path} does not fit what this config trains: it adapts {len(extra)} layers that lora_layers leaves out "
            f"({', '.join(extra[:3])}). Add {','.join(endings[:12])} to lora_layers, or set fuse_pretrained_lora = True."
        )
    shares = []
    with torch.no_grad():
        for layer, update in found.updates.items():
            if config.adapter_type == "lora":
                shares.append((_start_lora(own[layer], update, config), layer))
            else:
                _start_same_kind(found.path, layer, own[layer], update, config)
    _say(found, len(own), shares, config)


def _say(found: AdapterFile, layers: int, shares: list[tuple[float, str]], config: Config) -> None:
    ranks = {update.rank for update in found.updates.values() if update.is_low_rank} - {config.rank}
    what = f"{found.path} ({found.format}): the adapter starts from it"
    if any(share < 1 for share, _ in shares):
        mean, (least, where) = sum(share for share, _ in shares) / len(shares), min(shares)
        what += f", at rank {config.rank}, which keeps {mean:.4f} of the norm (least: {least:.4f}, {where})"
    elif ranks:
        what += f"; its rank {', '.join(map(str, sorted(ranks)))} becomes {config.rank}, and nothing is lost"
    if layers > len(found.updates):
        what += f"; {layers - len(found.updates)} of {layers} layers are not in it and start anew"
    _LOG.info("%s", what)


def _start_lora(own: Mapping[str, Tensor], update: Update, config: Config) -> float:
    """Fill A and B of one layer; returns the share of the norm that is kept."""
    down_place, up_place = own[_NAMES["down"]], own[_NAMES["up"]]
    scale = scale_of(config)
    if update.is_low_rank and update.rank == config.rank:
        up = update.tensors["up"].float()
        copy_into(down_place, update.tensors["down"].float())
        copy_into(up_place, up if update.scale == scale else up * (update.scale / scale))
        return 1.0
    if update.needs_weight:
        raise UserError(
            f"{_KEY}: a {'DoRA' if update.kind == 'lora' else 'OFT'} changes weights in a way that a new LoRA beside them cannot "
            "start from. Set fuse_pretrained_lora = True: it becomes part of the base."
        )
    down, up, share = to_rank(update, config.rank)
    whole_down, whole_up = gathered(down_place).detach().clone().cpu(), torch.zeros(gathered(up_place).shape)
    whole_down[: len(down)] = down  # further rows stay those of a new adapter, whose B is 0
    whole_up[:, : len(down)] = up / scale
    copy_into(down_place, whole_down)
    copy_into(up_place, whole_up)
    return share


def _start_same_kind(path: Path, layer: str, own: Mapping[str, Tensor], update: Update, config: Config) -> None:
    kind = "dora" if update.kind == "lora" and update.magnitude is not None else update.kind
    values = {_NAMES.get(name, f"{name}.default"): tensor.float() for name, tensor in update.tensors.items()}
    if update.magnitude is not None:
        values["lora_magnitude_vector.default.weight"] = update.magnitude.float().flatten()
    ratio = 1.0 if kind == "oft" else update.scale / scale_of(config)
    if ratio != 1.0:
        scaled = {_NAMES.get(name, f"{name}.default") for name in _SCALED.get(update.kind, ())}
        values = {name: tensor * ratio if name in scaled else tensor for name, tensor in values.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in values.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if kind != config.adapter_type or shapes != wanted or update.rows is not None:
        raise UserError(
            f"{path} has a {kind} at {layer} with {shapes}, and this config trains a {config.adapter_type} with {wanted}. Take the "
            "same adapter_type, rank and factors, or set fuse_pretrained_lora = True: it becomes part of the base."
        )
    for name, tensor in own.items():
        copy_into(tensor, values[name])
