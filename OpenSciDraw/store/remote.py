"""A store in cloud storage (abfs, s3, gs, hf): indices are copied once, rows are read by range requests.

Credentials come from the environment, as each package finds them (a managed identity, AWS_*, AZURE_STORAGE_*, HF_TOKEN …);
none is taken from a config or written to a log. docs/remote.md says how to use it.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import logging
import os
import random
import re
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from OpenSciDraw.errors import UserError, hide_secrets
from OpenSciDraw.store.cache import RowCache
from OpenSciDraw.store.files import IsWhole, Span, require_whole
from OpenSciDraw.store.shard import index_path, what_is_damaged
from OpenSciDraw.utils.files import carries_credentials, locked

_LOG = logging.getLogger("OpenSciDraw")
THREADS = 16  # requests of one process at a time
_AHEAD_BYTES = 2**30  # of rows that were fetched ahead and not yet read: older ones are let go
_QUIET_TRIES = 3
_SLOWEST = 1e6  # bytes a second: a request that is slower, and has had its stall_seconds, is begun anew


@dataclass(frozen=True)
class Patience:
    """How long a failing request is tried: `seconds`, and no try is begun after them. Waits grow twofold, to `longest_seconds`,
    by chance 50 % shorter. A try that gets no answer has `stall_seconds`."""

    seconds: float = 120.0
    tries: int = 10
    first_seconds: float = 0.5
    longest_seconds: float = 30.0
    stall_seconds: float = 60.0

    def wait(self, failed: int) -> float:
        return min(self.longest_seconds, self.first_seconds * 2 ** (failed - 1)) * random.uniform(0.5, 1.0)


PATIENT = Patience()


@dataclass(frozen=True)
class Service:
    """A kind of storage: what must be installed, what its errors are called, and where its credentials come from."""

    package: str
    errors: tuple[str, ...]  # 'module:name', beside OSError
    credentials: str


_AIO = "aiohttp:ClientError"
_AZURE = Service(
    "adlfs", (_AIO, "azure.core.exceptions:AzureError"),
    "a managed identity, `az login`, or AZURE_STORAGE_ACCOUNT_KEY / AZURE_STORAGE_SAS_TOKEN / AZURE_STORAGE_CONNECTION_STRING",
)  # fmt: skip
_S3 = Service(
    "s3fs", (_AIO, "botocore.exceptions:BotoCoreError", "botocore.exceptions:ClientError"),
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
)  # fmt: skip
_GOOGLE = Service(
    "gcsfs", (_AIO, "gcsfs.retry:HttpError", "google.auth.exceptions:GoogleAuthError"),
    "`gcloud auth application-default login`, GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account",
)  # fmt: skip
_HUB = Service("huggingface_hub", ("httpx:HTTPError",), "HF_TOKEN, or `hf auth login`")
SERVICES = {
    "abfs": _AZURE, "abfss": _AZURE, "az": _AZURE, "s3": _S3, "s3a": _S3, "gs": _GOOGLE, "gcs": _GOOGLE, "hf": _HUB,
    "memory": Service("fsspec", (), "none"),
}  # fmt: skip
_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ClientAuthenticationError",
    "CredentialUnavailableError", "DefaultCredentialsError", "RefreshError", "TokenRetrievalError",
}  # fmt: skip


def _plain(error: BaseException) -> str:
    """An error as text, without credentials that its address may carry."""
    text = hide_secrets(str(error))
    return f"{type(error).__name__}: {text[:500]}"


def _is_final(error: BaseException) -> bool:
    """Whether trying again is of no use: not there, not allowed, a request that is refused for what it is."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)) or type(error).__name__ in _NO_CREDENTIALS:
        return True
    status = next((v for n in ("status_code", "status", "code") if isinstance(v := getattr(error, n, None), int)), 0)
    return 400 <= status < 500 and status not in (408, 425, 429)


