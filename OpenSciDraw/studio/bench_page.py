"""The page of benches: `scienceflow bench` in the queue, and its tables, several beside each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from OpenSciDraw.bench.files import read_bench
from OpenSciDraw.bench.page import PAGE as HTML
from OpenSciDraw.bench.page import TITLES
from OpenSciDraw.bench.run import LIST, PROTOCOLS, TABLE, BenchSettings, progress
from OpenSciDraw.bench.tables import cell, columns_of, heading
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.evaluator import DRAWN
from OpenSciDraw.evaluation.results import FILE as RESULTS
from OpenSciDraw.studio import results
from OpenSciDraw.studio.calls import Call, Given, Page
from OpenSciDraw.studio.jobs import Job
from OpenSciDraw.studio.state import Studio

KIND = results.Kind("bench", "benches", TABLE, HTML)
_MOST_SHOWN, _MOST_FAILURES = 8, 50
_FACTS = ("model", "judge_model", "steps", "guidance", "seed")


# What bench.json holds, as far as it is shown.
class Score(BaseModel):
    value: float | None
    low: float | None
    high: float | None


class Row(BaseModel):
    difficulty: str
    pictures: int
    failures: int
    scores: dict[str, Score]


class Scored(BaseModel):
    rows: list[Row]
    model: str | None = None
    wording: str = "ours"
    rounds: int = 1


class Failure(BaseModel):
    id: str
    metric: str
    reason: str


class Table(BaseModel):
    what: str
    created: str
    weights: str | None
    step: int | None
    settings: dict[str, Any]
    remarks: list[str]
    failures: list[Failure]
    bench: dict[str, Any]
    scores: dict[str, Scored]


# -- asking ------------------------------------------------------------------------------------------
def choices(studio: Studio, given: Given) -> Any:
    """Files and folders that may be prompts and rubrics, and whether there is an access key for a judge."""
    files = results.files_in(studio, (".json",))
    above = sorted({str(Path(name).parent) for name in files} - {"."})
    return {"files": [*above, *files], "protocols": list(PROTOCOLS), "key": results.KEY,
            "has_key": bool(os.environ.get(results.KEY, "").strip())}  # fmt: skip


def start(studio: Studio, given: Given) -> Any:
    """Queue a bench. Its files are read first, so that what is wrong with them is said at once."""
    places, protocol = studio.places, given.text("protocol", "ours")
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol = {protocol!r:.40}: {', '.join(PROTOCOLS)}.")
    prompts, rubrics = (places.inside(given.text(name).strip()) for name in ("prompts", "rubrics"))
    references, instructions = (_place(studio, given, name) for name in ("references", "instructions"))
    target, judge = results.target_of(studio, given), results.endpoint(given, "judge")
    limit = results.numbers(given, limit=(1, 100_000))
    rounds = results.numbers(given, rounds=(1, 100))
    named = [*references, *instructions, *rounds]
    if protocol == "ours" and named:
        raise UserError("References, instructions and rounds are for the published protocol alone. Choose it, or leave them out.")
    if protocol != "ours" and not references:
        raise UserError("The published protocol compares with the papers' figures: give their folder as the references.")
    settings = BenchSettings(str(prompts), str(rubrics), protocol=protocol, limit=int(limit[1]) if limit else None)
    settings.metrics(judge[1] if judge else None)
    bench = read_bench(prompts, rubrics, Path(references[1]) if references else None, settings.limit)
    options = results.drawing_options(given, target)
    folder = results.new_folder(studio, KIND, given.text("name", "").strip(), f"{Path(target.given).name}-{prompts.stem}")
    arguments = [str(prompts), str(rubrics), "--from", results.source_of(target, folder), "--protocol", protocol]
    queued = results.queue(studio, KIND, folder, [*arguments, *named, *judge, *limit, *options])
    return queued | {"pictures": len(bench.rows), "remarks": bench.remarks}


def _place(studio: Studio, given: Given, name: str) -> list[str]:
    text = given.text(name, "").strip()
    return [f"--{name}", str(studio.places.inside(text))] if text else []


# -- what came of it -----------------------------------------------------------------------------------
def listed(studio: Studio, given: Given) -> Any:
    """All benches of the folder with how far they are."""
    jobs = results.jobs_of(studio, KIND)
    return [_row(studio, folder, jobs) for folder in results.folders(studio, KIND, jobs)]


def _row(studio: Studio, folder: Path, jobs: Sequence[Job]) -> dict[str, Any]:
    row = results.state_of(studio, KIND, folder, jobs)
    if all(studio.places.has(folder / name) for name in (LIST, DRAWN, RESULTS)):
        row["progress"] = progress(folder)
    try:
        found = results.summary_of(studio, KIND, folder, Table)
    except UserError as error:
        return row | {"problem": str(error)}
    if found is None:
        return row
    facts = [["weights", str(found.weights or "")], ["step", str(found.step if found.step is not None else "")]]
    facts += [[key, str(found.settings[key])] for key in _FACTS if found.settings.get(key) is not None]
    tables = [_table(name, scored) for name, scored in found.scores.items()]
    failures = [[failure.id, failure.metric, failure.reason] for failure in found.failures[:_MOST_FAILURES]]
    return row | {
        "what": results.shown(studio, found.what), "created": found.created, "facts": [fact for fact in facts if fact[1]],
        "remarks": found.remarks, "prompts": results.shown(studio, str(found.bench.get("prompts", ""))), "failures": failures,
        "tables": tables, "page": studio.places.file(folder, HTML) is not None,
    }  # fmt: skip


def _table(name: str, scored: Scored) -> dict[str, Any]:
    """By difficulty and axis, each number with its interval, as the command prints it."""
    said = scored.model_dump()
    columns = columns_of(said["rows"])
    rows = [
        [row["difficulty"], row["pictures"], *(cell(row["scores"].get(axis)) for axis in columns), row["failures"]]
        for row in said["rows"]
    ]
    title, columns = TITLES.get(name, name.capitalize()), ["difficulty", "pictures", *columns, "failures"]
    return {"name": name, "title": title, "heading": heading(name, said), "columns": columns, "rows": rows}


def several(studio: Studio, given: Given) -> Any:
    """Some benches whole, to be shown beside each other."""
    names, jobs = given.texts("folder", _MOST_SHOWN), results.jobs_of(studio, KIND)
    return [_row(studio, results.folder_of(studio, KIND, name), jobs) for name in names]


PAGE = Page("Bench", "bench.js", [
    Call("GET", "/api/bench", listed), Call("GET", "/api/bench/choices", choices), Call("GET", "/api/bench/several", several),
    Call("POST", "/api/bench/start", start), *results.shared_calls(KIND, "/api/bench"),
])  # fmt: skip
