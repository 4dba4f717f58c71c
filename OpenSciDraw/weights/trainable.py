"""What is trained: LoRA adapters on exact linear layers, or all weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.flow import keyed_generator
from OpenSciDraw.models.base import DTYPES, FigureModel
from OpenSciDraw.parallel.sharding import copy_into, gathered
from OpenSciDraw.quiet import warn_once
from OpenSciDraw.registry import MODELS
from OpenSciDraw.utils.files import unfinished
from OpenSciDraw.utils.tensor_files import FULL_FOLDER, FULL_STEM, TensorReader, load_tensors, open_tensors
from OpenSciDraw.weights.adapters import ADAPTER, AdaptedLinear
from OpenSciDraw.weights.files import LORA_FILE, TensorWriter, lora_config
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
    return sum(config.rank * sum(layers[name].weight.shape) for name in names)


def fill(model: FigureModel, config: Config) -> None:
    """Give a transformer that was built without weights (sharded training) those of the base and of a new adapter."""
    base = {name.replace(".base_layer.", "."): p for name, p in model.transformer.named_parameters() if ".lora_" not in name}
    if config.pretrained_full_ckpt_path is not None:
        given = config.pretrained_full_ckpt_path
        _read_full(base, open_weights(given, base, config.huggingface_token), given)
    else:
        folder = model.component_files("transformer")
        stem = FULL_STEM + (f".{model.source.variant}" if model.source.variant else "")
        _read_full(base, TensorReader(folder, stem), folder)
    initialise_lora(model.transformer, config.seed)


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
    """Add a LoRA adapter with fp32 weights; everything else stays frozen. Returns the layers' names.

    Raises:
        UserError: bad layer patterns, or PEFT made another set of layers than asked for.
    """
    layers = resolve_lora_layers(transformer, config.lora_layers)
    with torch.random.fork_rng(devices=[]):
        adapter = LoraConfig(r=config.rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=layers)
        adapter._register_custom_module({nn.Linear: AdaptedLinear})
        transformer.add_adapter(adapter, adapter_name=ADAPTER)
    made = [name for name, module in transformer.named_modules() if isinstance(module, LoraLayer)]
    if made != layers:
        raise UserError(f"PEFT made adapters on {len(made)} layers, {len(layers)} were asked for: {set(made) ^ set(layers)}")
    for parameter in trainable_parameters(transformer).values():
        parameter.data = parameter.data.float()  # small updates round away in bf16
    initialise_lora(transformer, config.seed)
    return layers


def initialise_lora(transformer: nn.Module, seed: int) -> None:
    """A ~ N(0, 1 / rank^2), B = 0 (PEFT's "gaussian"), keyed by (seed, layer): the same on any number of devices."""
    for name, parameter in transformer.named_parameters():
        if parameter.is_meta:
            continue
        if ".lora_A." in name:
            noise = torch.randn(parameter.shape, generator=keyed_generator("lora", seed, name))
            copy_into(parameter, noise / parameter.shape[0])
        elif ".lora_B." in name:
            copy_into(parameter, torch.zeros(parameter.shape))


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
        layers = {_file_name(name): gathered(tensor).detach().cpu().contiguous() for name, tensor in values.items()}
        if write:
            with unfinished(folder / LORA_FILE) as part:
                model.pipeline_class.save_lora_weights(
                    part.parent, transformer_lora_layers=layers, transformer_lora_adapter_metadata=lora_metadata(transformer)
                )
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
        _read_full(values, TensorReader(folder / FULL_FOLDER, FULL_STEM), folder)


def _read_full(values: Mapping[str, Tensor], reader: Weights, folder: Path | str) -> None:
    there = {name: reader.shape(name) for name in reader.names if not name.endswith(STATISTICS)}
    _require_fit(values, there, folder, "Check the model it belongs to.")
    for name, tensor in values.items():
        copy_into(tensor, reader[name])


def _file_name(parameter: str) -> str:
    """PEFT's parameter name -> the name in a LoRA file."""
    return parameter.replace(f".{ADAPTER}.", ".")


def load_lora_state(values: Mapping[str, Tensor], state: Mapping[str, Tensor], where: Path | str) -> None:
    """Put saved adapter tensors into an adapter's parameters (or their average).

    Raises:
        UserError: names or shapes differ from the adapter that the config describes.
    """
    own = {_file_name(name): tensor for name, tensor in values.items()}
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
    stated = transformer.peft_config[ADAPTER].to_dict() | {"lora_dropout": 0.0}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in stated.items()}  # the same bytes each time


def read_lora(path: Path) -> dict[str, Tensor]:
    """Adapter tensors of a diffusers LoRA file, without the pipeline's `transformer.` prefix."""
    return {name.removeprefix("transformer."): tensor for name, tensor in load_tensors(path).items()}


def lora_file(path: str) -> Path:
    file = Path(path).expanduser()
    file = file / LORA_FILE if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"pretrained_lora_ckpt_path = {path!r}: no such file (expected {LORA_FILE} or its folder).")
    return file


def load_pretrained(transformer: Any, config: Config) -> None:
    """Weights to start from, before the new adapter: a full checkpoint, a LoRA fused into the base.

    Raises:
        UserError: the path is missing, or does not fit the model.
    """
    if config.pretrained_full_ckpt_path is not None:
        given, parameters = config.pretrained_full_ckpt_path, dict(transformer.named_parameters())
        _read_full(parameters, open_weights(given, parameters, config.huggingface_token), given)
    if config.pretrained_lora_ckpt_path is not None and config.fuse_pretrained_lora:
        file = lora_file(config.pretrained_lora_ckpt_path)
        transformer.load_lora_adapter(str(file.parent), weight_name=file.name, adapter_name="pretrained")
        transformer.fuse_lora(adapter_names=["pretrained"])
        transformer.unload_lora()
    transformer.eval()


def attach_lora(pipe: Any, file: Path) -> None:
    """Load a LoRA file into a pipeline to draw with it: diffusers makes its layers in training mode, with dropout active."""
    with open_tensors(file):
        pass  # a damaged one is named, before diffusers looks at it
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.transformer.eval()


def load_pretrained_adapter(parameters: Mapping[str, Tensor], config: Config) -> None:
    """Start the new adapter from a saved one of the same rank and layers (unless it was fused into the base).

    The saved one keeps its effect where `lora_alpha` differs: its B is scaled by the ratio of the alphas.
    """
    if config.pretrained_lora_ckpt_path is not None and not config.fuse_pretrained_lora:
        file = lora_file(config.pretrained_lora_ckpt_path)
        state, alpha = read_lora(file), lora_config(file).get("lora_alpha")
        if alpha is not None and alpha != config.lora_alpha:
            state = {k: v * (alpha / config.lora_alpha) if ".lora_B." in k else v for k, v in state.items()}
        load_lora_state(parameters, state, file)
