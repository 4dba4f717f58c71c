"""What a run's folder holds, read so that a broken or missing part is a remark on the page and not the end of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from OpenSciDraw.config.text import saved_values
from OpenSciDraw.utils.files import json_objects, parse_json, real

_STEP = re.compile(r"step_(\d+)$")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass
class RunData:
    """One run. `config` the resolved values; `metrics` the lines of metrics.jsonl; `remarks` what could not be read."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    pictures: dict[int, list[Path]] = field(default_factory=dict)
    on_other: dict[Path, Path] = field(default_factory=dict)  # of a picture, the same prompt's on validation_model
    exports: list[tuple[str, int]] = field(default_factory=list)
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.config.get("run_name") or f"{self.folder.parent.name}/{self.folder.name}".strip("/"))

    @property
    def prompts(self) -> list[str]:
        """Those of the validation pictures."""
        given = self.config.get("validation_prompts")
        return [str(prompt) for prompt in given] if isinstance(given, (list, tuple)) else []

    def last(self, key: str) -> float | None:
        """The newest value of a metric that is a number."""
        return next((value for _, value in reversed(self.series(key)) if math.isfinite(value)), None)

    @property
    def last_step(self) -> int:
        return max((int(line["step"]) for line in self.metrics if isinstance(line.get("step"), int)), default=0)

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a metric; a step that was trained twice, before and after a resume, counts once."""
        found: dict[int, float] = {}
        for line in self.metrics:
            value = line.get(key)
            if isinstance(line.get("step"), int) and isinstance(value, (int, float)) and not isinstance(value, bool):
                found[line["step"]] = float(value)
        return sorted(found.items())

    def keys(self, start: str) -> list[str]:
        return list(dict.fromkeys(key for line in self.metrics for key in line if key.startswith(start)))


def is_run(folder: Path) -> bool:
    return (folder / "config.py").is_file() and ((folder / "metrics.jsonl").is_file() or (folder / "run.json").is_file())


def find_runs(folder: Path) -> list[Path]:
    """Runs below a folder, at most three levels down; checkpoints and evaluations are not looked into."""
    found: list[Path] = []
    level = [folder]
    for _ in range(3):
        deeper = sorted(path for parent in level for path in parent.iterdir() if path.is_dir() and not path.is_symlink())
        found += [path for path in deeper if is_run(path)]
        level = [path for path in deeper if not is_run(path)]
    return found


def read_run(folder: Path, metrics: bool = True) -> RunData:
    """All that a run's folder holds; without `metrics`, all but the lines of metrics.jsonl."""
    run = RunData(folder)
    run.config = _config(folder / "config.py", run.remarks)
    run.metrics = _json_lines(folder / "metrics.jsonl", run.remarks) if metrics else []
    run.bad_rows = _json_lines(folder / "quarantine.jsonl", run.remarks) if (folder / "quarantine.jsonl").exists() else []
    run.sessions = _sessions(folder / "run.json", run.remarks)
    for file in sorted((folder / "evaluations").glob("*/evaluation.json")):
        found = _json(file, run.remarks)
        if isinstance(found, dict) and isinstance(found.get("metrics"), dict):
            run.evaluations.append((file.parent.name, found))
    run.evaluations.sort(key=lambda item: str(item[1].get("created", "")))
    root = Path(str(run.config.get("image_output_dir") or folder / "validation_images"))
    if real(folder) not in real(root).parents:  # another's config could name any folder of this machine
        run.remarks.append(f"image_output_dir = {str(root)!r} lies outside of the run: its pictures are not shown.")
        root = folder / "validation_images"
    for path in sorted(root.glob("step_*")) if root.is_dir() else []:
        step = _STEP.search(path.name)
        files = [f for f in sorted(path.iterdir()) if f.suffix.lower() in _PICTURES and f.stem.isdecimal()] or [
            f for f in [path / "grid.png"] if f.is_file()
        ]
        if step and files:
            run.pictures[int(step[1])] = files
            others = {f: path / "validation_model" / f.name for f in files}
            run.on_other |= {f: other for f, other in others.items() if other.is_file() and f.stem.isdecimal()}
    export = folder / "export"
    found_files = [*folder.glob("*.safetensors"), *(export.rglob("*.safetensors") if export.is_dir() else [])]
    run.exports = [(str(f.relative_to(folder)), f.stat().st_size) for f in sorted(found_files)]
    for key in run.keys(""):
        wrong = [step for step, value in run.series(key) if not math.isfinite(value)]
        if wrong:
            run.remarks.append(f"{key} is not a finite number at {len(wrong)} step(s), the first of them {wrong[0]:.0f}.")
    if not run.pictures:
        run.remarks.append("This run has drawn no validation pictures.")
    if metrics and not run.metrics:
        run.remarks.append("This run has written no metrics yet.")
    return run


def _config(file: Path, remarks: list[str]) -> dict[str, Any]:
    """The resolved config as training saved it. It is not run."""
    try:
        return saved_values(file.read_bytes())
    except (OSError, ValueError) as error:
        remarks.append(f"config.py cannot be read: {error}.")
        return {}


def _json_lines(file: Path, remarks: list[str]) -> list[dict[str, Any]]:
    """Objects of a file of lines; a line that is none, as the last one of a run that was killed, is left out."""
    try:
        found, broken = json_objects(file.read_bytes())
    except OSError:
        return []
    if broken:
        remarks.append(f"{file.name}: {broken} line(s) could not be read and were left out.")
    return found


def _json(file: Path, remarks: list[str]) -> Any:
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remarks.append(f"{file.parent.name}/{file.name} cannot be read: {error}.")
        return None


def _sessions(file: Path, remarks: list[str]) -> list[dict[str, Any]]:
    found = _json(file, remarks) if file.is_file() else None
    sessions = found.get("sessions") if isinstance(found, dict) else None
    return [s for s in sessions if isinstance(s, dict)] if isinstance(sessions, list) else []


def finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
