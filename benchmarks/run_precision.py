"""What the precision of training costs in quality: a LoRA on the shipped base, in fp32, by autocast, in bf16, in fp8.

Several seeds each.

Command:  python benchmarks/run_precision.py

The demo's training (house style, rank 32), here 100 steps of 12, from the same store for each seed and way. "bf16 by autocast" is
how versions up to 0.4.0 trained (norms, modulations and residuals in fp32); "bf16" runs the transformer in bf16 throughout, as the
released pipeline does; "fp8 products" adds `fp8_products`, emulated here. Held-out loss: of 64 figures, same noise for all.
Structure: 48 unseen prompts drawn in 12 steps by the pipeline in bf16. Given are means over seeds, and the mean
difference to fp32 of the same seed with its 95 % interval (Student's t over seeds).
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest import mock

from report import BENCHMARKS, Result

from OpenSciDraw.cli import main as scienceflow
from OpenSciDraw.config import Config, load_config, save_config

SEEDS = (0, 1, 2)
STEPS, BATCH, PROMPTS = 100, 12, 48
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"mixed_precision": "no"}, "bf16 by autocast": {}, "bf16": {}, "fp8 products": {"fp8_products": True},
}  # fmt: skip
SCORES = ("components", "colour", "arrows", "one_letter_labels")
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for n seeds, two-sided


@contextmanager
def by_autocast(wanted: bool) -> Iterator[None]:
    """Training as it was: accelerate's autocast around a transformer without copies of its adapters."""
    if not wanted:
        yield
        return

    def given(config: Config, model: Any) -> str:
        return config.mixed_precision

    places = ("OpenSciDraw.training.build.autocast_type", "OpenSciDraw.weights.precision.autocast_type")
    with mock.patch(places[0], given), mock.patch(places[1], given):
        yield


def config_of(folder: Path, way: str, seed: int) -> Path:
    values = load_config(BENCHMARKS.parent / "configs" / "tiny" / "flux2klein_demo.py").model_dump(exclude_unset=True)
    values |= {
        "dataset": {**values["dataset"], "base_dir": str(folder)}, "seed": seed, "max_train_steps": STEPS,
        "validation_prompts": [], "resolution_list": [], "evaluate": None, "validation_steps": STEPS, "checkpointing_steps": STEPS,
        "lr_warmup_steps": 5, "train_batch_size": BATCH, "held_out_examples": 64, **WAYS[way],
        "model_output_dir": str(folder / f"{way}-{seed}".replace(" ", "_")),
    }  # fmt: skip
    path = folder / f"{way}-{seed}.py".replace(" ", "_")
    save_config(Config.model_validate({key: value for key, value in values.items() if value is not None}), path)
    return path


def one(folder: Path, way: str, seed: int) -> dict[str, float]:
    """Train and score."""
    path = config_of(folder, way, seed)
    with by_autocast(way == "bf16 by autocast"):
        if scienceflow(["train", str(path)]):
            raise SystemExit(f"training failed: {path}")
    run = Path(load_config(path).model_output_dir)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {"held-out loss": [line["held_out_loss"] for line in lines if "held_out_loss" in line][-1]}
    out = run / "scores"
    options = ["--figures", f"drawn:{PROMPTS}:seed=9:style=house", "--metrics", "structure", "--steps", "12", "--out", str(out)]
    if scienceflow(["evaluate", str(run), *options]):
        raise SystemExit(f"evaluation failed: {run}")
    metrics = json.loads((out / "evaluation.json").read_text())["metrics"]
    return found | {name: metrics[f"structure/{name}"]["value"] for name in SCORES}


def difference(found: list[float], exact: list[float]) -> str:
    apart = [a - b for a, b in zip(found, exact, strict=True)]
    return f"{mean(apart):+.4f} ± {T_95[len(apart)] * stdev(apart) / math.sqrt(len(apart)):.4f}"


def main() -> None:
    from accelerate.state import AcceleratorState, GradientState

    names = ("held-out loss", *SCORES)
    result = Result("precision", "python benchmarks/run_precision.py", ["training in", *(f"{n}: mean (to fp32)" for n in names)])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if scienceflow(["encode", str(config_of(folder, "bf16", 0))]):
            raise SystemExit("encoding failed")
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for seed in SEEDS:
            for way in WAYS:
                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()
                found[way].append(one(folder, way, seed))
                print(seed, way, found[way][-1], file=sys.stderr, flush=True)
    for way, runs in found.items():
        row = []
        for name in names:
            values, exact = ([run[name] for run in where] for where in (runs, found["fp32"]))
            row.append(f"{mean(values):.4f}" + ("" if way == "fp32" else f" ({difference(values, exact)})"))
        result.rows.append([way, *row])
    result.numbers = dict(found)
    result.save()


if __name__ == "__main__":
    main()
