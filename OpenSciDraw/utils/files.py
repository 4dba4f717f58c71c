"""Files that must be on disk, be what they were, and be one process's at a time; and folders that are not on a disk."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from OpenSciDraw.errors import FULL, SECRET, UserError

_UNFINISHED = re.compile(r"\..*\.(\d+)-\d+(\..*)?\.unfinished", re.DOTALL)
_UMASK = os.umask(0o022)
os.umask(_UMASK)  # it can be read by setting it alone: here, before there are threads


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


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Alone among the processes of this machine; gives the descriptor of the lock's file, which is made."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def real(path: Path) -> Path:
    """The path without links; of one that goes in a circle, as far as it can be followed (Path.resolve raises there)."""
    return Path(os.path.realpath(path))


def parse_json(text: str | bytes) -> Any:
    """`json.loads` of a text of unknown origin. Raises ValueError, also where it is nested deeper than Python follows."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def json_objects(lines: bytes) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of JSON lines, and how many of its lines that are not empty are none: cut, damaged, something else."""
    found, broken = [], 0
    for line in lines.splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            found.append(row)
        else:
            broken += bool(line.strip())
    return found, broken


def unfinished_mark() -> str:
    """Ends the names of what this thread is making and a killed process would leave behind: `clear_unfinished`."""
    return f".{os.getpid()}-{threading.get_ident()}.unfinished"


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that becomes `path`, in place of an earlier one, when the block ends well.

    What it writes may be read by whom the umask allows; safetensors' own files only by their owner.
    """
    place = path.with_name(f".{path.name}{unfinished_mark()}")
    place.mkdir(parents=True)
    try:
        yield place / path.name
        for file in place.rglob("*"):
            if file.is_file():
                let_read(file)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(place / path.name, path)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def let_read(file: Path) -> None:
    """Give a file the rights that a new one has."""
    file.chmod(0o666 & ~_UMASK)


def clear_unfinished(folder: Path) -> None:
    """Remove what processes that were killed have left in `folder`; for its one user, who is making nothing there yet."""
    for path in folder.glob(".*.unfinished"):
        process = _UNFINISHED.fullmatch(path.name)
        if process is not None and (int(process[1]) == os.getpid() or not Path("/proc", process[1]).exists()):
            shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """The file is there whole or not at all, and nothing else is left."""
    with unfinished(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, for people to read."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def make_folder(folder: Path) -> Path:
    """The folder, which is made. Raises UserError as `writable`."""
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Raises UserError where the system refuses to write into `folder`: no right, read-only, a file in the way, a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"The disk is full: nothing can be written to {folder}. Free space and run it again.") from error
        raise UserError(f"Cannot write to {folder}: {error.strerror or error}. Choose another folder.") from error


@contextmanager
def naming_full_disk(what: Path, then: str) -> Iterator[None]:
    """Raises UserError, naming what was to be written and what to do `then`, where the disk is full."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if not disk_is_full(error):
            raise
        raise UserError(f"The disk is full: {what} was not written. {then}") from error


def disk_is_full(error: BaseException | None) -> bool:
    from safetensors import SafetensorError

    if isinstance(error, SafetensorError):  # carries the system's error as text alone
        return f"os error {errno.ENOSPC}" in str(error)
    return isinstance(error, OSError) and error.errno in FULL


def is_remote(path: str) -> bool:
    """Whether a folder's name is that of a folder in cloud storage: s3://bucket/folder."""
    return "://" in path


def carries_credentials(address: str) -> bool:
    """Whether the address of a folder in cloud storage has a user's password, a query, or an assignment in it."""
    rest = address.partition("://")[2]
    return re.match(r"[^/@]*:[^/@]*@", rest) is not None or re.search(r"[?;&]|%3[bf]|" + SECRET.pattern, rest, re.I) is not None
