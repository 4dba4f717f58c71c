"""Weights of a whole transformer to start from, whoever wrote them: a diffusers folder, a hub repository, one file."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from OpenSciDraw.errors import UserError
from OpenSciDraw.models.original_names import FromOriginal, Place
from OpenSciDraw.utils.tensor_files import FULL_FOLDER, FULL_STEM, TensorReader

_LOG = logging.getLogger("OpenSciDraw")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TORCH_FILES = (".pt", ".pth", ".bin")
_LIST = "shadow_params"  # of diffusers' EMAModel.state_dict(): parameters in the model's order, without names


class Weights(Protocol):
    """Tensors by their names in diffusers' model; of `TensorReader`, slices that are not read yet."""

    @property
    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def __getitem__(self, name: str) -> Any: ...


class _Tensors:
    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    @property
    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def open_weights(
    given: str, parameters: Mapping[str, Tensor], token: str | None = None, original: Callable[[str], Place | None] | None = None
) -> Weights:
    """The weights that `pretrained_full_ckpt_path` names, for a model with these `parameters`, in its order.

    `given` is a folder with diffusers' files or with `transformer/` in it, the id of a hub repository with `transformer/`
    (fetched), a .safetensors file with diffusers' names or with the original's (which `original`, a family's `original_place`,
    knows: the one file that ComfyUI loads), or a file of torch, read by its weights-only loader: a state dict, or the
    `ema_weights.pt` of diffusers' EMAModel, a list that is matched to the parameters by its order.

    Raises:
        UserError: nothing there, not readable, something else than weights, or a list of another length or other shapes.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return TensorReader(path / FULL_FOLDER if (path / FULL_FOLDER).is_dir() else path, FULL_STEM)
    if path.is_file() and path.suffix == ".safetensors":
        return _one_file(path, parameters, original)
    if path.is_file() and path.suffix in _TORCH_FILES:
        return _Tensors(_read_torch(path, parameters))
    if not path.exists() and _HUB_ID.fullmatch(given):
        return TensorReader(_fetch(given, token) / FULL_FOLDER, FULL_STEM)
    raise UserError(
        f"pretrained_full_ckpt_path = {given!r}: no such folder. Give a folder with diffusers' weights, a hub id, or a file: "
        f".safetensors, {', '.join(_TORCH_FILES)}."
    )


def _one_file(path: Path, parameters: Mapping[str, Tensor], original: Callable[[str], Place | None] | None) -> Weights:
    reader = TensorReader(path.parent, path.stem)
    if not parameters.keys() & set(reader.names) and original is not None:
        places = {name: place for name in parameters if (place := original(name)) is not None}
        found = FromOriginal(places, reader.names, reader.tensor, reader.shape)
        if len(found.names) > len(found.unknown):
            _LOG.info("%s: weights with the original's names, as ComfyUI loads them", path)
            return found
    return reader


def _read_torch(path: Path, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError) as error:
        first = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{path}: torch's weights-only loader refuses it ({first}). Nothing else of such a file is run.") from error
    if isinstance(found, dict) and isinstance(found.get(_LIST), list):
        return _by_order(path, found[_LIST], parameters)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise UserError(f"{path} holds no weights: neither tensors by name nor {_LIST!r}.")
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def _by_order(path: Path, tensors: list[Any], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if len(tensors) != len(parameters) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise UserError(
            f"{path}: {_LIST} is a list of {len(tensors)} tensors without names, and this model has {len(parameters)} parameters: "
            "it is of another model."
        )
    pairs = list(zip(parameters.items(), tensors, strict=True))
    for at, ((name, own), tensor) in enumerate(pairs):
        if own.shape != tensor.shape:
            raise UserError(
                f"{path}: tensor {at} of {_LIST} is {tuple(tensor.shape)}, the parameter at that place, {name}, is "
                f"{tuple(own.shape)}: it is of another model."
            )
    _LOG.info("%s: %d tensors without names, matched to the parameters by their order; every shape agrees", path, len(pairs))
    return {name: tensor for (name, _), tensor in pairs}


def _fetch(repository: str, token: str | None) -> Path:
    """The folder here of a hub repository's transformer."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(repository, allow_patterns=[f"{FULL_FOLDER}/*"], token=token or os.environ.get("HF_TOKEN"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"pretrained_full_ckpt_path = {repository!r}: neither a folder nor to be had from the hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]})."
        ) from error
    if not (Path(found) / FULL_FOLDER).is_dir():
        raise UserError(f"pretrained_full_ckpt_path = {repository!r}: the repository has no {FULL_FOLDER}/.")
    return Path(found)
