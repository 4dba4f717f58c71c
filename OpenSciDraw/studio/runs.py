"""The page of runs: all that are in the folder, one with its curves and pictures, several beside each other."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse, JSONResponse

from OpenSciDraw.errors import UserError
from OpenSciDraw.studio import forms, saved
from OpenSciDraw.studio.calls import Call, Given, Page
from OpenSciDraw.studio.run_state import config_values, results_of, sessions, state_of
from OpenSciDraw.studio.state import Studio
from OpenSciDraw.utils.sole_user import holder_of, kernel

_MOST_COMPARED = 8
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def listed(studio: Studio, given: Given) -> Any:
    return [asdict(run) for run in studio.runs()]


def one(studio: Studio, given: Given) -> Any:
    """A run with its config, pictures by step, evaluations and remarks."""
    folder = studio.places.run(given.text("run"))
    jobs = [(job, studio.queue.state(job)) for job in studio.queue.jobs()]
    curves, found, config = studio.curves(folder), results_of(studio.places, folder), config_values(studio.places, folder)
    remarks = found.remarks + ([f"metrics.jsonl: {curves.broken} line(s) could not be read."] if curves.broken else [])
    pictures = [{"step": step, "files": [file.name for file in files]} for step, files in sorted(found.pictures.items())]
    evaluations = [
        {"name": name, "created": str(said.get("created", "")), "metrics": said["metrics"], "comparison": said.get("comparison")}
        for name, said in found.evaluations
    ]
    return {
        "run": asdict(state_of(studio.places, folder, curves, jobs)), "keys": sorted(curves.series), "prompts": found.prompts,
        "config": {name: forms.shown(value) for name, value in forms.leaves(config).items()}, "pictures": pictures,
        "evaluations": evaluations, "remarks": remarks, "sessions": len(sessions(studio.places, folder)),
        "checkpoints": checkpoints(folder), "exports": [{"file": name, "bytes": size} for name, size in found.exports],
    }  # fmt: skip


def checkpoints(folder: Path) -> list[str]:
    """Names of a run's checkpoints, the newest first."""
    steps = [(int(match[1]), path.name) for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))]
    return [name for _, name in sorted(steps, reverse=True)]


def curves(studio: Studio, given: Given) -> Any:
    """The lines of some keys, of one run or several; not `whole` while a long file is being read, of which they are a sample."""
    found = {name: studio.curves(studio.places.run(name)) for name in given.texts("run", _MOST_COMPARED)}
    whole = all(curves.is_whole for curves in found.values())
    lines = {name: curves.lines(given.texts("key", 400)) for name, curves in found.items()}
    return JSONResponse({"whole": whole, "lines": lines})  # all numbers are finite: nothing is to be made plain


def picture(studio: Studio, given: Given) -> Any:
    """A validation picture."""
    found = results_of(studio.places, studio.places.run(given.text("run"))).pictures
    name, step = given.text("file"), given.whole("step")
    file = next((file for file in found.get(step, []) if file.name == name), None)
    if file is None:
        raise UserError(f"There is no picture {name!r:.80} of step {step}.")
    return FileResponse(file, headers={"Cache-Control": "private, max-age=3600"})


def compared(studio: Studio, given: Given) -> Any:
    """What differs between the configs of two runs, and which numbers both have."""
    names = given.texts("run", _MOST_COMPARED)
    if len(names) < 2:
        raise UserError("Choose at least two runs to compare.")
    folders = [studio.places.run(name) for name in names]
    configs = [config_values(studio.places, folder) for folder in folders]
    keys = sorted({key for folder in folders for key in studio.curves(folder).series})
    rows: dict[str, list[str | None]] = {}
    for config in configs[1:]:
        for row in forms.differences(configs[0], config):
            rows.setdefault(str(row["key"]), [])
    flat = [forms.leaves(config) for config in configs]
    for key in rows:
        rows[key] = [forms.shown(config[key]) if key in config else None for config in flat]
    return {"runs": names, "keys": keys, "differences": [{"key": key, "values": values} for key, values in rows.items()]}


def paired(studio: Studio, given: Given) -> Any:
    """The paired statistics of two runs' evaluations of the same figures."""
    one, other = (studio.places.run(name) for name in given.texts("run", 2))
    return studio.look.ask("paired", one=str(one), other=str(other))


# -- start and stop -----------------------------------------------------------------------------------
def queue_training(studio: Studio, config: Any, *, after: int | None = None) -> Any:
    """Queue `scienceflow train` of a config: from its last checkpoint, where its folder has one."""
    studio.places.require_inside(config)
    folder = Path(config.model_output_dir).absolute()
    if studio.places.root not in folder.parents:
        raise UserError(f"model_output_dir = {config.model_output_dir!r} is not below {studio.places.root}.")
    run, own = studio.places.name(folder), [job for job in studio.queue.jobs() if job.command == "train"]
    busy = [job.number for job in own if job.run == run and not studio.queue.state(job).is_over]
    if busy or holder_of(folder)[1]:
        raise UserError(f"{run} is " + (f"in the queue already, as job {busy[0]}." if busy else "at work already: stop it first."))
    resume = "latest" if checkpoints(folder) or config.resume_from_checkpoint == "latest" else config.resume_from_checkpoint
    config = config.model_copy(update={"resume_from_checkpoint": resume})
    return studio.queue.add("train", [], f"train {run}", config=config, run=run, after=after)


def start(studio: Studio, given: Given) -> Any:
    """Go on with a run, exactly from its last checkpoint."""
    folder = studio.places.run(given.text("run"))
    return {"job": queue_training(studio, saved.load(folder / "config.py")).number}


def stop(studio: Studio, given: Given) -> Any:
    """SIGTERM: to the process group of a job of the queue, to the process of a run that was started in a shell."""
    folder = studio.places.run(given.text("run"))
    name = studio.places.name(folder)
    live = [job for job in studio.queue.jobs() if job.run == name and not studio.queue.state(job).is_over]
    if live:
        for job in live:
            studio.queue.stop(job.number)
        return {"stopped": [job.number for job in live]}
    holder, lives = holder_of(folder)
    if not lives:
        raise UserError(f"{name} does not run.")
    if holder.get("kernel") != kernel():
        raise UserError(f"{name} runs as process {holder.get('process')} on {holder.get('machine')}. Stop it there.")
    os.kill(int(holder["process"]), signal.SIGTERM)
    return {"stopped": []}


PAGE = Page("Runs", "runs.js", [
    Call("GET", "/api/runs", listed), Call("GET", "/api/runs/one", one), Call("GET", "/api/runs/curves", curves),
    Call("GET", "/api/runs/picture", picture), Call("GET", "/api/runs/compare", compared),
    Call("GET", "/api/runs/paired", paired),
    Call("POST", "/api/runs/start", start), Call("POST", "/api/runs/stop", stop),
])  # fmt: skip
