"""What the pages of illustrations and benches share: a command of the queue with a folder of its own, and all such folders."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.responses import FileResponse, Response

from OpenSciDraw.config import save_config
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.run import Target
from OpenSciDraw.studio import forms, saved
from OpenSciDraw.studio.calls import Call, Given
from OpenSciDraw.studio.jobs import Job
from OpenSciDraw.studio.run_state import read_bounded
from OpenSciDraw.studio.state import Studio
from OpenSciDraw.utils.endpoint import Endpoint
from OpenSciDraw.utils.files import make_folder, parse_json
from OpenSciDraw.utils.sole_user import holder_of

KEY = "OPENAI_API_KEY"  # the environment variable of the access key: no field of a page takes one
BASE = "from.py"  # in a folder of results: the config whose model is drawn with, as values
_MOST_FOLDERS, _MOST_FILES = 500, 300
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class Kind:
    """A command, the folder of its folders, the file that says what came of it, and its page."""

    command: str
    place: str
    summary: str
    page: str


# -- what was asked for ----------------------------------------------------------------------------
def target_of(studio: Studio, given: Given) -> Target:
    """What draws, as the playground names it: a run, a checkpoint, a saved config or a recipe. No config is run.

    Raises:
        UserError: there is none; a config that sends pictures to an address that was not given here.
    """
    name, ema = given.text("target"), given.text("ema", "") == "yes"
    path = forms.base_file(studio.places, name)
    if path.suffix == ".py":
        config, kind = saved.load(path), "config"
        if ema:
            raise UserError("The average of the weights (EMA) is of a run, and this is a base.")
    else:
        above = [folder for folder in [path, *path.parents][:4] if studio.places.root in folder.parents]
        file = next((found for folder in above if (found := studio.places.file(folder, "config.py"))), None)
        if file is None or not path.exists():
            raise UserError(f"{name!r:.200} is no run or checkpoint: there is no config.py in it or above it.")
        config, kind = saved.load(file), "run"
    judge = config.evaluate.judge_url
    if judge is not None and (judge != given.text("judge", "").strip() or config.evaluate.judge_key_variable != KEY):
        raise UserError(
            f"The config of {name} names a judge at {judge} (key in {config.evaluate.judge_key_variable}). Enter the same address "
            f"as the judge, with the key in {KEY}; or run the command in a shell."
        )
    return Target(name, kind, path, config, ema)


def endpoint(given: Given, name: str) -> list[str]:
    """`--NAME URL --NAME_model MODEL`, or nothing."""
    url, model = given.text(name, "", 500).strip(), given.text(f"{name}_model", "", 200).strip()
    if not url and not model:
        return []
    if not url or not model or model.startswith("-") or not model.isprintable():
        raise UserError(f"{name}: give both, the address of an OpenAI-compatible endpoint and the name of the model there.")
    Endpoint(url, model, KEY, 1.0, 0, setting=name)  # says what is wrong with an address
    return [f"--{name}", url, f"--{name}_model", model]


def numbers(given: Given, **bounds: tuple[int, int]) -> list[str]:
    """`--NAME N` of those that were given."""
    found = []
    for name, (low, high) in bounds.items():
        if given.text(name, "", 40).strip():
            found += [f"--{name}", str(given.whole(name, low=low, high=high))]
    return found


def drawing_options(given: Given, target: Target) -> list[str]:
    """How is drawn and read: what both commands take."""
    found = numbers(given, steps=(1, 500), seed=(0, 2**53), batch_size=(1, 256))
    if given.text("guidance", "", 40).strip():
        found += ["--guidance", f"{given.number('guidance', high=100):g}"]
    reader = given.text("reader", "")
    if reader not in ("", "rapidocr", "tesseract"):
        raise UserError(f"reader = {reader!r:.40}: rapidocr or tesseract.")
    return [*found, *(["--reader", reader] if reader else []), *(["--ema"] if target.ema else [])]


def new_folder(studio: Studio, kind: Kind, name: str, otherwise: str) -> Path:
    """A folder for what comes, made: of a name that was given, or of one that is free."""
    above = make_folder(studio.places.root / kind.place)
    if not studio.places.has(above):
        raise UserError(f"{kind.place} is a link that leads out of the studio's folder.")
    if not name:
        stem = re.sub(r"[^A-Za-z0-9]+", "-", otherwise).strip("-")[:40] or kind.command
        name = next(found for n in range(1, 100_000) if not os.path.lexists(above / (found := f"{stem}-{n}")))
    folder = above / forms.named(name)
    try:
        folder.mkdir()
    except FileExistsError:
        raise UserError(f"{kind.place}/{name} is there already. Choose another name, or go on with that one on its page.") from None
    return folder


def source_of(target: Target, folder: Path) -> str:
    """What --from is given: of a config a copy of its values beside the results, so that none of its code is run."""
    if target.kind == "run":
        return str(target.path)
    assert target.config is not None
    save_config(target.config, folder / BASE)
    return str(folder / BASE)


def queue(studio: Studio, kind: Kind, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Queue the command with `--out FOLDER`."""
    name = studio.places.name(folder)
    job = studio.queue.add(kind.command, [*arguments, "--out", str(folder)], f"{kind.command} {name}", run=name)
    return {"folder": name, "job": job.number}


