"""Groups of preferences made of scored pictures: a prompt's winner, and for each axis a loser that fails nearly there alone.

A pure function of the scores; datasets/preference_groups.py reads them. G groups, D axes in the order of AXES, n pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from OpenSciDraw.config import PreferenceConfig

NOBODY = -1  # in `losers`: no picture of the group fails on this axis as the rules ask
_SLACK = 1e-6  # scores are decimals: 0.7 - 0.4 is a gap of 0.3


@dataclass(frozen=True)
class Groups:
    """`ids` G strings; `winners` (G,) and `losers` (G, D) are numbers of pictures; `left_out` the other groups with the reason."""

    ids: list[str]
    winners: np.ndarray
    losers: np.ndarray
    left_out: list[tuple[str, str]]


def make_groups(
    prompts: Sequence[str] | pa.Array | pa.ChunkedArray, reward: np.ndarray, scores: np.ndarray, size: np.ndarray,
    counted: Sequence[bool], rules: PreferenceConfig,
) -> Groups:  # fmt: skip
    """At most one group of each prompt.

    The winner is the picture with the highest reward (of equal ones the first). A picture can lose on axis d when it is of the
    winner's size, its reward is lower by `min_total_gap` or more, its score on d by `min_gap` or more, and its scores on the other
    axes by something between `other_gap_low` and `other_gap_high`. Of those the one loses whose gap on d less `other_gap_weight`
    times the mean gap on the others is largest. No picture loses twice in a group: the axis with the fewest pictures to choose
    from chooses first. An axis without a score, of the winner or the loser, is not compared. Where nobody can lose there is nobody.

    Args:
        prompts: (n,) what the pictures of one prompt have in common.
        reward: (n,), NaN = not scored; scores: (n, D), NaN = not scored on this axis.
        size: (n,) equal for pictures of one latent shape.
        counted: (D,) axes that get losers.
    """
    encoded = pa.chunked_array(prompts) if isinstance(prompts, pa.ChunkedArray) else pa.chunked_array([pa.array(prompts)])
    codes = encoded.combine_chunks().dictionary_encode()
    names, code = codes.dictionary.to_pylist(), codes.indices.to_numpy()
    scored = np.flatnonzero(np.isfinite(reward))
    order = scored[np.lexsort((scored, -reward[scored], code[scored]))]  # prompt by prompt, the best first
    present, first, count = np.unique(code[order], return_index=True, return_counts=True)
    best = np.full(len(names), NOBODY)
    best[present] = order[first]
    pictures = np.zeros(len(names), dtype=np.int64)
    pictures[present] = count

    able, rank = _who_can_lose(best[code], reward, scores, size, rules)
    able &= np.asarray(counted)
    ids, winners, losers, left_out = [], [], [], []
    ends = dict(zip(present.tolist(), zip(first.tolist(), (first + count).tolist(), strict=True), strict=True))
    for number, name in enumerate(names):
        if pictures[number] < rules.min_pictures:
            left_out.append((name, f"fewer than {rules.min_pictures} scored pictures"))
            continue
        if reward[best[number]] < rules.min_reward - _SLACK:
            left_out.append((name, f"no picture with a reward of {rules.min_reward:g} or more"))
            continue
        start, end = ends[number]
        chosen = _choose(order[start + 1 : end], able, rank)
        if not any(loser != NOBODY for loser in chosen):
            left_out.append((name, "no picture that loses by the rules"))
            continue
        ids.append(name)
        winners.append(best[number])
        losers.append(chosen)
    shape = (-1, scores.shape[1])
    return Groups(ids, np.array(winners, dtype=np.int64), np.array(losers, dtype=np.int64).reshape(shape), left_out)


def _who_can_lose(
    winner: np.ndarray, reward: np.ndarray, scores: np.ndarray, size: np.ndarray, rules: PreferenceConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Of each picture and axis, (n, D): whether it can lose against its prompt's `winner` (n,), and how good a loser it is."""
    with np.errstate(invalid="ignore"):  # NaN: not scored; every comparison with it is false
        gaps = scores[winner] - scores
        lost = (reward[winner] - reward >= rules.min_total_gap - _SLACK) & (size[winner] == size)
        near = (gaps >= rules.other_gap_low - _SLACK) & (gaps <= rules.other_gap_high + _SLACK)
    known = np.isfinite(gaps)
    alike, filled = near | ~known, np.where(known, gaps, 0.0)
    able, rank = np.zeros(gaps.shape, dtype=bool), np.zeros(gaps.shape)
    for axis in range(gaps.shape[1]):
        others = [other for other in range(gaps.shape[1]) if other != axis]
        able[:, axis] = known[:, axis] & lost & (filled[:, axis] >= rules.min_gap - _SLACK) & alike[:, others].all(1)
        mean = filled[:, others].sum(1) / known[:, others].sum(1).clip(min=1)
        rank[:, axis] = filled[:, axis] - rules.other_gap_weight * mean
    return able, rank


def _choose(pictures: np.ndarray, able: np.ndarray, rank: np.ndarray) -> list[int]:
    """The loser of each axis among a prompt's `pictures`, or NOBODY."""
    candidates = [pictures[able[pictures, axis]] for axis in range(able.shape[1])]
    chosen = [NOBODY] * len(candidates)
    for axis in sorted(range(len(candidates)), key=lambda axis: len(candidates[axis])):
        free = [picture for picture in candidates[axis].tolist() if picture not in chosen]
        if free:
            chosen[axis] = max(free, key=lambda picture: (rank[picture, axis], -picture))
    return chosen
