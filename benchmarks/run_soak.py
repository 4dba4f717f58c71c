"""Stop every stage at random moments and compare what it leaves, in the end, with what it makes undisturbed.

    python benchmarks/run_soak.py --kills 1000 [--stages train,encode] [--seed 0]

A stage is started, stopped (SIGKILL or SIGTERM, to the process or to its whole group), and started again by the same command,
`KILLS_OF_A_RUN` times; then it may finish. What it has made must be the same bits, no file of an unfinished write may be left,
and no process. Moments are drawn over the whole command, and three in four over the part in which it writes. Seven stages:
train, train with two data workers, encode, repack, prepare, evaluate, export. Results: results/soak.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results" / "soak.json"
KILLS_OF_A_RUN = 8
STEPS = 10  # of training
MARK = "SCIENCEFLOW_SOAK"
LEFT = re.compile(r"\.unfinished|\.tmp|\.lock|\.part$|\.work$|\.text\.")
MEASURED = {"time", "images_per_second", "data_wait_share", "memory_gb", "seconds", "seconds_per_picture", "created", "started",
            "versions"}  # fmt: skip
MODEL = {
    "model_type": "Flux2Klein", "pretrained_model_name_or_path": "embedded:flux2_klein_tiny_random", "max_sequence_length": 64,
    "mixed_precision": "no", "rank": 4, "lora_alpha": 8, "learning_rate": 1e-3, "lr_warmup_steps": 0, "train_batch_size": 2,
    "num_train_epochs": 100, "gradient_checkpointing": False, "held_out_examples": 2, "logging_steps": 1, "validation_steps": 4,
    "num_inference_steps": 1, "report_to": "none", "resume_from_checkpoint": "latest", "validation_prompts": ["A box."],
    "resolution_list": [[64, 64]],
}  # fmt: skip


# -- the stages ------------------------------------------------------------------------------------
@dataclass
class Stage:
    """A command that makes `out`; `content` says what of it must be the same, by name."""

    name: str
    command: Callable[[Path], list[str]]
    content: Callable[[Path], dict[str, str]]
    seconds: float = 0.0  # of an undisturbed run, and when it first wrote
    writes_at: float = 0.0
    expected: dict[str, str] = field(default_factory=dict)


def all_files(out: Path) -> dict[str, str]:
    """sha256 of each file."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def of_training(out: Path) -> dict[str, str]:
    """Tensors and pictures by their bytes; metrics without times, of each step the last line."""
    kept = {name: digest for name, digest in all_files(out).items() if name.endswith(".png")} | tensors(out)
    last = f"checkpoint-{STEPS}"  # a stop leaves a checkpoint of its own among those that are kept
    kept = {name: digest for name, digest in kept.items() if name.startswith(last) or not name.startswith("checkpoint-")}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line.startswith("{")]
    metrics: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            if "step" in row and "event" not in row and name not in MEASURED:
                metrics[f"{row['step']} {name}"] = value
    validated = sorted({row["step"] for row in rows if row.get("event") == "validated"})
    return {**kept, "metrics": json.dumps(metrics, sort_keys=True), "validated": str(validated)}


def of_evaluation(out: Path) -> dict[str, str]:
    """Pictures by their bytes, results and summary without times."""
    kept = {name: digest for name, digest in all_files(out).items() if name.endswith(".png")}
    results = sorted((out / "results.jsonl").read_text().splitlines())
    summary = json.loads((out / "evaluation.json").read_text())
    return {**kept, "results": "\n".join(results), "summary": json.dumps(_without_times(summary), sort_keys=True)}


def tensors(out: Path) -> dict[str, str]:
    """Tensors by their bytes. (Files are not compared: safetensors writes its metadata in any order, and some have a date.)"""
    from safetensors.torch import load_file

    return {
        f"{path.relative_to(out)} {name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for path in sorted(out.rglob("*.safetensors")) for name, tensor in load_file(path).items()
    }  # fmt: skip