# -- what is there -----------------------------------------------------------------------------------
def folders(studio: Studio, kind: Kind, jobs: Sequence[Job]) -> list[Path]:
    """Folders of results, those of `jobs` and those that the command made in a shell, the newest first."""
    places, found = studio.places, {studio.places.root / job.run for job in jobs if job.run}
    for folder in places.folders():
        found |= {file.parent for file in (folder / kind.place).glob(f"*/{kind.summary}")}
        if (folder / kind.summary).is_file():
            found.add(folder)
    inside = [folder for folder in found if folder.is_dir() and places.has(folder)]
    return sorted(inside, key=lambda folder: folder.stat().st_mtime, reverse=True)[:_MOST_FOLDERS]


def folder_of(studio: Studio, kind: Kind, name: str) -> Path:
    """Raises UserError where the studio's folder holds no such results."""
    folder = studio.places.inside(name)
    known = studio.places.file(folder, kind.summary) is not None
    if not known and not (folder.is_dir() and any(job.run == name for job in jobs_of(studio, kind))):
        raise UserError(f"{name!r:.200} holds no {kind.summary}, and no {kind.command} of the queue works there.")
    return folder


def jobs_of(studio: Studio, kind: Kind) -> list[Job]:
    return [job for job in studio.queue.jobs() if job.command == kind.command]


def state_of(studio: Studio, kind: Kind, folder: Path, jobs: Sequence[Job]) -> dict[str, Any]:
    """The folder's name, and of its last one of `jobs` the state, what it said last, and its command."""
    name = studio.places.name(folder)
    own = [job for job in jobs if job.run == name]
    is_done = studio.places.file(folder, kind.summary) is not None
    if not own:
        word = "running" if holder_of(folder)[1] else "done" if is_done else "stopped"
        return {"folder": name, "job": None, "state": {"name": word, "reason": "made in a shell"}, "said": "", "command": ""}
    job, state = own[-1], studio.queue.state(own[-1])
    lines = [line for line in studio.queue.log(job.number).splitlines() if line.strip() and not line.startswith("$ ")]
    command = shlex.join(["scienceflow", job.command, *job.arguments])
    said = lines[-1][:500] if lines and state.name != "done" else ""
    seconds = None if state.since is None else (state.until or time.time()) - state.since
    return {"folder": name, "job": job.number, "state": asdict(state), "said": said, "command": command, "seconds": seconds}


def summary_of(studio: Studio, kind: Kind, folder: Path, model: type[_Model]) -> _Model | None:
    """What the summary holds, checked; None where there is none yet. Raises UserError for one of another form."""
    data = read_bounded(studio.places.file(folder, kind.summary))
    if not data:
        return None
    try:
        return model.model_validate(parse_json(data))
    except (ValidationError, ValueError, RecursionError) as error:
        name = f"{studio.places.name(folder)}/{kind.summary}"
        raise UserError(f"{name} was not written by `scienceflow {kind.command}`: {error!s:.300}") from error


def shown(studio: Studio, path: str) -> str:
    """A path as the page names it, where it lies in the folder."""
    return path.removeprefix(f"{studio.places.root}/")


def shared_calls(kind: Kind, path: str) -> list[Call]:
    """Calls that are the same on both pages: the page that the command wrote, and the command once more."""
    return [
        Call("GET", f"{path}/page", partial(_page_of, kind=kind)), Call("POST", f"{path}/go_on", partial(_go_on, kind=kind)),
    ]  # fmt: skip


def _page_of(studio: Studio, given: Given, kind: Kind) -> Response:
    """To be kept: a stored file is never shown, nor run, under the studio's own address."""
    file = studio.places.file(folder_of(studio, kind, given.text("folder")), kind.page)
    if file is None:
        raise UserError(f"There is no {kind.page} yet.")
    return download(file, kind.page)


def download(file: Path, name: str) -> Response:
    return FileResponse(file, media_type="application/octet-stream", filename=name, content_disposition_type="attachment")


def _go_on(studio: Studio, given: Given, kind: Kind) -> dict[str, Any]:
    """The command goes on where it stopped."""
    name = given.text("folder")
    own = [job for job in jobs_of(studio, kind) if job.run == name]
    if not own:
        raise UserError(f"{name!r:.200} was made in a shell: run the same command again there, and it goes on.")
    return {"folder": name, "job": studio.queue.again(own[-1].number).number}


def files_in(studio: Studio, endings: tuple[str, ...]) -> list[str]:
    """Names of the folder's files with these endings, outside of runs and stores; the first some hundred."""
    found: list[str] = []
    for folder in studio.places.folders():
        with os.scandir(folder) as entries:
            own = [entry.name for entry in entries if entry.name.lower().endswith(endings) and entry.is_file()]
        names = sorted(name for name in own if not name.startswith("."))
        found += [studio.places.name(folder / name) for name in names if studio.places.has(folder / name)]
        if len(found) >= _MOST_FILES:
            break
    return found[:_MOST_FILES]
