"""A run that is told to stop saves, says so by its exit code and leaves no process behind, whoever of its processes was told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import REPO, merged, write_config

from OpenSciDraw.training import checkpoint
from OpenSciDraw.training.run import EXIT_PREEMPTED
from OpenSciDraw.training.stopping import AGAIN_SECONDS, StopRequest, StopSignals
from OpenSciDraw.weights.files import list_checkpoints

PROGRAM = str(REPO / "train_OpenSciDraw_loop.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", PROGRAM]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1",
              "--mixed_precision=no", "--dynamo_backend=no", PROGRAM]  # fmt: skip


class Started:
    """A training command in a process group of its own."""

    def __init__(self, folder: Path, store_config: dict, command: list[str], **changes: object):  # type: ignore[type-arg]
        self.out, self.log = folder / "run", folder / "log"
        values = {"model_output_dir": str(self.out), "max_train_steps": 5000, "dataloader_num_workers": 2, "logging_steps": 1}
        self.config = write_config(folder / "c.py", merged(store_config, **(values | changes)))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, str(self.config)], stdout=log, stderr=subprocess.STDOUT, cwd=REPO, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
            )  # fmt: skip
        self.family: list[psutil.Process] = []

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"waited too long: {self.log.read_text()}"
            time.sleep(0.01)
        self.family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def lines(self) -> list[dict]:  # type: ignore[type-arg]
        file = self.out / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def steps(self) -> list[int]:
        return [row["step"] for row in self.lines() if "train_loss" in row]

    def assert_saved_and_gone(self) -> None:
        _, alive = psutil.wait_procs(self.family, timeout=60)
        assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], self.log.read_text()
        saved = list_checkpoints(self.out)
        assert len(saved) == 1, self.log.read_text()
        checkpoint.check(saved[0])
        assert int(saved[0].name.split("-")[1]) == max(self.steps())


@pytest.mark.parametrize(
    "whom",
    ["the process", "torchrun", *(pytest.param(whom, marks=pytest.mark.slow) for whom in ("its group", "accelerate launch"))],
)
def test_sigterm_with_data_workers_saves_and_leaves_nothing_running(whom: str, store_config: dict, tmp_path: Path) -> None:  # type: ignore[type-arg]
    command = {"torchrun": TORCHRUN, "accelerate launch": ACCELERATE}.get(whom, [sys.executable, PROGRAM])
    run = Started(tmp_path, store_config, command)
    run.wait_for(lambda: len(run.steps()) > 2)
    workers = 2 if command[1] == PROGRAM else 3  # beside a launcher the training process itself
    assert len(run.family) >= 1 + workers
    if whom == "its group":
        os.killpg(run.process.pid, signal.SIGTERM)
    else:
        run.process.send_signal(signal.SIGTERM)
    code = run.process.wait(timeout=60)
    if command[1] == PROGRAM:
        assert code == EXIT_PREEMPTED, run.log.read_text()
    run.assert_saved_and_gone()


def test_ctrl_c_which_the_whole_group_gets_saves_too(store_config: dict, tmp_path: Path) -> None:  # type: ignore[type-arg]
    run = Started(tmp_path, store_config, [sys.executable, PROGRAM])
    run.wait_for(lambda: len(run.steps()) > 2)
    end = time.monotonic() + AGAIN_SECONDS - 0.2
    while run.process.poll() is None and time.monotonic() < end:  # a launcher passes it on a second time, whenever that is
        os.killpg(run.process.pid, signal.SIGINT)
        time.sleep(0.002)
    assert run.process.wait(timeout=60) == EXIT_PREEMPTED, run.log.read_text()
    run.assert_saved_and_gone()


def test_workers_end_when_training_is_killed(store_config: dict, tmp_path: Path) -> None:  # type: ignore[type-arg]
    run = Started(tmp_path, store_config, [sys.executable, PROGRAM])
    run.wait_for(lambda: len(run.steps()) > 2)
    assert len(run.family) >= 3
    run.process.kill()
    run.process.wait()
    _, alive = psutil.wait_procs(run.family, timeout=20)
    assert not alive


@pytest.mark.slow
def test_a_run_that_is_stopped_in_a_validation_owes_it_and_does_it_when_it_goes_on(store_config: dict, tmp_path: Path) -> None:  # type: ignore[type-arg]
    """The last step's pictures of a stopped run are those of a run that was not."""
    steps = {"max_train_steps": 2, "checkpointing_steps": 2, "validation_steps": 2, "held_out_examples": 2,
             "validation_prompts": ["A box."], "resolution_list": [[64, 64]], "num_inference_steps": 400}  # fmt: skip
    run = Started(tmp_path, store_config, [sys.executable, PROGRAM], **steps, resume_from_checkpoint="latest")
    run.wait_for(lambda: any(row.get("event") == "validated" for row in run.lines()))  # that of step 0
    run.wait_for(lambda: (run.out / "checkpoint-2" / "manifest.json").exists())
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.process.wait(timeout=60) == EXIT_PREEMPTED, run.log.read_text()
    run.assert_saved_and_gone()
    assert [row["step"] for row in run.lines() if "held_out_loss" in row] == [0]
    again = Started(tmp_path, store_config, [sys.executable, PROGRAM], **steps, resume_from_checkpoint="latest")
    assert again.process.wait(timeout=120) == 0, again.log.read_text()
    assert [row["step"] for row in again.lines() if "held_out_loss" in row] == [0, 2]
    assert [row["step"] for row in again.lines() if row.get("event") == "validated"] == [0, 2]
    assert list((again.out / "validation_images").rglob("*.png"))
    once_more = Started(tmp_path, store_config, [sys.executable, PROGRAM], **steps, resume_from_checkpoint="latest")
    assert once_more.process.wait(timeout=120) == 0
    assert [row["step"] for row in once_more.lines() if row.get("event") == "validated"] == [0, 2]