def of_preparing(out: Path) -> dict[str, str]:
    """Everything but the page and card that name the folder."""
    return {name: digest for name, digest in all_files(out).items() if not name.endswith((".html", ".md"))}


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_times(item) for name, item in value.items() if name not in MEASURED and name != "run"}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def stages(inputs: Path) -> list[Stage]:
    """The stages, with what they need made in `inputs` by the product itself."""
    dataset = {"type": "ArXiVParquetDatasetV2", "base_dir": str(inputs), "parquet_base_path": "store"}
    drawn = {"figures": "drawn:24", "resolution": 128, "samples_per_shard": 4, "num_workers": 1, "batch_size": 4}

    def config(name: str, **changes: Any) -> str:
        path = inputs / f"{name}.py"
        values = {**MODEL, "dataset": dataset, "encode": drawn, **changes}
        path.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
        return str(path)

    def training(out: Path, workers: int) -> list[str]:
        return ["train", config(f"train{workers}", model_output_dir=str(out), max_train_steps=STEPS, checkpointing_steps=2,
                                checkpoints_total_limit=2, dataloader_num_workers=workers, use_ema=True)]  # fmt: skip

    def encoding(out: Path) -> list[str]:
        return ["encode", config("encode", dataset={**dataset, "base_dir": str(out.parent), "parquet_base_path": out.name})]

    papers(inputs / "papers")
    run([*_scienceflow(), "encode", config("inputs")])
    trained = inputs / "trained"
    run([*_scienceflow(), "train", config("trained", model_output_dir=str(trained), max_train_steps=2, checkpointing_steps=2)])
    return [
        Stage("train", lambda out: training(out, 0), of_training),
        Stage("train with workers", lambda out: training(out, 2), of_training),
        Stage("encode", encoding, all_files),
        Stage("repack", lambda out: ["repack", str(inputs / "store"), str(out), "--samples_per_shard", "5"], all_files),
        Stage("prepare", lambda out: ["prepare", str(inputs / "papers"), "--out", str(out), "--cfg_options", "papers_per_shard=2"],
              of_preparing),
        Stage("evaluate", lambda out: ["evaluate", str(trained), "--figures", "drawn:8:size=96", "--steps", "1", "--out", str(out)],
              of_evaluation),
        Stage("export", lambda out: ["export", str(trained), "--out", str(out)], tensors),
    ]  # fmt: skip


def papers(folder: Path) -> None:
    """Six LaTeX projects with two pictures each."""
    from OpenSciDraw.drawn.figure import draw_figure

    for number in range(6):
        paper = folder / f"2401.0000{number}"
        paper.mkdir(parents=True)
        figures = ""
        for at in range(2):
            figure = draw_figure(seed=number, index=at, size=320)
            figure.image.save(paper / f"f{at}.png")
            caption = f"Overview of the proposed pipeline number {number}-{at}: an encoder, a decoder and the loss between them."
            figures += f"\\begin{{figure}}\\includegraphics{{f{at}}}\\caption{{{caption}}}\\end{{figure}}\n"
        (paper / "main.tex").write_text(f"\\documentclass{{article}}\\begin{{document}}\n{figures}\\end{{document}}\n")


# -- stopping ----------------------------------------------------------------------------------------
def _scienceflow() -> list[str]:
    return [sys.executable, "-m", "OpenSciDraw.cli"]


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(os.getpid()), "PYTHONPATH": str(REPO)}
    return subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)  # fmt: skip


def run(command: list[str]) -> None:
    _, said = (process := start(command)).communicate()
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}:\n{said[-3000:]}")


