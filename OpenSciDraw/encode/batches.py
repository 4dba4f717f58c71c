"""Which rows are encoded together: a function of the rows and the card, since what is in a batch decides the last bits."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import torch

from OpenSciDraw.figures.buckets import Bucket
from OpenSciDraw.models.base import FigureModel

_LOG = logging.getLogger("OpenSciDraw")
T = TypeVar("T")
Out = TypeVar("Out")
ON_A_CPU = 4
MOST_FIGURES, MOST_CAPTIONS = 16, 16  # at 1024 px and at 512 tokens a GPU has long enough to do: 8,192 tokens
_SHARE = 0.5  # of the card's memory that the model leaves: the allocator's pieces and other programs need some
_WINDOW = 64  # captions that are sorted by length, and wait in CPU memory: 0.2 GB of the longest of Qwen-Image


class BatchSizes:
    """encode.batch_size: the number that was asked for, or for "auto" what the device holds.

    On a GPU "auto" encodes one figure of each bucket and counts its memory. The size is a power of two, reckoned from the card's
    whole memory rather than what is free at the moment, so that the next run makes the same batches. Where others have the
    memory, and a batch does not fit, it is encoded in halves, which is said once.
    """

    def __init__(self, asked: int | Literal["auto"], model: FigureModel):
        self._model, self._asked = model, asked
        self._may_halve = asked == "auto"
        self._known: dict[Bucket, int] = {}
        self._most = MOST_FIGURES
        self.captions = (MOST_CAPTIONS if model.device.type == "cuda" else ON_A_CPU) if asked == "auto" else asked

    def of(self, bucket: Bucket) -> int:
        """Figures of this bucket in a batch."""
        if self._asked != "auto":
            return self._asked
        if self._model.device.type != "cuda":
            return ON_A_CPU
        if bucket not in self._known:
            self._known[bucket] = self._measured(bucket)
        return min(self._known[bucket], self._most)

    def _measured(self, bucket: Bucket) -> int:
        device = self._model.device
        blank = torch.zeros(1, 3, bucket.height, bucket.width, device=device)
        self._model.encode_images(blank)  # the first time libraries take memory of their own
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self._model.encode_images(blank)
        each = max(1, torch.cuda.max_memory_allocated(device) - before)
        return fitting(_SHARE * (torch.cuda.get_device_properties(device).total_memory - before) / each)

    def whole_or_halves(self, work: Callable[[Sequence[T]], Out], items: Sequence[T]) -> Iterator[tuple[Sequence[T], Out]]:
        """(items, `work` of them), of all at once; with "auto" of halves where a GPU's memory does not hold them."""
        try:
            out = work(items)
        except torch.OutOfMemoryError:
            if not self._may_halve or len(items) == 1:
                raise
        else:
            yield items, out
            return
        half = (len(items) + 1) // 2
        if half < min(self._most, self.captions):
            _LOG.warning("a batch of %d does not fit into the GPU's memory: encoding %d at once", len(items), half)
            self._most = self.captions = half
        gc.collect()  # frames of the failed call hold tensors
        torch.cuda.empty_cache()
        for part in (items[:half], items[half:]):
            yield from self.whole_or_halves(work, part)


def fitting(count: float) -> int:
    """The largest power of two that is at most `count` and MOST_FIGURES; 1 where not even one seems to fit."""
    size = 1
    while 2 * size <= min(count, MOST_FIGURES):
        size *= 2
    return size


def by_length(lengths: Sequence[int] | None, count: int, size: int) -> Iterator[list[list[int]]]:
    """Positions 0 … count - 1 in windows, each of batches of at most `size`: neighbours in length together.

    Windows follow each other, so that what is encoded in one can be put back into its order; without `lengths` each is one batch.
    """
    window = size if lengths is None else max(size, _WINDOW)
    for start in range(0, count, window):
        order = list(range(start, min(start + window, count)))
        if lengths is not None:
            order.sort(key=lambda at: (lengths[at], at))
        yield [order[at : at + size] for at in range(0, len(order), size)]
