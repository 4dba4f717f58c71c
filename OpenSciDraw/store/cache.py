"""Rows on this machine's disk, up to a limit: the least recently read ones make room for others.

Any number of processes share it. A row is a file, written under another name first; readers compare its checksum.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from OpenSciDraw.utils.files import locked

_LOG = logging.getLogger("OpenSciDraw")
_KEPT = 0.9  # of the limit, when room is made


class RowCache:
    """`limit` bytes of rows in `folder`; 0 keeps none."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._failed = False

    def _path(self, key: str, offset: int) -> Path:
        return self.folder / key / str(offset)

    def get(self, key: str, offset: int, size: int) -> bytes | None:
        """The row's bytes; None when it is not here, or not of that size."""
        if not self.limit:
            return None
        path = self._path(key, offset)
        try:
            data = path.read_bytes()
            os.utime(path)  # it was read now
        except OSError:  # not here, or removed meanwhile
            return None
        return data if len(data) == size else None

    def put(self, key: str, offset: int, data: bytes) -> None:
        """Keep a row, if the disk lets us: a row that cannot be kept was read all the same."""
        if len(data) > self.limit:
            return
        path = self._path(key, offset)
        building = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(len(data), building)
            building.write_bytes(data)
            os.replace(building, path)
        except OSError as error:
            with suppress(OSError):
                building.unlink()
            if not self._failed:
                _LOG.warning("%s: rows cannot be kept here (%s); they are fetched each time", self.folder, error)
            self._failed = True

    def drop(self, key: str, offset: int) -> None:
        """Forget a row whose bytes are damaged."""
        with suppress(OSError):
            self._path(key, offset).unlink()

    def _make_room(self, size: int, building: Path) -> None:
        """Count `size` bytes in; over the limit, remove the rows that were read longest ago, and count anew.

        `building` is made with that size, so that others count it while its bytes are not there yet.
        """
        with locked(self.folder / "size") as handle:
            total = int(os.pread(handle, 32, 0) or b"0") + size
            if total > self.limit:
                total = self._remove(int(_KEPT * self.limit) - size) + size
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(total).encode(), 0)
            building.touch()
            os.truncate(building, size)

    def _remove(self, keep: int) -> int:
        """Remove rows until at most `keep` bytes are left; returns how many are."""
        found = []
        for folder in os.scandir(self.folder):
            if folder.is_dir():
                found += list(_files(folder.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= keep:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total


def _files(folder: str) -> Iterator[tuple[int, int, str]]:
    """(last use, bytes, path) of each file; those that another process removes meanwhile are left out."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                found = entry.stat()
            except FileNotFoundError:
                continue
            yield found.st_mtime_ns, found.st_size, entry.path
