"""All benchmarks, one after the other, and RESULTS.md from what they wrote.

Command:  python benchmarks/run_all.py          (about eight minutes on two CPU cores; nothing else should run meanwhile)
          python benchmarks/run_all.py --report  (only writes RESULTS.md anew from results/)
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import BENCHMARKS, RESULTS

NAMES = ("startup", "encode", "sample", "train_step", "step_counts", "store", "layouts", "text_storage")
# Gigabytes of disk, ten minutes or more, pictures that are not part of this repository, or packages that are no part of `dev`.
ASIDE = ("million", "kinds", "duplicates", "text_fidelity", "distribution", "structure", "precision", "preferences", "prefer",
         "vectorize")
HEADER = """# Benchmarks

Repeat: `make bench`, or `python benchmarks/run_all.py`; one alone: `python benchmarks/run_<name>.py`. Every number, each
repetition included, is in `results/<name>.json`.

All of this was measured on a CPU. What single GPUs showed is in `results/gpu/` and [docs/speed.md](../docs/speed.md).
Ours and the reference take turns in one process, and a ratio is the median over neighbouring pairs of ours/reference rates:
ratios bear a machine shared with other work, absolute rates do not.
"""


def section(content: dict[str, Any]) -> str:
    about = (BENCHMARKS / f"run_{content['name']}.py").read_text().split('"""')[1]
    title, _, *paragraphs = about.strip().split("\n\n")
    machine = content["machine"]
    where = (
        f"`{content['command']}`, {content['date']}: {machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} torch "
        f"thread(s), load average at the end {machine['load_average']}; Python {machine['python']}, torch {machine['torch']}."
    )
    rule = " | ".join(["---"] * len(content["columns"]))
    lines = [" | ".join(content["columns"]), rule, *(" | ".join(row) for row in content["rows"])]
    table = "\n".join(f"| {line} |" for line in lines)
    return "\n\n".join([f"## {title.rstrip('.')}", where, *paragraphs, table, *content["notes"]])


def main() -> None:
    if sys.argv[1:] != ["--report"]:
        for name in NAMES:
            print(f"\n== {name}", flush=True)
            subprocess.run([sys.executable, str(Path(BENCHMARKS) / f"run_{name}.py")], check=True)
    contents = [json.loads((RESULTS / f"{name}.json").read_text()) for name in (*NAMES, *ASIDE)]
    (BENCHMARKS / "RESULTS.md").write_text("\n\n".join([HEADER.strip(), *map(section, contents)]) + "\n")


if __name__ == "__main__":
    main()
