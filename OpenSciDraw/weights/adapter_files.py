"""Adapter files of any program: diffusers, PEFT, kohya and musubi, ai-toolkit, OneTrainer, LyCORIS, ComfyUI.

A file is a name for each layer, a suffix for each tensor of it, and a scale: `alpha` in the file divided by the rank, what a config
beside the weights says, or 1. Layers are found by their names (adapter_names.py); what they do to a weight is in updates.py.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.utils.files import parse_json
from OpenSciDraw.utils.tensor_files import load_tensors
from OpenSciDraw.weights.adapter_names import LayerNames, family_of, is_of_text_encoder, layer_names
from OpenSciDraw.weights.files import LORA_FILE, lora_config
from OpenSciDraw.weights.updates import KINDS, Update

_LOG = logging.getLogger("OpenSciDraw")
PEFT_FILE, PEFT_CONFIG = "adapter_model", "adapter_config.json"
_TORCH_FILES = (".bin", ".pt", ".pth", ".ckpt")
_SUFFIXES = (  # a tensor's name after its layer's, and what it is
    (r"(?:\.lora_A(?:\.\w+)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight", "down"),
    (r"(?:\.lora_B(?:\.\w+)?|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight", "up"),
    (r"\.dora_scale|\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?", "magnitude"),
    (r"\.oft_R(?:\.\w+)?\.weight", "oft_R"),
    (r"\.(alpha|scalar|diff|oft_blocks|rescale|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)(?:\.default)?", ""),
)
_ENDINGS = tuple((re.compile(f"(?P<layer>.+?)(?:{pattern})"), meaning) for pattern, meaning in _SUFFIXES)


@dataclass(frozen=True)
class AdapterFile:
    """What a file does to a model: `updates` by the names of its layers; `stated`: PEFT's config, where the file has one."""

    path: Path
    format: str
    updates: dict[str, Update]
    stated: dict[str, Any]


def adapter_path(given: str, key: str) -> Path:
    """The file that `given` names: itself, or the one adapter file of a folder. Raises UserError, naming `key`."""
    path = Path(given).expanduser()
    if path.is_dir():
        named = [path / LORA_FILE, *(path / f"{PEFT_FILE}{ending}" for ending in (".safetensors", ".bin"))]
        files = [p for p in named if p.is_file()] or sorted(path.glob("*.safetensors"))
        if len(files) > 1 and files[0] not in named:
            raise UserError(f"{key} = {given!r}: {len(files)} .safetensors files and no {LORA_FILE}. Give one of them.")
        path = files[0] if files else path / LORA_FILE
    if not path.is_file():
        raise UserError(f"{key} = {given!r}: no such file (expected {LORA_FILE}, {PEFT_FILE}.safetensors, or their folder).")
    return path


def read_adapter_file(path: Path, model: FigureModel, names: LayerNames | None = None) -> AdapterFile:
    """Read an adapter of any of the programs above for `model`; parts of text encoders are left out, with a warning.

    Raises:
        UserError: not readable, tensors of a kind or layers that this model does not have, or other shapes; says what the file is.
    """
    tensors, stated = _read(path)
    groups, unknown = _by_layer(tensors)
    text = [layer for layer in groups if is_of_text_encoder(layer)]
    unknown = [name for name in unknown if not is_of_text_encoder(name)]
    kind = _format(tensors, groups)
    if text:
        _LOG.warning("%s: %d layers of a text encoder (%s, …) are left out: it is not adapted here", path, len(text), text[0])
        groups = {layer: parts for layer, parts in groups.items() if layer not in text}
    if not groups:
        raise UserError(f"{path} holds no adapter: its first tensors are {', '.join(list(tensors)[:3]) or 'none'}. {_KNOWN}")
    names = names or layer_names(model)
    foreign = [layer for layer in groups if not names.parts(layer)]
    if foreign or unknown:
        first = (unknown or foreign)[:3]
        what = f"{kind}, of {family_of(groups)}, and not for {model.family}" if foreign else f"{kind} with tensors of another kind"
        raise UserError(
            f"{path} is {what}: {len(foreign)} of its {len(groups)} layers and {len(unknown)} of its tensors fit nothing here "
            f"({', '.join(first)}). Give an adapter that was made for {model.family}. {_KNOWN}"
        )
    updates: dict[str, Update] = {}
    for layer, parts in groups.items():
        update = _update(path, layer, parts, stated)
        for part in names.parts(layer):
            try:
                own = update if part.rows is None or len(part.rows) == update.shape()[0] else update.of_rows(part.rows)
            except ValueError as error:
                raise UserError(f"{path}: {layer} cannot be taken apart into {model.family}'s layers: {error}.") from error
            except IndexError as error:
                raise UserError(f"{path}: {layer} has {update.shape()[0]} rows, too few for {model.family}'s.") from error
            _require_shape(path, layer, own, part.layer, names.shapes[part.layer])
            updates[part.layer] = own
    return AdapterFile(path, kind, updates, stated)


