"""Duplicates at any scale equal those of a row-by-row comparison; decisions on many small files and on none."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from OpenSciDraw.prepare.filters.duplicates import HASH_BYTES, representatives
from OpenSciDraw.prepare.select import COLUMNS, QUALITIES, SPLITS, select
from OpenSciDraw.prepare.settings import PrepareSettings

SETTINGS = PrepareSettings(test_share=0.2, validation_share=0.2)


def turned(hashes: np.ndarray, most: int, chance: np.random.Generator) -> np.ndarray:
    """Each with 0 to `most` of its bits turned."""
    order = np.argsort(chance.random((len(hashes), 256)), axis=1)
    return hashes ^ np.packbits(order < chance.integers(0, most + 1, (len(hashes), 1)), axis=1)


def row_by_row(identity: np.ndarray, hashes: np.ndarray, bits: int) -> np.ndarray:
    every = np.unpackbits(hashes, axis=1).astype(np.float32)
    stands_for = np.arange(len(hashes))
    for row in range(1, len(hashes)):
        equal = np.flatnonzero(identity[:row] == identity[row])
        near = np.flatnonzero((np.abs(every[:row] - every[row]).sum(axis=1) <= bits) & (stands_for[:row] == np.arange(row)))
        stands_for[row] = stands_for[equal[0]] if len(equal) else near[0] if len(near) else row
    return stands_for


@pytest.mark.parametrize("bits", [0, 1, 12, 16, 17, 24, 31])
def test_duplicates_are_those_of_a_row_by_row_comparison(bits: int) -> None:
    chance = np.random.default_rng(bits)
    originals = chance.integers(0, 256, (900, HASH_BYTES), dtype=np.uint8)
    hashes = turned(originals[chance.integers(0, 900, 2600)], bits + 3, chance)  # chains and clusters around each original
    identity = chance.integers(0, 20_000, len(hashes))
    found = representatives(identity, hashes, bits)
    assert (found == row_by_row(identity, hashes, bits)).all()
    assert (found[found] == found).all() and (found < np.arange(len(hashes))).sum() > 100


def test_likeness_does_not_creep_along_a_chain() -> None:
    steps = np.zeros((40, 256), dtype=np.uint8)
    for row in range(40):
        steps[row, : 6 * row] = 1  # each 6 bits from the one before
    found = representatives(np.arange(40), np.packbits(steps, axis=1), 12)
    assert found.tolist() == [row - row % 3 for row in range(40)]


def test_a_hundred_thousand_copies_of_one_picture_cost_no_more_than_their_number() -> None:
    chance = np.random.default_rng(0)
    blank = np.zeros((100_000, HASH_BYTES), dtype=np.uint8)
    begin = time.perf_counter()
    assert (representatives(np.arange(100_000), blank, 12) == 0).all()
    near = turned(blank[:50_000], 5, chance)
    near[0] = 0
    assert (representatives(np.arange(50_000), near, 12) == 0).all()
    assert time.perf_counter() - begin < 10  # comparing each with each would take minutes


def test_a_distance_that_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="0 to 31"):
        representatives(np.arange(2), np.zeros((2, HASH_BYTES), dtype=np.uint8), 32)


# -- select ----------------------------------------------------------------------------------------
def rows(count: int, **given: list[Any]) -> pa.Table:
    chance = np.random.default_rng(0)
    text = ("paper_id", "parent_caption", "sha256", "kind", "language")
    types = {"phash": pa.binary(HASH_BYTES), "ink": pa.float32(), "sharpness": pa.float32(), "lossless": pa.bool_()}
    types |= dict.fromkeys(text, pa.string())
    values: dict[str, list[Any]] = {
        "paper_id": [f"2101.{n:05d}" for n in range(count)], "width": [900] * count, "height": [600] * count,
        "panels": [1] * count, "parent_caption": [""] * count, "sha256": [f"{n:064x}" for n in range(count)],
        "phash": [chance.bytes(HASH_BYTES) for _ in range(count)], "ink": [0.2] * count, "kind": ["plot"] * count,
        "sharpness": [0.9] * count, "lossless": [True] * count, "language": ["en"] * count,
        "caption_words": [20] * count, "caption_chars": [120] * count, **given,
    }  # fmt: skip
    return pa.table({name: pa.array(values[name], types.get(name, pa.int32())) for name in COLUMNS})


def test_nothing_to_select_from_is_no_error() -> None:
    chosen = select(rows(0), SETTINGS)
    assert len(chosen.keep) == 0 and all(step.came == step.dropped == 0 for step in chosen.steps)


def test_rows_of_many_small_files_are_decided_as_those_of_one() -> None:
    phash = [bytes([n % 50]) * HASH_BYTES for n in range(200)]
    whole = rows(200, phash=phash, caption_words=[n % 30 for n in range(200)])
    pieces = pa.concat_tables([whole.slice(start, 3) for start in range(0, 200, 3)])
    one, many = select(whole, SETTINGS), select(pieces, SETTINGS)
    for name in ("reason", "quality", "split", "same_as"):
        assert (getattr(one, name) == getattr(many, name)).all(), name
    assert 0 < one.keep.sum() < 60


def test_each_step_begins_with_what_the_one_before_left() -> None:
    chosen = select(rows(60, caption_words=[n % 6 for n in range(60)], kind=["plot", "photo", "table"] * 20), SETTINGS)
    left = 60
    for step in chosen.steps:
        assert step.came == left
        left -= step.dropped
    assert left == chosen.keep.sum() == sum(1 for n in range(60) if n % 6 >= 4 and n % 3 == 0)


def test_a_picture_in_two_papers_is_in_one_split_only() -> None:
    count = 400
    table = rows(count, phash=[bytes([n % 200]) * HASH_BYTES for n in range(count)])
    chosen = select(table, PrepareSettings(test_share=0.3, validation_share=0.3, near_duplicate_bits=0))
    assert chosen.keep[:200].all() and not chosen.keep[200:].any()  # the first by paper is kept, wherever it is
    assert set(chosen.split.tolist()) == set(range(len(SPLITS)))
    assert (chosen.same_as[200:] == np.arange(200)).all()


def test_a_picture_that_was_scaled_up_or_is_small_is_of_low_quality() -> None:
    table = rows(4, sharpness=[0.9, 0.4, 0.9, 0.9], width=[900, 900, 300, 500], height=[600, 600, 200, 400])
    assert [QUALITIES[n] for n in select(table, SETTINGS).quality] == ["high", "low", "low", "medium"]


def test_a_picture_counts_at_the_first_step_that_it_fails_and_then_stands_for_none() -> None:
    same = bytes(HASH_BYTES)
    table = rows(3, phash=[same] * 3, sha256=["a"] * 3, caption_words=[0, 20, 20], kind=["photo", "plot", "plot"])
    chosen = select(table, SETTINGS)
    assert [chosen.reasons[n].split(":")[0] for n in chosen.reason] == ["caption", "", "duplicate"]
    assert chosen.same_as.tolist() == [0, 1, 1]
