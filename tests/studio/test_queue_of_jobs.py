"""The queue: in files, so that a kill of the studio loses nothing and ends nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from OpenSciDraw.errors import UserError
from OpenSciDraw.studio import jobs
from OpenSciDraw.studio.devices import Device, Scheduler, gpus_in
from OpenSciDraw.studio.jobs import Queue
from OpenSciDraw.utils.sole_user import born, holder_of, kernel, sole_user

LAUNCH = """
import sys
from pathlib import Path
from OpenSciDraw.studio import jobs
from OpenSciDraw.studio.jobs import Queue
jobs.COMMANDS = ("draw",)
queue = Queue(Path(sys.argv[1]))
queue.launch(queue.add("draw", [sys.argv[2], "--count", "1000000"], "draw"), "cpu")
queue.add("draw", [sys.argv[2], "--count", "1"], "the next one")
print("launched", flush=True)
input()
"""


def until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_kill_of_the_studio_touches_no_run_and_the_next_studio_finds_and_stops_it(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", LAUNCH, str(tmp_path / "queue"), str(tmp_path / "out")], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)  # fmt: skip
    assert first.stdout is not None and first.stdout.readline() == b"launched\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    queue = Queue(tmp_path / "queue")
    running, waiting = queue.jobs()
    until(lambda: queue.state(running).pid is not None and (tmp_path / "out").exists())
    assert queue.state(running).name == "running" and queue.state(waiting).name == "waiting"
    pid = queue.state(running).pid
    assert pid is not None and os.getsid(pid) == pid  # in a session of its own: no signal of a terminal reaches it
    with pytest.raises(UserError, match="Stop it first"):
        queue.remove(running.number)
    queue.stop(running.number)
    until(lambda: queue.state(running).is_over)
    assert queue.state(running).name == "stopped" and born(pid) is None
    queue.stop(waiting.number)
    assert queue.state(waiting).name == "stopped" and queue.again(waiting.number).number == 3
    assert queue.log(running.number).startswith("$ scienceflow draw")


def put(queue: Queue, number: int, **files: Any) -> None:
    place = queue.place(number)
    for name, value in files.items():
        (place / f"{name}.json").write_text(json.dumps(value))


def test_the_state_of_a_job_follows_from_its_files_and_processes(tmp_path: Path) -> None:
    queue, me = Queue(tmp_path), os.getpid()
    for _ in range(7):
        queue.add("train", [], "train", run="runs/a")
    alive = {"process": me, "process_born": born(me), "keeper": 0, "keeper_born": None, "kernel": kernel(), "time": 1.0}
    put(queue, 1, launched={"device": "0", "time": 1.0}, started=alive)
    put(queue, 2, started=alive | {"process_born": "1"})  # its number is another process's by now
    put(queue, 3, started=alive | {"kernel": "another boot"})
    put(queue, 4, started=alive, ended={"code": 75, "time": 2.0})
    put(queue, 5, started=alive, ended={"code": 2, "time": 2.0})
    put(queue, 6, launched={"device": "0", "time": time.time()})
    names = [queue.state(job).name for job in queue.jobs()]
    assert names == ["running", "killed", "killed", "stopped", "failed", "running", "waiting"]
    put(queue, 6, launched={"device": "0", "time": 1.0})  # its keeper never came: it is started again
    assert queue.state(queue.job(6)).name == "waiting"
    later = queue.add("train", [], "train", after=5)
    assert queue.state(later).name == "blocked" and "has failed" in queue.state(later).reason
    (queue.place(9)).mkdir()
    (queue.place(9) / "job.json").write_text("{cut")
    assert len(queue.jobs()) == 8
    with pytest.raises(UserError, match="no job 44"):
        queue.job(44)
    with pytest.raises(UserError, match="The queue runs"):
        queue.add("rm", ["-rf"], "x")


def test_one_job_at_a_time_on_each_device_and_one_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, started = Queue(tmp_path / "queue"), []
    three = [Device("0", "a GPU"), Device("1", "a GPU", 30, 40), Device("2", "a GPU")]
    monkeypatch.setattr("OpenSciDraw.studio.devices.devices", lambda: three)

    def launch(job: jobs.Job, device: str) -> None:
        started.append((job.number, device))
        put(queue, job.number, launched={"device": device, "time": time.time()})

    monkeypatch.setattr(queue, "launch", launch)
    for run in ("a", "a", "b", "c"):
        queue.add("train", [], "train", run=run)
    scheduler = Scheduler(queue, tmp_path)
    with sole_user(tmp_path / "c", "train"):  # started in a shell
        assert holder_of(tmp_path / "c")[1]
        scheduler.tick()
        scheduler.tick()
    assert started == [(1, "0"), (3, "2")]  # GPU 1 is another program's
    assert holder_of(tmp_path / "c") == ({}, False)


def test_nvidia_smi_is_read() -> None:
    listing = "0, NVIDIA H100 80GB HBM3, 512, 81559\n1, NVIDIA H100 80GB HBM3, 60000, 81559\n[N/A], x, [N/A], 1\nnone"
    found = gpus_in(listing)
    assert [(gpu.name, gpu.is_busy) for gpu in found] == [("0", False), ("1", True)] and round(found[0].total) == 86


def test_a_config_of_the_queue_is_values_and_again_copies_it(studio: Any, client: Any) -> None:
    root = studio.places.root
    changes = {"encode.figures": str(root), "model_output_dir": str(root / "runs" / "x")}
    saved = client.post("/api/configs/save", json={"name": "x", "base": "recipe:tiny", "changes": changes})
    assert saved.json() == {"config": "configs/x.py"}
    assert client.post("/api/configs/start", json={"config": "configs/x.py"}).json() == {"jobs": [1, 2]}
    encode, train = studio.queue.jobs()
    assert (encode.command, train.command, train.after, train.run) == ("encode", "train", 1, "runs/x")
    assert studio.places.config("configs/x.py").model_output_dir == str(root / "runs" / "x")
    again = client.post("/api/configs/start", json={"config": "configs/x.py"})
    assert again.status_code == 400 and "in the queue already, as job 2" in again.json()["error"] and len(studio.queue.jobs()) == 2
    studio.queue.stop(2)
    copy = studio.queue.again(2)
    assert copy.arguments == [str(studio.queue.place(copy.number) / "config.py")] and Path(copy.arguments[0]).is_file()
