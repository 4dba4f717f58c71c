"""Where the bytes of a store's shards come from: files of this machine here, elsewhere in remote.py."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from OpenSciDraw.errors import UserError

_MAX_OPEN_FILES = 128
Span = tuple[int, int, int]  # shard, first byte, number of bytes
IsWhole = Callable[[memoryview], bool]


class Files(Protocol):
    """The shards of one table: on this machine (LocalFiles), or elsewhere (remote.RemoteFiles)."""

    folder: Path | str

    def shards(self) -> list[Path]:
        """The shards' paths on this machine, in order; their indices lie beside them, their tensors perhaps not."""
        ...

    def read_into(self, span: Span, view: memoryview, is_whole: IsWhole | None) -> None:
        """Raises ValueError when there are fewer bytes, or not `is_whole`; OSError when they cannot be read."""
        ...

    def will_need(self, spans: Iterable[Span]) -> None:
        """These are read next, in this order: begin to fetch them. Returns at once."""
        ...


class OpenFiles:
    """File descriptors of numbered files; the least recently used one is closed when there are many.

    They stay in their process. (Reads are positional: forked processes share the place of a file that was open before.)
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_open": OrderedDict()}

    def __getitem__(self, number: int) -> int:
        handle = self._open.pop(number, None)
        if handle is None:
            handle = os.open(self.paths[number], os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) >= _MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open[number] = handle
        return handle

    def __del__(self) -> None:
        for handle in self._open.values():
            os.close(handle)


class LocalFiles:
    """The shards of a folder.

    Raises:
        UserError: no shard, or an unfinished one.
    """

    def __init__(self, folder: Path):
        self.folder: Path | str = folder
        with os.scandir(folder) as entries:
            names = {entry.name for entry in entries if not entry.name.startswith(".")}
        self._names = require_whole(names, folder)
        self._files = OpenFiles(self.shards())

    def shards(self) -> list[Path]:
        return [Path(self.folder, name) for name in self._names]

    def read_into(self, span: Span, view: memoryview, is_whole: IsWhole | None) -> None:
        shard, offset, size = span
        got = os.preadv(self._files[shard], [view], offset)
        if got != size:
            raise ValueError(f"{self._names[shard]} has {got} of {size} bytes at {offset} (the file is cut short)")
        if is_whole is not None and not is_whole(view):
            raise ValueError(f"{self._names[shard]}: the bytes at {offset} do not match their checksum (the file was damaged)")

    def will_need(self, spans: Iterable[Span]) -> None:
        if sys.platform != "linux":
            return
        for shard, offset, size in spans:
            try:
                file = self._files[shard]
                if not _in_memory(file, offset + size - 1):
                    os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)
            except OSError:
                continue  # it is reported, with the row, when the row is read


def _in_memory(file: int, position: int) -> bool:
    """Whether a byte is in the page cache: advice for bytes that are there takes a quarter of the time of reading them."""
    if sys.platform != "linux":
        return True
    try:
        return bool(os.preadv(file, [bytearray(1)], position, os.RWF_NOWAIT))
    except BlockingIOError:
        return False


def require_whole(names: set[str], folder: Path | str) -> list[str]:
    """The shards among the file names of a folder, sorted. Raises UserError: none, or one without an index."""
    shards = sorted(name for name in names if name.endswith(".parquet"))
    unfinished = [name for name in shards if f"{name.removesuffix('.parquet')}.index.arrow" not in names]
    if unfinished:
        raise UserError(
            f"{folder}: {len(unfinished)} shard(s) were not finished ({', '.join(unfinished[:5])}): encoding was "
            "interrupted. Run the same `scienceflow encode` command to finish it."
        )
    if not shards:
        raise UserError(f"{folder}: no encoded shard here. Run `scienceflow encode CONFIG.py` first.")
    return shards


class Folder(Protocol):
    """A store's folder: on this machine (LocalFolder), or elsewhere (remote.RemoteFolder)."""

    name: Path | str

    def has(self, entry: str) -> bool:
        """Whether a file or folder of this name is in it."""
        ...

    def files(self, kind: str) -> Files: ...


class LocalFolder:
    def __init__(self, folder: Path):
        self.name: Path | str = folder

    def has(self, entry: str) -> bool:
        return Path(self.name, entry).exists()

    def files(self, kind: str) -> LocalFiles:
        return LocalFiles(Path(self.name, kind))
