"""`scienceflow export`: a trained LoRA as the files that other programs load."""

from __future__ import annotations

import datetime
import json
import logging
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel, build_model
from OpenSciDraw.utils.checkpoint import LORA_FILE, list_checkpoints, load_tensors

_LOG = logging.getLogger("OpenSciDraw")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Adapter:
    """A LoRA read from disk: tensors in diffusers names without prefix, and PEFT's config of it."""

    file: Path
    run: Path
    config: Config
    layers: dict[str, Tensor]
    peft: dict[str, Any]

    def output_folder(self, kind: str) -> Path:
        """`<run>/<kind>` for the run's own adapter, `<run>/<kind>/checkpoint-<step>` for a checkpoint's."""
        folder = self.run / kind
        return folder if self.file.parent == self.run else folder / self.file.parent.name


def find_adapter(target: str) -> tuple[Path, Path]:
    """(LoRA file, run folder) of a run folder, one of its checkpoints, or a LoRA file in either.

    Raises:
        UserError: nothing there.
    """
    path = Path(target).expanduser()
    folder = path.parent if path.is_file() else path
    file = path if path.is_file() else folder / LORA_FILE
    if not file.exists() and folder.is_dir():
        checkpoints = list_checkpoints(folder)
        if checkpoints:
            file = checkpoints[-1] / LORA_FILE
            _LOG.info("no finished adapter in %s: taking %s", folder, file.parent.name)
    if not file.is_file():
        raise UserError(f"{target}: no {LORA_FILE} here, nor checkpoint-* folders. Give a run folder or a checkpoint of one.")
    run = next((p for p in (file.parent, file.parent.parent) if (p / "config.py").is_file()), None)
    if run is None:
        raise UserError(f"{target}: no config.py beside the adapter, so its model is not known. Give a folder that training made.")
    return file, run


def read_adapter(target: str) -> Adapter:
    """Read a run's adapter and the config it was trained with."""
    from OpenSciDraw.config_file import load_config

    file, run = find_adapter(target)
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata() or {}
    if "lora_adapter_metadata" not in metadata:
        raise UserError(f"{file} has no lora_adapter_metadata: rank and alpha are not known. Was it written by ScienceFlow?")
    peft = {key.removeprefix("transformer."): value for key, value in json.loads(metadata["lora_adapter_metadata"]).items()}
    layers = {name.removeprefix("transformer."): tensor for name, tensor in load_tensors(file).items()}
    return Adapter(file, run, load_config(run / "config.py"), layers, peft)


def modelspec(adapter: Adapter, format_name: str) -> dict[str, str]:
    """Metadata after the ModelSpec standard 1.0.1 (Stability AI), with kohya's rank and alpha keys."""
    config, peft = adapter.config, adapter.peft
    base = config.pretrained_model_name_or_path.split("/")[-1].removeprefix("embedded:")
    newest = [path.name for path in list_checkpoints(adapter.run)[-1:]]  # the run's own adapter is its last step's
    names = newest if adapter.file.parent == adapter.run else [adapter.file.parent.name]
    step = re.search(r"checkpoint-(\d+)$", "".join(names))
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base.lower()}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers" if format_name == "diffusers" else "https://github.com/comfyanonymous/ComfyUI",
        "modelspec.title": config.run_name or Path(config.model_output_dir).name,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{config.encode.resolution}x{config.encode.resolution}",
        "modelspec.prediction_type": "flow",
        "ss_base_model_version": base,
        "ss_network_module": "peft.lora",
        "ss_network_dim": str(peft["r"]),
        "ss_network_alpha": str(peft["lora_alpha"]),
        "ss_steps": step[1] if step else "unknown",
    }


def export(target: str, out: Path | None, formats: tuple[str, ...], dtype: str) -> list[Path]:
    """Write the adapter of `target` in each format; returns the files.

    `diffusers`: `<out>/pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(out)`; alpha in the
    metadata, where diffusers looks for it. `comfyui`: `<out>/<name>_comfyui.safetensors`, the original
    repository's module names with `.alpha` tensors.
    """
    adapter = read_adapter(target)
    out = out or adapter.output_folder("export")
    out.mkdir(parents=True, exist_ok=True)
    if (out / LORA_FILE).resolve() == adapter.file.resolve():
        raise UserError(f"--out {out} is where the adapter itself lies. Choose another folder.")
    layers = {name: tensor.to(_DTYPES[dtype]) for name, tensor in adapter.layers.items()}
    written = []
    if "diffusers" in formats:
        metadata = modelspec(adapter, "diffusers")
        metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{k}": v for k, v in adapter.peft.items()}, sort_keys=True)
        metadata["format"] = "pt"
        written.append(out / LORA_FILE)
        save_file({f"transformer.{name}": t.contiguous() for name, t in layers.items()}, written[-1], metadata)
    if "comfyui" in formats:
        model: FigureModel = build_model(adapter.config)
        original = model.original_lora(layers, float(adapter.peft["lora_alpha"]), int(adapter.peft["r"]))
        name = re.sub(r"[^\w.-]+", "_", adapter.config.run_name or Path(adapter.config.model_output_dir).name)
        written.append(out / f"{name}_comfyui.safetensors")
        save_file(original, written[-1], modelspec(adapter, "comfyui"))
    return written


def main(arguments: Namespace) -> int:
    formats = ("diffusers", "comfyui") if arguments.format == "both" else (arguments.format,)
    out = Path(arguments.out) if arguments.out else None
    for path in export(arguments.target, out, formats, arguments.dtype):
        print(f"{path}  ({path.stat().st_size / 1e6:.2f} MB)")
    return 0
