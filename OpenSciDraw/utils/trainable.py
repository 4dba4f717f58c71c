"""What is trained: LoRA adapters on exact linear layers. The only file that knows how."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError

ADAPTER = "default"


def resolve_lora_layers(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Exact names of the linear layers that `lora_layers` means.

    A pattern matches a layer whose dotted name is the pattern or ends with `.pattern`, and only linear
    layers: `attn.to_out` then means the single blocks' projection and not the ModuleList of that name in
    the dual blocks, on which PEFT raises.

    Raises:
        UserError: a pattern matches nothing; names the nearest ones.
    """
    wanted = [p.strip() for p in (patterns.split(",") if isinstance(patterns, str) else patterns) if p.strip()]
    if not wanted:
        raise UserError("lora_layers is empty. Name the layers to train, e.g. 'to_k,to_q,to_v,to_out.0'.")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found: set[str] = set()
    for pattern in wanted:
        matches = [name for name in linear if name == pattern or name.endswith(f".{pattern}")]
        if not matches:
            endings = sorted({".".join(name.split(".")[-n:]) for name in linear for n in (1, 2, 3)})
            near = difflib.get_close_matches(pattern, endings, n=5, cutoff=0.5)
            raise UserError(
                f"lora_layers: {pattern!r} matches no linear layer of {type(model).__name__}. "
                + (f"Did you mean {', '.join(near)}?" if near else f"Known endings: {', '.join(endings[:30])}.")
            )
        found.update(matches)
    return [name for name in linear if name in found]


def add_lora(transformer: Any, config: Config, seed: int) -> list[str]:
    """Add a LoRA adapter with fp32 weights; everything else stays frozen. Returns the layers' names.

    Raises:
        UserError: bad layer patterns, or PEFT made another set of layers than asked for.
    """
    layers = resolve_lora_layers(transformer, config.lora_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # A is random, B is zero: the start depends on the seed alone
        transformer.add_adapter(
            LoraConfig(
                r=config.rank,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                init_lora_weights="gaussian",
                target_modules=layers,
            ),
            adapter_name=ADAPTER,
        )
    made = [name for name, module in transformer.named_modules() if isinstance(module, LoraLayer)]
    if made != layers:
        raise UserError(f"PEFT made adapters on {len(made)} layers, {len(layers)} were asked for: {set(made) ^ set(layers)}")
    for parameter in trainable_parameters(transformer).values():
        parameter.data = parameter.data.float()  # small updates round away in bf16
    return layers


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in a fixed order."""
    return {name: p for name, p in sorted(module.named_parameters()) if p.requires_grad}


def lora_state(transformer: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors in diffusers names without prefix: `<module>.lora_{A,B}.weight`, fp32, on the CPU."""
    state = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def load_lora_state(transformer: nn.Module, state: dict[str, Tensor], where: Path | str) -> None:
    """Put saved adapter tensors into the model's adapter.

    Raises:
        UserError: names or shapes differ from the adapter that the config describes.
    """
    own = lora_state(transformer)
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f"{k}: file {tuple(state[k].shape)}, config {tuple(own[k].shape)}"
              for k in own.keys() & state.keys() if own[k].shape != state[k].shape]  # fmt: skip
    if missing or extra or shapes:
        raise UserError(
            f"{where} does not fit the adapter of this config: {len(missing)} tensors missing "
            f"({', '.join(missing[:3])}), {len(extra)} unexpected ({', '.join(extra[:3])}), {len(shapes)} of another "
            f"shape ({', '.join(shapes[:3])}). Check rank and lora_layers."
        )
    set_peft_model_state_dict(transformer, state, adapter_name=ADAPTER)


def lora_metadata(transformer: Any) -> dict[str, Any]:
    """The adapter's config as diffusers stores it beside the weights (rank, alpha, target modules)."""
    return transformer.peft_config[ADAPTER].to_dict()


def read_lora(path: Path) -> dict[str, Tensor]:
    """Adapter tensors of a diffusers LoRA file, without the pipeline's `transformer.` prefix."""
    from OpenSciDraw.utils.checkpoint import load_tensors

    return {name.removeprefix("transformer."): tensor for name, tensor in load_tensors(path).items()}


def _lora_file(path: str) -> Path:
    from OpenSciDraw.utils.checkpoint import LORA_FILE

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
        folder = Path(config.pretrained_full_ckpt_path).expanduser()
        folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
        if not folder.is_dir():
            raise UserError(f"pretrained_full_ckpt_path = {config.pretrained_full_ckpt_path!r}: no such folder.")
        other = type(transformer).from_pretrained(folder, torch_dtype=transformer.dtype)
        try:
            transformer.load_state_dict(other.state_dict())
        except RuntimeError as error:
            raise UserError(f"{folder} does not fit the model: {error}") from error
    if config.pretrained_lora_ckpt_path is not None and config.fuse_pretrained_lora:
        file = _lora_file(config.pretrained_lora_ckpt_path)
        transformer.load_lora_adapter(str(file.parent), weight_name=file.name, adapter_name="pretrained")
        transformer.fuse_lora(adapter_names=["pretrained"])
        transformer.unload_lora()


def load_pretrained_adapter(transformer: nn.Module, config: Config) -> None:
    """Start the new adapter from a saved one of the same rank and layers (unless it was fused into the base).

    The saved one keeps its effect where `lora_alpha` differs: its B is scaled by the ratio of the alphas.
    """
    if config.pretrained_lora_ckpt_path is not None and not config.fuse_pretrained_lora:
        file = _lora_file(config.pretrained_lora_ckpt_path)
        state, alpha = read_lora(file), lora_alpha(file)
        if alpha is not None and alpha != config.lora_alpha:
            state = {k: v * (alpha / config.lora_alpha) if ".lora_B." in k else v for k, v in state.items()}
        load_lora_state(transformer, state, file)


def lora_alpha(file: Path) -> float | None:
    """The alpha that a diffusers LoRA file states in its metadata, or None."""
    with safe_open(file, framework="pt") as handle:
        metadata = json.loads((handle.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return metadata.get("transformer.lora_alpha")
