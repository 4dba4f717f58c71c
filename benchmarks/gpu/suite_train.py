"""Runs of the project's own loop: their rate, memory, kernels, start, checkpoints and resume."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from suite_bench import Bench
from suite_process import stop, tail
from suite_results import REPO
from torch.autograd import DeviceType

from OpenSciDraw.config import Config
from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.planning.plan import Plan
from OpenSciDraw.training.run import Training
from OpenSciDraw.weights.files import LORA_FILE
from train_OpenSciDraw_loop import train

WARM_UP_LINES = 2  # of metrics.jsonl, not counted
KERNEL_CALLS = ("cudaLaunch", "cuLaunch")  # of the profiler: each starts one kernel
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize")


class Stamped(Training):
    """Training that notes when each step begins, with nothing of the one before it left to do on the device."""

    def batches(self) -> Iterator[Batch]:
        self.stamps: list[float] = []
        for batch in super().batches():
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            self.stamps.append(time.perf_counter())
            yield batch

    def seconds_of_steps(self) -> list[float]:
        return [after - before for before, after in zip(self.stamps, self.stamps[1:], strict=False)]


class Profiled(Training):
    """Training whose steps from `first` on are profiled, `count` of them."""

    first, count = 5, 3

    def batches(self) -> Iterator[Batch]:
        from torch.profiler import ProfilerActivity, profile

        cuda = self.accelerator.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self.profile = profile(activities=activities)
        for number, batch in enumerate(super().batches()):
            if number in (self.first, self.first + self.count) and cuda:
                torch.cuda.synchronize()
            if number == self.first:
                self.profile.start()
                began = time.perf_counter()
            if number == self.first + self.count:
                self.wall_seconds = time.perf_counter() - began
                self.profile.stop()
            yield batch


def run_of(config: Config, kind: type[Training] = Training) -> Any:
    """Train as the program does, in this process; returns the run after its end. An earlier run in the folder is deleted."""
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps its state for one run a process
    GradientState._reset_state()
    if config.resume_from_checkpoint is None:
        shutil.rmtree(config.model_output_dir, ignore_errors=True)
    run = kind(config)
    assert train(run) == 0
    return run


def metrics(config: Config) -> list[dict[str, Any]]:
    file = Path(config.model_output_dir) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _without_spare(plan: Plan) -> float:
    return (sum(plan.memory.values()) - plan.memory["CUDA context and spare"]) / 1e9


def _share_of_rate(bench: Bench, kind: str, config: Config, rate: float) -> dict[str, float]:
    """Of the card's own rate, with the FLOPs of a step that recomputes nothing; only a LoRA's, whose case the goals name."""
    ceiling = bench.earlier("card", "tflops")
    if not ceiling or not config.use_lora:
        return {}
    whole = bench.plan(kind, config.model_copy(update={"gradient_checkpointing": False}))
    return {"share": whole.steps[-1].flops * rate / config.train_batch_size / (ceiling * 1e12)}


def training(bench: Bench, kind: str, name: str, bare: str | None = None, **changes: Any) -> dict[str, Any]:
    """Rate and peak memory of a run, its share of the card's rate, and what `plan` says.

    `bare`: the case that the rate is held against. The share counts a step's FLOPs without recomputation. `dataset` among
    the changes: data that are there already, whose steps the planner counts as those of another kind.
    """
    if "dataset" not in changes:
        bench.store(kind)
    config = bench.config(kind, name, **changes)
    bench.free()
    before = torch.cuda.memory_allocated() / 1e9 if bench.cuda else 0.0
    run = run_of(config)
    rows = [row for row in metrics(config) if "images_per_second" in row]
    rate = median(row["images_per_second"] for row in rows[WARM_UP_LINES:] or rows[-1:])
    kept = run.activations
    del run
    found: dict[str, Any] = {
        "images_per_second": rate, "peak_gb": max(row["memory_gb"] for row in rows) if bench.cuda else None,
        "waited_for_data": rows[-1]["data_wait_share"],
        "losses": [round(row["train_loss"], 4) for row in rows[:: max(1, len(rows) // 3)]],
    }  # fmt: skip
    if before > 0.1:
        found["gb_before"] = before
    if kept is not None:
        found["blocks_kept"] = kept.kept
    counted = f"{kind}-{name}" if {"dataset", "token_routing"} & changes.keys() else kind  # other costs of a step
    if not (bench.rehearse and kind in bench.costs):  # planning takes longer than a rehearsed run: once is enough there
        found["plan_gb"] = _without_spare(bench.plan(counted, config))
        found |= _share_of_rate(bench, counted, config, rate)
    other = bench.earlier(bare, "images_per_second") if bare else None
    if other:
        found["of_bare"] = rate / other
    note = bench.folder(kind) / "note"
    return found | ({"note": note.read_text()} if note.exists() else {})


def profiled(bench: Bench, kind: str) -> dict[str, Any]:
    """Kernels launched, copies between types and waits of one step, by torch.profiler; the table lies beside the results."""
    bench.store(kind)
    Profiled.first, Profiled.count = (1, 1) if bench.rehearse else (5, 3)
    run = run_of(bench.config(kind, "profile", max_train_steps=Profiled.first + Profiled.count + 1, logging_steps=10**6), Profiled)
    averages, count = run.profile.key_averages(), Profiled.count

    def calls(*names: str) -> float:
        return sum(event.count for event in averages if event.key.startswith(names)) / count

    by = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    bench.results.parent.mkdir(parents=True, exist_ok=True)
    sorts = dict.fromkeys((by, "self_cpu_time_total"))
    tables = [averages.table(sort_by=key, row_limit=50, max_name_column_width=80) for key in sorts]
    bench.results.with_suffix(".profile.txt").write_text("\n".join(tables))
    found = {"dtype_copies": calls("aten::_to_copy"), "items": calls("aten::_local_scalar_dense")}
    if bench.cuda:
        kernels = [event for event in averages if event.device_type == DeviceType.CUDA]  # operators carry their kernels' time too
        busy = sum(event.self_device_time_total for event in kernels) / 1e6
        found |= {"kernels": calls(*KERNEL_CALLS), "waits": calls(*WAITS), "device_busy": busy / run.wall_seconds}
    return found


def checkpointed(bench: Bench, kind: str) -> dict[str, Any]:
    """Seconds that a checkpoint adds to its step, and to the slowest of the steps while it is written."""
    bench.store(kind)
    at, last = (2, 4) if bench.rehearse else (8, 16)
    config = bench.config(kind, "checkpoint", max_train_steps=last, checkpointing_steps=at)
    run = run_of(config, Stamped)
    seconds = run.seconds_of_steps()
    usual = median(seconds[at // 2 : at - 1] or seconds[:1])
    bytes_written = sum(file.stat().st_size for file in (run.output_dir / f"checkpoint-{at}").iterdir())
    return {
        "stopped_seconds": seconds[at - 1] - usual, "later_steps_seconds": max(seconds[at:]) - usual, "usual_step_seconds": usual,
        "checkpoint_gb": bytes_written / 1e9,
    }  # fmt: skip


class Command:
    """`python train_OpenSciDraw_loop.py CONFIG` in a process of its own."""

    def __init__(self, bench: Bench, config: Config):
        self.config, self.log = config, bench.work / f"{Path(config.model_output_dir).name}.log"
        shutil.rmtree(config.model_output_dir, ignore_errors=True)
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # the suite has put this repository into PYTHONPATH
        if config.deterministic:
            environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        self.started = time.time()
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "train_OpenSciDraw_loop.py", str(bench.write_config(config))],
                cwd=REPO, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait_for_step(self, step: int) -> float:
        """Seconds from the command to the end of a step, by the time in its line of metrics.jsonl."""
        while True:
            for row in metrics(self.config):
                if row.get("step", 0) >= step and "train_loss" in row:
                    return row["time"] - self.started
            if self.process.poll() is not None:
                raise RuntimeError(f"training ended with {self.process.returncode} before step {step}: {tail(self.log)}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL, to it and its data workers."""
        stop(self.process)


