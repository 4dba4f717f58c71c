"""Files that must be on disk, and be what they were."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def sync_to_disk(path: Path) -> None:
    """Return once a file's bytes, or a folder's entries, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
