"""The page of a bench, in the look of the report: the tables, and pictures with what the judge found."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from OpenSciDraw.bench.files import Bench
from OpenSciDraw.bench.tables import cell, columns_of, heading, overall_of
from OpenSciDraw.evaluation.answers import findings
from OpenSciDraw.evaluation.evaluator import Evaluator
from OpenSciDraw.evaluation.examples import find_picture
from OpenSciDraw.reporting import page

PAGE = "bench.html"
TITLES = {"judge": "Our judge", "judge_published": "Published protocol"}
_SHOWN = 8  # pictures of a difficulty
_FINDINGS = 6  # of a picture


def page_of(bench: Bench, evaluator: Evaluator, table: Mapping[str, Any]) -> str:
    """The whole page as HTML; `table` is what bench.json holds."""
    drawn = table["settings"]
    facts = page.facts([
        ("weights", table["weights"]), ("step", table["step"]), ("model", drawn.get("model")),
        ("judge", drawn.get("judge_model")), ("pictures", len(bench.rows)), ("sampling steps", drawn.get("steps")),
        ("guidance", drawn.get("guidance")), ("seconds a picture", table["seconds_per_picture"]),
    ])  # fmt: skip
    about = f'<p class="lead">{escape(table["what"])} on {escape(table["bench"]["prompts"])}, {escape(table["created"])}</p>'
    lead = f"{about}{facts}{page.remarks(table['remarks'])}"
    sections = [("Scores", "".join(_scores(name, found) for name, found in table["scores"].items()))]
    pictures, said = page.Pictures(), findings(evaluator.folder)
    for difficulty in bench.difficulties:
        sections.append((f"Pictures: {difficulty}", _pictures(bench, difficulty, evaluator, pictures, said)))
    failures = [[item["id"], item["metric"], item["reason"]] for item in table["failures"]]
    sections.append(("Failures", page.table(("picture", "metric", "reason"), failures) if failures else ""))
    return page.document(f"Bench of {Path(table['what']).name}", lead, sections, "scienceflow bench")


def _scores(name: str, found: Mapping[str, Any]) -> str:
    columns = columns_of(found["rows"])
    rows = [
        [row["difficulty"], row["pictures"], *(cell(row["scores"].get(axis)) for axis in columns), row["failures"]]
        for row in found["rows"]
    ]
    caption = heading(name, dict(found)) + "; in brackets the 95 % interval."
    title = f"<h3>{escape(TITLES.get(name, name.capitalize()))}</h3>"
    return title + page.table(["difficulty", "pictures", *columns, "failures"], rows, caption, range(1, len(columns) + 3))


def _pictures(
    bench: Bench, difficulty: str, evaluator: Evaluator, pictures: page.Pictures, said: Mapping[str, list[str]]
) -> str:
    """The first pictures of a difficulty, unselected, each with its reference where there is one."""
    rows = [row for row in bench.rows if row["difficulty"] == difficulty]
    cards = []
    for row in rows[:_SHOWN]:
        if pictures.left < 0:
            break
        file = find_picture(evaluator.pictures, row["id"])
        shown = [("drawn", page.picture(pictures, file, f"{row['id']}: {row['prompt'][:300]}"))]
        if "reference" in row:
            wanted = page.picture(pictures, Path(row["reference"]), f"{row['id']}: figure of the paper")
            shown.append(("figure of the paper", wanted))
        cards.append((_about(row, evaluator, said.get(row["id"], [])), shown))
    left = len(rows) - len(cards)
    note = f'<p class="lead">The first {len(cards)} of {len(rows)}, not selected.</p>' if left else ""
    return note + page.side_by_side(cards) if cards else ""


def _about(row: Mapping[str, Any], evaluator: Evaluator, found: list[str]) -> str:
    results = [evaluator.results.get(name, row["id"]) for name in evaluator.metrics]
    overall = [(r.metric, overall_of(r.scores)) for r in results if r is not None]
    scores = ", ".join(f"{name} {100 * value:.0f}" for name, value in overall if value is not None)
    prompt = row["prompt"] if len(row["prompt"]) <= 160 else row["prompt"][:157] + "…"
    more = f" … and {len(found) - _FINDINGS} more" if len(found) > _FINDINGS else ""
    listed = f" Found: {'; '.join(found[:_FINDINGS])}{more}." if found else ""
    return f"{row['id']} ({row['width']} × {row['height']}): {scores or 'not scored'}. {prompt}{listed}"
