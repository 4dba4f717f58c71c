"""A function in a process of its own, with bounded time and memory: what a hostile paper does stays in there.

A small server process is started once. It imports the parsers and nothing else (no torch, no threads, not the
caller's main module), and forks itself for each call, which takes milliseconds. It kills what a call leaves
behind, and everything when the calling process is gone. (multiprocessing's forkserver does neither: there a
process that a child started survives it, and every child imports the caller's main module again.)
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import gc
import os
import pickle
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn, TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")
_MAX_FILE_BYTES = 4 * 2**30  # of any one file that the process writes
_PRELOAD = (
    "numpy", "PIL.Image", "pyarrow", "pypdfium2", "resvg_py", "pylatexenc.latex2text", "OpenSciDraw.prepare.extract",
    "OpenSciDraw.prepare.filters.language_model",
)  # fmt: skip
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
_LINUX = sys.platform == "linux"
_ORDER = struct.Struct("dQ")  # to the server: seconds, memory_bytes; with it go the ends of `data` and `status`
_ENDED = struct.Struct("i?")  # from the server: exit code, whether it was killed for its time
_LENGTH = struct.Struct("Q")


class IsolationError(RuntimeError):
    """The function gave no result. The message is the reason: 'kind: details'."""


class TooMuch(IsolationError):
    """It needed more time or memory than it was given."""


class Crashed(IsolationError):
    """It ended without a result: an exception, a signal, an exit."""


def run_isolated(
    function: Callable[[Argument], Result], argument: Argument, *, seconds: float, memory_bytes: int
) -> Result:
    """`function(argument)` in a fresh process; `function` is one of a module, argument and result can be pickled.

    When it returns or raises, every process that the function started is gone. Threads may call this side by side.

    Raises:
        TooMuch: after `seconds` of wall-clock or CPU time, or at `memory_bytes` beyond the interpreter's own.
        Crashed: the function raised something, or its process died.
        OSError: the disk is full (ENOSPC), which is no fault of what the function was given.
    """
    request = pickle.dumps((function, argument))
    data, status = _launch(seconds, memory_bytes)
    with data, status:
        with suppress(BrokenPipeError, ConnectionResetError):  # it died before it read all: `status` says of what
            data.sendall(_LENGTH.pack(len(request)) + request)
        reply = _receive(data, memory_bytes)
        ended = status.recv(_ENDED.size)
    if reply is None:
        raise _died(ended, seconds)
    kind, value = pickle.loads(reply)
    if kind == "result":
        return value  # type: ignore[no-any-return]
    if kind == "full":
        raise OSError(errno.ENOSPC, value)
    raise TooMuch(value) if kind == "memory" else Crashed(value)


def end_all() -> None:
    """End the functions that run now, in whatever thread; each is then Crashed. The next call is as ever."""
    with _hold.lock:
        _hold.stop()


def run_program(
    command: Sequence[str | Path], *, seconds: float, folder: Path, environment: Mapping[str, str], file_bytes: int
) -> tuple[int, str]:
    """Run a program in `folder`; its exit code and the first MiB of what it prints. To be called inside `run_isolated`.

    No file that it writes gets larger than `file_bytes`. What it starts dies with it when the time is over.

    Raises:
        TooMuch: after `seconds`.
    """
    with tempfile.TemporaryFile(dir=folder) as printed:
        program = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=lambda: _limit(resource.RLIMIT_FSIZE, file_bytes),
        )  # fmt: skip
        try:
            code = program.wait(seconds)
        except subprocess.TimeoutExpired as error:
            _kill_group(program.pid)
            program.wait()
            raise TooMuch(f"not done after {seconds:g} s") from error
        printed.seek(0)
        return code, printed.read(2**20).decode("utf-8", "replace")


def _receive(data: socket.socket, most: int) -> bytes | None:
    """A whole message; None when the other side ends before."""
    parts: list[bytes] = []
    missing = _LENGTH.size
    header = True
    while missing:
        try:
            part = data.recv(min(missing, 2**20))
        except ConnectionResetError:
            return None
        if not part:
            return None
        parts.append(part)
        missing -= len(part)
        if header and not missing:
            (missing,) = _LENGTH.unpack(b"".join(parts))
            parts, header = [], False
            if missing > most:
                return None
    return b"".join(parts)


def _died(ended: bytes, seconds: float) -> IsolationError:
    if len(ended) < _ENDED.size:
        return Crashed("crashed: the server of the papers' processes was killed from outside")
    code, late = _ENDED.unpack(ended)
    if late or code == -signal.SIGXCPU:
        return TooMuch(f"time limit: not done after {seconds:g} s")
    if code < 0:
        hint = " (the system was out of memory, or it was killed from outside)" if -code == signal.SIGKILL else ""
        return Crashed(f"crashed: the process died of {signal.Signals(-code).name}{hint}")
    return Crashed(f"crashed: the process ended with exit code {code} and no result")


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # nobody, or only the dead, are left in it
        os.killpg(pid, signal.SIGKILL)


def _limit(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


# -- the caller's hold on the server --------------------------------------------------------------
@dataclass
class _Hold:
    """The server of this process, started when it is first needed."""

    lock: threading.Lock
    control: socket.socket | None = None
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.control, theirs = socket.socketpair()
        code = f"import sys; sys.path[:] = sys.argv[2:]; from {__name__} import _serve; _serve(int(sys.argv[1]))"
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # none survive a fork
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno()), *sys.path], pass_fds=[theirs.fileno()],
                env={**os.environ, **threads}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the caller's to handle
            )  # fmt: skip

    def stop(self) -> None:
        if self.control is not None and self.process is not None:
            self.control.close()
            self.process.wait()
            self.control = self.process = None


_hold = _Hold(threading.Lock())
atexit.register(_hold.stop)


def _forget() -> None:
    """In a fork of the caller: the server is its parent's, and must see when that is gone."""
    _hold.lock = threading.Lock()
    if _hold.control is not None and _hold.process is not None:
        _hold.control.close()
        _hold.process.returncode = 0  # not a child of this process: nothing to wait for
        _hold.control = _hold.process = None


