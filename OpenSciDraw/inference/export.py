"""`scienceflow export`: trained weights as the files that other programs load."""

from __future__ import annotations

import datetime
import json
import logging
import re
import shutil
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from OpenSciDraw.config import Config, Drawing, drawing_of_run
from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.other_base import base_name, config_of_adapter
from OpenSciDraw.inference.pictures import drawing_of_trained
from OpenSciDraw.models.base import FigureModel, build_model
from OpenSciDraw.utils.files import naming_full_disk, real, unfinished
from OpenSciDraw.utils.sole_user import sole_user
from OpenSciDraw.utils.tensor_files import FULL_FOLDER, FULL_STEM, TensorReader, load_tensors
from OpenSciDraw.weights.files import EMA_FOLDER, LORA_FILE, TensorWriter, list_checkpoints, lora_config

_LOG = logging.getLogger("OpenSciDraw")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Trained:
    """What a run trained: `path` is a LoRA file, or the `transformer/` folder of all weights."""

    path: Path
    run: Path
    config: Config

    @property
    def is_lora(self) -> bool:
        return self.path.is_file()

    def output_folder(self, kind: str) -> Path:
        """`<run>/<kind>` for the run's own weights, `<run>/<kind>/<its folder>` for a checkpoint's or an average."""
        return self.run / kind / self.path.parent.relative_to(self.run)


@dataclass(frozen=True)
class Adapter(Trained):
    """A LoRA read from disk: tensors in diffusers names without prefix, and PEFT's config of it."""

    layers: dict[str, Tensor]
    peft: dict[str, Any]


def _weights_in(folder: Path) -> Path | None:
    """A LoRA file or `transformer/` in `folder`."""
    found = (folder / LORA_FILE, folder / FULL_FOLDER / "config.json")
    return found[0] if found[0].is_file() else found[1].parent if found[1].is_file() else None


def find_trained(target: str, ema: bool = False) -> Trained:
    """The weights of a run folder, of one of its checkpoints, or a LoRA file or `transformer/` in either.

    `ema`: their average over the steps (`use_ema`).

    Raises:
        UserError: nothing there.
    """
    path = Path(target).expanduser().absolute()
    itself = path.is_file() or path.name == FULL_FOLDER
    folder = path.parent if itself else path
    inner = folder / EMA_FOLDER if ema else folder
    weights: Path | None = path if itself and not ema else _weights_in(inner)
    if weights is None and list_checkpoints(folder):
        inner = list_checkpoints(folder)[-1] / (EMA_FOLDER if ema else ".")
        weights = _weights_in(inner)
        if weights is not None:
            _LOG.info("no finished weights in %s: taking %s", folder, inner.relative_to(folder))
    if weights is None or not weights.exists():
        what = f"{LORA_FILE} or {FULL_FOLDER}/" + (f" in {EMA_FOLDER}/ (was use_ema set?)" if ema else "")
        raise UserError(f"{target}: no {what} here, nor checkpoint-* folders. Give a run folder or a checkpoint of one.")
    run = next((p for p in list(weights.parents)[:3] if (p / "config.py").is_file()), None)
    if run is None:
        raise UserError(f"{target}: no config.py beside the weights, so their model is not known. Give a folder of training.")
    from OpenSciDraw.config import load_saved_config

    return Trained(weights, run, load_saved_config(run / "config.py"))


def read_adapter(trained: Trained) -> Adapter:
    """Read a run's LoRA."""
    peft = lora_config(trained.path)
    if not peft:
        raise UserError(f"{trained.path} has no lora_adapter_metadata: rank and alpha are not known. Did ScienceFlow write it?")
    peft["lora_dropout"] = 0.0  # files of version 0.4.0 state that of training, which would disturb every picture
    layers = {name.removeprefix("transformer."): tensor for name, tensor in load_tensors(trained.path).items()}
    return Adapter(trained.path, trained.run, trained.config, layers, peft)


def few_steps(config: Config, base: str | None) -> Drawing | None:
    """How to draw with weights that learned few steps, or on a distilled `base`; None where a picture has steps as one likes."""
    if base is not None and (model := build_model(config, draws_only=True)).is_distilled:
        return drawing_of_trained(model, config)
    return drawing_of_run(config) if config.distills else None


def _usage(drawing: Drawing) -> str:
    return f"num_inference_steps = {drawing.steps}, guidance_scale = {drawing.guidance:.1f}"


