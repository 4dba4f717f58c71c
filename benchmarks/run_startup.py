"""How long a command takes to answer: `scienceflow --help`, the refusal of a typo in a config, the first step of training.

Command:  python benchmarks/run_startup.py

Each is a new process, 10 times, in turn; the table gives the median. The share of imports is the time of a process
that imports the command line and does nothing, over that of `--help`, both less an empty interpreter's. A command
must not load torch before its config is known to be right; the benchmark fails if one does.

Then the start of training: what a run imports, as a plain import and as `train` does it (no garbage collection meanwhile, no
optional library that the config does not use), and the whole of `train` on the embedded model of 0.1 M parameters, from the
command to the end of its first step (validation of 2 figures before and after it, and a checkpoint, included). The parts of
building a run are of one process, in the order of training.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from report import Result, in_turn

REPETITIONS = 10
START_REPETITIONS = 5
REPO = Path(__file__).resolve().parents[1]
PYTHON = [sys.executable]
SCIENCEFLOW = [sys.executable, "-m", "OpenSciDraw.cli"]


def process(command: list[str], expected_code: int = 0) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode != expected_code:
            raise SystemExit(f"{command} exited with {done.returncode}, expected {expected_code}:\n{done.stderr}")
        return seconds

    return run


def loads_torch(arguments: list[str]) -> bool:
    """Whether `scienceflow` with these arguments imports torch."""
    done = subprocess.run([*PYTHON, "-X", "importtime", "-m", "OpenSciDraw.cli", *arguments], capture_output=True, text=True)
    return any(line.rsplit("|", 1)[-1].strip() == "torch" for line in done.stderr.splitlines())


IMPORTS = "import OpenSciDraw.training.run; from OpenSciDraw.models import flux2_klein"
QUICK = f"""from OpenSciDraw.training.startup import quick_imports
with quick_imports(['torchao', 'bitsandbytes', 'scipy']): {IMPORTS}"""
COUNT = "\nimport sys; print(len(sys.modules))"
RUN = """
model_type = "Flux2Klein"
pretrained_model_name_or_path = "embedded:flux2_klein_tiny_random"
max_sequence_length = 64
mixed_precision = "bf16"
rank = 4
lora_layers = "to_q,to_k,to_v,to_qkv_mlp_proj"
train_batch_size = 2
max_train_steps = 1
dataloader_num_workers = 0
held_out_examples = 2
validation_prompts = ["A box."]
num_inference_steps = 1
resolution_list = [[64, 64]]
report_to = "none"
dataset = dict(type="ArXiVParquetDatasetV2", base_dir={folder!r}, parquet_base_path="store")
encode = dict(figures="drawn:16", resolution=128, num_workers=0, batch_size=8)
model_output_dir = {run!r}
"""
# Of one process: seconds of the methods that build a run, and how it loads its parts. Names, then a number, in lines.
PARTS = """
import sys, time
from OpenSciDraw.config.files import load_config
from OpenSciDraw.training.startup import quick_imports, unused_libraries
config = load_config(sys.argv[1], [])
with quick_imports(unused_libraries(config)):
    import OpenSciDraw.training.run as training
    from OpenSciDraw.models.flux2_klein import Flux2Klein
spent = {}
def timed(owner, name):
    inner = getattr(owner, name)
    def outer(*args, **kwargs):
        start = time.perf_counter()
        result = inner(*args, **kwargs)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        return result
    setattr(owner, name, outer)
timed(training, "build_model")
timed(training, "build_accelerator")
for name in ("load_vae", "load_text_encoder", "load_transformer"):
    timed(Flux2Klein, name)
for name in ("_build_data", "_encode_prompts", "_build_transformer", "_open_log"):
    timed(training.Training, name)
start = time.perf_counter()
training.Training(config)
spent["all of it"] = time.perf_counter() - start
for name, seconds in spent.items():
    print(f"PART {name.lstrip('_')}={seconds}")
