"""One command at a time in a folder: a second one is refused, and what a killed one left behind blocks nobody.

Among processes of one machine, and over NFS, the kernel's lock (flock) decides: it ends with its process. Where locks do not
reach (blob mounts, machines that see different locks) the file of the lock decides: who holds it writes a sign of life into it
every few seconds, and a file without one, watched for a while, is that of a killed process. No clocks are compared.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.utils.files import clear_unfinished, parse_json, writable

_LOG = logging.getLogger("OpenSciDraw")
BEAT_SECONDS, WATCH_SECONDS = 10.0, 35.0
_CHILDREN_SECONDS = 10.0
_SIZE = 1024  # bytes of the file: always written whole
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # a file system without flock
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_handles: set[int] = set()


def _close_in_child() -> None:
    while _handles:
        os.close(_handles.pop())


os.register_at_fork(after_in_child=_close_in_child)  # a data worker that outlives its parent must not hold the parent's lock


@contextmanager
def sole_user(folder: Path, what: str, rank: int = 0, world_size: int = 1) -> Iterator[None]:
    """Nobody else writes into `folder`, which is made, while this is open; `what` is the command's name, for others' messages.

    Processes that share the work take one place each: `rank` of `world_size`. Another count of processes is another command.

    Raises:
        UserError: another process holds the folder (which, where, since when), or nothing can be written there.
    """
    path = folder / (".lock" if world_size == 1 else f".lock-{rank}")
    mine = {
        "command": what, "process": os.getpid(), "born": born(os.getpid()), "machine": socket.gethostname(),
        "kernel": kernel(), "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"), "world_size": world_size,
    }  # fmt: skip
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_other_counts(path, world_size)
        handle = _take(path, mine)
    _handles.add(handle)
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(handle, path, mine, stop), daemon=True)
    beating.start()
    try:
        clear_unfinished(folder)
        yield
    finally:
        stop.set()
        beating.join()
        if _is_signed(_read(path), mine):  # else another machine has taken it over
            path.unlink(missing_ok=True)
        _handles.discard(handle)
        os.close(handle)
        with suppress(OSError):  # what was refused later on leaves no empty folders
            for place in made:
                place.rmdir()


@contextmanager
def sole_run(folder: str) -> Iterator[None]:
    """As `sole_user` for a training, whose first process speaks for all of them."""
    if int(os.environ.get("RANK", 0)):
        yield
        return
    with sole_user(Path(folder), "train"):
        yield


def _take(path: Path, mine: dict[str, Any]) -> int:
    """The descriptor of the lock, held and signed. Raises UserError when it is another's."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(handle, path)
            if not _is_still(handle, path):  # its last holder removed it meanwhile
                os.close(handle)
                continue
            before = _read(path)
            if before and _lives(path, before):
                _refuse(path, before)
            _sign(handle, mine)
            return handle
        except BaseException:
            os.close(handle)
            raise


def holder_of(folder: Path) -> tuple[dict[str, Any], bool]:
    """Who signed the lock of `folder` (`command`, `process`, `machine`, `started`), {} where nobody did; and whether it lives.

    For looking alone: it takes nothing and waits for nothing. One on another machine counts as living for WATCH_SECONDS after its
    last sign of life, by the times of the file.
    """
    for path in sorted(folder.glob(".lock*")):
        holder = _read(path)
        if not holder:
            continue
        if holder.get("kernel") == kernel():
            return holder, holder.get("born") == born(holder.get("process"))
        try:
            return holder, time.time() - path.stat().st_mtime < WATCH_SECONDS
        except OSError:
            continue  # it has just let go
    return {}, False


def _lock(handle: int, path: Path) -> None:
    end = time.monotonic() + _CHILDREN_SECONDS
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            if error.errno not in _HELD:
                raise
        holder = _read(path)
        is_dead = holder.get("kernel") == kernel() and holder.get("born") != born(holder.get("process"))
        if not is_dead or time.monotonic() > end:
            _refuse(path, holder)
        time.sleep(0.05)  # it was killed: a child that it had just begun to fork lets go in a moment


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _refuse_other_counts(path: Path, world_size: int) -> None:
    """Processes of one command are as many for each of them: others in the folder belong to another command."""
    for other in sorted(path.parent.glob(".lock*")):
        holder = _read(other)
        if other == path or not holder or holder.get("world_size", world_size) == world_size:
            continue
        try:
            handle = os.open(other, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            _lock(handle, other)
            if _lives(other, holder):
                _refuse(other, holder)
        finally:
            os.close(handle)


def _refuse(path: Path, holder: dict[str, Any]) -> None:
    who = "another process"
    if holder:
        who = f"`{holder.get('command')}`, {_named(holder)}, since {holder.get('started')}"
    raise UserError(f"{path.parent} is in use by {who}. Wait until it is done, stop it, or choose another folder.")


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process')} on {holder.get('machine')}"


def _lives(path: Path, holder: dict[str, Any]) -> bool:
    """Whether the process that signed a lock which the kernel does not hold is there still."""
    if holder.get("kernel") == kernel():  # this machine and this container
        return holder.get("born") == born(holder.get("process"))
    _LOG.info("%s was in use by %s: waiting %g s for a sign of life", path.parent, _named(holder), WATCH_SECONDS)
    end = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCH_SECONDS / 10))
        if _read(path) != holder:
            return bool(_read(path))
    return False


def _beat(handle: int, path: Path, mine: dict[str, Any], stop: threading.Event) -> None:
    """Write the sign of life; end this process as a scheduler would where another machine took the folder over."""
    number = 0
    while not stop.wait(BEAT_SECONDS):
        holder = _read(path)
        if not _is_signed(holder, mine):
            _LOG.error("%s was taken over by %s: this process stops", path.parent, _named(holder))
            os.kill(os.getpid(), signal.SIGTERM)
            return
        number += 1
        try:
            _sign(handle, {**mine, "beat": number})
        except OSError as error:  # a mount that is away for a while: the work says so itself, if it matters
            _LOG.debug("%s: no sign of life could be written: %s", path, error)


def _is_signed(holder: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether a lock's file names this process, or nobody (it could not be read)."""
    return not holder or {**holder, "beat": 0} == {**mine, "beat": 0}


def _sign(handle: int, holder: dict[str, Any]) -> None:
    os.pwrite(handle, json.dumps(holder).encode().ljust(_SIZE), 0)
    os.fsync(handle)  # mounts of blob storage carry it away now


def _read(path: Path) -> dict[str, Any]:
    """What the holder wrote; empty where there is no holder, or nothing that can be read."""
    try:
        with path.open("rb") as file:
            found = parse_json(file.read(_SIZE) or b"{}")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def kernel() -> str:
    """Names the running kernel and the space of process numbers in it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def born(process: Any) -> str | None:
    """When a process began, in ticks since the machine did; None where none lives by that number (or there is no /proc)."""
    try:
        fields = Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # a dead one whose parent has not looked yet has let go of its locks
    except (OSError, ValueError, TypeError, IndexError):
        return None