def modelspec(adapter: Adapter, format_name: str, drawing: Drawing | None = None) -> dict[str, str]:
    """Metadata after the ModelSpec standard 1.0.1 (Stability AI), with kohya's rank and alpha keys; `drawing` of few steps."""
    config, peft = adapter.config, adapter.peft
    base = config.pretrained_model_name_or_path.split("/")[-1].removeprefix("embedded:")
    newest = [path.name for path in list_checkpoints(adapter.run)[-1:]]  # the run's own adapter is its last step's
    names = newest if "checkpoint-" not in str(adapter.path.relative_to(adapter.run)) else [str(adapter.path)]
    step = re.search(r"checkpoint-(\d+)", "".join(names))
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base.lower()}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers" if format_name == "diffusers" else "https://github.com/comfyanonymous/ComfyUI",
        "modelspec.title": config.run_name or Path(config.model_output_dir).name,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{config.encode.resolution}x{config.encode.resolution}",
        "modelspec.prediction_type": "flow",
        **({} if drawing is None else {"modelspec.usage_hint": _usage(drawing)}),
        "ss_base_model_version": base,
        "ss_network_module": "peft.lora",
        "ss_network_dim": str(peft["r"]),
        "ss_network_alpha": str(peft["lora_alpha"]),
        "ss_steps": step[1] if step else "unknown",
    }


def export(
    target: str, out: Path | None, formats: tuple[str, ...], dtype: str | None, ema: bool = False, base: str | None = None
) -> list[Path]:  # fmt: skip
    """Write the weights of `target` in each format; returns the files or folders.

    `base`: the model that an adapter is for, where that is not the one that it was trained on; the files' metadata name it.

    A LoRA (fp32 where `dtype` is None): `diffusers` is `<out>/pytorch_lora_weights.safetensors`, for
    `pipe.load_lora_weights(out)`, alpha in the metadata, where diffusers looks for it; `comfyui` is
    `<out>/<name>_comfyui.safetensors`, the original repository's module names with `.alpha` tensors.
    All weights (as stored where `dtype` is None): `diffusers` is `<out>/transformer/`, for `from_pretrained`.
    """
    trained = find_trained(target, ema)
    folder = trained.output_folder("export")
    if base is not None:
        trained = replace(trained, config=config_of_adapter(trained.path, trained.config, base))
        folder = folder / f"on_{base_name(base)}"
    out = out or folder
    if real(out / trained.path.name) == real(trained.path):
        raise UserError(f"--out {out} is where the weights themselves lie. Choose another folder.")
    with sole_user(out, "export"), naming_full_disk(out, "Free space and run it again."):
        return _export(trained, out, formats, dtype, few_steps(trained.config, base))


def _export(trained: Trained, out: Path, formats: tuple[str, ...], dtype: str | None, drawing: Drawing | None) -> list[Path]:
    if drawing is not None:
        _LOG.info("to draw with what is exported: %s", _usage(drawing))
    if trained.is_lora:
        return _export_lora(read_adapter(trained), out, formats, _DTYPES[dtype or "fp32"], drawing)
    if "diffusers" not in formats:
        raise UserError(f"{trained.path} holds all weights, and comfyui is for a LoRA only. Use --format diffusers.")
    reader = TensorReader(trained.path, FULL_STEM)
    with unfinished(out / FULL_FOLDER) as building:
        with TensorWriter(building, FULL_STEM) as files:
            for name in tqdm(reader.names, desc="export", unit="tensor"):
                files.add(name, reader[name][:], _DTYPES[dtype] if dtype else None)
        shutil.copyfile(trained.path / "config.json", building / "config.json")
    return [out / FULL_FOLDER]


def _export_lora(
    adapter: Adapter, out: Path, formats: tuple[str, ...], dtype: torch.dtype, drawing: Drawing | None
) -> list[Path]:  # fmt: skip
    layers = {name: tensor.to(dtype) for name, tensor in adapter.layers.items()}
    written = []
    if "diffusers" in formats:
        metadata = modelspec(adapter, "diffusers", drawing)
        metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{k}": v for k, v in adapter.peft.items()}, sort_keys=True)
        metadata["format"] = "pt"
        written.append(out / LORA_FILE)
        with unfinished(written[-1]) as part:
            save_file({f"transformer.{name}": t.contiguous() for name, t in layers.items()}, part, metadata)
    if "comfyui" in formats:
        model: FigureModel = build_model(adapter.config)
        original = model.original_lora(layers, float(adapter.peft["lora_alpha"]), int(adapter.peft["r"]))
        name = re.sub(r"[^\w.-]+", "_", adapter.config.run_name or Path(adapter.config.model_output_dir).name)
        written.append(out / f"{name}_comfyui.safetensors")
        with unfinished(written[-1]) as part:
            save_file(original, part, modelspec(adapter, "comfyui", drawing))
    return written


def main(arguments: Namespace) -> int:
    formats = ("diffusers", "comfyui") if arguments.format == "both" else (arguments.format,)
    out = Path(arguments.out) if arguments.out else None
    for path in export(arguments.target, out, formats, arguments.dtype, arguments.ema, arguments.base):
        size = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
        print(f"{path}  ({size / 1e6:.2f} MB)")
    return 0
