"""What a run says of itself: metrics.jsonl always, a tracker by choice, a progress bar."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from OpenSciDraw import flow
from OpenSciDraw.train_iteration_funcs.flow_matching import LossOutput, Means
from OpenSciDraw.utils.files import json_objects, parse_json, write_json

_LOG = logging.getLogger("OpenSciDraw")


class RunLog:
    """Collects between two logging steps and writes one line for them.

    Metrics: `loss` (mean of this step on rank 0), `train_loss` (mean over all samples since the last line,
    accumulation and ranks), `loss_sigma_0.0-0.1` … (unweighted, by noise level), `lr` (effective), `grad_norm`,
    `images_per_second` (all ranks), `data_wait_share` (of the wall time, rank 0), `memory_gb` (peak, rank 0),
    `bad_rows` (so far, rank 0), and what the objective has averaged by name (`LossOutput.means`).
    """

    def __init__(self, folder: Path, accelerator: Accelerator, total_steps: int, first_step: int):
        self.accelerator = accelerator
        self.path = folder / "metrics.jsonl"
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc="train", unit="step", dynamic_ncols=True,
            disable=not accelerator.is_main_process, mininterval=1.0 if sys.stderr.isatty() else 10.0,
        )  # fmt: skip
        self._end_last_line()
        self._events = _events(self.path)
        if first_step:
            self.event("resumed", first_step)
        self._reset()

    def _reset(self) -> None:
        device = self.accelerator.device
        self._bins = torch.zeros(2, flow.SIGMA_BINS, device=device)  # loss sums, counts
        self._weighted = torch.zeros(2, device=device)  # loss sum, samples
        self._means: Means | None = None  # of the objective's own numbers
        self._step_loss: list[Tensor] = []
        self._since, self._waited = time.perf_counter(), 0.0

    def waited(self, seconds: float) -> None:
        """Time that this rank spent waiting for its next batch."""
        self._waited += seconds

    def micro_step(self, output: LossOutput) -> None:
        """Add one micro-step; no synchronisation with the device."""
        losses = output.per_sample.float()
        if output.sigma is not None:
            where = flow.sigma_bin(output.sigma)
            self._bins[0].index_add_(0, where, losses)
            self._bins[1].index_add_(0, where, torch.ones_like(losses))
        count = len(losses)
        self._weighted += torch.stack([output.loss.detach().float() * count, torch.full_like(losses[0], count)])
        self._step_loss.append(output.loss.detach())
        if output.means is not None:
            before = self._means
            self._means = output.means if before is None else replace(before, sums=before.sums + output.means.sums)

    def optimizer_step(self, step: int, every: int, lr: float, grad_norm: Tensor | None, bad_rows: int) -> None:
        """Advance the bar; at each `every`-th step write the line."""
        self.bar.update(1)
        if step % every:
            self._step_loss.clear()
            return
        sums: Tensor = self.accelerator.reduce(torch.cat([self._bins.flatten(), self._weighted]), reduction="sum")
        bins, weighted = sums[:-2].view(2, -1), sums[-2:]
        seconds = time.perf_counter() - self._since
        metrics: dict[str, float] = {
            "loss": torch.stack(self._step_loss).mean().item(),
            "train_loss": (weighted[0] / weighted[1]).item(),
            "lr": lr,
            "images_per_second": weighted[1].item() / seconds,
            "data_wait_share": self._waited / seconds,
            "memory_gb": peak_memory_gb(self.accelerator.device),
            "bad_rows": bad_rows,
        }
        if grad_norm is not None:
            metrics["grad_norm"] = float(grad_norm)
        metrics |= self._named_means()
        for at, (total, count) in enumerate(bins.T.tolist()):
            if count:
                metrics[f"loss_sigma_{at / flow.SIGMA_BINS:.1f}-{(at + 1) / flow.SIGMA_BINS:.1f}"] = total / count
        self.metrics(step, metrics)
        self.bar.set_postfix(loss=f"{metrics['train_loss']:.4f}", lr=f"{lr:.2e}", img_s=f"{metrics['images_per_second']:.1f}")
        self._reset()

    def _named_means(self) -> dict[str, float]:
        """The objective's own numbers over all samples since the last line; without those that had nothing to count."""
        if self._means is None:
            return {}
        sums: Tensor = self.accelerator.reduce(self._means.sums, reduction="sum")
        pairs = zip(self._means.names, *sums.tolist(), strict=True)
        return {name: total / count for name, total, count in pairs if count}

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Write one line of metrics.jsonl and send it to the tracker (rank 0)."""
        if self.accelerator.is_main_process:
            self._write({"step": step, "time": round(time.time(), 3), **values})
        self.accelerator.log(values, step=step)

    def event(self, name: str, step: int) -> None:
        """Write a line that says what happened at a step (rank 0): `resumed`, `validated`."""
        if self.accelerator.is_main_process:
            self._write({"event": name, "step": step})

    def has_event(self, name: str, step: int) -> bool:
        """Whether rank 0 had such a line in metrics.jsonl when this run began; the same answer on every rank."""
        found = torch.tensor(float(self.accelerator.is_main_process and (name, step) in self._events))
        return bool(self.accelerator.reduce(found.to(self.accelerator.device), reduction="sum").item())

    def exclude_time(self, seconds: float) -> None:
        """Take time that was not training (validation, checkpoints) out of the rates."""
        self._since += seconds

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _end_last_line(self) -> None:
        """A run that was killed while it wrote leaves half a line, which must not take the next one with it."""
        if self.accelerator.is_main_process and self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            with self.path.open("a") as file:
                file.write("\n")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        self.accelerator.end_training()


def _events(path: Path) -> set[tuple[str, int]]:
    """(name, step) of each event in metrics.jsonl; lines that are none, or cut, are passed over."""
    rows = json_objects(path.read_bytes())[0] if path.exists() else []
    return {(str(row["event"]), row.get("step", -1)) for row in rows if "event" in row}


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory: of the GPU's allocator, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def save_session(folder: Path, session: dict[str, Any]) -> None:
    """Add one start of training to `run.json`: {"sessions": [...]}, one for each time that the command was run."""
    file = folder / "run.json"
    sessions: list[Any] = []
    if file.exists():
        try:
            sessions = parse_json(file.read_bytes())["sessions"]
        except (ValueError, KeyError, TypeError) as error:
            file.rename(damaged := file.with_suffix(".damaged.json"))
            _LOG.warning("%s is damaged (%s): kept as %s, and begun anew", file, type(error).__name__, damaged.name)
    write_json(file, {"sessions": [*sessions, session]})


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' * (threads > 1)}"
