"""What is trained: LoRA adapters on exact linear layers, or all weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, inject_adapter_in_model
from torch import Tensor, nn

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import DTYPES, FigureModel
from OpenSciDraw.parallel.sharding import copy_into, gathered
from OpenSciDraw.quiet import warn_once
from OpenSciDraw.registry import MODELS
from OpenSciDraw.utils.files import unfinished
from OpenSciDraw.utils.tensor_files import FULL_FOLDER, FULL_STEM, TensorReader, load_tensors
from OpenSciDraw.weights.adapters import ADAPTER
from OpenSciDraw.weights.files import LORA_FILE, TensorWriter
from OpenSciDraw.weights.kinds import (
    adapted_layers,
    file_name,
    initialise,
    peft_config,
    require_fitting,
    without_chance,
)
from OpenSciDraw.weights.other_programs import Weights, open_weights

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm (a VAE's): saved, but not trained


# -- before training -----------------------------------------------------------------------------
def loading_dtype(config: Config) -> torch.dtype:
    """Type in which the transformer's weights are loaded: that of activations, or of full fine-tuning's weights."""
    masters_elsewhere = config.offload_optimizer or config.master_weights == "bf16"
    return DTYPES[config.mixed_precision] if config.use_lora or masters_elsewhere else torch.float32


def make_trainable(transformer: Any, config: Config) -> list[str]:
    """Mark what trains, adding the adapter where one is asked for; returns the LoRA layers' names ([] = all weights)."""
    if config.use_lora:
        return add_lora(transformer, config)
    transformer.requires_grad_(True)
    return []


def count_trained(transformer: nn.Module, config: Config) -> int:
    """How many parameters `make_trainable` would train, without changing anything."""
    if not config.use_lora:
        return sum(p.numel() for p in transformer.parameters())
    layers = dict(transformer.named_modules())
    names = resolve_lora_layers(transformer, config.lora_layers)
    if config.adapter_type == "lora":
        return sum(config.rank * sum(layers[name].weight.shape) for name in names)
    alike: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        alike.setdefault(tuple(layers[name].weight.shape), []).append(name)
    total = 0
    with torch.device("meta"):  # an adapter on one layer of each shape, without memory
        for (out, width), same in alike.items():
            alone = nn.ModuleDict({"layer": nn.Linear(width, out, bias=False)})
            inject_adapter_in_model(peft_config(config, ["layer"]), alone, ADAPTER)
            total += len(same) * sum(p.numel() for p in alone.parameters() if p.requires_grad)
    return total


def fill(model: FigureModel, config: Config) -> None:
    """Give a transformer that was built without weights (sharded training) those of the base and of a new adapter."""
    adapter = trainable_parameters(model.transformer) if config.use_lora else {}
    frozen = {name: p for name, p in model.transformer.named_parameters() if name not in adapter}
    base = {name.replace(".base_layer.", "."): p for name, p in frozen.items()}
    if config.pretrained_full_ckpt_path is not None:
        given = config.pretrained_full_ckpt_path
        read_full(base, open_weights(given, base, config.huggingface_token, model.original_place), given)
    else:
        folder = model.component_files("transformer")
        stem = FULL_STEM + (f".{model.source.variant}" if model.source.variant else "")
        read_full(base, TensorReader(folder, stem), folder)
    initialise(model.transformer, config.seed)