_KNOWN = "Adapters of diffusers, PEFT, kohya, musubi, ai-toolkit, OneTrainer, LyCORIS and ComfyUI are read (docs/adapters.md)."


def _read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    if path.suffix == ".safetensors":
        tensors: Mapping[str, Tensor] = load_tensors(path)
        stated = lora_config(path)
    elif path.suffix in _TORCH_FILES:
        tensors, stated = _read_torch(path), {}
    else:
        raise UserError(f"{path}: an adapter is a .safetensors file, or a file of torch ({', '.join(_TORCH_FILES)}).")
    config = path.parent / PEFT_CONFIG
    if not stated and config.is_file() and path.stem == PEFT_FILE:
        try:
            stated = dict(parse_json(config.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{config}: cannot be read as PEFT's config ({error}).") from error
    return tensors, stated


def _read_torch(path: Path) -> Mapping[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError) as error:
        first = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{path}: torch's weights-only loader refuses it ({first}). Nothing else of such a file is run.") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise UserError(f"{path} holds no tensors by name. {_KNOWN}")
    return found


def _by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tensors by layer and meaning, and the names that mean nothing here."""
    groups: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        for pattern, meaning in _ENDINGS:
            if match := pattern.fullmatch(name):
                groups.setdefault(match["layer"], {})[meaning or match[2]] = tensor
                break
        else:
            unknown.append(name)
    return groups, unknown


def _update(path: Path, layer: str, parts: dict[str, Tensor], stated: Mapping[str, Any]) -> Update:
    alpha, scalar, magnitude = parts.get("alpha"), parts.get("scalar"), parts.get("magnitude")
    tensors = {name: tensor for name, tensor in parts.items() if name not in ("alpha", "scalar", "magnitude")}
    if any(number is not None and number.numel() != 1 for number in (alpha, scalar)):
        raise UserError(f"{path}: alpha of {layer} is no single number.")
    kind = next((k for k, wanted in KINDS.items() if _is(wanted, tensors)), None)
    if kind is None or any(tensor.ndim != 2 for name, tensor in tensors.items() if name not in ("oft_blocks", "rescale")):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise UserError(f"{path}: {layer} has {shapes or 'no weights'}, which is no whole adapter of a linear layer.")
    if kind == "oft_rows":
        return Update(kind, tensors, float(alpha) if alpha is not None else 0.0, magnitude)
    if kind == "oft":
        exact = stated.get("use_cayley_neumann") is False
        return Update(kind, tensors, 1.0, None, None, 0 if exact else int(stated.get("num_cayley_neumann_terms", 5)))
    rank = _rank_of_scale(kind, tensors)
    scale = 1.0
    if alpha is not None:
        scale = float(alpha) / rank if rank else 1.0
    elif stated and kind != "diff":
        scale = stated_scale(stated, layer, rank)
    return Update(kind, tensors, scale * (1.0 if scalar is None else float(scalar)), magnitude)


def _is(wanted: tuple[str, ...], tensors: Mapping[str, Tensor]) -> bool:
    needed = {name for name in wanted if not name.endswith("?")}
    if not (needed <= tensors.keys() <= {name.removesuffix("?") for name in wanted}):
        return False
    factors = [(f"lokr_w{n}" in tensors, {f"lokr_w{n}_a", f"lokr_w{n}_b"} <= tensors.keys()) for n in (1, 2)]
    return bool(tensors) and ("lokr_w1?" not in wanted or all(whole != split for whole, split in factors))


def _rank_of_scale(kind: str, tensors: Mapping[str, Tensor]) -> int | None:
    """The rank that alpha is divided by; None where alpha does nothing (a Kronecker product of two whole factors)."""
    of_kind = {"lora": ("down",), "loha": ("hada_w1_b",), "lokr": ("lokr_w2_b", "lokr_w1_b")}.get(kind, ())
    return next((tensors[name].shape[0] for name in of_kind if name in tensors), None)


def stated_scale(stated: Mapping[str, Any], layer: str, rank: int | None) -> float:
    """The scale of `layer` by PEFT's config: alpha / r, or alpha / sqrt(r); with its patterns for single layers."""

    def of_layer(key: str, default: float) -> float:
        patterns = {_plain_name(k): v for k, v in (stated.get(key) or {}).items()}
        return float(next((v for k, v in patterns.items() if f".{layer}".endswith(f".{k}")), default))

    r = of_layer("rank_pattern", float(stated.get("r", rank or 1)))
    alpha = of_layer("alpha_pattern", float(stated.get("lora_alpha", stated.get("alpha", r))))
    if r <= 0:
        raise UserError(f"an adapter's config gives {layer} the rank {r:g}.")
    return alpha / (r**0.5 if stated.get("use_rslora") else r)


def _plain_name(pattern: str) -> str:
    """The name that a pattern of PEFT's config means. A regular expression of an unknown file is not run."""
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if re.search(r"[^\w.-]", name):
        raise UserError(f"rank_pattern or alpha_pattern {pattern!r} of an adapter's config: only names of layers are read.")
    return name


def _require_shape(path: Path, layer: str, update: Update, own: str, shape: tuple[int, int]) -> None:
    out, width = update.shape()
    if out not in (None, shape[0]) or width not in (-1, shape[1]):
        raise UserError(
            f"{path}: {layer} adapts a layer of {out or '?'} x {width}, and {own} of this model is {shape[0]} x {shape[1]}: the "
            "adapter was made for another size of the family."
        )


def _format(tensors: Mapping[str, Tensor], groups: Mapping[str, Mapping[str, Tensor]]) -> str:
    """What the file is, for people: the kind of adapter and whose names it has."""
    kinds = {k for parts in groups.values() for k, wanted in KINDS.items() if parts.keys() & {w.removesuffix("?") for w in wanted}}
    dora = "DoRA" if any("magnitude" in parts for parts in groups.values()) else "LoRA"
    names = {"lora": dora, "loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "oft_rows": "OFT (LyCORIS)", "diff": "whole differences"}
    what = " and ".join(names[kind] for kind in KINDS if kind in kinds) or "no adapter"
    whose = {
        "base_model.model.": "PEFT", "lora_unet_": "kohya or musubi", "lycoris_": "LyCORIS", "lora_transformer_": "OneTrainer",
        "diffusion_model.": "ai-toolkit or ComfyUI", "transformer.": "diffusers",
    }  # fmt: skip
    first = next((program for prefix, program in whose.items() if any(name.startswith(prefix) for name in tensors)), "bare")
    return f"{'an' if what.startswith('OFT') else 'a'} {what} file with {first} names"
