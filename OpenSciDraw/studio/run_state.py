"""What a run's folder says of it: whether it runs, how far it is, what it has drawn and measured. Nothing else knows more."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from OpenSciDraw.reporting.run_data import RunData, read_run
from OpenSciDraw.studio import saved
from OpenSciDraw.studio.curves import Curves
from OpenSciDraw.studio.jobs import Job, JobState
from OpenSciDraw.studio.places import Places
from OpenSciDraw.utils.files import parse_json
from OpenSciDraw.utils.sole_user import holder_of

_MOST_BYTES = 4 << 20  # of a config or a JSON file of a run


def _stamp(path: Path | None) -> tuple[Path | None, int, int]:
    status = None if path is None else path.stat()
    return path, status.st_mtime_ns if status else 0, status.st_size if status else 0


@lru_cache(maxsize=2048)  # pages that are open ask every second
def _parsed(path: Path | None, changed: int, size: int) -> Any:
    """A config's values, or a JSON file's; {} where it is neither. By its time and size, so that another one is read anew."""
    try:
        data = read_bounded(path)
        return saved.values(data) if path is not None and path.suffix == ".py" else parse_json(data or b"{}")
    except ValueError:
        return {}


@dataclass(frozen=True)
class RunState:
    """`status`: starting, running, stopping, queued, finished, stopped, failed. Seconds, GB and steps as their names say."""

    name: str
    title: str
    status: str
    reason: str
    step: int
    total: int | None
    seconds_left: float | None
    memory_gb: float | None
    loss: float | None
    held_out: float | None
    device: str | None
    started: str | None
    job: int | None
    version: str  # changes whenever something of the run's files did


def read_bounded(path: Path | None) -> bytes:
    """A small file; nothing where there is none, or it is too large to be what it should."""
    if path is None or not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return b""
    return path.read_bytes()


def config_values(places: Places, folder: Path) -> dict[str, Any]:
    """The saved config of a run as values, not to be changed; {} where it holds anything else."""
    return _parsed(*_stamp(places.file(folder, "config.py")))


def sessions(places: Places, folder: Path) -> list[dict[str, Any]]:
    """One for each time that training was started, as run.json has them."""
    found = _parsed(*_stamp(places.file(folder, "run.json")))
    listed = found.get("sessions") if isinstance(found, dict) else None
    return [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []


def state_of(places: Places, folder: Path, curves: Curves, jobs: list[tuple[Job, JobState]]) -> RunState:
    """The state of a run; `jobs` are the queue's, of which the newest of this run says why it failed."""
    name, config = places.name(folder), config_values(places, folder)
    last = (sessions(places, folder) or [{}])[-1]
    total = next((int(n) for n in (last.get("total_steps"), config.get("max_train_steps")) if isinstance(n, int)), None)
    own = [(job, state) for job, state in jobs if job.run == name and job.command == "train"]
    job, state = own[-1] if own else (None, None)
    status, reason = _status(folder, curves.step, total, state)
    text = {key: value for key in ("device", "started") if isinstance(value := last.get(key), str)}
    changed = [path.stat().st_mtime_ns for path in _watched(folder) if path.exists()]
    return RunState(
        name=name, title=str(config.get("run_name") or name), status=status, reason=reason, step=curves.step, total=total,
        seconds_left=curves.seconds_left(total) if total and status == "running" else None,
        memory_gb=curves.last.get("memory_gb"), loss=curves.last.get("train_loss"), held_out=curves.last.get("held_out_loss"),
        device=text.get("device"), started=text.get("started"), job=None if job is None else job.number,
        version=f"{max(changed, default=0)}-{len(changed)}-{status}-{reason}",
    )  # fmt: skip


def _watched(folder: Path) -> list[Path]:
    return [folder / name for name in ("metrics.jsonl", "run.json", "config.py", "validation_images", "evaluations")]


def _status(folder: Path, step: int, total: int | None, job: JobState | None) -> tuple[str, str]:
    holder, lives = holder_of(folder)
    if lives:
        what = holder.get("command", "?")
        words = "" if what == "train" else f"in use by `{what}`"
        if job is not None and job.name == "stopping":
            return "stopping", "it saves a checkpoint"
        return ("running" if step else "starting"), words
    if job is not None and job.is_live:
        return "starting", job.reason
    if job is not None and job.name in ("waiting", "blocked"):
        return "queued", job.reason
    if total is not None and step >= total and (any(folder.glob("*.safetensors")) or (folder / "transformer").is_dir()):
        return "finished", ""
    if job is not None and job.name in ("failed", "killed"):
        return "failed", job.reason
    if holder:
        return "failed", "its process ended without a word: it was killed, or the machine went down"
    return "stopped", ""


def results_of(places: Places, folder: Path) -> RunData:
    """Pictures, evaluations and remarks of a run, with what links lead out of the studio's folder left out."""
    run = read_run(folder, metrics=False)
    run.pictures = {step: [file for file in files if places.has(file)] for step, files in run.pictures.items()}
    run.evaluations = [(name, found) for name, found in run.evaluations if places.has(folder / "evaluations" / name)]
    return run
