"""The plan of a config on this machine: `scienceflow plan`'s, with this machine's GPU or CPU, memory and disk. Runs in a worker."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from OpenSciDraw.config import load_saved_config
from OpenSciDraw.errors import UserError
from OpenSciDraw.planning.gpus import GPUS
from OpenSciDraw.planning.machine import memory_bytes
from OpenSciDraw.planning.plan import GB, make_plan, plan_with_changes
from OpenSciDraw.studio.devices import Device, devices

_ON_CPU = "A100-80GB"  # whose plan is read for a CPU: weights, gradients, state and activations are the same bytes
_CONTEXT = "CUDA context and spare"
_PROCESS_BYTES = 1.0e9  # assumed: Python, torch and the libraries


def plan_here(report: Callable[[Any], None], config: str, root: str) -> dict[str, Any]:
    """What `scienceflow plan` says of a saved config on this machine.

    On a CPU the bytes are the same, without CUDA's; the time is the FLOPs at the speed of one matrix product here, so the least.
    """
    loaded, disk, device = load_saved_config(config), shutil.disk_usage(root).free, devices()[0]
    if device.total:
        name = known_gpu(device)
        plan, better = plan_with_changes(loaded, name, 1, "ddp")
        note = f"Computed, not measured. One GPU, as {name}."
        return {
            "plan": asdict(plan), "device": device.what, "peak": plan.peak, "memory": GPUS[name].memory_gb * GB, "fits": plan.fits,
            "changes": better.changes if better else [], "disk": disk, "at_least": False, "note": note,
        }  # fmt: skip
    if loaded.activation_memory_gb == "auto":  # acts on GPUs alone
        loaded = loaded.model_copy(update={"activation_memory_gb": None})
    plan = make_plan(loaded, _ON_CPU)
    plan.encoding_memory += _PROCESS_BYTES - plan.memory.pop(_CONTEXT)
    plan.memory["the process itself (assumed)"] = _PROCESS_BYTES
    plan.step_seconds = plan.step_flops / matrix_speed()
    memory = float(memory_bytes() or 0)
    note = ("Computed, not measured. On a CPU the time is the least: all FLOPs at the speed of a matrix product of this machine. "
            "Encoding, validation and drawing come on top.")  # fmt: skip
    return {
        "plan": asdict(plan), "device": device.what, "peak": plan.peak, "memory": memory, "fits": plan.peak < memory,
        "changes": [], "disk": disk, "at_least": True, "note": note,
    }  # fmt: skip


def known_gpu(device: Device) -> str:
    """The name in planning/gpus.py of a GPU as nvidia-smi calls it. Raises UserError where it is none of those."""
    words = device.what.replace(" ", "").upper()
    found = [name for name in GPUS if name.partition("-")[0].upper() in words]
    if not found:
        raise UserError(f"{device.what}: not among the GPUs whose speed is known ({', '.join(GPUS)}). `scienceflow plan --gpu` "
                        "takes one of these.")  # fmt: skip
    return min(found, key=lambda name: abs(GPUS[name].memory_gb - device.total))


def matrix_speed(side: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of a product of two square fp32 matrices on this CPU."""
    a = torch.ones(side, side)
    a @ a
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        a @ a
        count += 1
    return count * 2 * side**3 / spent
