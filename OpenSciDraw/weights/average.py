"""An average of the trained weights over the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from OpenSciDraw.parallel.sharding import like, local


class WeightAverage:
    """Exponential moving average in fp32: s <- d_n s + (1 - d_n) p after each optimizer step n.

    d_n = min(decay, (1 + n) / (10 + n)), n counted from `start` (`ema_update_after_step`), so that the first steps do
    not stay in the average for ever (the ramp of diffusers' EMAModel); before it, s is p. With `every` > 1 one update
    stands for `every` steps, with the product of their d_n. Dealt parameters (FSDP2) are averaged where they lie.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, every: int, start: int):
        self.parameters = dict(parameters)
        self.decay, self.every, self.start = decay, every, start
        self._average = {name: local(p).float().clone() for name, p in self.parameters.items()}

    def decay_at(self, step: int) -> float:
        """d of optimizer step `step` (the first is 1)."""
        n = step - self.start
        return 0.0 if n <= 0 else min(self.decay, (1 + n) / (10 + n))

    def _current(self) -> list[Tensor]:
        return [local(p) for p in self.parameters.values()]  # anew each time: FSDP2 may move its memory

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`; does something at every `every`-th."""
        if step % self.every:
            return
        keep = 1.0
        for n in range(step - self.every + 1, step + 1):
            keep *= self.decay_at(n)
        averages = list(self._average.values())
        current = [p.float() for p in self._current()]  # no copy where they are fp32
        torch._foreach_lerp_(averages, current, 1 - keep)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name, dealt as the parameters are."""
        return {name: like(average, self.parameters[name]) for name, average in self._average.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in place of the weights; afterwards these are back, to the bit."""
        own = [p.clone() for p in self._current()]
        with torch.no_grad():
            torch._foreach_copy_(self._current(), list(self._average.values()))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._current(), own)