def resolve_lora_layers(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Exact names of the linear layers that `lora_layers` means.

    A pattern matches a layer whose dotted name is the pattern or ends with `.pattern`, and only linear
    layers: `attn.to_out` then means the single blocks' projection and not the ModuleList of that name in
    the dual blocks, on which PEFT raises.

    Raises:
        UserError: a pattern matches nothing, and is not one of another family's that is left out here with a warning; names
            the nearest ones.
    """
    wanted = [p.strip() for p in (patterns.split(",") if isinstance(patterns, str) else patterns) if p.strip()]
    if not wanted:
        raise UserError("lora_layers is empty. Name the layers to train, e.g. 'to_k,to_q,to_v,to_out.0'.")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers_of = {pattern: [n for n in linear if n == pattern or n.endswith(f".{pattern}")] for pattern in wanted}
    found = {name for matches in layers_of.values() for name in matches}
    elsewhere = {name for family in MODELS.names() for name in (MODELS.class_literal(family, "block_layers") or "").split(",")}
    others = [pattern for pattern, matches in layers_of.items() if not matches and pattern in elsewhere] if found else []
    if others:
        warn_once(f"lora_layers: {', '.join(others)} match no layer of {type(model).__name__}; other families have them")
    for pattern, matches in layers_of.items():
        if not matches and pattern not in others:
            endings = sorted({".".join(name.split(".")[-n:]) for name in linear for n in (1, 2, 3)})
            near = difflib.get_close_matches(pattern, endings, n=5, cutoff=0.5)
            raise UserError(
                f"lora_layers: {pattern!r} matches no linear layer of {type(model).__name__}. "
                + (f"Did you mean {', '.join(near)}?" if near else f"Known endings: {', '.join(endings[:30])}.")
            )
    return [name for name in linear if name in found]


def add_lora(transformer: Any, config: Config) -> list[str]:
    """Add an adapter (`adapter_type`) with fp32 weights; everything else stays frozen. Returns the layers' names.

    Raises:
        UserError: bad layer patterns, or PEFT made another set of layers than asked for.
    """
    layers = resolve_lora_layers(transformer, config.lora_layers)
    require_fitting(transformer, layers, config)
    with torch.random.fork_rng(devices=[]):
        transformer.add_adapter(peft_config(config, layers), adapter_name=ADAPTER)
    without_chance(transformer)
    made = list(adapted_layers(transformer))
    if made != layers:
        raise UserError(f"PEFT made adapters on {len(made)} layers, {len(layers)} were asked for: {set(made) ^ set(layers)}")
    for parameter in trainable_parameters(transformer).values():
        parameter.data = parameter.data.float()  # small updates round away in bf16
    initialise(transformer, config.seed)
    return layers


def inject(transformer: Any, stated: Mapping[str, Any]) -> None:
    """Add an adapter as a file of ours states it (`lora_metadata`), with fp32 weights that are still to be filled."""
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[stated["peft_type"]]
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config_class(**stated), transformer, ADAPTER)
    without_chance(transformer)
    for parameter in trainable_parameters(transformer).values():
        parameter.data = parameter.data.float()


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in a fixed order."""
    return {name: p for name, p in sorted(module.named_parameters()) if p.requires_grad}


# -- saving and loading what trains ----------------------------------------------------------------
def values_to_save(transformer: Any, values: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """`values` (what trains, or its average, by parameter name); of a model whose weights all train with its buffers as well."""
    return dict(values) if config.use_lora else {**transformer.state_dict(), **values}


def save_weights(
    model: FigureModel, transformer: Any, values: Mapping[str, Tensor], folder: Path, config: Config, write: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `values` (of `values_to_save`) as files that diffusers loads; every rank calls it.

    A LoRA becomes `<folder>/pytorch_lora_weights.safetensors` (fp32), all weights `<folder>/transformer/`, in `dtype`
    or as they are.
    """
    if config.use_lora:
        layers = {file_name(name): gathered(tensor).detach().cpu().contiguous() for name, tensor in values.items()}
        if write:
            with unfinished(folder / LORA_FILE) as part:
                model.save_lora(part.parent, layers, lora_metadata(transformer))
        return
    final = folder / FULL_FOLDER
    with unfinished(final) if write else nullcontext(final) as building:
        with TensorWriter(building, FULL_STEM, write) as files:
            for name, tensor in values.items():
                files.add(name, tensor, dtype)
        if write:
            model.save_config(transformer, building)


def load_weights(values: Mapping[str, Tensor], folder: Path, config: Config) -> None:
    """Fill `values` (what trains, or its average) from what `save_weights` wrote; each rank reads its own rows.

    Raises:
        UserError: names or shapes differ from what this config trains.
    """
    if config.use_lora:
        load_lora_state(values, read_lora(folder / LORA_FILE), folder)
    else:
        read_full(values, TensorReader(folder / FULL_FOLDER, FULL_STEM), folder)


def read_full(values: Mapping[str, Tensor], reader: Weights, folder: Path | str) -> None:
    there = {name: reader.shape(name) for name in reader.names if not name.endswith(STATISTICS)}
    _require_fit(values, there, folder, "Check the model it belongs to.")
    for name, tensor in values.items():
        copy_into(tensor, reader[name])


def load_lora_state(values: Mapping[str, Tensor], state: Mapping[str, Tensor], where: Path | str) -> None:
    """Put saved adapter tensors into an adapter's parameters (or their average).

    Raises:
        UserError: names or shapes differ from the adapter that the config describes.
    """
    own = {file_name(name): tensor for name, tensor in values.items()}
    _require_fit(own, {name: tuple(t.shape) for name, t in state.items()}, where, "Check rank and lora_layers.")
    for name, tensor in own.items():
        copy_into(tensor, state[name])


def _require_fit(own: Mapping[str, Tensor], there: Mapping[str, tuple[int, ...]], where: Path | str, hint: str) -> None:
    missing, extra = sorted(own.keys() - there.keys()), sorted(there.keys() - own.keys())
    shapes = [f"{k}: file {there[k]}, config {tuple(own[k].shape)}"
              for k in own.keys() & there.keys() if tuple(own[k].shape) != there[k]]  # fmt: skip
    if missing or extra or shapes:
        raise UserError(
            f"{where} does not fit what this config trains: {len(missing)} tensors missing ({', '.join(missing[:3])}), "
            f"{len(extra)} unexpected ({', '.join(extra[:3])}), {len(shapes)} of another shape "
            f"({', '.join(shapes[:3])}). {hint}"
        )


def lora_metadata(transformer: Any) -> dict[str, Any]:
    """The adapter's config as diffusers stores it beside the weights (rank, alpha, target modules).

    Without dropout: diffusers would build it in training mode, and every picture by `load_lora_weights` would be disturbed.
    """
    stated = transformer.peft_config[ADAPTER].to_dict()
    stated |= {name: 0.0 for name in ("lora_dropout", "module_dropout", "rank_dropout") if name in stated}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in stated.items()}  # the same bytes each time


def read_lora(path: Path) -> dict[str, Tensor]:
    """Adapter tensors of a diffusers LoRA file, without the pipeline's `transformer.` prefix."""
    return {name.removeprefix("transformer."): tensor for name, tensor in load_tensors(path).items()}
