"""From results to numbers with intervals, to a comparison of two evaluations, to a table for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.base import Metric
from OpenSciDraw.evaluation.results import WHOLE_SET, Result, Results
from OpenSciDraw.evaluation.statistics import better, compare, interval


@dataclass(frozen=True)
class Measured:
    """A metric, what it measured (ids, in order; (WHOLE_SET,) for a metric of sets), and over how many pictures."""

    name: str
    metric: Metric
    ids: Sequence[str]
    examples: int
    failures: Sequence[tuple[str, str]] = ()

    @property
    def of_sets(self) -> bool:
        return tuple(self.ids) == (WHOLE_SET,)


def failures_of(name: str, ids: Sequence[str], results: Results) -> list[tuple[str, str]]:
    """(id, reason) of what counts as a failure."""
    return [(result.id, result.failure) for result in results.of(name, ids) if result.failure is not None]


def keys_of(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(key for result in results for key in result.scores))


def summarize(measured: Measured, results: Results, seed: int) -> dict[str, dict[str, Any]]:
    """'metric/key' -> value, low, high (None: not known), examples that it applies to, failures among them."""
    found, higher = results.of(measured.name, measured.ids), measured.metric.higher_is_better
    summary: dict[str, dict[str, Any]] = {}
    for key in keys_of(found):
        own = [result for result in found if key in result.scores]
        if measured.of_sets:
            numbers, examples, failures = own[0].scores[key], measured.examples, len(measured.failures)
        else:
            score = interval(*_columns(own, key), seed=seed)
            numbers, examples = (score.value, score.low, score.high), len(own)
            failures = sum(result.failure is not None for result in own)
        value, low, high = (None if math.isnan(number) else number for number in numbers)
        summary[f"{measured.name}/{key}"] = {
            "value": value, "low": low, "high": high, "examples": examples, "failures": failures, "higher_is_better": higher,
        }  # fmt: skip
    return summary


def _columns(results: Sequence[Result], key: str) -> tuple[list[float], list[float]]:
    pairs = [result.scores[key] for result in results]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


# -- two evaluations -------------------------------------------------------------------------------
def compare_results(measured: Measured, results: Results, other: Results, where: str, seed: int) -> dict[str, dict[str, Any]]:
    """'metric/key' -> difference (this - other), low, high, p, better, on how many `examples` that both measured.

    Metrics of sets are compared by whether their intervals overlap: p, low and high are None.

    Raises:
        UserError: the other measured something else under the same ids, or by another method.
    """
    mine = {result.id: result for result in results.of(measured.name, measured.ids)}
    theirs = {result.id: result for result in other.of(measured.name, mine)}
    if measured.of_sets:
        return _compare_sets(measured, mine, theirs)
    for identity, result in theirs.items():
        if result.example != mine[identity].example:
            raise UserError(
                f"{where}: {measured.name} of {identity!r} was measured on another prompt, size or ground truth than here. "
                "Compare evaluations of the same figures."
            )
        if result.method != mine[identity].method:
            raise UserError(
                f"{where}: {measured.name} was measured in another way there (version of the metric, reader of text, judge, "
                "seed of noise). Evaluate it again with the same settings: its pictures are kept."
            )
    compared = {}
    for key in keys_of(list(mine.values())):
        common = [name for name in theirs if key in mine[name].scores and key in theirs[name].scores]
        if not common:
            continue
        pairs = [_columns([found[name] for name in common], key) for found in (mine, theirs)]
        outcome = compare(*pairs[0], *pairs[1], seed=seed)
        numbers = {"difference": outcome.difference, "low": outcome.low, "high": outcome.high, "p": outcome.p}
        compared[f"{measured.name}/{key}"] = {
            **{name: None if math.isnan(number) else number for name, number in numbers.items()},
            "better": better(outcome, measured.metric.higher_is_better), "examples": len(common),
        }  # fmt: skip
    return compared


def _compare_sets(measured: Measured, mine: Mapping[str, Result], theirs: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    if not (mine and theirs) or mine[WHOLE_SET].example != theirs[WHOLE_SET].example:
        return {}  # a set's number depends on which examples it is over
    compared = {}
    for key in mine[WHOLE_SET].scores.keys() & theirs[WHOLE_SET].scores.keys():
        (value, low, high), (their_value, their_low, their_high) = (found[WHOLE_SET].scores[key] for found in (mine, theirs))
        apart = low > their_high or their_low > high
        winner = "this" if (value > their_value) == measured.metric.higher_is_better else "other"
        compared[f"{measured.name}/{key}"] = {
            "difference": value - their_value, "low": None, "high": None, "p": None,
            "better": winner if apart else "neither", "examples": measured.examples,
        }  # fmt: skip
    return compared


# -- for people ------------------------------------------------------------------------------------
def table(evaluation: Mapping[str, Any]) -> str:
    """evaluation.json as text: one line a metric, with the comparison beside it."""
    comparison = evaluation["comparison"]
    head = ["metric", "value", "95 % interval", "examples", "failures"]
    rows = [head + (["difference", "95 % interval", "of both", "better"] if comparison else [])]
    for name, found in evaluation["metrics"].items():
        row = [name, _number(found["value"]), _ends(found), str(found["examples"]), str(found["failures"])]
        rows.append(row + (_comparison_cells(comparison["metrics"].get(name)) if comparison else []))
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _comparison_cells(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["", "", "0", "not compared"]
    apart = "intervals overlap" if found["better"] == "neither" else "intervals apart"
    p = apart if found["p"] is None else f"p = {found['p']:.4f}"
    verdict = f"{found['better']}, {p}"
    return [_number(found["difference"], sign=True), _ends(found, sign=True), str(found["examples"]), verdict]


def _number(value: float | None, sign: bool = False) -> str:
    if value is None:
        return "-"
    digits = 4 if abs(value) < 0.1 else 3
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def _ends(found: Mapping[str, Any], sign: bool = False) -> str:
    return "" if found["low"] is None else f"[{_number(found['low'], sign)}, {_number(found['high'], sign)}]"
