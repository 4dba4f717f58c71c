"""Intervals cover what they should, and p-values are those of small cases counted by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from OpenSciDraw.evaluation.statistics import Comparison, better, compare, interval


def test_a_score_is_the_ratio_of_the_sums_not_the_mean_of_the_ratios() -> None:
    found = interval([1, 9], [1, 90])
    assert found.value == pytest.approx(10 / 91)
    assert found.low <= found.value <= found.high


def test_the_interval_covers_the_true_score_in_95_of_100_samples() -> None:
    """Boxes in pictures: pictures differ in how many there are and in how well they came out."""
    generator = np.random.default_rng(3)
    hit, count = 0, 400
    for at in range(count):
        totals = generator.integers(1, 10, 60)
        share = generator.beta(4.5, 0.5, 60)  # the mean is 0.9, skewed
        found = interval(generator.binomial(totals, share), totals, seed=at, resamples=1000)
        hit += found.low <= 0.9 <= found.high
    assert 0.915 <= hit / count <= 0.98  # two sided 3 standard errors of 0.95 at n = 400, and 0.002 of BCa's own


def test_the_interval_shrinks_with_the_root_of_the_number_of_pictures() -> None:
    def width(count: int) -> float:
        hits = np.random.default_rng(1).integers(0, 2, count)
        found = interval(hits, np.ones(count))
        return found.high - found.low

    assert width(100) / width(1600) == pytest.approx(4, rel=0.1)


def test_faultless_pictures_are_no_proof_of_a_faultless_model() -> None:
    found = interval(np.full(50, 3), np.full(50, 3))
    assert found.value == found.high == 1
    assert found.low == pytest.approx(0.025 ** (1 / 50))  # 50 of 50 is this unlikely below it
    assert interval(np.zeros(50), np.full(50, 3)).high == pytest.approx(1 - 0.025 ** (1 / 50))


def test_nothing_to_measure_has_no_value_and_one_picture_no_interval() -> None:
    assert np.isnan(interval([0, 0], [0, 0]).value)
    alone = interval([1], [2])
    assert alone.value == 0.5 and np.isnan(alone.low) and np.isnan(alone.high)


def test_the_same_seed_gives_the_same_interval_and_another_one_nearly_the_same() -> None:
    hits = np.random.default_rng(0).integers(0, 5, 200)
    totals = np.full(200, 4)
    assert interval(hits, totals, seed=1) == interval(hits, totals, seed=1)
    other = interval(hits, totals, seed=2)
    assert other != interval(hits, totals, seed=1)
    assert other.low == pytest.approx(interval(hits, totals, seed=1).low, abs=0.005)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        interval([1, np.nan], [1, 1])
    with pytest.raises(ValueError, match="negative"):
        interval([-1, 1], [1, 1])


def test_the_interval_is_scipys_bca_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(5)
    totals = generator.integers(1, 10, 80).astype(float)
    hits = generator.binomial(totals.astype(int), 0.85).astype(float)
    theirs = stats.bootstrap(
        (hits, totals), lambda h, t, axis: h.sum(axis) / t.sum(axis), paired=True, method="BCa", n_resamples=10_000,
        random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    ours = interval(hits, totals)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)


# -- comparisons -----------------------------------------------------------------------------------
def test_few_pictures_are_compared_by_counting_every_sign_flip() -> None:
    this, other = np.array([1.0, 1.0, 1.0, 0.5, 1.0]), np.array([0.0, 0.5, 1.0, 0.75, 0.25])
    ones = np.ones(5)
    differences = this - other
    flipped = [abs(np.mean(differences * signs)) for signs in itertools.product((-1, 1), repeat=5)]
    expected = np.mean([value >= abs(differences.mean()) - 1e-12 for value in flipped])
    found = compare(this, ones, other, ones)
    assert found.p == pytest.approx(expected)
    assert found.difference == pytest.approx(differences.mean())


def test_where_totals_differ_a_picture_swaps_hits_and_totals_together() -> None:
    this, other = ([2.0, 1.0], [3.0, 4.0]), ([0.0, 1.0], [1.0, 2.0])
    differences = []
    for swaps in itertools.product((False, True), repeat=2):
        sums = np.zeros(4)
        for at, swap in enumerate(swaps):
            a, b = (this[0][at], this[1][at]), (other[0][at], other[1][at])
            sums += np.array([*(b if swap else a), *(a if swap else b)])
        differences.append(abs(sums[0] / sums[1] - sums[2] / sums[3]))
    assert compare(*this, *other).p == np.mean([value >= differences[0] - 1e-12 for value in differences])


def test_equal_results_are_not_different() -> None:
    hits, totals = np.arange(20) % 3, np.full(20, 2)
    found = compare(hits, totals, hits, totals)
    assert (found.difference, found.p) == (0, 1) and found.low == found.high == 0
    assert better(found, True) == "neither"


def test_p_is_below_5_percent_in_5_of_100_comparisons_of_equals() -> None:
    generator = np.random.default_rng(7)
    ones, below, count = np.ones(40), 0, 400
    for at in range(count):
        difficulty = generator.beta(5, 1, 40)
        this, other = generator.random((2, 40)) < difficulty
        below += compare(this, ones, other, ones, seed=at, resamples=500).p < 0.05
    assert below / count <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / count)


def test_pairing_finds_a_difference_that_the_two_intervals_alone_hide() -> None:
    generator = np.random.default_rng(2)
    totals = np.full(60, 10)
    base = generator.integers(0, 9, 60)  # pictures differ much from each other, the two runs by one hit each
    found = compare(base + 1, totals, base, totals)
    this, other = interval(base + 1, totals), interval(base, totals)
    assert this.low < other.high  # they overlap
    assert found.p < 0.001 and 0.05 < found.low <= found.high < 0.15
    assert better(found, True) == "this" and better(found, False) == "other"


def test_a_comparison_is_scipys_permutation_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(9)
    this, other = generator.random(30), generator.random(30) - 0.12
    other = np.clip(other, 0, None)
    theirs = stats.permutation_test(
        (this, other), lambda a, b, axis: (a - b).mean(axis), permutation_type="samples", vectorized=True, n_resamples=20_000
    )
    assert compare(this, np.ones(30), other, np.ones(30)).p == pytest.approx(theirs.pvalue, abs=0.01)


def test_better_needs_significance() -> None:
    assert better(Comparison(0.1, -0.1, 0.3, 0.2), True) == "neither"
    assert better(Comparison(-0.1, -0.2, -0.05, 0.01), False) == "this"