def processes() -> Iterator[int]:
    """Processes of this program's commands that are there still."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={os.getpid()}".encode() in path.read_bytes().split(b"\0") and int(path.parent.name) != os.getpid():
                yield int(path.parent.name)
        except OSError:
            continue


def end_of_processes(seconds: float = 20.0) -> list[int]:
    """Wait until none is left; those that are."""
    end = time.monotonic() + seconds
    while (left := list(processes())) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def measure(stage: Stage, out: Path) -> None:
    """Run a stage undisturbed: its time, and what it makes."""
    begin = time.monotonic()
    process, stage.writes_at = start([*_scienceflow(), *stage.command(out)]), 0.0
    while process.poll() is None:
        if not stage.writes_at and out.exists() and any(not path.name.startswith(".lock") for path in out.rglob("*")):
            stage.writes_at = time.monotonic() - begin
        time.sleep(0.02)
    assert process.stderr is not None
    if process.returncode:
        raise RuntimeError(f"{stage.name} ended with {process.returncode}: {process.stderr.read()[-3000:]}")
    process.stderr.close()
    stage.seconds, stage.expected = time.monotonic() - begin, stage.content(out)


def stop_once(stage: Stage, out: Path, draw: random.Random, counts: Counter[str]) -> str | None:
    """Start a stage and stop it at a random moment. Returns what went wrong, and "done" where it was done before that."""
    late = draw.random() < 0.75
    moment = draw.uniform(stage.writes_at if late else 0.0, 1.02 * stage.seconds)
    number, group = draw.choice((signal.SIGKILL, signal.SIGTERM)), draw.random() < 0.5
    process = start([*_scienceflow(), *stage.command(out)])
    said = ""
    try:
        _, said = process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        (os.killpg if group else os.kill)(process.pid, number)
        counts[f"{number.name} {'group' if group else 'process'}"] += 1
        _, said = process.communicate()
    code = process.returncode
    counts[f"exit {code}"] += 1
    if left := end_of_processes():
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return f"left processes {left} after {number.name}"
    if code == 0:
        return "done"
    if code in (75, -signal.SIGKILL, -signal.SIGTERM):
        return None
    return f"exit {code} after {number.name} {'to the group' if group else ''} at {moment:.2f} s: {said[-1500:]}"


def finish(stage: Stage, out: Path) -> list[str]:
    """Let a stage finish; what differs from the undisturbed run, and what is left behind."""
    run([*_scienceflow(), *stage.command(out)])
    found = stage.content(out)
    names = sorted(found.keys() | stage.expected.keys())
    wrong = [f"{name} differs" for name in names if found.get(name) != stage.expected.get(name)]
    return wrong + [f"{path.relative_to(out)} was left" for path in out.rglob("*") if LEFT.search(path.name)]


def soak(kills: int, wanted: list[str] | None, seed: int, folder: Path, results: Path) -> dict[str, Any]:
    """Stop the stages `kills` times together; the counts, and each difference, which are in `results` after each run."""
    draw = random.Random(seed)
    known = {stage.name: stage for stage in stages(folder)}
    if unknown := [name for name in wanted or () if name not in known]:
        raise SystemExit(f"no such stage: {', '.join(unknown)}. There are: {', '.join(known)}.")
    chosen = [known[name] for name in wanted or known]
    out = folder / "out"  # one place for all: configs and evaluations name it
    for stage in chosen:
        measure(stage, out)
        shutil.rmtree(out)
        print(f"{stage.name}: {stage.seconds:.1f} s undisturbed, writes from {stage.writes_at:.1f} s", flush=True)
    counts: dict[str, Counter[str]] = {stage.name: Counter() for stage in chosen}
    failures: list[str] = []
    done, begin = 0, time.monotonic()
    found: dict[str, Any] = {}
    while done < kills:
        stage = chosen[sum(c["runs"] for c in counts.values()) % len(chosen)]
        count = counts[stage.name]
        count["runs"] += 1
        for _ in range(min(KILLS_OF_A_RUN, kills - done, -(-kills // len(chosen)))):
            before = sum(count[name] for name in count if name.startswith("SIG"))
            problem = stop_once(stage, out, draw, count)
            done += sum(count[name] for name in count if name.startswith("SIG")) - before
            if problem == "done":
                break
            failures += [f"{stage.name}: {problem}"] if problem else []
        failures += [f"{stage.name}, run {count['runs']}: {wrong}" for wrong in finish(stage, out)]
        shutil.rmtree(out, ignore_errors=True)
        left = (time.monotonic() - begin) / max(done, 1) * (kills - done)
        print(f"{done} of {kills} kills, {len(failures)} failures, {left / 60:.0f} min left", flush=True)
        for line in failures[-3:]:
            print(f"  {line[:600]}", flush=True)
        found = {"kills": done, "seed": seed, "minutes": round((time.monotonic() - begin) / 60, 1), "failures": failures,
                 "stages": {name: dict(sorted(count.items())) for name, count in counts.items()}}  # fmt: skip
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(found, indent=1) + "\n")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stages", help="names, separated by commas (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wanted = arguments.stages.split(",") if arguments.stages else None
        found = soak(arguments.kills, wanted, arguments.seed, Path(folder), arguments.results)
    print(json.dumps({name: value for name, value in found.items() if name != "failures"}, indent=1))
    print(f"{found['kills']} kills, {len(found['failures'])} failures: {arguments.results}")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
