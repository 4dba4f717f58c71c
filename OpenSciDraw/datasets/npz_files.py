"""Latents and text in npz files, as the layouts before the store have them: opened without trust, checked, in our shapes."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

TEXT = ("text_embeds", "prompt_embeds")  # names of embeddings
_MASK = ("text_mask", "attention_mask")
_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # of damaged files, beside OSError and ValueError


def read_npz(
    folder: Path, name: str | None, parts: Mapping[str, Sequence[str]], optional: Sequence[str] = (), column: str = "cache_path"
) -> dict[str, np.ndarray]:
    """The arrays of `<folder>/<name>` by part: each of `parts` as whichever of its names is there, and the mask of text.

    `column`: the one that `name` is from, for messages. Raises ValueError where the file lies outside of the folder, is damaged or
    lacks a part that is not `optional`, OSError where it cannot be read.
    """
    path = Path(os.path.normpath(folder / (name or "..")))
    if not path.is_relative_to(folder):
        raise ValueError(f"{column} {name!r} leads out of {folder}")
    try:
        with _open_npz(path) as data:
            wanted = dict(parts)
            if "text" in parts and "text_ids" not in data.files:  # with them it is FLUX's text, whose pads belong to it
                wanted["mask"] = _MASK
            out = {part: data[key] for part, keys in wanted.items() for key in keys if key in data.files}
    except _ERRORS as error:
        raise ValueError(f"{path}: damaged npz file: {error}") from error
    lacking = [" or ".join(parts[part]) for part in parts if part not in out and part not in optional]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}")
    return out


def _open_npz(path: Path) -> NpzFile:
    data = np.load(path, allow_pickle=False)
    if not isinstance(data, NpzFile):
        raise ValueError(f"{path} is not an npz file")
    return data


def require_numbers(name: str, array: np.ndarray, declared: Sequence[int] | None = None) -> None:
    """Raises ValueError unless these are finite floating-point numbers, of the shape that the row declares."""
    if array.dtype.kind != "f":
        raise ValueError(f"{name} are {array.dtype}, not floating-point numbers")
    if wrong := array.size - int(np.isfinite(array).sum()):
        raise ValueError(f"{name} with numbers that are not finite: {wrong} of {array.size}")
    if declared is not None and array.shape != tuple(declared):
        raise ValueError(f"{name} are {array.shape}, the row says {tuple(declared)}")


def latents_of(array: np.ndarray, is_posterior: bool) -> np.ndarray:
    """(C, h, w) of latents, or of a posterior's mean || logvar (2C, h, w): the mean is its mode."""
    latents = array[: len(array) // 2] if is_posterior else array
    return latents[:, 0] if latents.ndim == 4 and latents.shape[1] == 1 else latents  # Qwen's VAE is one for films: (C, 1, h, w)


def text_of(arrays: Mapping[str, np.ndarray]) -> Tensor:
    """(L, D); text with a mask is trimmed to its tokens."""
    text, mask = arrays["text"], arrays.get("mask")
    if text.ndim != 2:
        raise ValueError(f"text is {text.shape}, expected (tokens, width)")
    if mask is not None:
        if mask.shape != text.shape[:1] or not mask.any():
            raise ValueError(f"the text's mask is {mask.shape} with {np.count_nonzero(mask)} tokens, the text {text.shape}")
        text = text[mask.astype(bool)]
    return torch.from_numpy(text)
