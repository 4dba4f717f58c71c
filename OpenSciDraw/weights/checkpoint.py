"""Checkpoints: atomic, hashed, checked when read; no pickle; the same whatever the number of ranks.

    <model_output_dir>/checkpoint-<step>/pytorch_lora_weights.safetensors    LoRA: diffusers names, fp32
                                         transformer/                        full: diffusers layout, in the trained type
                                         ema/                                the same of the average, fp32
                                         optimizer.safetensors / .json       optimizer and scheduler state
                                         trainer_state.json                  step, data position, totals
                                         manifest.json                       sha256 of every file, written last

More than FILE_BYTES of tensors become several files with an index, as in the diffusers layout.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from OpenSciDraw.errors import UserError
from OpenSciDraw.parallel.sharding import gathered
from OpenSciDraw.utils.files import disk_is_full, let_read, naming_full_disk, parse_json, sha256_of, sync_to_disk

_LOG = logging.getLogger("OpenSciDraw")
_NAME = re.compile(r"checkpoint-(\d+)")
FULL_DISK = "Earlier checkpoints are whole. Free space and run the same command with resume_from_checkpoint = 'latest'."
LORA_FILE = "pytorch_lora_weights.safetensors"
FULL_FOLDER, FULL_STEM = "transformer", "diffusion_pytorch_model"  # diffusers' names
EMA_FOLDER = "ema"
FILE_BYTES = 5_000_000_000
HASHING_THREADS = 8


class DamagedCheckpoint(Exception):
    """A checkpoint's files are not those that were written."""


# -- tensors in files, a few at a time ------------------------------------------------------------
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


# -- trees of tensors and plain values, without pickle ------------------------------------------
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


# -- writing -----------------------------------------------------------------------------------
class CheckpointWriter:
    """`with CheckpointWriter(out, step) as folder:` fill the folder; it gets its name when all is on disk."""

    def __init__(self, output_dir: Path, step: int, write: bool = True):
        self.write = write  # False on the ranks that only take part in gathering
        self.final = output_dir / f"checkpoint-{step}"
        self.building = output_dir / f".checkpoint-{step}.tmp"

    def __enter__(self) -> Path:
        if not self.write:
            return self.building
        for left in self.building.parent.glob(".checkpoint-*.tmp"):  # of this step or another, by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.building.mkdir(parents=True)
        return self.building

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if not self.write:
            return
        if kind is not None:
            shutil.rmtree(self.building, ignore_errors=True)
            if disk_is_full(value):
                with naming_full_disk(self.final, FULL_DISK):
                    raise value
            return
        files = sorted(path for path in self.building.rglob("*") if path.is_file())
        hashes = {}
        for path in files:
            hashes[str(path.relative_to(self.building))] = sha256_of(path)
            sync_to_disk(path)
        manifest = self.building / "manifest.json"
        manifest.write_text(json.dumps(hashes, indent=1))
        sync_to_disk(manifest)
        for folder in (self.building, *(path for path in self.building.rglob("*") if path.is_dir())):
            sync_to_disk(folder)
        if self.final.exists():  # only a damaged one can be here: a good one would have been resumed from
            shutil.rmtree(self.final)
        os.replace(self.building, self.final)
        sync_to_disk(self.final.parent)


def delete_old(output_dir: Path, limit: int | None) -> None:
    """Keep the newest `limit` checkpoints (None keeps all)."""
    if limit is not None:
        for path in list_checkpoints(output_dir)[:-limit]:
            shutil.rmtree(path)


# -- finding and checking ----------------------------------------------------------------------
def list_checkpoints(output_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [(int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def check(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        DamagedCheckpoint: names the first file that is missing or differs.
    """
    manifest = folder / "manifest.json"
    if not manifest.exists():
        raise DamagedCheckpoint(f"{folder}: manifest.json is missing")
    try:
        hashes = parse_json(manifest.read_bytes())
        if not isinstance(hashes, dict):
            raise ValueError("a list of hashes by file name is expected")
        paths = [folder / name for name in hashes]
        for path in paths:
            if not path.is_file():
                raise DamagedCheckpoint(f"{path} is missing")
        with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing holds no lock, so files go side by side
            for path, digest, found in zip(paths, hashes.values(), pool.map(sha256_of, paths), strict=True):
                if found != digest:
                    raise DamagedCheckpoint(f"{path} is not the file that was written (sha256 differs)")
    except (OSError, ValueError) as error:  # not JSON; a name that is too long, or none
        raise DamagedCheckpoint(f"{manifest}: {error}") from error


def find_checkpoint(output_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: None, "latest" or "checkpoint-<step>".

    "latest" in a folder without any starts at step 0 and says so; a damaged latest is named, and the one
    before it is used.

    Raises:
        UserError: a named checkpoint that does not exist or is damaged; only damaged ones there.
    """
    if wanted is None:
        return None
    there = list_checkpoints(output_dir)
    names = ", ".join(path.name for path in there) or "none"
    if wanted != "latest":
        folder = output_dir / wanted
        if folder not in there:
            raise UserError(f"resume_from_checkpoint = {wanted!r}: not in {output_dir}. There: {names}.")
        try:
            check(folder)
        except DamagedCheckpoint as error:
            raise UserError(f"resume_from_checkpoint = {wanted!r} is damaged: {error}. There: {names}.") from error
        return folder
    for folder in reversed(there):
        try:
            check(folder)
        except DamagedCheckpoint as error:
            _LOG.warning("Damaged checkpoint passed over: %s", error)
            continue
        return folder
    if there:
        raise UserError(f"Every checkpoint in {output_dir} is damaged ({names}). Set resume_from_checkpoint = None to start over.")
    _LOG.info("resume_from_checkpoint = 'latest': no checkpoint in %s yet, so this run starts at step 0", output_dir)
    return None


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, opened. Raises UserError where it is not there or not readable."""
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}).") from error


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


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        UserError: not there or not readable.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}).") from error
