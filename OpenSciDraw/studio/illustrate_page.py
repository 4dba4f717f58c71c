"""The page of illustrations: a paper or a paragraph becomes figures, by `scienceflow illustrate` in the queue."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, field_serializer
from starlette.responses import FileResponse

from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.evaluator import DRAWN, PICTURES
from OpenSciDraw.illustrate.page import PAGE as HTML
from OpenSciDraw.illustrate.run import SUMMARY, IllustrateSettings, check
from OpenSciDraw.illustrate.sources import subjects_of_text
from OpenSciDraw.studio import results
from OpenSciDraw.studio.calls import Call, Given, Page
from OpenSciDraw.studio.jobs import Job
from OpenSciDraw.studio.state import Studio
from OpenSciDraw.utils.files import json_objects, write_text

KIND = results.Kind("illustrate", "illustrations", SUMMARY, HTML)
TEXT = "text.txt"  # a paragraph that was typed in
_PAPERS = (".tar.gz", ".tgz", ".gz", ".tar", ".zip", ".tex", ".md")
_NUMBERS = {"candidates": (1, 32), "pictures": (1, 64), "refine": (0, 20), "limit": (1, 10_000), "width": (32, 4096),
            "height": (32, 4096)}  # fmt: skip
_FACTS = ("model", "steps", "guidance", "seed", "writer_model", "judge_model", "candidates", "pictures", "refine", "refine_by")


# What illustrate.json holds, as far as it is shown.
class Drawn(BaseModel):
    file: str
    seed: int
    score: float | None
    findings: list[str]
    failure: str | None
    prompt: str

    @field_serializer("seed")
    def _exact(self, seed: int) -> str:
        """As text: a browser's numbers are exact up to 2**53 alone."""
        return str(seed)


class Candidate(BaseModel):
    id: str
    text: str
    by: str
    round: int
    instruction: str | None
    edited: str | None
    kept: bool
    score: float | None
    pictures: list[Drawn]


class Subject(BaseModel):
    id: str
    caption: str
    context: str
    candidates: list[Candidate]


class Illustration(BaseModel):
    what: str
    source: str
    settings: dict[str, Any]
    remarks: list[str]
    subjects: list[Subject]


# -- asking ------------------------------------------------------------------------------------------
def choices(studio: Studio, given: Given) -> Any:
    """Papers and texts in the folder, by name; whether there is an access key for endpoints."""
    files = results.files_in(studio, _PAPERS)
    projects = {str(Path(name).parent) for name in files if name.lower().endswith(".tex")} - {"."}
    others = [name for name in files if not name.lower().endswith(".tex") or str(Path(name).parent) == "."]
    return {"sources": [*sorted(projects), *others], "key": results.KEY, "has_key": bool(os.environ.get(results.KEY, "").strip())}


def start(studio: Studio, given: Given) -> Any:
    """Queue an illustration of a paper in the folder, or of a paragraph."""
    name, text = given.text("source", "").strip(), given.text("text", "").strip()
    if bool(name) == bool(text):
        raise UserError("Give a paper in the folder, or type a paragraph: one of the two.")
    path = studio.places.inside(name) if name else None
    if path is not None and not path.exists():
        raise UserError(f"There is no {name!r:.200} in the studio's folder.")
    if text:
        subjects_of_text(text)
    target, only, by = results.target_of(studio, given), given.text("only", "", 2000).split(), given.text("refine_by", "text")
    if by not in ("text", "edit"):
        raise UserError(f"refine_by = {by!r:.40}: text or edit.")
    if (text and only) or any(word.startswith("-") for word in only):
        raise UserError("The figures of a paper are named as fig2, or by their labels; a paragraph has none.")
    written = results.numbers(given, **_NUMBERS)
    writer, judge = results.endpoint(given, "writer"), results.endpoint(given, "judge")
    options = results.drawing_options(given, target)
    asked: dict[str, int] = {key[2:]: int(value) for key, value in zip(written[::2], written[1::2], strict=True)}
    url, model = (writer[1], writer[3]) if writer else (None, None)
    settings = IllustrateSettings(name, text or None, tuple(only), refine_by=by, writer_url=url, writer_model=model, **asked)
    check(settings, target)
    folder = results.new_folder(studio, KIND, given.text("name", "").strip(), path.name if path is not None else "text")
    if path is None:
        path = folder / TEXT
        write_text(path, text + "\n")
    arguments = [str(path), "--from", results.source_of(target, folder), *(["--only", *only] if only else []), *written]
    arguments += [*writer, *judge, *(["--refine_by", by] if settings.refine else []), *options]
    return results.queue(studio, KIND, folder, arguments)


# -- what came of it -----------------------------------------------------------------------------------
def listed(studio: Studio, given: Given) -> Any:
    """All illustrations of the folder with how far they are."""
    jobs = results.jobs_of(studio, KIND)
    return [_row(studio, folder, jobs)[0] for folder in results.folders(studio, KIND, jobs)]


def _row(studio: Studio, folder: Path, jobs: Sequence[Job]) -> tuple[dict[str, Any], Illustration | None]:
    """What a list shows of a folder, and its summary, where there is one that can be read."""
    row = results.state_of(studio, KIND, folder, jobs)
    try:
        found = results.summary_of(studio, KIND, folder, Illustration)
    except UserError as error:
        return row | {"problem": str(error)}, None
    file = studio.places.file(folder, DRAWN)
    lines = [] if file is None else json_objects(file.read_bytes())[0]
    row["drawn"] = len({line["id"] for line in lines if isinstance(line.get("id"), str)})
    if found is not None:
        scores = [c.score for subject in found.subjects for c in subject.candidates if c.kept and c.score is not None]
        row |= {
            "what": results.shown(studio, found.what), "source": results.shown(studio, found.source),
            "subjects": len(found.subjects), "best": max(scores, default=None),
        }  # fmt: skip
    return row, found


def one(studio: Studio, given: Given) -> Any:
    """One illustration: subjects, candidates, pictures."""
    folder = results.folder_of(studio, KIND, given.text("folder"))
    row, found = _row(studio, folder, results.jobs_of(studio, KIND))
    facts = [] if found is None else [[key, str(found.settings[key])] for key in _FACTS if found.settings.get(key) is not None]
    said = {} if found is None else {"subjects": found.model_dump()["subjects"], "remarks": found.remarks}
    return row | {"facts": facts, "page": studio.places.file(folder, HTML) is not None} | said


def picture(studio: Studio, given: Given) -> Any:
    """A picture of an illustration, by its file's name."""
    folder, name = results.folder_of(studio, KIND, given.text("folder")), given.text("file", most=300)
    plain = name.endswith(".png") and "/" not in name and "\\" not in name and not name.startswith(".")
    file = studio.places.file(folder / PICTURES, name) if plain else None
    if file is None:
        raise UserError(f"There is no picture {name!r:.80} here.")
    return FileResponse(file, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


PAGE = Page("Illustrate", "illustrate.js", [
    Call("GET", "/api/illustrate", listed), Call("GET", "/api/illustrate/choices", choices),
    Call("GET", "/api/illustrate/one", one),
    Call("GET", "/api/illustrate/picture", picture), Call("POST", "/api/illustrate/start", start),
    *results.shared_calls(KIND, "/api/illustrate"),
])  # fmt: skip
