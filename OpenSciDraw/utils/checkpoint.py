"""Checkpoints: atomic, hashed, checked when read; no pickle.

    <model_output_dir>/checkpoint-<step>/pytorch_lora_weights.safetensors    diffusers names, fp32
                                         optimizer.safetensors / .json       optimizer and scheduler state
                                         trainer_state.json                  step, data position, totals
                                         manifest.json                       sha256 of every file, written last
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from OpenSciDraw.errors import UserError
from OpenSciDraw.utils.files import sha256_of, sync_to_disk

_LOG = logging.getLogger("OpenSciDraw")
_NAME = re.compile(r"checkpoint-(\d+)")
LORA_FILE = "pytorch_lora_weights.safetensors"


class DamagedCheckpoint(Exception):
    """A checkpoint's files are not those that were written."""


# -- trees of tensors and plain values, without pickle ------------------------------------------
def save_tree(path: Path, tree: Any) -> None:
    """Save nested dicts, lists, tensors and JSON values as `path`.safetensors and `path`.json."""
    tensors: dict[str, Tensor] = {}

    def strip(node: Any) -> Any:
        if isinstance(node, Tensor):
            tensors[str(len(tensors))] = node.detach().cpu().contiguous().clone()
            return {"__tensor__": str(len(tensors) - 1)}
        if isinstance(node, dict):
            return {"__dict__": [[key, strip(value)] for key, value in node.items()]}  # keys may be integers
        if isinstance(node, (list, tuple)):
            return [strip(value) for value in node]
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"a checkpoint holds tensors and plain values, not {type(node).__name__}")

    path.with_suffix(".json").write_text(json.dumps(strip(tree)))
    save_file(tensors, path.with_suffix(".safetensors"))


def load_tree(path: Path) -> Any:
    """Read what `save_tree` wrote."""
    tensors = load_file(path.with_suffix(".safetensors"))

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            if "__tensor__" in node:
                return tensors[node["__tensor__"]]
            return {key: fill(value) for key, value in node["__dict__"]}
        return [fill(value) for value in node] if isinstance(node, list) else node

    return fill(json.loads(path.with_suffix(".json").read_text()))


# -- writing -----------------------------------------------------------------------------------
class CheckpointWriter:
    """`with CheckpointWriter(out, step) as folder:` fill the folder; it gets its name when all is on disk."""

    def __init__(self, output_dir: Path, step: int):
        self.final = output_dir / f"checkpoint-{step}"
        self.building = output_dir / f".checkpoint-{step}.tmp"

    def __enter__(self) -> Path:
        shutil.rmtree(self.building, ignore_errors=True)
        self.building.mkdir(parents=True)
        return self.building

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.building, ignore_errors=True)
            if _disk_is_full(value):
                raise UserError(
                    f"The disk is full: {self.final} was not written. Earlier checkpoints are whole. Free space and run the "
                    "same command with resume_from_checkpoint = 'latest'."
                ) from value
            return
        files = sorted(path for path in self.building.rglob("*") if path.is_file())
        hashes = {}
        for path in files:
            hashes[str(path.relative_to(self.building))] = sha256_of(path)
            sync_to_disk(path)
        manifest = self.building / "manifest.json"
        manifest.write_text(json.dumps(hashes, indent=1))
        sync_to_disk(manifest)
        sync_to_disk(self.building)
        if self.final.exists():  # only a damaged one can be here: a good one would have been resumed from
            shutil.rmtree(self.final)
        os.replace(self.building, self.final)
        sync_to_disk(self.final.parent)


def _disk_is_full(error: BaseException) -> bool:
    if isinstance(error, SafetensorError):  # carries the system's error as text alone
        return f"os error {errno.ENOSPC}" in str(error)
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


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
        hashes = json.loads(manifest.read_text())
    except ValueError as error:
        raise DamagedCheckpoint(f"{manifest}: {error}") from error
    for name, digest in hashes.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing")
        if sha256_of(path) != digest:
            raise DamagedCheckpoint(f"{path} is not the file that was written (sha256 differs)")


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


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        UserError: not there or not readable.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}).") from error
