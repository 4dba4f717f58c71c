"""Preferences from own pictures, end to end at small width: the shipped base draws, M-DPO trains on it, both are measured.

Command:  python benchmarks/run_prefer.py --prompts 4000 --steps 1000 --unseen 500

configs/tiny/flux2klein_prefer.py with these numbers; `scienceflow prefer`, `train` and `evaluate` as a user runs them. Structure of
unseen prompts with 95 % intervals, and p of the paired comparison with the base. --folder keeps what is done, so that a second run
goes on with it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from report import Result

from OpenSciDraw.cli import main as scienceflow
from OpenSciDraw.planning.machine import cpu_has_bf16

CONFIG = str(Path(__file__).resolve().parents[1] / "configs" / "tiny" / "flux2klein_prefer.py")
SCORES = ("components", "arrows", "one_letter_labels", "labels")


def run(arguments: list[str]) -> float:
    """CPU seconds of a command. Stops at the first that fails."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    start = time.process_time()
    if scienceflow(arguments):
        raise SystemExit(f"failed: {arguments}")
    return time.process_time() - start


def all_of(folder: Path, prompts: int, steps: int, unseen: int, precision: str = "no") -> dict[str, Any]:
    """The three commands, and what they gave."""
    options = [
        "--cfg_options", f"mixed_precision={precision}", f"dataset.base_dir={folder / 'set'}", f"max_train_steps={steps}",
        f"model_output_dir={folder / 'train'}", f"checkpointing_steps={steps}", f"validation_steps={steps}",
    ]  # fmt: skip
    figures = f"drawn:{unseen}:seed=9:style=small"
    made = ["prefer", CONFIG, "--limit", str(prompts), "--out", str(folder / "set"), "--batch_size", "32", *options]
    seconds = {"prefer": run(made)}
    seconds["train"] = run(["train", CONFIG, *options])
    seconds["evaluate base"] = run(["evaluate", CONFIG, "--figures", figures, "--out", str(folder / "base"), *options])
    trained = ["evaluate", str(folder / "train"), "--figures", figures, "--out", str(folder / "trained")]
    seconds["evaluate trained"] = run([*trained, "--compare", str(folder / "base")])
    lines = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "preference_winner_change" in line]
    base, found = (json.loads((folder / name / "evaluation.json").read_text()) for name in ("base", "trained"))
    return {
        "prefer": json.loads((folder / "set" / "prefer.json").read_text()), "cpu seconds": seconds,
        "held-out loss": [line["held_out_loss"] for line in lines if "held_out_loss" in line],
        "last logged": {name: value for name, value in logged[-1].items() if name.startswith("preference_")},
        "base": {name: base["metrics"][f"structure/{name}"] for name in SCORES},
        "trained": {name: found["metrics"][f"structure/{name}"] for name in SCORES},
        "difference": {name: found["comparison"]["metrics"][f"structure/{name}"] for name in SCORES},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4000, help="of which preferences are made")
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--unseen", type=int, default=500, help="prompts to measure with")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16" if cpu_has_bf16() else "no")
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.folder or temporary).absolute()
        numbers = all_of(folder, given.prompts, given.steps, given.unseen, given.precision)
    command = f"python benchmarks/run_prefer.py --prompts {given.prompts} --steps {given.steps} --unseen {given.unseen}"
    result = Result("prefer", command, ["score", "base", "trained", "difference", "p"], numbers=numbers)
    for name in SCORES:
        base, trained, difference = (numbers[key][name] for key in ("base", "trained", "difference"))
        cells = [f"{item['value']:.3f} ({item['low']:.3f} to {item['high']:.3f})" for item in (base, trained)]
        result.rows.append([name, *cells, f"{difference['difference']:+.3f}", f"{difference['p']:.2g}"])
    made = numbers["prefer"]
    result.notes.append(f"{made['groups']['made']} groups of {made['prompts']} prompts; losers: {made['losers']}; left out: "
                        f"{made['left out']}")  # fmt: skip
    result.save()


if __name__ == "__main__":
    main()
