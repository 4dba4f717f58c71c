"""Which rows are encoded together: a function of the rows, less padding, and halves where a batch does not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from OpenSciDraw.encode.batches import ON_A_CPU, BatchSizes, by_length, fitting
from OpenSciDraw.figures.buckets import Bucket

CPU: Any = SimpleNamespace(device=torch.device("cpu"))


def test_captions_alike_in_length_come_together_and_each_once() -> None:
    lengths = [7 * number % 41 for number in range(150)]
    windows = list(by_length(lengths, 150, 4))
    assert [sorted(at for batch in window for at in batch) for window in windows] == [
        list(range(0, 64)), list(range(64, 128)), list(range(128, 150))
    ]  # fmt: skip
    padded = sum(len(batch) * max(lengths[at] for at in batch) for window in windows for batch in window)
    in_order = sum(len(lengths[at : at + 4]) * max(lengths[at : at + 4]) for at in range(0, 150, 4))
    assert padded < 1.1 * sum(lengths) < in_order
    assert list(by_length(lengths, 150, 4)) == windows


def test_captions_that_are_all_padded_alike_stay_in_their_order() -> None:
    assert list(by_length(None, 5, 2)) == [[[0, 1]], [[2, 3]], [[4]]]


def test_a_number_stays_and_auto_on_a_cpu_is_fixed() -> None:
    assert BatchSizes(3, CPU).of(Bucket(64, 64)) == BatchSizes(3, CPU).captions == 3
    assert BatchSizes("auto", CPU).of(Bucket(64, 64)) == BatchSizes("auto", CPU).captions == ON_A_CPU
    assert [fitting(count) for count in (0.4, 1, 3.9, 4, 9, 500)] == [1, 1, 2, 4, 8, 16]


def test_a_batch_that_does_not_fit_is_encoded_in_halves_which_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[int] = []

    def work(items: Any) -> list[int]:
        tried.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError
        return [10 * item for item in items]

    sizes = BatchSizes("auto", CPU)
    sizes.captions = 7
    done = list(sizes.whole_or_halves(work, list(range(7))))
    assert [item for items, _ in done for item in items] == list(range(7))
    assert [out for _, outs in done for out in outs] == [10 * item for item in range(7)]
    assert sizes.captions == 2 and len(caplog.records) == 2  # 7 -> 4 -> 2
    list(sizes.whole_or_halves(work, list(range(7))))
    assert len(caplog.records) == 2
    with pytest.raises(torch.OutOfMemoryError):
        list(BatchSizes(7, CPU).whole_or_halves(work, list(range(7))))
