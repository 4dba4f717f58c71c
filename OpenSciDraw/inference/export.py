"""`scienceflow export`: trained weights as the files that other programs load."""

from __future__ import annotations

import datetime
import json
import logging
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from OpenSciDraw.config import Config, Drawing, drawing_of_run
from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.comfyui import adapter_tensors, original_places, write_original
from OpenSciDraw.inference.other_base import base_name, config_of_adapter
from OpenSciDraw.inference.pictures import drawing_of_trained
from OpenSciDraw.models.base import build_model
from OpenSciDraw.utils.files import naming_full_disk, real, unfinished
from OpenSciDraw.utils.sole_user import sole_user
from OpenSciDraw.utils.tensor_files import FULL_FOLDER, FULL_STEM, TensorReader
from OpenSciDraw.weights.adapter_files import read_adapter_file
from OpenSciDraw.weights.files import EMA_FOLDER, LORA_FILE, TensorWriter, list_checkpoints
from OpenSciDraw.weights.other_programs import Weights
from OpenSciDraw.weights.trainable import read_lora
from OpenSciDraw.weights.updates import Update

_LOG = logging.getLogger("OpenSciDraw")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Trained:
    """What a run trained: `path` is an adapter's file, or the `transformer/` folder of all weights.

    `is_base`: nothing yet; `path` is the config file, and its base is meant.
    """

    path: Path
    run: Path
    config: Config
    is_base: bool = field(default=False, kw_only=True)

    @property
    def is_lora(self) -> bool:
        return self.path.is_file() and not self.is_base

    def output_folder(self, kind: str) -> Path:
        """`<run>/<kind>` for the run's own weights, `<run>/<kind>/<its folder>` for a checkpoint's or an average."""
        if self.is_base:
            return self.run / kind
        return self.run / kind / self.path.parent.relative_to(self.run)


@dataclass(frozen=True)
class Adapter(Trained):
    """An adapter read from disk, of any program: what it does to each layer, and PEFT's config of it, where the file has one.

    `layers`: the tensors in diffusers' names without prefix.
    """

    updates: dict[str, Update]
    layers: dict[str, Tensor]
    peft: dict[str, Any]

    @property
    def rank_and_alpha(self) -> tuple[int, float]:
        ranks = [update.rank for update in self.updates.values() if update.kind == "lora"]
        rank = int(self.peft.get("r") or max(ranks, default=0))
        return rank, float(self.peft.get("lora_alpha", self.peft.get("alpha", rank)))


def _weights_in(folder: Path) -> Path | None:
    """A LoRA file or `transformer/` in `folder`."""
    found = (folder / LORA_FILE, folder / FULL_FOLDER / "config.json")
    return found[0] if found[0].is_file() else found[1].parent if found[1].is_file() else None


def find_trained(target: str, ema: bool = False, config: str | None = None) -> Trained:
    """The weights of a run folder, of one of its checkpoints, or a LoRA file or `transformer/` in either.

    `ema`: their average over the steps (`use_ema`). `config`: a config file that says whose model they are, for weights of other
    programs, beside which none lies.

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
    from OpenSciDraw.config import load_config, load_saved_config

    if config is not None:
        return Trained(weights, weights.parent, load_config(config, complete=False))
    run = next((p for p in list(weights.parents)[:3] if (p / "config.py").is_file()), None)
    if run is None:
        raise UserError(
            f"{target}: no config.py beside the weights, so their model is not known. Give a folder of training, or "
            "--config CONFIG."
        )

    return Trained(weights, run, load_saved_config(run / "config.py"))


def read_adapter(trained: Trained) -> Adapter:
    """Read a run's adapter, or one of another program."""
    found = read_adapter_file(trained.path, build_model(trained.config, draws_only=True))
    peft = dict(found.stated)
    if peft.get("peft_type") and peft.get("auto_mapping") is None and trained.path.suffix == ".safetensors":
        peft |= {name: 0.0 for name in ("lora_dropout", "module_dropout") if name in peft}  # it would disturb every picture
        return Adapter(trained.path, trained.run, trained.config, found.updates, read_lora(trained.path), peft)
    if not all(update.is_low_rank for update in found.updates.values()):
        return Adapter(trained.path, trained.run, trained.config, found.updates, {}, {})
    layers = {f"{name}.lora_A.weight": update.tensors["down"].clone() for name, update in found.updates.items()}
    layers |= {f"{name}.lora_B.weight": update.tensors["up"] * update.scale for name, update in found.updates.items()}
    return Adapter(trained.path, trained.run, trained.config, found.updates, layers, plain_config(found.updates))


