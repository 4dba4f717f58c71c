"""Tensors in safetensors files, one or several with an index, read a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from OpenSciDraw.errors import UserError
from OpenSciDraw.utils.files import parse_json

FULL_FOLDER, FULL_STEM = "transformer", "diffusion_pytorch_model"  # diffusers' names


def weight_file_names(stem: str, variant: str | None = None) -> tuple[str, str]:
    """Names of the one file of weights, and of the index where there are several."""
    if variant is None:
        return f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    return f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json"


class TensorReader:
    """What TensorWriter (or diffusers) wrote, tensor by tensor: `reader[name]` is a safetensors slice, not yet read.

    `device`: a CUDA device that tensors are put on as they are read; for others they stay in CPU memory.
    `variant`: of the files' names, as diffusers writes it.

    Raises:
        UserError: nothing there, not readable as safetensors, or a name that leads out of the folder.
    """

    def __init__(self, folder: Path, stem: str, device: torch.device | None = None, variant: str | None = None):
        self.folder = folder
        single, index_name = weight_file_names(stem, variant)
        index = folder / index_name
        place = str(device) if device is not None and device.type == "cuda" else "cpu"  # safetensors knows no cpu:0
        try:
            names = sorted(set(parse_json(index.read_text())["weight_map"].values())) if index.exists() else [single]
            if any(Path(name).name != name for name in names):
                raise UserError(f"{index}: its file names must lie in its own folder.")
            self._handles = [safe_open(folder / name, framework="pt", device=place) for name in names]
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{folder / single}: cannot be read ({type(error).__name__}: {error}).") from error
        self._handle_of = {name: handle for handle in self._handles for name in handle.keys()}

    @property
    def names(self) -> list[str]:
        return sorted(self._handle_of)

    def __getitem__(self, name: str) -> Any:
        handle = self._handle_of[name]
        part = handle.get_slice(name)
        return part if part.get_shape() else handle.get_tensor(name)

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, on `device` (or the CPU).

        Raises:
            UserError: its bytes cannot be read.
        """
        try:
            return self._handle_of[name].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder}: the tensor {name} cannot be read ({type(error).__name__}: {error}).") from error

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle_of[name].get_slice(name).get_shape())


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, opened. Raises UserError where it is not there or not readable."""
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}).") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        UserError: not there or not readable.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}).") from error
