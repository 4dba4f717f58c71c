"""The data order: one bucket per batch, disjoint and complete over ranks, a pure function of (seed, epoch)."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest

from OpenSciDraw.datasets.mix_scale_sampler import ArXiVMixScaleBatchSampler
from OpenSciDraw.errors import UserError

RNG = np.random.default_rng(0)
MIXED = RNG.choice([0, 1, 2, 7], p=[0.6, 0.3, 0.09, 0.01], size=203)


def samplers(buckets: np.ndarray, world: int, **options) -> list[ArXiVMixScaleBatchSampler]:  # type: ignore[no-untyped-def]
    return [ArXiVMixScaleBatchSampler(buckets, num_replicas=world, rank=r, **options) for r in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_are_one_bucket_disjoint_and_complete_over_ranks(world: int, batch_size: int) -> None:
    per_rank = [list(s) for s in samplers(MIXED, world, batch_size=batch_size, seed=3)]
    assert len({len(batches) for batches in per_rank}) == 1  # every rank takes the same number of steps
    rows = [row for batches in per_rank for batch in batches for row in batch]
    repeats = len(rows) - len(set(rows))
    assert set(rows) == set(range(len(MIXED)))
    assert repeats == 0 if batch_size > 1 or len(MIXED) % world == 0 else repeats < world
    for batch in (batch for batches in per_rank for batch in batches):
        assert 1 <= len(batch) <= batch_size
        assert len(set(MIXED[batch].tolist())) == 1


def test_ranks_share_a_bucket_at_almost_every_step() -> None:
    per_rank = [list(s) for s in samplers(MIXED, 2, batch_size=2)]
    same = [MIXED[a[0]] == MIXED[b[0]] for a, b in zip(*per_rank, strict=True)]
    assert np.mean(same) > 0.9


def test_the_order_is_the_same_on_every_machine() -> None:
    """A hash of the order itself: it may not depend on the platform, the library versions or the process."""
    order = [list(s) for s in samplers(np.arange(203) * 7919 % 10 // 3, 2, batch_size=4, seed=42)]
    assert hashlib.sha256(repr(order).encode()).hexdigest()[:16] == "1dbbfea9eabd0468"


def test_epochs_and_seeds_differ_and_repeat() -> None:
    sampler = ArXiVMixScaleBatchSampler(MIXED, batch_size=4)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert first == list(sampler) and first != second
    assert first != list(ArXiVMixScaleBatchSampler(MIXED, batch_size=4, seed=1))


def test_it_resumes_at_its_position() -> None:
    sampler = ArXiVMixScaleBatchSampler(MIXED, batch_size=4)
    sampler.set_epoch(2)
    all_batches = list(sampler)
    sampler.position = 7
    other = ArXiVMixScaleBatchSampler(MIXED, batch_size=4)
    other.load_state_dict(sampler.state_dict())
    assert list(other) == all_batches[7:]


def test_a_position_of_other_data_is_refused() -> None:
    state = ArXiVMixScaleBatchSampler(MIXED, batch_size=4).state_dict()
    with pytest.raises(UserError, match="rows: 203 in the checkpoint, 100 now"):
        ArXiVMixScaleBatchSampler(MIXED[:100], batch_size=4).load_state_dict(state)


def test_small_buckets_are_kept_also_with_drop_last() -> None:
    buckets = np.array([0] * 10 + [1] * 3)
    rows = [r for batch in ArXiVMixScaleBatchSampler(buckets, batch_size=4, drop_last=True) for r in batch]
    assert {10, 11, 12} <= set(rows) and len(rows) == 8 + 3
    one = [r for batch in ArXiVMixScaleBatchSampler(np.array([5]), batch_size=64) for r in batch]
    assert one == [0]


def test_nothing_left_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="0 row"):
        ArXiVMixScaleBatchSampler(np.zeros(0, dtype=int))
    with pytest.raises(UserError, match="1 row.*2 rank"):
        ArXiVMixScaleBatchSampler(np.zeros(1, dtype=int), num_replicas=2)


def test_dataset_indices_are_what_is_yielded() -> None:
    rows = np.array([11, 13, 17])
    assert sorted(r for b in ArXiVMixScaleBatchSampler(np.zeros(3, dtype=int), rows=rows) for r in b) == [11, 13, 17]


def test_a_million_rows_are_planned_within_two_seconds() -> None:
    buckets = np.random.default_rng(1).integers(0, 40, 1_000_000)
    sampler = ArXiVMixScaleBatchSampler(buckets, batch_size=2, num_replicas=8)
    best = 9.0
    for epoch in range(3):
        sampler.set_epoch(epoch)
        start = time.perf_counter()
        len(sampler)
        best = min(best, time.perf_counter() - start)
    assert best < 2.0


@pytest.mark.parametrize(("then", "now"), [((2, 2), (4, 1)), ((2, 2), (3, 1)), ((5, 1), (1, 8)), ((1, 3), (2, 2))])
def test_an_epoch_goes_on_with_another_batch_size_and_number_of_ranks(then: tuple[int, int], now: tuple[int, int]) -> None:
    """Every row once an epoch, whatever changed in its middle, and changed again."""
    seen: list[int] = []
    parts = [(*then, 5), (*now, 4), (*then, None)]
    state = None
    for batch_size, world, steps in parts:
        group = samplers(MIXED, world, batch_size=batch_size)
        for sampler in group:
            if state is not None:
                sampler.load_state_dict(state)
        batches = [list(sampler)[:steps] for sampler in group]
        seen += [row for rank in batches for batch in rank for row in batch]
        for sampler in group:
            sampler.position += len(batches[0])
        state = group[0].state_dict()
    assert set(seen) == set(range(len(MIXED)))
    assert len(seen) - len(set(seen)) < 3 * 8  # at most the repeats that a last step may need


def test_the_same_global_batch_keeps_the_order_when_ranks_change() -> None:
    two, one = samplers(np.zeros(64), 2, batch_size=2), samplers(np.zeros(64), 1, batch_size=4)[0]
    whole = list(one)
    for sampler in two:
        sampler.position = 5
    one.load_state_dict(two[0].state_dict())
    assert list(one) == whole[5:]


def test_other_data_cannot_be_resumed() -> None:
    state = samplers(MIXED, 1)[0].state_dict()
    with pytest.raises(UserError, match="rows: 203 in the checkpoint, 202 now"):
        samplers(MIXED[:-1], 1)[0].load_state_dict(state)


def test_batches_hold_texts_of_like_length_so_that_masks_are_rarely_needed() -> None:
    rng = np.random.default_rng(1)
    buckets, lengths = rng.integers(0, 3, 6000), rng.normal(300, 80, 6000).clip(20, 512).astype(int)
    uneven = {}
    for name, given in (("grouped", lengths), ("as they come", None)):
        sampler = ArXiVMixScaleBatchSampler(buckets, lengths=given, batch_size=2)
        batches = list(sampler)
        assert sorted(row for batch in batches for row in batch) == list(range(6000))
        uneven[name] = np.mean([len(set(lengths[batch].tolist())) > 1 for batch in batches])
    assert uneven["grouped"] < 0.2 < 0.9 < uneven["as they come"]
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_equal_lengths_change_nothing() -> None:
    assert list(ArXiVMixScaleBatchSampler(MIXED, lengths=np.full(203, 512))) == list(ArXiVMixScaleBatchSampler(MIXED))
