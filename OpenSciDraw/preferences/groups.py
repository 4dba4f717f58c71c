"""Scores of pictures become groups by the rules of datasets/group_making.py, and the prompts without a group get their reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from OpenSciDraw.config import PreferConfig, PreferenceConfig
from OpenSciDraw.datasets.batch import AXES
from OpenSciDraw.datasets.group_making import NOBODY, Groups, make_groups
from OpenSciDraw.evaluation.examples import Example, picture_name
from OpenSciDraw.evaluation.results import Results
from OpenSciDraw.preferences.seeds import pictures_of
from OpenSciDraw.utils.files import unfinished

_SLACK = 1e-6
ALIKE = "all pictures score alike"


@dataclass(frozen=True)
class Scored:
    """P prompts with G pictures each; `scores` (P, G, D) in the order of AXES and `reward` (P, G), NaN where there is none."""

    prompts: list[Example]
    count: int
    scores: np.ndarray
    reward: np.ndarray

    @classmethod
    def of(cls, prompts: list[Example], results: Results, settings: PreferConfig) -> Scored:
        """From results of metrics. A picture that could not be scored for a reason outside of it has no reward."""
        axes = settings.axes.model_dump()
        scores = np.full((len(prompts), settings.pictures, len(AXES)), np.nan)
        unscored = np.zeros(scores.shape[:2], dtype=bool)
        for row, prompt in enumerate(prompts):
            for column, example in enumerate(pictures_of(prompt, settings.pictures)):
                for number, axis in enumerate(AXES):
                    if axes[axis] is None:
                        continue
                    metric, _, name = axes[axis].partition("/")
                    result = results.get(metric, example.id)
                    if result is None or result.retry:
                        unscored[row, column] = True
                    elif name in result.scores and result.scores[name][1] > 0:
                        scores[row, column, number] = result.scores[name][0] / result.scores[name][1]
        known = np.isfinite(scores)
        total, count = np.where(known, scores, 0.0).sum(2), known.sum(2)
        reward = np.divide(total, count, out=np.full(total.shape, np.nan), where=(count > 0) & ~unscored)
        return cls(prompts, settings.pictures, scores, reward)

    @property
    def ids(self) -> list[str]:
        """(P * G,) ids of the pictures."""
        return [example.id for prompt in self.prompts for example in pictures_of(prompt, self.count)]


def rules_of(settings: PreferConfig) -> PreferenceConfig:
    """The rules as group making takes them; a prompt whose pictures were not all scored has no group."""
    names = ("min_reward", "min_gap", "other_gap_low", "other_gap_high", "min_total_gap", "other_gap_weight")
    return PreferenceConfig(min_pictures=settings.pictures, **{name: getattr(settings, name) for name in names})


def groups_of(scored: Scored, settings: PreferConfig) -> Groups:
    """Groups whose winners and losers are numbers in `scored.ids`; every prompt without one is in `left_out`."""
    rules, number = rules_of(settings), len(scored.prompts) * scored.count
    names = [prompt.id for prompt in scored.prompts for _ in range(scored.count)]
    sizes = np.array([prompt.height << 32 | prompt.width for prompt in scored.prompts], dtype=np.int64).repeat(scored.count)
    counted = [value is not None for value in (settings.axes.model_dump()[axis] for axis in AXES)]
    groups = make_groups(names, scored.reward.reshape(-1), scored.scores.reshape(number, -1), sizes, counted, rules)
    row = {prompt.id: at for at, prompt in enumerate(scored.prompts)}
    left_out = [(name, _why(reason, scored, row[name], rules)) for name, reason in groups.left_out]
    return Groups(groups.ids, groups.winners, groups.losers, left_out)


def _why(reason: str, scored: Scored, row: int, rules: PreferenceConfig) -> str:
    """The reason in full, where nobody can lose: the first rule, in the order of docs/preferences.md, that leaves nobody over."""
    if not reason.startswith("no picture that loses"):
        return reason
    reward, scores = scored.reward[row], scored.scores[row]
    best = int(np.nanargmax(reward))
    with np.errstate(invalid="ignore"):
        gaps, total = scores[best] - scores, reward[best] - reward
        if not np.nanmax(np.abs(gaps), initial=0.0) > _SLACK and not np.nanmax(total) > _SLACK:
            return ALIKE
        far = gaps >= rules.min_gap - _SLACK
        if not far.any():
            return f"no gap of {rules.min_gap:g} or more on any axis"
        lower = far & (total >= rules.min_total_gap - _SLACK)[:, None]
        if not lower.any():
            return f"no reward lower by {rules.min_total_gap:g} or more"
    return f"gaps on the other axes outside of {rules.other_gap_low:g} to {rules.other_gap_high:g}"


def counts(groups: Groups) -> dict[str, dict[str, int]]:
    """How many groups, losers by axis, and prompts left out by reason."""
    losers = (groups.losers != NOBODY).sum(0).tolist()
    return {
        "groups": {"made": len(groups.ids), "left out": len(groups.left_out)},
        "losers": dict(zip(AXES, losers, strict=True)),
        "left out": dict(Counter(reason for _, reason in groups.left_out).most_common()),
    }


def chances(scored: Scored, thresholds: Sequence[float] = (0.10, 0.15, 0.20, 0.30)) -> dict[str, dict[str, int]]:
    """For each axis, at how many prompts the best and the worst picture lie at least so far apart; what to choose `min_gap` by."""
    found: dict[str, dict[str, int]] = {}
    for number, axis in enumerate(AXES):
        of_axis = scored.scores[:, :, number]
        known = np.isfinite(of_axis).any(1)
        if known.any():
            spread = np.nanmax(of_axis[known], axis=1) - np.nanmin(of_axis[known], axis=1)
            found[axis] = {"prompts": int(known.sum())} | {f"{gap:.2f}": int((spread >= gap - _SLACK).sum()) for gap in thresholds}
    return found


# -- files -------------------------------------------------------------------------------------------
def write_scores(scored: Scored, path: Path) -> None:
    """A row a picture: its file, prompt, reward and scores, in the order of the prompts."""
    table: dict[str, list[object]] = {
        "group_id": [prompt.id for prompt in scored.prompts for _ in range(scored.count)],
        "picture": [picture_name(identity) for identity in scored.ids],
        "caption": [prompt.prompt for prompt in scored.prompts for _ in range(scored.count)],
        "reward": _numbers(scored.reward),
    }
    table |= {f"{axis}_score": _numbers(scored.scores[:, :, number]) for number, axis in enumerate(AXES)}
    write_table(pa.table(table), path)


def group_table(scored: Scored, groups: Groups) -> pa.Table:
    """groups.parquet of a store whose figures have the names of the pictures."""
    names = [picture_name(identity) for identity in scored.ids]
    text = {prompt.id: prompt.prompt for prompt in scored.prompts}
    table = {
        "group_id": groups.ids, "caption": [text[name] for name in groups.ids],
        "winner": [names[at] for at in groups.winners.tolist()],
    }  # fmt: skip
    for number, axis in enumerate(AXES):
        table[f"loser_{axis}"] = [None if at == NOBODY else names[at] for at in groups.losers[:, number].tolist()]
    return pa.table({name: pa.array(values, pa.string()) for name, values in table.items()})


def write_table(table: pa.Table, path: Path) -> None:
    """The file is there whole or not at all."""
    with unfinished(path) as part:
        pq.write_table(table, part)


def _numbers(values: np.ndarray) -> list[object]:
    return [float(value) if np.isfinite(value) else None for value in values.reshape(-1)]
