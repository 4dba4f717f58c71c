"""Judgements as a table: a row for each difficulty and one for all, a column for each axis, every number with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from OpenSciDraw.bench.files import Bench
from OpenSciDraw.evaluation.results import Result, Results
from OpenSciDraw.evaluation.statistics import interval
from OpenSciDraw.evaluation.summary import Measured, failures_of, summarize

OVERALL = "overall"
ALL = "all"
_FIRST = ("components", "arrows", "text")


def rows_of(measured: Measured, bench: Bench, results: Results, seed: int) -> list[dict[str, Any]]:
    """For each difficulty and for all: `pictures`, `failures`, and `scores` by axis as in evaluation.json.

    Where a judge gives no overall score of its own, it is the mean of a picture's axes.
    """
    rows = []
    groups = [(name, bench.ids(name)) for name in bench.difficulties]
    for name, ids in [*groups, (ALL, bench.ids())] if len(groups) > 1 else groups:
        part = Measured(measured.name, measured.metric, ids, len(ids), failures_of(measured.name, ids, results))
        scores = {key.partition("/")[2]: value for key, value in summarize(part, results, seed).items()}
        if OVERALL not in scores and set(scores) & set(_FIRST):
            scores[OVERALL] = _overall(results.of(measured.name, ids), seed)
        rows.append({"difficulty": name, "pictures": len(ids), "failures": len(part.failures), "scores": scores})
    return rows


def _overall(found: Sequence[Result], seed: int) -> dict[str, Any]:
    means = [overall_of(result.scores) for result in found if result.scores]
    known = [mean for mean in means if mean is not None]
    score = interval(known, [1.0] * len(known), seed=seed)
    value, low, high = (None if math.isnan(number) else number for number in (score.value, score.low, score.high))
    failures = sum(result.failure is not None for result in found if result.scores)
    return {"value": value, "low": low, "high": high, "examples": len(known), "failures": failures, "higher_is_better": True}


def overall_of(scores: Mapping[str, Sequence[float]]) -> float | None:
    """One picture's overall score: the judge's own, else the mean of its axes; None without any."""
    if OVERALL in scores:
        return scores[OVERALL][0]
    ratios = [numbers[0] / numbers[1] for numbers in scores.values() if numbers[1]]
    return sum(ratios) / len(ratios) if ratios else None


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The axes in their order, what else was measured after them, overall last."""
    names = dict.fromkeys(name for row in rows for name in row["scores"])
    first = [name for name in _FIRST if name in names]
    last = [OVERALL] if OVERALL in names else []
    return [*first, *(name for name in names if name not in (*first, *last)), *last]


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for a terminal, scores in percent."""
    columns = columns_of(rows)
    lines = [["difficulty", "pictures", *columns, "failures"]]
    for row in rows:
        cells = [cell(row["scores"].get(name)) for name in columns]
        lines.append([row["difficulty"], str(row["pictures"]), *cells, str(row["failures"])])
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    shown = ["  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([shown[0], "-" * max(map(len, shown)), *shown[1:]])


def cell(score: Mapping[str, Any] | None) -> str:
    """A score in percent with its interval: '67.2 (61.0 to 73.1)'."""
    if score is None or score["value"] is None:
        return "-"
    ends = f" ({100 * score['low']:.1f} to {100 * score['high']:.1f})" if score["low"] is not None else ""
    return f"{100 * score['value']:.1f}{ends}"


def heading(name: str, found: dict[str, Any]) -> str:
    """What scored, in a line: for the terminal and the page."""
    model = found.get("model")
    if name == "judge":
        return f"Our judge ({model}): the picture alone against its checklist, in percent"
    if name == "judge_published":
        wording = "our wording of the instructions" if found["wording"] == "ours" else f"instructions from {found['wording']}"
        rounds = "one round" if found["rounds"] == 1 else f"mean of {found['rounds']} rounds"
        return f"Published protocol ({model}): reference and picture, a call for each axis, {rounds}, {wording}, in percent"
    return f"{name.capitalize()}: the quoted words of the prompt, read in the picture, in percent"
