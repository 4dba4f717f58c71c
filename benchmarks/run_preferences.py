"""Training on preferences at small width: what beta, the cap and the winner's own loss do to both losses and to the pictures.

Command:  python benchmarks/run_preferences.py

The shipped base, a LoRA of rank 32, groups of drawn diagrams with their three flawed forms (a shape missing, an arrow turned, a
wrong label; OpenSciDraw/drawn/flaws.py), objective `mdpo`, mode contrastive. Winner and losers: how far their loss lies above the
reference's, mean over the last 20 steps. Structure: 48 unseen prompts drawn in 12 steps. "winners alone" is the objective
flow_matching on the same data; "base" is not trained. One seed: differences of structure of a few hundredths mean nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from report import Result

from OpenSciDraw.cli import main as scienceflow
from OpenSciDraw.config import Config, save_config
from OpenSciDraw.datasets.batch import AXES
from OpenSciDraw.drawn.flaws import write_groups

GROUPS, STEPS, BATCH, PROMPTS, LAST = 180, 80, 2, 48, 20
BASE: dict[str, Any] = {
    "pretrained_model_name_or_path": "embedded:flux2_klein_tiny", "max_sequence_length": 84, "rank": 32, "lora_alpha": 32,
    "lora_layers": "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,linear_in,linear_out,to_qkv_mlp_proj,"
                   "attn.to_out",
    "learning_rate": 1e-3, "lr_warmup_steps": 10, "lr_scheduler": "constant_with_warmup", "train_batch_size": BATCH,
    "max_train_steps": STEPS, "timestep_shift": 10.0, "logit_std": 1.5, "weighting_scheme": "logit_normal",
    "gradient_checkpointing": False, "mixed_precision": "no", "dataloader_num_workers": 0, "held_out_examples": 16,
    "checkpointing_steps": STEPS, "validation_steps": STEPS, "logging_steps": LAST, "report_to": "none",
    "num_inference_steps": 12, "guidance_scale": 3.0,
}  # fmt: skip
ALONE = {"winner_weight": 0.0}
NO_CAP = {"max_margin": None, **ALONE}
WAYS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "winners alone": {"train_iteration_func_name": "flow_matching"},
    "beta 2000, no cap": {"preference": {"beta": 2000.0, **NO_CAP}},
    "beta 500, no cap": {"preference": {"beta": 500.0, **NO_CAP}},
    "beta 100, no cap": {"preference": {"beta": 100.0, **NO_CAP}},
    "beta 100, margin 0.01": {"preference": {"beta": 100.0, "max_margin": 0.01, **ALONE}},
    "beta 100, margin 0.003": {"preference": {"beta": 100.0, "max_margin": 0.003, **ALONE}},
    "beta 500, margin 0.003": {"preference": {"beta": 500.0, "max_margin": 0.003, **ALONE}},
    "beta 100, margin 0.01, winner 10": {"preference": {"beta": 100.0, "max_margin": 0.01, "winner_weight": 10.0}},
}
SCORES = ("components", "arrows", "one_letter_labels")


def config_of(folder: Path, way: str, changes: dict[str, Any]) -> Path:
    data = {"type": "PreferenceGroups", "base_dir": str(folder), "parquet_base_path": "store"}
    encode = {"figures": str(folder / "figures"), "resolution": 128, "batch_size": 16, "num_workers": 0}
    name = "".join(letter if letter.isalnum() else "_" for letter in way)
    values = {**BASE, "train_iteration_func_name": "mdpo", **changes, "dataset": data, "encode": encode}
    path = folder / f"{name}.py"
    save_config(Config.model_validate({**values, "model_output_dir": str(folder / name)}), path)
    return path


def run(arguments: list[str]) -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if scienceflow(arguments):
        raise SystemExit(f"failed: {arguments}")


def one(folder: Path, way: str, changes: dict[str, Any] | None) -> dict[str, float]:
    """Train and score."""
    path, found = config_of(folder, way, changes or {}), {}
    trained = path.with_suffix("")
    if changes is not None:
        run(["train", str(path)])
        lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
        found["held-out loss"] = [line["held_out_loss"] for line in lines if "held_out_loss" in line][-1]
        last = [line for line in lines if "train_loss" in line][-1]
        if "preference_winner_change" in last:
            found["winner"] = last["preference_winner_change"]
            for what in ("accuracy", "margin", "loser_change"):
                found[what] = mean(last[f"preference_{what}_{axis}"] for axis in AXES)
    out = folder / "scores" / trained.name
    target = [str(trained if changes is not None else path)]
    run(["evaluate", *target, "--figures", f"drawn:{PROMPTS}:seed=9:style=small", "--metrics", "structure", "--out", str(out)])
    metrics = json.loads((out / "evaluation.json").read_text())["metrics"]
    return found | {name: metrics[f"structure/{name}"]["value"] for name in SCORES}


def main() -> None:
    names = ("held-out loss", "accuracy", "margin", "winner", "loser_change", *SCORES)
    result = Result("preferences", "python benchmarks/run_preferences.py", ["training", *names])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_groups(folder / "figures", folder / "groups.parquet", GROUPS, seed=21)
        run(["encode", str(config_of(folder, "encode", {}))])
        (folder / "groups.parquet").rename(folder / "store" / "groups.parquet")
        for way, changes in WAYS.items():
            found = result.numbers[way] = one(folder, way, changes)
            print(way, found, file=sys.stderr, flush=True)
            result.rows.append([way, *(f"{found[name]:.4f}" if name in found else "" for name in names)])
    result.save()


if __name__ == "__main__":
    main()
