"""Intervals of scores and comparisons of two of them, over pictures.

A score is a ratio of sums over pictures, sum(hits) / sum(totals): a picture with nine boxes counts nine times as much as
one with a single box. So a picture is the unit that is resampled, with its hits and its totals.

    interval   BCa bootstrap (Efron 1987, "Better bootstrap confidence intervals", JASA 82, 171-185): the ends keep their
               coverage where a score is near 0 or 1 and its distribution is skewed
    compare    two scores of the same pictures: the interval of the difference by the same bootstrap, p by a permutation
               test in which each picture may swap its two results (the sign flip of its difference, where totals agree)

All arrays are (n,) over pictures; what is drawn by chance depends on `seed` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000
SIGNIFICANT = 0.05
_EXACT = 13  # pictures: up to so many, all 2^n swaps are counted
_CHUNK = 4_000_000  # drawn numbers in memory at a time

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval. NaN where it is not known: no totals, or ends from a single picture."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """How much this score is above the other's on the same pictures, with a 95 % interval and a two-sided p."""

    difference: float
    low: float
    high: float
    p: float


def interval(hits: ArrayLike, totals: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """sum(hits) / sum(totals) with its interval.

    Where every picture has all hits (or none), resampling sees no variation: the open end is then the exact binomial one
    for n pictures (Clopper and Pearson 1934), 0.025^(1/n) or 1 - 0.025^(1/n).

    Raises:
        ValueError: arrays of different lengths, negative or not finite numbers.
    """
    data = _checked(hits, totals)
    if not data[:, 1].sum():
        return Interval(np.nan, np.nan, np.nan)
    value = float(_ratio(data.sum(0)))
    counted = data[data[:, 1] > 0]
    if (counted[:, 0] == counted[:, 1]).all() or not counted[:, 0].any():
        open_end = (0.5 - CONFIDENCE / 2) ** (1 / len(counted))
        return Interval(value, open_end, 1.0) if value else Interval(value, 0.0, 1 - open_end)
    return Interval(value, *_bca(data, _ratio, seed, resamples))


def compare(
    hits: ArrayLike, totals: ArrayLike, other_hits: ArrayLike, other_totals: ArrayLike, *, seed: int = 0,
    resamples: int = RESAMPLES,
) -> Comparison:  # fmt: skip
    """This score minus the other's, both of the same pictures in the same order.

    Raises:
        ValueError: see `interval`.
    """
    data = np.concatenate([_checked(hits, totals), _checked(other_hits, other_totals)], axis=1)
    if not (data[:, 1].sum() and data[:, 3].sum()):
        return Comparison(np.nan, np.nan, np.nan, np.nan)
    difference = float(_difference(data.sum(0)))
    return Comparison(difference, *_bca(data, _difference, seed, resamples), _swap_test(data, seed, resamples))


def better(comparison: Comparison, higher_is_better: bool) -> str:
    """'this', 'other', or 'neither' where p is not below 0.05."""
    if not comparison.p < SIGNIFICANT:
        return "neither"
    return "this" if (comparison.difference > 0) == higher_is_better else "other"


# -- the bootstrap -------------------------------------------------------------------------------
def _checked(hits: ArrayLike, totals: ArrayLike) -> Array:
    data = np.stack([np.asarray(hits, dtype=np.float64), np.asarray(totals, dtype=np.float64)], axis=1)
    if not np.isfinite(data).all() or (data < 0).any():
        raise ValueError("hits and totals must be finite and not negative")
    return data


def _ratio(sums: Array) -> Array:
    """(..., 2) sums of hits and totals -> ratios; NaN where the totals are 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def _difference(sums: Array) -> Array:
    return _ratio(sums[..., :2]) - _ratio(sums[..., 2:])


def _bca(data: Array, statistic, seed: int, resamples: int) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """Both ends of the interval of `statistic`, a function of the column sums of `data` (n, columns)."""
    count = len(data)
    if count < 2:
        return np.nan, np.nan
    total = data.sum(0)
    value = statistic(total)
    drawn = np.concatenate([statistic(sums) for sums in _resampled_sums(data, seed, resamples)])
    drawn = drawn[np.isfinite(drawn)]
    left_out = statistic(total - data)  # jackknife
    left_out = left_out[np.isfinite(left_out)]
    if not len(drawn) or np.ptp(drawn) == 0:
        return float(value), float(value)
    normal = NormalDist()
    below = (np.mean(drawn < value) + np.mean(drawn <= value)) / 2
    bias = normal.inv_cdf(float(np.clip(below, 0.5 / len(drawn), 1 - 0.5 / len(drawn))))
    spread = left_out.mean() - left_out
    square = (spread**2).sum()
    acceleration = (spread**3).sum() / (6 * square**1.5) if square else 0.0
    ends = []
    for tail in (0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2):
        z = bias + normal.inv_cdf(tail)
        ends.append(normal.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(drawn, ends)
    return float(low), float(high)


def _resampled_sums(data: Array, seed: int, resamples: int) -> Iterator[Array]:
    """(some, columns) sums over n rows drawn with replacement, `resamples` of them in all."""
    generator, count = np.random.default_rng(seed), len(data)
    step = max(1, _CHUNK // (count * data.shape[1]))
    for first in range(0, resamples, step):
        rows = generator.integers(0, count, (min(step, resamples - first), count))
        yield data[rows].sum(1)


# -- the test --------------------------------------------------------------------------------------
def _swap_test(data: Array, seed: int, resamples: int) -> float:
    """Two-sided p of the difference: how often swapping pictures' results at random makes it as large or larger."""
    count = len(data)
    observed = abs(float(_difference(data.sum(0))))
    change = data[:, [2, 3, 0, 1]] - data  # what a swap adds to the sums
    if count <= _EXACT:
        swaps = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        found = _as_large(data.sum(0) + swaps @ change, observed)
        return float(found.mean())
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // count)
    larger = 0
    for first in range(0, resamples, step):
        swaps = generator.integers(0, 2, (min(step, resamples - first), count))
        larger += int(_as_large(data.sum(0) + swaps @ change, observed).sum())
    return (larger + 1) / (resamples + 1)


def _as_large(sums: Array, observed: float) -> NDArray[np.bool_]:
    found = np.abs(_difference(sums))
    return np.asarray((found >= observed * (1 - 1e-12) - 1e-15) | ~np.isfinite(found))