def started(bench: Bench, kind: str) -> dict[str, Any]:
    """Seconds from the command to the end of its first step; the weights lie in the page cache, as they were just written."""
    bench.store(kind)
    bench.free()
    command = Command(bench, bench.config(kind, "start", logging_steps=1))
    try:
        return {"first_step_seconds": command.wait_for_step(1)}
    finally:
        command.kill()


def resumed(bench: Bench) -> dict[str, Any]:
    """A run that is killed after a checkpoint and goes on, against one that is not: every bit of the adapter."""
    bench.store("short")
    steps = {"max_train_steps": 6, "checkpointing_steps": 3, "logging_steps": 1, "deterministic": True}
    whole = bench.config("short", "whole", **steps)
    killed = bench.config("short", "killed", **(steps | {"max_train_steps": 10**6, "resume_from_checkpoint": "latest"}))
    command = Command(bench, killed)
    try:
        command.wait_for_step(5)  # the checkpoint of step 3 is whole: only one is written at a time, and this waits for its file
        while not (Path(killed.model_output_dir) / "checkpoint-3" / "manifest.json").exists():
            time.sleep(0.02)
    finally:
        command.kill()
    for newer in Path(killed.model_output_dir).glob("checkpoint-[0-9]*"):
        if newer.name != "checkpoint-3":  # it may have come further before it died
            shutil.rmtree(newer)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    run_of(whole)
    run_of(bench.config("short", "killed", **(steps | {"resume_from_checkpoint": "latest"})))
    ours, theirs = (load_file(Path(config.model_output_dir) / LORA_FILE) for config in (killed, whole))
    different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    if different or set(ours) != set(theirs):
        raise AssertionError(f"{len(different)} of {len(theirs)} tensors differ after a resume: {different[:3]}")
    return {"equal_tensors": len(theirs), "note": "3 blocks of the 4B's width, killed with SIGKILL after step 5, resumed at 3"}
