"""A folder has one user at a time, and a killed one blocks nobody."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import merged, write_config

from OpenSciDraw import cli
from OpenSciDraw.errors import UserError
from OpenSciDraw.utils import sole_user as module
from OpenSciDraw.utils.files import clear_unfinished, unfinished
from OpenSciDraw.utils.sole_user import sole_user

_HOLD = """
import sys, time
from pathlib import Path
from OpenSciDraw.utils.sole_user import sole_user
with sole_user(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    time.sleep(600)
"""
_HOLD_WITH_CHILD = _HOLD.replace('    print(', '    import os\n    if os.fork():\n        print(')


def _holder(folder: Path, program: str = _HOLD) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, str(folder)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def _take(folder: Path, **place: int) -> None:
    with sole_user(folder, "encode", **place):
        pass


def test_a_second_process_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    holder = _holder(tmp_path)
    try:
        with pytest.raises(UserError, match=rf"in use by `train`, process {holder.pid} on \S+, since 20\d\d-"):
            _take(tmp_path)
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("program", [_HOLD, _HOLD_WITH_CHILD], ids=["alone", "with a child that lives on"])
def test_a_killed_process_blocks_nobody(tmp_path: Path, program: str) -> None:
    holder = _holder(tmp_path, program)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    try:
        assert (tmp_path / ".lock").exists()
        start = time.monotonic()
        _take(tmp_path)
        assert time.monotonic() - start < 1 and list(tmp_path.iterdir()) == []
    finally:
        if program == _HOLD_WITH_CHILD:
            os.killpg(holder.pid, signal.SIGKILL)


def test_a_file_system_without_locks_knows_a_living_process_by_its_number_and_birth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(handle: int, how: int) -> None:
        raise OSError(module.errno.ENOLCK, "no locks here")

    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    with sole_user(tmp_path, "train"), pytest.raises(UserError, match="in use by `train`"):
        _take(tmp_path)
    _take(tmp_path)
    dead = {"command": "train", "process": os.getpid(), "born": "1", "kernel": module.kernel()}  # its number was given again
    (tmp_path / ".lock").write_text(json.dumps(dead))
    _take(tmp_path)


def _of_another_machine(beat: int) -> str:
    holder = {"command": "train", "process": 7, "machine": "node-2", "kernel": "other", "started": "2026-11-27"}
    return json.dumps({**holder, "beat": beat})


def test_a_lock_of_another_machine_holds_while_it_gives_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_SECONDS", 1.0)
    lock, stop = tmp_path / ".lock", threading.Event()
    lock.write_text(_of_another_machine(0))

    def beat() -> None:
        number = 0
        while not stop.wait(0.2):
            number += 1
            lock.write_text(_of_another_machine(number))

    other = threading.Thread(target=beat)
    other.start()
    try:
        with pytest.raises(UserError, match="process 7 on node-2, since 2026-11-27"):
            _take(tmp_path)
    finally:
        stop.set()
        other.join()
    _take(tmp_path)  # it was killed: no sign of life


def test_who_holds_a_folder_gives_signs_of_life_and_stops_when_another_machine_took_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    got = list[int]()
    monkeypatch.setattr(module.os, "kill", lambda process, number: got.append(number))
    with sole_user(tmp_path, "train"):
        first = module._read(tmp_path / ".lock")
        time.sleep(0.5)
        assert module._read(tmp_path / ".lock")["beat"] > first.get("beat", 0)
        (tmp_path / ".lock").write_text(_of_another_machine(1))
        time.sleep(0.5)
    assert got == [signal.SIGTERM] and (tmp_path / ".lock").exists()


def test_processes_of_one_command_share_a_folder_and_another_count_of_them_is_refused(tmp_path: Path) -> None:
    with sole_user(tmp_path, "encode", 0, 2), sole_user(tmp_path, "encode", 1, 2):
        with pytest.raises(UserError, match="in use by `encode`"):
            _take(tmp_path, rank=0, world_size=2)
        with pytest.raises(UserError, match="in use by `encode`"):
            _take(tmp_path)
    with sole_user(tmp_path, "encode"), pytest.raises(UserError, match="in use by `encode`"):
        _take(tmp_path, rank=1, world_size=2)


def test_a_folder_that_was_made_and_not_used_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no figures"), sole_user(tmp_path / "a" / "b", "encode"):
        raise UserError("no figures")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "encode", "export", "evaluate", "repack", "prepare"])
def test_each_command_that_fills_a_folder_refuses_one_in_use(  # type: ignore[no-untyped-def]
    command: str, tmp_path: Path, store_config: dict, run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, trained = tmp_path / "folder", tmp_path / "run"
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "2401.00001.tex").write_text("\\documentclass{article}\\begin{document}x\\end{document}")
    dataset = {"base_dir": str(tmp_path), "parquet_base_path": "folder"} if command == "encode" else {}
    config = write_config(tmp_path / "config.py", merged(store_config, model_output_dir=str(folder), dataset=dataset))
    if command == "export":
        run(model_output_dir=str(trained), max_train_steps=1)
    store = Path(store_config["dataset"]["base_dir"]) / "store"
    arguments = {
        "train": [config], "encode": [config], "export": [trained, "--out", folder], "repack": [store, folder],
        "evaluate": [config, "--figures", "drawn:2", "--out", folder], "prepare": [tmp_path / "papers", "--out", folder],
    }  # fmt: skip
    with sole_user(folder, "other"):
        assert cli.main([command, *map(str, arguments[command])]) == 2
        assert "is in use by `other`, process" in capsys.readouterr().err
        assert [path.name for path in folder.iterdir()] == [".lock"]


def test_what_a_killed_process_was_making_is_removed_and_what_a_living_one_makes_is_not(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    for name in (f".a.json.{ended.stdout.strip()}-1.unfinished", f".text.{ended.stdout.strip()}-1.x_y.unfinished",
                 f".b.json.{os.getpid()}-1.unfinished", f".c.json.{os.getppid()}-1.unfinished"):  # fmt: skip
        (tmp_path / name).mkdir()
    clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f".c.json.{os.getppid()}-1.unfinished"]


def test_weights_may_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for path in (tmp_path / "a.safetensors", tmp_path / "folder"):
        with unfinished(path) as part:
            if path.suffix:
                save_file({"a": torch.zeros(2)}, part)
            else:
                part.mkdir()
                save_file({"a": torch.zeros(2)}, part / "b.safetensors")
    plain = tmp_path / "plain"
    plain.touch()
    for path in (tmp_path / "a.safetensors", tmp_path / "folder" / "b.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "folder", "plain"]
