"""How long a command takes to answer: `scienceflow --help`, the refusal of a typo in a config, the imports of training.

Command:  python benchmarks/run_startup.py

Each is a new process, 10 times, in turn; the table gives the median. The share of imports is the time of a process
that imports the command line and does nothing, over that of `--help`, both less an empty interpreter's. A command
must not load torch before its config is known to be right; the benchmark fails if one does.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from report import Result, in_turn

REPETITIONS = 10
PYTHON = [sys.executable]
TRAINING = "import sys, OpenSciDraw.training, OpenSciDraw.models.flux2_klein"
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
            "import of what trains FLUX.2-klein": process([*PYTHON, "-c", TRAINING]),
        }
        seconds = in_turn(runs, REPETITIONS)
        if loads_torch(["--help"]) or loads_torch(typo):
            raise SystemExit("torch is loaded before the config is known to be right")
    middle = {name: median(values) for name, values in seconds.items()}
    limits = {"scienceflow --help": "0.5 s", "refusal of a typo in a config": "2 s"}
    rows = [[name, f"{value:.3f} s", limits.get(name, "")] for name, value in middle.items()]
    empty, imports, full, *_ = middle.values()
    share = (imports - empty) / (full - empty)
    result = Result("startup", "python benchmarks/run_startup.py", ["what", "median", "limit"], rows)
    result.notes = [f"Imports are {share:.0%} of what `--help` adds to an empty interpreter. Neither loads torch."]
    count = [*PYTHON, "-c", TRAINING + "; print(len(sys.modules), 'torchao' in sys.modules)"]
    modules, torchao = subprocess.run(count, capture_output=True, text=True, check=True).stdout.split()
    through = "not torchao"
    if torchao == "True":
        through = "torchao among them (diffusers and transformers import it where it is installed)"
    result.notes += [f"What trains is {modules} modules, {through}."]
    result.numbers = {"seconds": seconds, "median_seconds": middle, "import_share_of_help": share}
    result.numbers["modules_of_training"] = int(modules)
    result.save()


if __name__ == "__main__":
    main()