def plain_config(updates: dict[str, Update]) -> dict[str, Any]:
    """PEFT's config of a LoRA whose scales are in its tensors, each layer with its own rank."""
    ranks = {name: update.rank for name, update in updates.items()}
    most = max(ranks.values())
    other = {f"^{name}": rank for name, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA", "r": most, "lora_alpha": most, "rank_pattern": other, "alpha_pattern": dict(other),
        "lora_dropout": 0.0, "target_modules": sorted(ranks), "bias": "none",
    }  # fmt: skip


def few_steps(config: Config, base: str | None) -> Drawing | None:
    """How to draw with weights that learned few steps, or on a distilled `base`; None where a picture has steps as one likes."""
    if base is not None and (model := build_model(config, draws_only=True)).is_distilled:
        return drawing_of_trained(model, config)
    return drawing_of_run(config) if config.distills else None


def _usage(drawing: Drawing) -> str:
    return f"num_inference_steps = {drawing.steps}, guidance_scale = {drawing.guidance:.1f}"


def modelspec(adapter: Adapter, format_name: str, drawing: Drawing | None = None) -> dict[str, str]:
    """Metadata after the ModelSpec standard 1.0.1 (Stability AI), with kohya's rank and alpha keys; `drawing` of few steps."""
    config, (rank, alpha) = adapter.config, adapter.rank_and_alpha
    base = config.pretrained_model_name_or_path.split("/")[-1].removeprefix("embedded:")
    newest = [path.name for path in list_checkpoints(adapter.run)[-1:]]  # the run's own adapter is its last step's
    names = newest if "checkpoint-" not in str(adapter.path.relative_to(adapter.run)) else [str(adapter.path)]
    step = re.search(r"checkpoint-(\d+)", "".join(names))
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base.lower()}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers" if format_name == "diffusers" else "https://github.com/comfyanonymous/ComfyUI",
        "modelspec.title": _title(config),
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{config.encode.resolution}x{config.encode.resolution}",
        "modelspec.prediction_type": "flow",
        **({} if drawing is None else {"modelspec.usage_hint": _usage(drawing)}),
        "ss_base_model_version": base,
        "ss_network_module": "peft.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_steps": step[1] if step else "unknown",
    }


def export(
    target: str, out: Path | None, formats: tuple[str, ...], dtype: str | None, ema: bool = False, base: str | None = None,
    config: str | None = None,
) -> list[Path]:  # fmt: skip
    """Write the weights of `target` in each format; returns the files or folders.

    `base`: the model that an adapter is for, where that is not the one that it was trained on; the files' metadata name it.
    `config`: as for `find_trained`.

    An adapter (fp32 where `dtype` is None): `diffusers` is `<out>/pytorch_lora_weights.safetensors`, for
    `pipe.load_lora_weights(out)`, alpha in the metadata, where diffusers looks for it; `comfyui` is
    `<out>/<name>_comfyui.safetensors`, the original repository's module names with `.alpha` tensors.
    All weights (as stored where `dtype` is None): `diffusers` is `<out>/transformer/`, for `from_pretrained`; `comfyui` is one
    file, `<out>/<name>_comfyui.safetensors`, with the original's names.
    """
    trained = find_trained(target, ema, config)
    folder = trained.output_folder("export")
    if base is not None:
        trained = replace(trained, config=config_of_adapter(trained.path, trained.config, base))
        folder = folder / f"on_{base_name(base)}"
    out = out or folder
    if real(out / trained.path.name) == real(trained.path):
        raise UserError(f"--out {out} is where the weights themselves lie. Choose another folder.")
    with sole_user(out, "export"), naming_full_disk(out, "Free space and run it again."):
        drawing = few_steps(trained.config, base)
        if drawing is not None:
            _LOG.info("to draw with what is exported: %s", _usage(drawing))
        if trained.is_lora:
            return write_adapter(read_adapter(trained), out, formats, DTYPES[dtype or "fp32"], drawing)
        reader = TensorReader(trained.path, FULL_STEM)
        return write_weights(trained, reader, lambda name: reader[name][:], out, formats, DTYPES[dtype] if dtype else None)


