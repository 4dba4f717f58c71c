"""Preferences from own pictures, end to end at small width: the shipped base draws, M-DPO trains on it, both are measured.

Command:  python benchmarks/run_prefer.py --prompts 4000 3200 --steps 1000 750 --unseen 500

configs/tiny/flux2klein_prefer.py with these numbers, and for a second round flux2klein_prefer_again.py: `scienceflow prefer`,
`train`, `merge` and `evaluate` as a user runs them. Structure of unseen prompts with 95 % intervals, and p of the paired
comparison with the base. --folder keeps what is done, so that a second run goes on with it.
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

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "tiny"
ROUNDS = tuple(str(CONFIGS / name) for name in ("flux2klein_prefer.py", "flux2klein_prefer_again.py"))
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


def all_of(folder: Path, prompts: list[int], steps: list[int], unseen: int, precision: str = "no") -> dict[str, Any]:
    """The commands, round by round, and what they gave; `prompts` and `steps` of each round."""
    shared = ["--cfg_options", f"mixed_precision={precision}"]
    sample = ["--figures", f"drawn:{unseen}:seed=9:style=small", "--batch_size", "32"]
    seconds = {"evaluate base": run(["evaluate", ROUNDS[0], *sample, "--out", str(folder / "base"), *shared])}
    rounds: list[dict[str, Any]] = []
    for number, (config, count, last) in enumerate(zip(ROUNDS, prompts, steps, strict=False), 1):
        here, before = folder / f"round{number}", folder / f"round{number - 1}"
        options = [*shared, f"dataset.base_dir={here / 'set'}", f"model_output_dir={here / 'train'}",
                   f"max_train_steps={last}", f"checkpointing_steps={last}", f"validation_steps={last}"]  # fmt: skip
        if number > 1:
            merged = str(before / "merged")
            seconds[f"merge {number - 1}"] = run(["merge", str(before / "train"), "--out", merged, "--dtype", "fp32"])
            options.append(f"pretrained_full_ckpt_path={merged}")
        made = ["prefer", config, "--limit", str(count), "--out", str(here / "set"), "--batch_size", "32", *options]
        seconds[f"prefer {number}"] = run(made)
        seconds[f"train {number}"] = run(["train", config, *options])
        trained = ["evaluate", str(here / "train"), *sample, "--out", str(here / "scores"), "--compare", str(folder / "base")]
        seconds[f"evaluate {number}"] = run(trained)
        rounds.append(_round(here))
    base = json.loads((folder / "base" / "evaluation.json").read_text())
    return {"cpu seconds": seconds, "base": {name: base["metrics"][f"structure/{name}"] for name in SCORES}, "rounds": rounds}


def _round(folder: Path) -> dict[str, Any]:
    """What a round gave."""
    lines = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "preference_winner_change" in line]
    found = json.loads((folder / "scores" / "evaluation.json").read_text())
    return {
        "prefer": json.loads((folder / "set" / "prefer.json").read_text()),
        "held-out loss": [line["held_out_loss"] for line in lines if "held_out_loss" in line],
        "last logged": {name: value for name, value in logged[-1].items() if name.startswith("preference_")},
        "trained": {name: found["metrics"][f"structure/{name}"] for name in SCORES},
        "difference": {name: found["comparison"]["metrics"][f"structure/{name}"] for name in SCORES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[4000, 3200], help="of which preferences are made, by round")
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 750], help="of training, by round")
    parser.add_argument("--unseen", type=int, default=500, help="prompts to measure with")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16" if cpu_has_bf16() else "no")
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    given = parser.parse_args()
    if len(given.prompts) != len(given.steps) or len(given.steps) > len(ROUNDS):
        parser.error(f"--prompts and --steps need one number for each of one to {len(ROUNDS)} rounds")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.folder or temporary).absolute()
        numbers = all_of(folder, given.prompts, given.steps, given.unseen, given.precision)
    counts = [" ".join(map(str, of)) for of in (given.prompts, given.steps)]
    command = f"python benchmarks/run_prefer.py --prompts {counts[0]} --steps {counts[1]} --unseen {given.unseen}"
    result = Result("prefer", command, ["round", "score", "base", "trained", "difference", "p"], numbers=numbers)
    for number, of in enumerate(numbers["rounds"], 1):
        for name in SCORES:
            base, trained, difference = (where[name] for where in (numbers["base"], of["trained"], of["difference"]))
            cells = [f"{item['value']:.3f} ({item['low']:.3f} to {item['high']:.3f})" for item in (base, trained)]
            result.rows.append([str(number), name, *cells, f"{difference['difference']:+.3f}", f"{difference['p']:.2g}"])
        made = of["prefer"]
        result.notes.append(f"round {number}: {made['groups']['made']} groups of {made['prompts']} prompts; "
                            f"losers: {made['losers']}; left out: {made['left out']}")  # fmt: skip
    result.save()


if __name__ == "__main__":
    main()