class Remote:
    """A folder in cloud storage. Can be pickled: each process connects by itself, when it first asks.

    Raises:
        UserError: an unknown kind of storage, a missing package, an address with credentials in it.
    """

    def __init__(self, url: str, patience: Patience = PATIENT):
        protocol, _, rest = url.partition("://")
        if protocol not in SERVICES:
            raise UserError(f"{protocol}:// is no storage that is known here. Known: {', '.join(f'{p}://' for p in SERVICES)}.")
        if carries_credentials(url):
            raise UserError(
                f"{protocol}://…: the address carries credentials. They belong into the environment: "
                f"{SERVICES[protocol].credentials}."
            )
        account = re.fullmatch(r"([^/@]+)@([^/@.]+)(/.*)?", rest)
        if account and SERVICES[protocol] is _AZURE:
            rest = f"{account[1]}@{account[2]}.dfs.core.windows.net{account[3] or ''}"
        self.url, self.service, self.patience = f"{protocol}://{rest.rstrip('/')}", SERVICES[protocol], patience
        try:
            importlib.import_module(self.service.package)
            importlib.import_module("fsspec")
        except ImportError as error:
            raise UserError(
                f"{self.url}: {self.service.package} is not installed ({error}). Run `pip install 'OpenSciDraw[remote]'`."
            ) from error
        self._connected: tuple[int, Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connected": None}

    def child(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}", self.patience)

    def _connect(self) -> tuple[Any, str]:
        """(file system, path in it) of this process: threads and connections do not survive a fork."""
        if self._connected is None or self._connected[0] != os.getpid():
            from fsspec.core import url_to_fs

            try:
                system, path = url_to_fs(self.url)
            except ValueError as error:  # adlfs: no account, credentials of a wrong form
                raise UserError(f"{self.url}: {_plain(error)}. Credentials come from {self.service.credentials}.") from error
            self._connected = (os.getpid(), system, path)
        return self._connected[1:]

    def _call(self, what: str, size: int, name: str, *arguments: Any, **options: Any) -> Any:
        """A method of the file system, on the path `name`; failures that may pass are tried again.

        `size` bytes go over the line. Raises OSError when it cannot be done, FileNotFoundError when it is not there.
        """
        errors: tuple[type[BaseException], ...] = (
            OSError, asyncio.TimeoutError, *(_class(error) for error in self.service.errors)
        )  # fmt: skip
        end = time.monotonic() + self.patience.seconds
        for failed in range(1, self.patience.tries + 1):
            try:
                longest = min(self.patience.stall_seconds, max(1.0, end - time.monotonic()))
                return self._once(what, longest + size / _SLOWEST, name, *arguments, **options)
            except errors as error:
                if isinstance(error, FileNotFoundError) or type(error).__name__ == "ResourceNotFoundError":
                    raise FileNotFoundError(f"{self.url}/{name}: not there") from error
                if _is_final(error):
                    raise OSError(f"{self.url}: refused: {_plain(error)}") from error
                if failed == self.patience.tries or time.monotonic() > end:
                    raise ConnectionError(f"{self.url}/{name}: failed {failed} times, at last: {_plain(error)}") from error
                wait = self.patience.wait(failed)
                level = logging.INFO if failed < _QUIET_TRIES else logging.WARNING
                _LOG.log(level, "%s/%s: %s; again in %.1f s", self.url, name, _plain(error), wait)
                time.sleep(wait)

    def _once(self, what: str, seconds: float, name: str, *arguments: Any, **options: Any) -> Any:
        from fsspec.asyn import AsyncFileSystem

        system, path = self._connect()
        path = f"{path}/{name}".rstrip("/")
        arguments = (*arguments, path) if what == "put_file" else (path, *arguments)
        if not isinstance(system, AsyncFileSystem):
            return getattr(system, what)(*arguments, **options)
        call = asyncio.wait_for(getattr(system, f"_{what}")(*arguments, **options), seconds)
        return asyncio.run_coroutine_threadsafe(call, system.loop).result()

    def read(self, name: str, start: int | None = None, size: int | None = None) -> bytes:
        """A file, or a range of it. Raises OSError."""
        end = None if start is None or size is None else start + size
        return self._call("cat_file", size or 0, name, start=start, end=end)

    def entries(self, name: str = "") -> dict[str, dict[str, Any]]:
        """What is in the folder: {name: fsspec's details}; {} when it is not there. Raises UserError when it cannot be seen."""
        try:
            self._connect()[0].invalidate_cache()
            found = self._call("ls", 0, name, detail=True)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(
                f"{self.url} cannot be read: {error}. Check the address; credentials come from {self.service.credentials}."
            ) from error
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry for entry in found}

    def write(self, file: Path, name: str) -> None:
        """Copy a file there. Raises OSError."""
        size = file.stat().st_size
        self._call("put_file", size, name, str(file))
        there = self._details(name)["size"]
        if there != size:
            raise OSError(f"{self.url}/{name}: {there} bytes arrived of {size}")

    def remove(self, name: str) -> None:
        """Remove a file, if it is there. Raises OSError."""
        try:
            self._details(name)
        except FileNotFoundError:
            return
        self._call("rm_file", 0, name)

    def _details(self, name: str) -> dict[str, Any]:
        self._connect()[0].invalidate_cache()
        return self._call("info", 0, name)


def _class(name: str) -> type[Exception]:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def version_of(entry: dict[str, Any]) -> str:
    """Changes when the file does, as far as the storage tells."""
    names = ("ETag", "etag", "blob_id", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "created", "size")
    return hashlib.sha256(repr([str(entry.get(name)) for name in names]).encode()).hexdigest()[:12]


def modified(entry: dict[str, Any]) -> float:
    """When a file was written there, in seconds since 1970; 0 where the storage does not tell."""
    found = next((entry[name] for name in ("LastModified", "last_modified", "mtime", "created") if entry.get(name)), 0.0)
    return float(found.timestamp()) if hasattr(found, "timestamp") else float(found) if isinstance(found, (int, float)) else 0.0


# -- reading -----------------------------------------------------------------------------------
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