"""


def parts_of_start(config: Path) -> dict[str, float]:
    done = subprocess.run([*PYTHON, "-c", PARTS, str(config)], capture_output=True, text=True, cwd=REPO)
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = [line.removeprefix("PART ").split("=") for line in done.stdout.splitlines() if line.startswith("PART ")]
    return {name: float(seconds) for name, seconds in lines}


def start_of_training() -> tuple[dict[str, list[float]], dict[str, int], dict[str, float]]:
    """Seconds of importing and of one step of training, modules, and the parts of building a run (medians)."""
    modules = {}
    for name, code in (("plain", IMPORTS), ("as train does", QUICK)):
        done = subprocess.run([*PYTHON, "-c", code + COUNT], capture_output=True, text=True, check=True, cwd=REPO)
        modules[name] = int(done.stdout.split()[-1])
    with tempfile.TemporaryDirectory() as folder:
        config, run = Path(folder) / "run.py", Path(folder) / "run"
        config.write_text(RUN.format(folder=folder, run=str(run)))
        process([*SCIENCEFLOW, "encode", str(config)])()

        def train() -> float:
            shutil.rmtree(run, ignore_errors=True)
            return process([*PYTHON, str(REPO / "train_OpenSciDraw_loop.py"), str(config)])()

        runs = {
            "imports of a run, plain": process([*PYTHON, "-c", IMPORTS]),
            "imports of a run, as train does": process([*PYTHON, "-c", QUICK]),
            "train, one step": train,
        }
        seconds = in_turn(runs, START_REPETITIONS)
        shutil.rmtree(run)
        every = [parts_of_start(config) for _ in range(START_REPETITIONS)]
    return seconds, modules, {name: median(parts[name] for parts in every) for name in every[0]}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "typo.py"
        config.write_text(
            'pretrained_model_name_or_path = "embedded:flux2_klein_tiny_random"\n'
            'dataset = dict(type="ArXiVParquetDatasetV2", base_dir="data")\n'
            "trian_batch_size = 2\n"
        )
        typo = ["train", str(config)]
        runs = {
            "an empty interpreter": process([*PYTHON, "-c", "pass"]),
            "import of the command line": process([*PYTHON, "-c", "import OpenSciDraw.cli"]),
            "scienceflow --help": process([*SCIENCEFLOW, "--help"]),
            "refusal of a typo in a config": process([*SCIENCEFLOW, *typo], expected_code=2),
        }
        seconds = in_turn(runs, REPETITIONS)
        if loads_torch(["--help"]) or loads_torch(typo):
            raise SystemExit("torch is loaded before the config is known to be right")
    middle = {name: median(values) for name, values in seconds.items()}
    limits = {"scienceflow --help": "0.5 s", "refusal of a typo in a config": "2 s"}
    empty, imports, full, _ = middle.values()
    start, modules, parts = start_of_training()
    seconds |= start
    middle |= {name: median(values) for name, values in start.items()}
    rows = [[name, f"{value:.3f} s", limits.get(name, "")] for name, value in middle.items()]
    rows += [[f"building a run: {name}", f"{value:.3f} s", ""] for name, value in parts.items()]
    share = (imports - empty) / (full - empty)
    result = Result("startup", "python benchmarks/run_startup.py", ["what", "median", "limit"], rows)
    gain = median(a / b for a, b in zip(*list(start.values())[:2], strict=True))
    result.notes = [
        f"Imports are {share:.0%} of what `--help` adds to an empty interpreter. Neither loads torch.",
        f"Importing as `train` does it is {gain:.2f} times as fast as plainly ({modules['as train does']} modules instead of "
        f"{modules['plain']}): the median over neighbouring pairs.",
    ]
    result.numbers = {
        "seconds": seconds, "median_seconds": middle, "import_share_of_help": share, "modules": modules,
        "import_gain": gain, "building_a_run_seconds": parts,
    }  # fmt: skip
    result.save()


if __name__ == "__main__":
    main()
