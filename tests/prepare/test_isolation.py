"""A hostile function in a process of its own: it costs its time and memory and nothing else, and leaves nothing behind."""

from __future__ import annotations

import ctypes
import operator
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from OpenSciDraw.prepare.isolation import Crashed, TooMuch, run_isolated, run_program

MEMORY = 2**30
linux = pytest.mark.skipif(sys.platform != "linux", reason="a limit of address space, and lost children found, are Linux's")


def isolated(function, argument, seconds: float = 20, memory_bytes: int = MEMORY):  # type: ignore[no-untyped-def]
    return run_isolated(function, argument, seconds=seconds, memory_bytes=memory_bytes)


def double(value):  # type: ignore[no-untyped-def]
    return value * 2


def facts(_: object) -> tuple[int, int, bool]:
    return os.getpid(), os.getppid(), "torch" in sys.modules


def fill(size: int) -> bytes:
    return b"x" * size


def fail(words: str) -> None:
    raise LookupError(words)


def leave(code: int) -> None:
    sys.exit(code)


def no_pickle(_: object) -> object:
    return lambda: None


def segfault(_: object) -> None:
    ctypes.string_at(0)


def busy(_: object) -> None:
    while True:
        pass


def hog(_: object) -> int:
    return len([bytearray(2**26) for _ in range(1000)])


def endless_recursion(value: int) -> int:
    return endless_recursion(value + 1)


def write_much(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(8 * 2**30)


def start_sleepers(path: Path) -> str:
    """Children in the group, in sessions of their own, and one whose parent is gone already."""
    pids = [subprocess.Popen(["sleep", "300"], start_new_session=own).pid for own in (False, True)]
    lost = subprocess.check_output(["sh", "-c", "sleep 300 >/dev/null 2>&1 & echo $!"], start_new_session=True)
    path.write_text(" ".join(map(str, [*pids, int(lost)])))
    return "started"


def start_sleepers_and_hang(path: Path) -> None:
    start_sleepers(path)
    time.sleep(300)


def alive(pids: str) -> list[int]:
    return [pid for pid in map(int, pids.split()) if Path(f"/proc/{pid}").exists()]


def run_quick_program(argument: tuple[Path, list[str], float, int]) -> tuple[int, str]:
    folder, command, seconds, file_bytes = argument
    return run_program(command, seconds=seconds, folder=folder, environment={"PATH": os.environ["PATH"]}, file_bytes=file_bytes)


def test_a_result_comes_back_from_a_fresh_process_without_torch() -> None:
    assert isolated(double, [1, "é"]) == [1, "é", 1, "é"]
    (first, server, torch), (second, same_server, _) = isolated(facts, None), isolated(facts, None)
    assert len({first, second, server, os.getpid()}) == 4 and server == same_server
    assert not torch


def test_hundreds_of_megabytes_come_back_whole() -> None:
    assert isolated(fill, 200 * 2**20) == b"x" * (200 * 2**20)


@pytest.mark.parametrize("function, argument, error, reason", [
    (fail, "no such thing\nsecond line", Crashed, r"^crashed: LookupError: no such thing \(test_isolation.py, line \d+\)$"),
    (leave, 3, Crashed, "crashed: SystemExit: 3"),
    (no_pickle, None, Crashed, "crashed: .*pickle"),
    (segfault, None, Crashed, "the process died of SIGSEGV"),
    (endless_recursion, 0, Crashed, "RecursionError"),
    pytest.param(hog, None, TooMuch, "memory limit: more than 1024 MiB", marks=linux),
])  # fmt: skip
def test_what_goes_wrong_inside_comes_back_as_a_reason(function, argument, error, reason) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=reason):
        isolated(function, argument)
    assert isolated(double, 2) == 4


@pytest.mark.parametrize("function", [busy, time.sleep])
def test_an_endless_function_is_stopped_at_its_time(function) -> None:  # type: ignore[no-untyped-def]
    start = time.monotonic()
    with pytest.raises(TooMuch, match=r"time limit: not done after 0.5 s"):
        isolated(function, 300, seconds=0.5)
    assert time.monotonic() - start < 3


def test_no_file_grows_without_bound(tmp_path: Path) -> None:
    with pytest.raises(Crashed, match="File too large"):
        isolated(write_much, tmp_path / "large")


@linux
@pytest.mark.parametrize("function, seconds", [(start_sleepers, 20), (start_sleepers_and_hang, 1)])
def test_nothing_that_it_started_survives_it(function, seconds: float, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    try:
        assert isolated(function, tmp_path / "pids", seconds=seconds) == "started"
    except TooMuch:
        assert function is start_sleepers_and_hang
    pids = (tmp_path / "pids").read_text()
    assert len(pids.split()) == 3 and not alive(pids)


@linux
def test_everything_dies_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_isolation as t\n"
        "t.isolated(t.start_sleepers_and_hang, Path(sys.argv[2]), seconds=300)"
    )
    caller = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "pids")])
    deadline = time.monotonic() + 20
    while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pids = (tmp_path / "pids").read_text()
    assert len(alive(pids)) == 3
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    while alive(pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_was_killed_is_replaced() -> None:
    _, server, _ = isolated(facts, None)
    os.kill(server, signal.SIGKILL)
    time.sleep(0.1)
    _, another, _ = isolated(facts, None)
    assert another != server


def test_threads_run_side_by_side_and_a_call_costs_milliseconds() -> None:
    isolated(operator.neg, 1)  # the server has started
    with ThreadPoolExecutor(4) as pool:
        start = time.monotonic()
        results = list(pool.map(lambda n: isolated(operator.neg, n), range(80)))
        each = (time.monotonic() - start) / 80
        assert results == [-n for n in range(80)]
        start = time.monotonic()
        waits = [pool.submit(isolated, time.sleep, 0.6) for _ in range(4)]
        assert [wait.result() for wait in waits] == [None] * 4
        assert time.monotonic() - start < 1.8
    assert each < 0.06


def test_the_callers_main_module_is_not_run_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from OpenSciDraw.prepare.isolation import run_isolated\nimport math\nprint('main', __name__)\n"
        "print(run_isolated(math.sqrt, 4.0, seconds=20, memory_bytes=2**30))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["main", "__main__", "2.0"] and not done.stderr


def test_a_fork_of_the_caller_has_a_server_of_its_own() -> None:
    _, server, _ = isolated(facts, None)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, str(isolated(facts, None)[1]).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    other = int(os.read(reader, 100))
    os.close(reader)
    os.close(writer)
    assert other != server and isolated(facts, None)[1] == server


def test_a_programs_output_and_its_bounds(tmp_path: Path) -> None:
    assert isolated(run_quick_program, (tmp_path, ["sh", "-c", "echo out; echo err >&2; exit 3"], 10, 2**20)) == (3, "out\nerr\n")
    with pytest.raises(Crashed, match="TooMuch: not done after 0.3 s"):
        isolated(run_quick_program, (tmp_path, ["sleep", "300"], 0.3, 2**20))
    code, printed = isolated(run_quick_program, (tmp_path, ["yes"], 10, 2**16))
    assert code != 0 and len(printed) <= 2**16
