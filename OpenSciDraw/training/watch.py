"""Training on rewards is stopped when a number that is not rewarded falls: a reward can be had by a way that nobody wanted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from OpenSciDraw.config import RewardConfig
from OpenSciDraw.errors import UserError
from OpenSciDraw.registry import METRICS
from OpenSciDraw.utils.files import json_objects

_LOG = logging.getLogger("OpenSciDraw")


def values_at_start(metrics_file: Path, names: Mapping[str, float]) -> dict[str, float]:
    """Of each name the first value that metrics.jsonl has: that of the validation before the first step."""
    rows: list[dict[str, Any]] = json_objects(metrics_file.read_bytes())[0] if metrics_file.exists() else []
    return {name: found[0] for name in names if (found := [float(row[name]) for row in rows if name in row])}


def worse_by(name: str, start: float, now: float) -> float:
    """By what share of its start a number is worse; below 0 it is better. Losses and distances are better when they fall."""
    metric = name.partition("/")[0]
    falls = metric.startswith("held_out_loss") or (metric in METRICS.names() and not METRICS.get(metric).higher_is_better)
    change = (now - start) if falls else (start - now)
    return change / max(abs(start), 1e-12)


def require_no_worse(settings: RewardConfig, start: Mapping[str, float], values: Mapping[str, float], step: int) -> None:
    """Compares this validation's `values` with those at the start, by `watch` and `watch_action`.

    Raises:
        UserError: one is worse than it may be, and the action is to stop; or a watched number is not measured.
    """
    missing = [name for name in settings.watch if name not in values]
    if missing:
        raise UserError(
            f"reward.watch: no validation measures {missing[0]!r}. There: {', '.join(values)}. Set validation_func_name and "
            "evaluate to measure it, or leave it out."
        )
    for name, allowed in settings.watch.items():
        first = start.get(name, values[name])
        worse = worse_by(name, first, values[name])
        if not worse <= allowed:  # a NaN is worse too
            said = f"step {step}: {name} is {values[name]:.4g}, at the start it was {first:.4g}: worse by more than {allowed:.0%}"
            if settings.watch_action == "stop":
                raise UserError(
                    f"{said}, as reward.watch allows. Look at the pictures, and take a checkpoint from before; raise reward.pull "
                    "or lower learning_rate for the next run. To go on all the same, raise reward.watch or set "
                    "reward.watch_action = 'warn'."
                )
            _LOG.warning("%s (reward.watch)", said)
