"""Which of a figure's captions an epoch trains on: a function of (seed, epoch, figure), never of history."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

_GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2: its multiples modulo 1 are spread most evenly


class Turn(NamedTuple):
    """A pass over a figure's data: of which run, and which one."""

    seed: int
    epoch: int

    def later(self, passes: int) -> Turn:
        return Turn(self.seed, self.epoch + passes)


def chosen_caption(weights: Sequence[float], turn: Turn, sample_id: str) -> int:
    """The place of the caption that is trained on, among those with `weights` of sum 1.

    Each figure starts at a random place of [0, 1), keyed by (seed, figure), and moves on by the golden ratio's fraction every
    epoch (a Kronecker sequence). So over the epochs each caption comes as often as its weight says, sooner than by chance, and
    within an epoch the figures are independent of each other.
    """
    digest = hashlib.blake2b(repr(("caption", turn.seed, sample_id)).encode(), digest_size=8).digest()
    place = (int.from_bytes(digest, "little") / 2**64 + turn.epoch * _GOLDEN) % 1.0
    ends = list(accumulate(weights))
    return next((at for at, end in enumerate(ends) if place < end), len(ends) - 1)  # the sum may be a rounding below 1
