"""Two runs' evaluations of the same pictures, compared as `evaluate --compare` does it. Runs in a worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.results import Results
from OpenSciDraw.evaluation.summary import Measured, compare_results
from OpenSciDraw.registry import METRICS
from OpenSciDraw.utils.files import parse_json

SUMMARY = "evaluation.json"


def paired(report: Callable[[Any], None], one: str, other: str) -> dict[str, Any]:
    """Of each pair of evaluations of the same figures in two runs: how much the first is above the other, per metric."""
    mine, theirs = _evaluations(Path(one)), _evaluations(Path(other))
    pairs, refused = [], []
    for figures in dict.fromkeys(mine):
        if figures not in theirs:
            continue
        (folder, summary), (other_folder, _) = mine[figures], theirs[figures]
        results, other_results = Results(folder), Results(other_folder)
        compared: dict[str, Any] = {}
        for name in dict.fromkeys(key.partition("/")[0] for key in summary["metrics"]):
            if METRICS.problem(name):
                continue
            found = results.of(name)
            measured = Measured(name, METRICS.get(name), [result.id for result in found], len(found))
            try:
                compared |= compare_results(measured, results, other_results, other_folder.name, 0)
            except UserError as error:
                refused.append(str(error))
        if compared:
            pairs.append({"figures": figures, "one": folder.name, "other": other_folder.name, "metrics": compared})
    return {"pairs": pairs, "refused": refused}


def _evaluations(run: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The newest evaluation of each set of figures."""
    found = []
    for file in (run / "evaluations").glob(f"*/{SUMMARY}"):
        try:
            summary = parse_json(file.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(summary, dict) and isinstance(summary.get("metrics"), dict):
            found.append((str(summary.get("created", "")), file.parent, summary))
    return {str(summary.get("figures")): (folder, summary) for _, folder, summary in sorted(found, key=lambda item: item[0])}
