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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from OpenSciDraw.errors import UserError, hide_secrets
from OpenSciDraw.utils.files import carries_credentials

_LOG = logging.getLogger("OpenSciDraw")
THREADS = 16  # requests of one process at a time
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
