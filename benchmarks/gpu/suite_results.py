"""What a run of the suite leaves: one JSON line for each case, written when the case ends, and a Markdown table of the lines.

    python benchmarks/gpu/suite_results.py FILE.jsonl      prints the table

A line: {"case", "part", "status", "seconds", "values", "reason", "time", "command", "card", "driver", "commit", "versions"}.
`status`: ok, failed, skipped, late (over its time limit), died (its process ended) or "not reached" (no time was left).
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / "benchmarks" / "results" / "gpu"
PACKAGES = (
    "torch", "triton", "diffusers", "transformers", "peft", "accelerate", "torchao", "bitsandbytes", "prodigyopt"
)  # fmt: skip
Record = dict[str, Any]
_COLUMNS = {  # value of a record -> heading and format; what is not named here goes into the last column
    "images_per_second": ("images/s", "{:.3g}"), "peak_gb": ("peak GB", "{:.2f}"), "plan_gb": ("plan GB", "{:.2f}"),
    "share": ("share of the card's rate", "{:.0%}"), "of_bare": ("of the bare rate", "{:.3f}"),
}  # fmt: skip


def _said_by(*command: str) -> str | None:
    """The first line that a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=20)
    except OSError:
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def environment(command: str, rehearse: bool = False) -> Record:
    """What every line says of the machine and the program; nothing heavy is imported."""
    found = None if rehearse else _said_by("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    card, _, driver = (found or "cpu, none").partition(", ")
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    version = re.search(r'__version__ = "(.+)"', (REPO / "OpenSciDraw" / "__init__.py").read_text())
    versions["OpenSciDraw"] = version.group(1) if version else "unknown"
    commit = _said_by("git", "rev-parse", "--short", "HEAD") or os.environ.get("COMMIT", "unknown")
    changed = "+changes" if _said_by("git", "status", "--porcelain", "--untracked-files=no") else ""
    return {"command": command, "card": card, "driver": driver, "commit": commit + changed, "versions": versions}


def results_file(folder: Path, card: str) -> Path:
    """`<date>-<card>.jsonl` of today; runs of one day on one card go on in one file."""
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return folder / f"{datetime.date.today().isoformat()}-{name}.jsonl"


def append(path: Path, record: Record) -> None:
    """Add a line, on the disk before this returns, and write the table anew beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**record, "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    whole = not path.exists() or path.stat().st_size == 0 or path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".md").write_text(table(read(path)), encoding="utf-8")


def read(path: Path) -> list[Record]:
    """All whole lines; one that a cut run left unfinished is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def newest(records: Iterable[Record]) -> list[Record]:
    """The last line of each case, in the order in which cases first appear; one that ran is not hidden by one that did not."""
    out: dict[str, Record] = {}
    for record in records:
        if record["status"] != "not reached" or record["case"] not in out:
            out[record["case"]] = record
    return list(out.values())


def table(records: Iterable[Record]) -> str:
    """The newest line of each case as Markdown, under what the machine was."""
    rows = newest(records)
    if not rows:
        return "Nothing was measured.\n"
    versions: dict[tuple[str, ...], None] = {}
    for row in rows:
        parts = ", ".join(f"{name} {value}" for name, value in row["versions"].items())
        versions[(row["card"], row["driver"], row["commit"], row["command"], parts)] = None
    form = "{}, driver {}, commit {}: `{}`. {}.\n"
    lines = [form.format(*version) for version in versions]
    head = ["case", *(heading for heading, _ in _COLUMNS.values()), "more"]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(_row(record) for record in rows)]) + "\n"


def _row(record: Record) -> str:
    values = record["values"]
    cells = [form.format(values[name]) if values.get(name) is not None else "" for name, (_, form) in _COLUMNS.items()]
    more = [f"{name} {_short(value)}" for name, value in values.items() if name not in _COLUMNS and value is not None]
    if record["status"] != "ok":
        more.insert(0, f"**{record['status']}**: {record['reason'] or ''}")
    text = "; ".join(more).replace("|", "\\|").replace("\n", " ")
    return "| " + " | ".join([record["case"], *cells, text]) + " |"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_short, value)) if isinstance(value, list) else str(value)[:300]


if __name__ == "__main__":
    print(table(read(Path(sys.argv[1]))), end="")