os.register_at_fork(after_in_child=_forget)


def _launch(seconds: float, memory_bytes: int) -> tuple[socket.socket, socket.socket]:
    """Have a process forked. `data` carries the request there and the result back; `status` tells of its end."""
    data, their_data = socket.socketpair()
    status, their_status = socket.socketpair()
    order = _ORDER.pack(seconds, memory_bytes)
    with their_data, their_status, _hold.lock:
        for is_last in (False, True):
            if _hold.control is None:
                _hold.start()
            assert _hold.control is not None
            try:
                socket.send_fds(_hold.control, [order], [their_data.fileno(), their_status.fileno()])
                break
            except (BrokenPipeError, ConnectionResetError):  # somebody killed it since
                _hold.stop()
                if is_last:
                    raise
    return data, status


# -- the server --------------------------------------------------------------------------------------
@dataclass
class _Run:
    data: socket.socket
    status: socket.socket
    deadline: float
    late: bool = False


def _serve(control_fd: int) -> None:
    """The server's life: fork for each order, tell of each end; with the caller's end, the end of all."""
    control = socket.socket(fileno=control_fd)
    for name in _PRELOAD:
        with suppress(ImportError):  # an extra that is not installed: the function that needs it says so
            import_module(name)
    gc.freeze()  # a collection in a child would touch, and so copy, all of the parent's memory
    if _LINUX:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what loses its parent becomes a child of this process, and is found
    _Server(control).run()


