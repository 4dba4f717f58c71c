"""Runs cases one after the other in this process; suite.py starts it, and watches it by the lines that it writes to --events."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from suite_bare import bare_step, card_rate
from suite_bench import Bench
from suite_catalogue import CATALOGUE, Case
from suite_draw import drawn, encoded, peer
from suite_objectives import edits, preferences, rewards, routed
from suite_process import LEAST_SECONDS, Late, time_limit
from suite_results import append
from suite_train import checkpointed, profiled, resumed, started, training

from OpenSciDraw.quiet import start_logging

LEFT_GB = 0.5  # of device memory, after a case: more, and the next one starts in a new process
Run = Callable[[], dict[str, Any]]
_FULL: dict[str, Any] = {"use_lora": False, "learning_rate": 1e-5}


def runs(bench: Bench) -> dict[str, Run]:
    """What each case of the catalogue does."""
    train, bare = partial(training, bench), partial(bare_step, bench)
    recomputed: dict[str, Any] = {"activation_memory_gb": None}
    kept: dict[str, Any] = {"gradient_checkpointing": False} if bench.rehearse else {}  # "auto" keeps all where it fits
    return {
        "card": lambda: card_rate(bench),
        "encode_4b": lambda: encoded(bench, "4B"),
        "bare_4b_bf16": lambda: bare("4B", autocast=False, recompute=False),
        "bare_4b_bf16_recomputed": lambda: bare("4B", autocast=False, recompute=True),
        "bare_4b_autocast": lambda: bare("4B", autocast=True, recompute=False),
        "bare_4b_autocast_recomputed": lambda: bare("4B", autocast=True, recompute=True),
        "train_4b": lambda: train("4B", "auto", "bare_4b_bf16", **kept),
        "train_4b_recomputed": lambda: train("4B", "recomputed", "bare_4b_bf16_recomputed", **recomputed),
        "train_4b_batch4": lambda: train("4B", "batch4", train_batch_size=4),
        "profile_4b": lambda: profiled(bench, "4B"),
        "train_9b": lambda: train("9B", "auto9", "bare_9b_bf16", **kept),
        "train_9b_recomputed": lambda: train("9B", "recomputed9", **recomputed),
        "train_9b_batch4": lambda: train("9B", "batch49", train_batch_size=4),
        "bare_9b_bf16": lambda: bare("9B", autocast=False, recompute=False),
        "first_step_4b": lambda: started(bench, "4B"),
        "checkpoint_4b": lambda: checkpointed(bench, "4B"),
        "checkpoint_9b": lambda: checkpointed(bench, "9B"),
        "resume": lambda: resumed(bench),
        "draw_4b": lambda: drawn(bench, "4B"),
        "compile_4b": lambda: train("4B", "compiled", compile_blocks=True),
        "peer_4b_recomputed": lambda: peer(bench),
        "peer_4b": lambda: peer(bench, recompute=False),
        "fp8_products_4b": lambda: train("4B", "fp8_products", fp8_products=True),
        **{f"{name}_4b": partial(train, "4B", name, quantization=name, **recomputed) for name in ("int8", "fp8", "nf4")},
        "offload_4b": lambda: train("4B", "offload", offload=True, resident_blocks=2 if bench.rehearse else 4, **recomputed),
        "full_4b_bf16_8bit": lambda: train("4B", "full_bf16_8bit", master_weights="bf16", use_8bit_adam=True, **_FULL),
        "full_4b_bf16": lambda: train("4B", "full_bf16", master_weights="bf16", **_FULL),
        "full_4b_fp32_8bit": lambda: train("4B", "full_fp32_8bit", use_8bit_adam=True, **_FULL),
        "full_4b_fp32": lambda: train("4B", "full_fp32", **_FULL),
        "ema_4b": lambda: train("4B", "ema", use_ema=True, ema_steps=1),
        "prodigy_4b": lambda: train("4B", "prodigy", optimizer="prodigy", learning_rate=1.0),
        "edit_4b": lambda: edits(bench, "4B", **kept),
        "dpo_4b": lambda: preferences(bench, "4B", "dpo", **kept),
        "dpo_full_4b": lambda: preferences(bench, "4B", "dpo_full", master_weights="bf16", use_8bit_adam=True, **_FULL),
        "reward_4b": lambda: rewards(bench, "4B"),
        "routed_4b": lambda: train("4B", "routed", master_weights="bf16", use_8bit_adam=True, token_routing=routed(bench), **_FULL),
        "encode_qwen": lambda: encoded(bench, "qwen"),
        "train_qwen": lambda: train("qwen", "qwen"),
    }  # fmt: skip


def why_not(case: Case, bench: Bench) -> str | None:
    """Why a case cannot run here; None when it can."""
    missing = [name for name in case.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    if case.cuda and not bench.cuda:
        return "needs a CUDA GPU"
    if case.variable is not None and not os.environ.get(case.variable):
        return f"the environment variable {case.variable} is not set"
    return None


def outcome(run: Run, limit_seconds: float) -> dict[str, Any]:
    """Run a case: its status, values and reason. Whatever ends it, the suite goes on."""
    start = time.perf_counter()
    record: dict[str, Any] = {"status": "ok", "values": {}, "reason": None}
    try:
        with time_limit(limit_seconds):
            record["values"] = run()
    except Late:
        record |= {"status": "late", "reason": f"not done after {limit_seconds:.0f} s"}
    except Exception as error:  # the boundary of a case: its failure is a result
        traceback.print_exc()
        record |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
    return record | {"seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--work", "--results", "--cases", "--environment"):
        parser.add_argument(name, required=True)
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--until", type=float, required=True, help="time.monotonic() of the end")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    start_logging()
    os.set_inheritable(given.events, False)
    device = torch.device("cuda" if torch.cuda.is_available() and not given.rehearse else "cpu")
    environment = json.loads(given.environment)
    bench = Bench(Path(given.work), Path(given.results), given.rehearse, device, environment)
    todo, known = {case.name: case for case in CATALOGUE}, runs(bench)
    for name in given.cases.split(","):
        left = given.until - time.monotonic()
        if left < LEAST_SECONDS:
            return 0
        os.write(given.events, f"start {name}\n".encode())
        reason = why_not(todo[name], bench)
        if reason is not None:
            record: dict[str, Any] = {"status": "skipped", "values": {}, "reason": reason, "seconds": 0.0}
        else:
            record = outcome(known[name], min(todo[name].job(given.rehearse).limit_seconds, left))
        append(bench.results, {"case": name, "part": todo[name].part, **record, **environment})
        os.write(given.events, f"end {name}\n".encode())
        if bench.cuda and (record["status"] in ("failed", "late") or not _is_clean(bench)):
            return 0  # the cases that are left get a new process
    return 0


def _is_clean(bench: Bench) -> bool:
    bench.free()
    return torch.cuda.memory_allocated() < LEFT_GB * 1e9


if __name__ == "__main__":
    sys.exit(main())