def test_a_stop_while_data_are_waited_for_takes_no_further_step(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from train_OpenSciDraw_loop import train

    training = run(model_output_dir=str(tmp_path / "whole"), max_train_steps=2)
    shutil.rmtree(tmp_path / "whole")
    training.step, training.saved_step, training.micro_step, training.total_steps = 1, 0, 1, 5

    class Slow:
        def __iter__(self):  # type: ignore[no-untyped-def]
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
            raise AssertionError("waited for data")
            yield

    training.loader = Slow()
    saved = []
    training.save_checkpoint = lambda: saved.append(training.step)
    training.owes_validation = lambda: False
    begun = time.monotonic()
    assert train(training) == EXIT_PREEMPTED and time.monotonic() - begun < 10
    assert saved == [1]


def test_a_worker_that_dies_while_the_run_stops_is_no_error(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    training = run(model_output_dir=str(tmp_path), max_train_steps=1)

    def dying():  # type: ignore[no-untyped-def]
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        yield

    with pytest.raises(RuntimeError):
        training._next(dying())

    def dying_after_the_signal():  # type: ignore[no-untyped-def]
        training.signals.number = signal.SIGTERM
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        yield

    with pytest.raises(StopRequest):
        training._next(dying_after_the_signal())


def test_handlers_are_put_back_and_a_run_that_is_over_is_let_go() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signal.getsignal(signal.SIGTERM) != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == signal.SIGTERM
        with pytest.raises(StopRequest), signals.interruptible(True):
            raise AssertionError("went on")
        with signals.interruptible(False):
            pass
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_program_that_was_told_to_end_ends_with_its_own_code_however_late_it_is_told_again(number: int) -> None:
    program = (
        "import os, signal, sys\n"
        "from OpenSciDraw.training.stopping import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    signals.ends_process = True\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        f"os.kill(os.getpid(), {int(number)})\n"
        "sys.exit(75)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPO, check=False).returncode == EXIT_PREEMPTED


def test_a_cut_last_line_of_the_metrics_takes_no_other_with_it(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run(model_output_dir=str(tmp_path), max_train_steps=2, checkpointing_steps=2)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_text().splitlines()
    file.write_text("\n".join(whole)[:-5])
    run(model_output_dir=str(tmp_path), max_train_steps=3, checkpointing_steps=2, resume_from_checkpoint="latest")
    lines = file.read_text().splitlines()
    assert lines[: len(whole) - 1] == whole[:-1] and lines[len(whole) - 1] == whole[-1][:-5]
    assert json.loads(lines[len(whole)]) == {"event": "resumed", "step": 2}
