"""How weights and a run's state lie in files: tensors, trees of them, LoRA files, and the folders of a run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from OpenSciDraw.errors import UserError
from OpenSciDraw.parallel.sharding import gathered
from OpenSciDraw.utils.files import let_read, parse_json
from OpenSciDraw.utils.tensor_files import TensorReader, open_tensors

_NAME = re.compile(r"checkpoint-(\d+)")
LORA_FILE = "pytorch_lora_weights.safetensors"
EMA_FOLDER = "ema"
OLD_POLICY_FOLDER = "old_policy"
FILE_BYTES = 5_000_000_000


class TensorWriter:
    """Tensors, one after another, into `<stem>.safetensors`, or several files with `<stem>.safetensors.index.json`.

    Every rank adds every tensor, because dealt ones are gathered; only the one with `write` keeps and writes them,
    never more than FILE_BYTES at a time.
    """

    def __init__(self, folder: Path, stem: str, write: bool = True):
        self.folder, self.stem, self.write = folder, stem, write
        self._pending: dict[str, Tensor] = {}
        self._bytes, self._total = 0, 0
        self._files: list[tuple[Path, list[str]]] = []

    def __enter__(self) -> TensorWriter:
        if self.write:
            self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def add(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        whole = gathered(tensor).detach()
        if not self.write:
            return
        size = whole.numel() * (dtype or whole.dtype).itemsize
        if self._pending and self._bytes + size > FILE_BYTES:
            self._flush()
        self._pending[name] = whole.to("cpu", dtype).contiguous()
        self._bytes += size

    def _flush(self) -> None:
        path = self.folder / f"{self.stem}-{len(self._files) + 1:05d}.part"
        save_file(self._pending, path, {"format": "pt"})
        let_read(path)
        self._files.append((path, list(self._pending)))
        self._total += self._bytes
        self._pending, self._bytes = {}, 0

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if kind is not None or not self.write:
            return
        self._flush()
        count = len(self._files)
        places: dict[str, str] = {}
        for at, (path, names) in enumerate(self._files, 1):
            final = f"{self.stem}-{at:05d}-of-{count:05d}.safetensors" if count > 1 else f"{self.stem}.safetensors"
            os.replace(path, self.folder / final)
            places |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": places}
            (self.folder / f"{self.stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))


def save_tree(path: Path, tree: Any, write: bool = True) -> None:
    """Save nested dicts, lists, tensors and JSON values as `path`.safetensors and `path`.json (every rank calls it)."""
    count = 0
    with TensorWriter(path.parent, path.name, write) as files:

        def strip(node: Any) -> Any:
            nonlocal count
            if callable(node):  # a tensor that is gathered when its turn comes
                node = node()
            if isinstance(node, Tensor):
                files.add(str(count), node)
                count += 1
                return {"__tensor__": str(count - 1)}
            if isinstance(node, dict):
                return {"__dict__": [[key, strip(value)] for key, value in node.items()]}  # keys may be integers
            if isinstance(node, (list, tuple)):
                return [strip(value) for value in node]
            if node is None or isinstance(node, (bool, int, float, str)):
                return node
            raise TypeError(f"a checkpoint holds tensors and plain values, not {type(node).__name__}")

        text = json.dumps(strip(tree))
        if write:
            path.with_suffix(".json").write_text(text)


Place = Callable[[tuple[Any, ...], Any, tuple[int, ...]], "Tensor | None"]


def load_tree(path: Path, place: Place | None = None) -> Any:
    """Read what `save_tree` wrote. `place(keys, slice, shape)` may give a tensor of its own instead of the whole one."""
    reader = TensorReader(path.parent, path.name)

    def fill(node: Any, keys: tuple[Any, ...]) -> Any:
        if isinstance(node, dict):
            if "__tensor__" in node:
                source, shape = reader[node["__tensor__"]], reader.shape(node["__tensor__"])
                own = None if place is None else place(keys, source, shape)
                return own if own is not None else source[:] if shape else source
            return {key: fill(value, (*keys, key)) for key, value in node["__dict__"]}
        return [fill(value, (*keys, at)) for at, value in enumerate(node)] if isinstance(node, list) else node

    return fill(parse_json(path.with_suffix(".json").read_text()), ())


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [(int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def lora_config(path: Path) -> dict[str, Any]:
    """What a diffusers LoRA file says of its adapter (PEFT's config, without the pipeline's prefix); empty where it says nothing.

    Raises:
        UserError: not readable, or what it says is damaged.
    """
    with open_tensors(path) as handle:
        stated = (handle.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        return {key.removeprefix("transformer."): value for key, value in parse_json(stated).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: its lora_adapter_metadata is damaged ({error}).") from error
