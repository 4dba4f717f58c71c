"""The old policy of training on rewards: an average of the weights over the rounds, which draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from OpenSciDraw.config import RewardConfig
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.parallel.ranks import evaluating
from OpenSciDraw.weights.average import WeightAverage


class OldPolicy(WeightAverage):
    """s <- d_i s + (1 - d_i) p after round i, d_i = min(old_decay_rate i, old_decay_max) (arXiv:2509.16117), in fp32.

    `model.as_old_policy()` is this policy from now on: its weights stand in the place of those that train, in eval mode.
    """

    def __init__(
        self, model: FigureModel, parameters: Mapping[str, nn.Parameter], settings: RewardConfig, accelerator: Accelerator
    ):
        super().__init__(parameters, settings.old_decay_max, every=1, start=0)
        self.rate, self.model, self.accelerator = settings.old_decay_rate, model, accelerator
        model.old_policy = self.in_place

    def decay_at(self, step: int) -> float:
        """d of round `step` (the first is 1)."""
        return min(self.rate * step, self.decay)

    @contextmanager
    def in_place(self) -> Iterator[Any]:
        own = self.model.transformer
        with evaluating(own, self.accelerator) as transformer, self.applied():
            self.model.transformer = transformer  # without DDP, whose collectives are for what trains
            try:
                yield transformer
            finally:
                self.model.transformer = own
                for module in transformer.modules():
                    if isinstance(module, FSDPModule):  # gathered parameters are the old policy's
                        module.reshard()