class _Server:
    def __init__(self, control: socket.socket):
        self._control = control
        self._runs: dict[int, _Run] = {}
        self._selector = selectors.DefaultSelector()
        self._woken, wake = socket.socketpair()
        wake.setblocking(False)
        self._wake = wake
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._selector.register(control, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def run(self) -> None:
        try:
            while True:
                nearest = min((run.deadline for run in self._runs.values() if not run.late), default=None)
                ready = self._selector.select(None if nearest is None else max(0.0, nearest - time.monotonic()))
                for key, _ in ready:
                    if key.fileobj is self._control:
                        if not self._accept():
                            return
                    elif key.fileobj is self._woken:
                        self._woken.recv(4096)
                    else:  # the caller has closed `status`: it waits no longer
                        _kill_group(key.data)
                        self._selector.unregister(key.fileobj)
                self._look_after()
        finally:
            for pid in list(self._runs):
                self._end(pid)

    def _accept(self) -> bool:
        """Fork for an order; False when the caller is gone."""
        order, fds, _, _ = socket.recv_fds(self._control, _ORDER.size, 2)
        if len(order) < _ORDER.size:
            return False
        seconds, memory_bytes = _ORDER.unpack(order)
        run = _Run(socket.socket(fileno=fds[0]), socket.socket(fileno=fds[1]), time.monotonic() + seconds)
        pid = os.fork()
        if not pid:
            self._become_worker(run, seconds, memory_bytes)
        with suppress(OSError):
            os.setpgid(pid, pid)  # here and in the child: whoever comes first
        self._runs[pid] = run
        self._selector.register(run.status, selectors.EVENT_READ, pid)
        return True

    def _become_worker(self, own: _Run, seconds: float, memory_bytes: int) -> NoReturn:
        try:
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._selector.close()
            for other in (self._control, self._woken, self._wake, own.status):
                other.close()
            for run in self._runs.values():
                run.data.close()
                run.status.close()
            _work(own.data, seconds, memory_bytes)
            os._exit(0)
        finally:
            os._exit(1)

    def _look_after(self) -> None:
        now = time.monotonic()
        for pid, run in list(self._runs.items()):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                self._end(pid)
            elif now >= run.deadline and not run.late:
                run.late = True
                _kill_group(pid)

    def _end(self, pid: int) -> None:
        """Kill what is left of a run, then tell its caller. Its number is not free for others before that (WNOWAIT)."""
        run = self._runs.pop(pid)
        _kill_group(pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._kill_strays()
        with suppress(KeyError):
            self._selector.unregister(run.status)
        with suppress(OSError):  # the caller waits no longer
            run.status.send(_ENDED.pack(code, run.late))
        with suppress(OSError):
            run.data.shutdown(socket.SHUT_RDWR)  # the end of the reply, whoever else has this socket open
        run.data.close()
        run.status.close()

    def _kill_strays(self) -> None:
        """Workers keep their own lost children, so those that come to this process are left from workers that died."""
        listing = Path(f"/proc/self/task/{os.getpid()}/children")
        for _ in range(100):  # each may have children, that come here when it dies
            try:
                strays = {int(pid) for pid in listing.read_text().split()} - self._runs.keys()
            except OSError:  # not Linux, or a kernel without this list
                return
            if not strays:
                return
            for pid in strays:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


# -- in the child --------------------------------------------------------------------------------
def _work(data: socket.socket, seconds: float, memory_bytes: int) -> None:
    too_much = pickle.dumps(("memory", f"memory limit: more than {memory_bytes / 2**20:.0f} MiB"))
    try:
        request = _receive(data, sys.maxsize)
        if request is None:
            return
        _set_limits(seconds, memory_bytes)
        function, argument = pickle.loads(request)
        reply = pickle.dumps(("result", function(argument)), protocol=5)
    except MemoryError:
        reply = too_much
    except BaseException as error:  # noqa: BLE001 - exits and Rust's panics too: it crosses the border as words
        words = str(error).splitlines()
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        reason = f"crashed: {type(error).__name__}: {words[0][:500] if words else ''} ({where})"
        is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        reply = pickle.dumps(("full", os.strerror(errno.ENOSPC)) if is_full else ("error", reason))
    data.sendall(_LENGTH.pack(len(reply)))
    data.sendall(reply)


def _set_limits(seconds: float, memory_bytes: int) -> None:
    os.dup2(1, 2)  # libraries' complaints about hostile files: to where the server's own output goes, nowhere
    if _LINUX:  # elsewhere the address space has no limit that holds
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        own = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _limit(resource.RLIMIT_AS, own + memory_bytes)
    _limit(resource.RLIMIT_CPU, int(seconds) + 5)
    _limit(resource.RLIMIT_FSIZE, _MAX_FILE_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    os.nice(5)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value)
