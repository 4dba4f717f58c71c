"""Values that the CPU reads later, so that no step waits for them; and the stop at a loss or gradient that is not finite."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.train_iteration_funcs.flow_matching import LossOutput


class Arriving:
    """A scalar's value at this point of the device's work, read without waiting for what is queued after it."""

    def __init__(self, value: Tensor):
        self.is_here = not value.is_cuda
        self._value = value
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            self._copied = torch.cuda.current_stream(value.device).record_event()

    def read(self) -> float:
        if not self.is_here:
            self._copied.synchronize()
        return float(self._value)


@dataclass(frozen=True)
class _Noted:
    name: str
    value: Tensor
    finite: Arriving
    output: LossOutput
    batch: Batch
    step: int


class FiniteCheck:
    """Values are noted as they arise and read when they are on the CPU anyway.

    On a CPU that is at once, before the optimizer's step. On a GPU each is copied behind the step's own work and read a step later:
    a bad step may be taken, but nothing of it is saved, because `settle` reads what is left before each checkpoint and validation.
    """

    def __init__(self) -> None:
        self._noted: deque[_Noted] = deque()

    def note(self, name: str, value: Tensor, output: LossOutput, batch: Batch, step: int) -> None:
        """Check `value` (scalar) of this step, now or a step later.

        Raises:
            FloatingPointError: it, or one of an earlier step, is not finite; names the step and the rows.
        """
        self._noted.append(_Noted(name, value, Arriving(torch.isfinite(value.detach())), output, batch, step))
        while self._noted and (self._noted[0].finite.is_here or self._noted[0].step < step):
            self._read()

    def settle(self) -> None:
        """Read all that was noted. Raises FloatingPointError as `note` does."""
        while self._noted:
            self._read()

    def _read(self) -> None:
        noted = self._noted.popleft()
        if noted.finite.read():
            return
        output, ids = noted.output, noted.batch.sample_ids
        levels = [""] * len(ids) if output.sigma is None else [f" at sigma {s:.3f}" for s in output.sigma.tolist()]
        losses = output.per_sample.tolist()
        rows = ", ".join(f"{sample} (loss {loss:.3g}{level})" for sample, loss, level in zip(ids, losses, levels, strict=True))
        when = "before the optimizer step" if noted.finite.is_here else "a step later, before anything of it was saved"
        raise FloatingPointError(
            f"{noted.name} is {noted.value.item()} at step {noted.step}: stopped {when}. Rows: {rows}. "
            "The last checkpoint is untouched. Look at these rows with `scienceflow verify`; if they are fine, "
            "lower learning_rate or use mixed_precision='bf16'."
        )