def write_weights(
    trained: Trained, reader: Weights, read: Callable[[str], Tensor], out: Path, formats: tuple[str, ...],
    dtype: torch.dtype | None,
) -> list[Path]:  # fmt: skip
    """Write all weights, whose names and shapes `reader` has and whose values `read` gives, in each format.

    Raises:
        UserError: the family does not say its names in ComfyUI's file.
    """
    written, model = [], build_model(trained.config, draws_only=True)
    places = original_places(model, reader.names) if "comfyui" in formats else {}
    if "diffusers" in formats:
        written.append(out / FULL_FOLDER)
        with unfinished(out / FULL_FOLDER) as building:
            with TensorWriter(building, FULL_STEM) as files:
                for name in tqdm(reader.names, desc="diffusers", unit="tensor"):
                    files.add(name, read(name), dtype)
            (building / "config.json").write_text(json.dumps(model.transformer_config(), indent=2, sort_keys=True))
    if "comfyui" in formats:
        kept = dtype or read(next(iter(places))).dtype
        written.append(out / f"{_file_stem(trained.config)}_comfyui.safetensors")
        write_original(written[-1], places, reader.shape, read, kept, {"modelspec.title": _title(trained.config)})
    return written


def _title(config: Config) -> str:
    return config.run_name or Path(config.model_output_dir).name


def _file_stem(config: Config) -> str:
    return re.sub(r"[^\w.-]+", "_", _title(config))


def write_adapter(
    adapter: Adapter, out: Path, formats: tuple[str, ...], dtype: torch.dtype, drawing: Drawing | None = None
) -> list[Path]:
    """Write an adapter in each format; `drawing` of few steps goes into the metadata.

    Raises:
        UserError: it has no form there.
    """
    written = []
    if "diffusers" in formats:
        if not adapter.layers:
            raise UserError(
                f"{adapter.path} is no LoRA, and was not written by PEFT, which diffusers needs. Use --format comfyui, or merge it "
                "into the base: scienceflow merge CONFIG --lora FILE."
            )
        metadata = modelspec(adapter, "diffusers", drawing)
        metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{k}": v for k, v in adapter.peft.items()}, sort_keys=True)
        metadata["format"] = "pt"
        written.append(out / LORA_FILE)
        with unfinished(written[-1]) as part:
            save_file({f"transformer.{name}": t.to(dtype).contiguous() for name, t in adapter.layers.items()}, part, metadata)
    if "comfyui" in formats:
        made = adapter_tensors(build_model(adapter.config, draws_only=True), adapter.updates)
        typed = {name: tensor if name.endswith(".alpha") else tensor.to(dtype) for name, tensor in made.items()}
        written.append(out / f"{_file_stem(adapter.config)}_comfyui.safetensors")
        with unfinished(written[-1]) as part:
            save_file(typed, part, modelspec(adapter, "comfyui", drawing))
    return written


def say_written(paths: list[Path]) -> None:
    """Each file or folder with its size."""
    for path in paths:
        size = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
        print(f"{path}  ({size / 1e6:.2f} MB)")


def formats_of(choice: str) -> tuple[str, ...]:
    return ("diffusers", "comfyui") if choice == "both" else (choice,)


def main(arguments: Namespace) -> int:
    out = Path(arguments.out) if arguments.out else None
    trained = find_trained(arguments.target, arguments.ema, arguments.config)
    # of all weights one copy is enough, unless two are asked for
    choice = arguments.format or ("both" if trained.is_lora else "diffusers")
    say_written(export(arguments.target, out, formats_of(choice), arguments.dtype, arguments.ema, arguments.base, arguments.config))
    return 0
