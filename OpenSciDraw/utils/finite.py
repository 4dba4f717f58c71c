"""Stop at a loss or gradient that is not finite, without making the device wait at every step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.train_iteration_funcs.flow_matching import LossOutput


@dataclass(frozen=True)
class _Noted:
    name: str
    value: Tensor
    finite: Tensor  # scalar in CPU memory
    copied: torch.cuda.Event | None  # when `finite` is there; None: now
    output: LossOutput
    batch: Batch
    step: int


class FiniteCheck:
    """Values are noted as they arise and read when they are on the CPU anyway.

    On a CPU that is at once, before the optimizer's step. On a GPU each is copied behind the step's own work and read a step later:
    a bad step may be taken, but nothing of it is saved, because `settle` reads what is left before each checkpoint and validation.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._noted: deque[_Noted] = deque()

    def note(self, name: str, value: Tensor, output: LossOutput, batch: Batch, step: int) -> None:
        """Check `value` (scalar) of this step, now or a step later.

        Raises:
            FloatingPointError: it, or one of an earlier step, is not finite; names the step and the rows.
        """
        finite, copied = torch.isfinite(value.detach()), None
        if self.device.type == "cuda":
            finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            copied = torch.cuda.current_stream(self.device).record_event()
        self._noted.append(_Noted(name, value, finite, copied, output, batch, step))
        while self._noted and (self._noted[0].copied is None or self._noted[0].step < step):
            self._read()

    def settle(self) -> None:
        """Read all that was noted. Raises FloatingPointError as `note` does."""
        while self._noted:
            self._read()

    def _read(self) -> None:
        noted = self._noted.popleft()
        if noted.copied is not None:
            noted.copied.synchronize()
        if noted.finite.item():
            return
        output, ids = noted.output, noted.batch.sample_ids
        levels = [""] * len(ids) if output.sigma is None else [f" at sigma {s:.3f}" for s in output.sigma.tolist()]
        losses = output.per_sample.tolist()
        rows = ", ".join(f"{sample} (loss {loss:.3g}{level})" for sample, loss, level in zip(ids, losses, levels, strict=True))
        when = "before the optimizer step" if noted.copied is None else "a step later, before anything of it was saved"
        raise FloatingPointError(
            f"{noted.name} is {noted.value.item()} at step {noted.step}: stopped {when}. Rows: {rows}. "
            "The last checkpoint is untouched. Look at these rows with `scienceflow verify`; if they are fine, "
            "lower learning_rate or use mixed_precision='bf16'."
        )
