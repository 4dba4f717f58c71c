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
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.utils.files import disk_is_full, naming_full_disk, parse_json, sha256_of, sync_to_disk
from OpenSciDraw.weights.files import list_checkpoints

_LOG = logging.getLogger("OpenSciDraw")
FULL_DISK = "Earlier checkpoints are whole. Free space and run the same command with resume_from_checkpoint = 'latest'."
HASHING_THREADS = 8


class DamagedCheckpoint(Exception):
    """A checkpoint's files are not those that were written."""


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
