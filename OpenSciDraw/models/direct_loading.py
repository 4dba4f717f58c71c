"""A transformer's weights straight from safetensors files to the device that computes with them.

diffusers' `from_pretrained` builds the model in CPU memory, casts there, and is then moved. Here the model is built without
memory and each tensor is read onto the device and cast there; the result is the same to the bit, see
tests/models/test_direct_loading.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from OpenSciDraw.errors import UserError
from OpenSciDraw.utils.files import parse_json
from OpenSciDraw.utils.tensor_files import FULL_STEM, TensorReader, weight_file_names

if TYPE_CHECKING:
    from OpenSciDraw.models.source import ModelSource

_LOG = logging.getLogger("OpenSciDraw")


def local_folder(source: ModelSource, part: str) -> Path | None:
    """The folder on this machine that holds a component's safetensors files, fetched from the hub where they are not here.

    None where there are no such files, or the hub cannot say: then diffusers' loader finds other formats, or the right error.
    """
    single, index = weight_file_names(FULL_STEM, source.variant)
    if source.is_local:
        folder = Path(source.name) / part
        return folder if (folder / index).exists() or (folder / single).exists() else None
    found = _fetch(source, part, index)
    if found is None:
        found = _fetch(source, part, single)
        return None if found is None else found.parent
    for name in sorted(set(_shards(found))):
        if _fetch(source, part, name) is None:
            return None
    return found.parent


def _shards(index: Path) -> list[str]:
    return list(parse_json(index.read_text())["weight_map"].values())


def _fetch(source: ModelSource, part: str, name: str) -> Path | None:
    """One file of a hub model, or None when it is not there or cannot be reached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = hf_hub_download(
            source.name, name, subfolder=part, revision=source.revision, cache_dir=source.cache_dir, token=source.token
        )
    except (HfHubHTTPError, OSError):
        return None
    return Path(path)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def empty(cls: Any, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """A diffusers model by its config, frozen and in eval mode, with its parameters on meta in `dtype`.

    Buffers are small and stay real, since tables of RoPE are in no file; made in `dtype`, as `from_pretrained` makes them.
    """
    from accelerate import init_empty_weights

    with _default_dtype(dtype), init_empty_weights():
        model = cls.from_config(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def kept_in_fp32(cls: Any) -> set[str]:
    """Parts of parameters' names that a class of diffusers or transformers keeps in fp32 whatever the dtype; most keep none."""
    names = getattr(cls, "_keep_in_fp32_modules", None) or []
    return {names} if isinstance(names, str) else set(names)


def load(cls: Any, config: dict[str, Any], reader: TensorReader, dtype: torch.dtype, device: torch.device) -> Any:
    """The model by `config` with the reader's tensors, floating ones in `dtype`, on `device`.

    Modules that the class keeps in fp32 stay so; tensors that the model does not know are named in a warning, as by diffusers.

    Raises:
        UserError: a tensor is missing, damaged or of another shape than the config says.
    """
    model = empty(cls, config, dtype)
    expected: dict[str, Tensor] = model.state_dict()
    _require_fit(cls, expected, reader)
    keep = kept_in_fp32(cls)
    tensors = {}
    for name in expected:
        tensor = reader.tensor(name)
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float32 if keep & set(name.split(".")) else dtype)
        tensors[name] = tensor
    model.load_state_dict(tensors, assign=True)
    return model.to(device).eval().requires_grad_(False)  # moves what the reader could not: buffers, devices other than CUDA


def _require_fit(cls: Any, expected: dict[str, Tensor], reader: TensorReader) -> None:
    there = set(reader.names)
    missing = sorted(expected.keys() - there)
    if missing:
        raise UserError(
            f"{reader.folder}: {len(missing)} tensor(s) of {cls.__name__} are missing: {', '.join(missing[:5])}. "
            "The files are not whole, or belong to another config.json. Fetch the folder again."
        )
    shapes = [f"{name} is {reader.shape(name)} in the file, {tuple(tensor.shape)} by config.json"
              for name, tensor in expected.items() if reader.shape(name) != tuple(tensor.shape)]  # fmt: skip
    if shapes:
        which = "; ".join(shapes[:3])
        raise UserError(f"{reader.folder}: {len(shapes)} tensor(s) of another shape: {which}. Fetch the folder again.")
    ignored = cls._keys_to_ignore_on_load_unexpected or []
    unknown = sorted(name for name in there - expected.keys() if not any(re.search(pattern, name) for pattern in ignored))
    if unknown:
        which = ", ".join(unknown[:5])
        _LOG.warning("%s: %d tensors are not of %s and are left out: %s", reader.folder, len(unknown), cls.__name__, which)
