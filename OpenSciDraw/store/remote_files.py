"""Reading rows from cloud storage, through a cache on this machine."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.store.cache import RowCache
from OpenSciDraw.store.files import IsWhole, Span, require_whole
from OpenSciDraw.store.remote import PATIENT, THREADS, Patience, Remote, version_of
from OpenSciDraw.store.shard import index_path, what_is_damaged
from OpenSciDraw.utils.files import locked

_AHEAD_BYTES = 2**30  # of rows that were fetched ahead and not yet read: older ones are let go
_LOG = logging.getLogger("OpenSciDraw")


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scienceflow" / "remote"


class RemoteFolder:
    """A store's folder in cloud storage, with its copy of indices and rows in `cache_dir` (None: the user's cache).

    Rows take at most `cache_bytes` there, of all stores and processes together; the least recently read ones make room.

    Raises:
        UserError: as Remote; nothing at this address, or no right to read it.
    """

    def __init__(self, url: str, cache_dir: str | Path | None, cache_bytes: int, patience: Patience = PATIENT):
        self.remote = Remote(url, patience)
        self.name: Path | str = self.remote.url
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache()
        self.cache_bytes = cache_bytes
        self._entries = set(self.remote.entries())
        if not self._entries:
            raise UserError(f"{url}: no such folder or container, or nothing in it. Check dataset.base_dir and parquet_base_path.")

    def has(self, entry: str) -> bool:
        return entry in self._entries

    def files(self, kind: str) -> RemoteFiles:
        return RemoteFiles(self.remote.child(kind), self.cache_dir, self.cache_bytes)


class RemoteFiles:
    """The shards of one table of a store in cloud storage.

    Raises:
        UserError: no shard, an unfinished one, or the indices cannot be fetched.
    """

    def __init__(self, remote: Remote, cache_dir: Path, cache_bytes: int):
        self.remote = remote
        self.folder: Path | str = remote.url
        entries = {name: e for name, e in remote.entries().items() if not name.startswith(".")}
        self._names = require_whole(set(entries), remote.url)
        self._sizes = [entries[name]["size"] for name in self._names]
        address = hashlib.sha256(remote.url.encode()).hexdigest()[:16]
        self._copies = cache_dir / "indices" / address
        index_of = {name: entries[index_path(Path(name)).name] for name in self._names}
        versions = {name: version_of(index) + version_of(entries[name]) for name, index in index_of.items()}
        self._shards = [self._copies / f"{Path(name).stem}-{versions[name]}.parquet" for name in self._names]
        self._fetch_indices([index_of[name]["size"] for name in self._names])
        self._cache = RowCache(cache_dir / "rows", cache_bytes)
        self._keys = [f"{address}-{shard.stem}" for shard in self._shards]
        self._state: tuple[int, ThreadPoolExecutor, dict[Span, Future[bytes]]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": None}

    def shards(self) -> list[Path]:
        return self._shards

    def _fetch_indices(self, sizes: list[int]) -> None:
        """Copy the indices that are not here yet; one process of a machine does it, the others wait."""
        self._copies.mkdir(parents=True, exist_ok=True)
        with locked(self._copies / "lock"), ThreadPoolExecutor(THREADS) as pool:
            copies = [index_path(shard) for shard in self._shards]
            here = [_has_size(copy, size) and not what_is_damaged(copy) for copy, size in zip(copies, sizes, strict=True)]
            todo = [n for n, is_here in enumerate(here) if not is_here]
            if todo:
                _LOG.info("%s: copying %d indices (%.2f GB)", self.folder, len(todo), sum(sizes[n] for n in todo) / 1e9)
            try:
                list(pool.map(lambda n: self._fetch_index(index_path(Path(self._names[n])).name, copies[n], sizes[n]), todo))
            except OSError as error:
                raise UserError(f"{self.folder}: an index cannot be fetched: {error}.") from error

    def _fetch_index(self, name: str, copy: Path, size: int) -> None:
        data = self.remote.read(name)
        if len(data) != size:
            raise OSError(f"{name} has {len(data)} bytes of {size}: it is being written anew")
        building = copy.with_name(f".{copy.name}.tmp")
        building.write_bytes(data)
        os.replace(building, copy)

    def _live(self) -> tuple[ThreadPoolExecutor, dict[Span, Future[bytes]]]:
        """This process's threads, and what they fetch or have fetched ahead."""
        if self._state is None or self._state[0] != os.getpid():
            self._state = (os.getpid(), ThreadPoolExecutor(THREADS, "scienceflow-remote"), {})
        return self._state[1:]

    def _fetch(self, span: Span) -> bytes:
        shard, offset, size = span
        if offset + size > self._sizes[shard]:
            raise ValueError(f"{self._names[shard]} has fewer than {offset + size} bytes (the file is cut short)")
        data = self.remote.read(self._names[shard], offset, size)
        if len(data) != size:
            raise ValueError(f"{self._names[shard]}: {len(data)} of {size} bytes came from {offset}")
        return data

    def _load(self, span: Span) -> bytes:
        """A row's bytes from the cache, or fetched and put there."""
        data = self._cache.get(self._keys[span[0]], span[1], span[2])
        if data is None:
            data = self._fetch(span)
            self._cache.put(self._keys[span[0]], span[1], data)
        return data

    def will_need(self, spans: Iterable[Span]) -> None:
        pool, ahead = self._live()
        for span in spans:
            if span not in ahead:
                ahead[span] = pool.submit(self._load, span)
        done = [span for span, future in ahead.items() if future.done()]
        too_many = sum(size for _, _, size in ahead) - _AHEAD_BYTES
        while too_many > 0 and done:
            span = done.pop(0)
            del ahead[span]
            too_many -= span[2]

    def read_into(self, span: Span, view: memoryview, is_whole: IsWhole | None) -> None:
        future = self._live()[1].pop(span, None)
        data = self._load(span) if future is None else future.result()
        if is_whole is not None and not is_whole(memoryview(data)):
            self._cache.drop(self._keys[span[0]], span[1])  # perhaps only the copy is damaged
            data = self._fetch(span)
            if not is_whole(memoryview(data)):
                raise ValueError(f"{self._names[span[0]]}: the bytes at {span[1]} do not match their checksum")
            self._cache.put(self._keys[span[0]], span[1], data)
        view[:] = data


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False
