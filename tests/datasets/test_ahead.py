"""What data workers prepare, and checks that do not wait."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from OpenSciDraw import flow
from OpenSciDraw.datasets.ahead import BatchReader, Numbered
from OpenSciDraw.datasets.batch import Batch, Sample, collate
from OpenSciDraw.train_iteration_funcs.flow_matching import LossOutput
from OpenSciDraw.training.finite import FiniteCheck


class Rows:
    """Latents (16, 4, 6) of rows that are their own names."""

    def __len__(self) -> int:
        return 8

    def batch(self, indices: list[int], coming: object = ()) -> Batch:
        return collate([Sample(str(i), "", latents=torch.full((16, 4, 6), float(i)), text=torch.zeros(3, 2)) for i in indices])


def test_a_workers_noise_is_what_the_training_process_would_draw() -> None:
    order = Numbered([[0, 1], [2], [5, 7]])
    loader = torch.utils.data.DataLoader(BatchReader(Rows(), seed=3), batch_size=None, sampler=order, num_workers=2)
    order.first = 41  # a resumed run
    clean = torch.zeros(2, 64, 2, 3)
    for number, batch in enumerate(loader, 41):
        assert batch.micro_step == number
        here = clean[: len(batch.sample_ids)]
        given = flow.noise_of(batch.noise, 3, number, batch.sample_ids, here)
        assert torch.equal(given, flow.noise_of(None, 3, number, batch.sample_ids, here))
        assert torch.equal(given, flow.keyed_noise(3, number, batch.sample_ids, here.shape[1:]))


def test_pinning_a_batch_reaches_each_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.data_ptr()) or self)
    batch = BatchReader(Rows(), seed=0)[0, [1, 2], 0]
    moved = torch.utils.data._utils.pin_memory.pin_memory(batch)  # as DataLoader does
    assert set(pinned) == {t.data_ptr() for t in (batch.latents, batch.noise, *batch.text)}
    assert moved.sample_ids == ["1", "2"] and torch.equal(moved.latents, batch.latents)


def noted(check: FiniteCheck, value: float, step: int) -> None:
    output = LossOutput(torch.tensor(value), torch.tensor([value]), torch.tensor([0.25]))
    check.note("Loss", output.loss, output, collate([Sample("a", "")]), step)


def test_a_bad_loss_stops_at_once_on_a_cpu() -> None:
    check = FiniteCheck()
    noted(check, 1.0, 0)
    said = r"Loss is nan at step 1: stopped before the optimizer step.*a \(loss nan at sigma 0.250"
    with pytest.raises(FloatingPointError, match=said):
        noted(check, math.nan, 1)


def test_on_a_gpu_a_bad_loss_is_read_a_step_later_or_before_anything_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    event = SimpleNamespace(synchronize=lambda: waited.append(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=lambda: event))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    check = FiniteCheck()
    noted(check, math.inf, 4)
    assert not waited  # nobody waits for the step that runs
    with pytest.raises(FloatingPointError, match="inf at step 4: stopped a step later, before anything of it was saved"):
        noted(check, 1.0, 5)
    noted(check, math.nan, 6)
    with pytest.raises(FloatingPointError, match="nan at step 6"):
        check.settle()
