"""One sampler over several sources, each with its share of the rows of an epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from OpenSciDraw.datasets.mix_scale_sampler import ArXiVMixScaleBatchSampler, epoch_keys
from OpenSciDraw.errors import UserError

_LOG = logging.getLogger("OpenSciDraw")
_SALT = 16  # of a source's passes, behind the salts of the base class


@dataclass(frozen=True)
class Quota:
    """A source: its name, and what it asks for: a `share` of all rows of an epoch, or so many `repeats` of its own."""

    name: str
    share: float | None
    repeats: float


class SourceSampler(ArXiVMixScaleBatchSampler):
    """As ArXiVMixScaleBatchSampler, where an epoch is so many rows of each source.

    A source is passed through again and again, each time in another order, keyed by (seed, source, pass); an epoch goes on in its
    pass where the one before ended. So all rows of a source come equally often over time, whatever its share, and what an epoch
    holds is a function of (seed, epoch). Within an epoch sources mix freely: a batch is of one bucket and of any source.

    Args:
        bucket_of, lengths, rows: as in the base class, of the rows that are trained on, source by source.
        source_of: (rows,) the source of each, 0 … S - 1.
        quotas: of each source, in this order.
        total: rows of the dataset. What is yielded is row + total x (pass - epoch): the dataset knows the pass by it.

    Raises:
        UserError: a source without rows, or as the base class.
    """

    def __init__(
        self, bucket_of: np.ndarray, *, source_of: np.ndarray, quotas: Sequence[Quota], total: int, rows: np.ndarray,
        lengths: np.ndarray | None = None, **options: Any,
    ):  # fmt: skip
        self.quotas, self.total, self._own = list(quotas), total, (bucket_of, source_of, rows, lengths)
        self.sizes = np.bincount(source_of, minlength=len(quotas)).tolist()
        for quota, size in zip(quotas, self.sizes, strict=True):
            if not size:
                raise UserError(f"The source {quota.name!r} has no row to train on. Leave it out, or lower held_out_examples.")
        self.per_epoch = rows_of_an_epoch(self.quotas, self.sizes)
        first = np.cumsum([0, *self.sizes])[:-1]
        self._copies = [math.ceil(c / n) + bool(c % n) for c, n in zip(self.per_epoch, self.sizes, strict=True)]
        spans = zip(first, self.sizes, self._copies, strict=True)
        at = np.concatenate([np.tile(np.arange(start, start + size), copies) for start, size, copies in spans])
        self._begins = np.cumsum([0, *(n * k for n, k in zip(self.sizes, self._copies, strict=True))])[:-1]
        super().__init__(bucket_of[at], rows=np.asarray(rows)[at], lengths=None if lengths is None else lengths[at], **options)

    def _first_pass(self, source: int) -> int:
        return self.epoch * self.per_epoch[source] // self.sizes[source]

    def _rows_of_epoch(self) -> np.ndarray:
        """Places of this epoch's rows among all rows and their further passes, sorted."""
        found = []
        for source, (count, size) in enumerate(zip(self.per_epoch, self.sizes, strict=True)):
            start, stop, first = self.epoch * count, (self.epoch + 1) * count, self._first_pass(source)
            for number in range(first, math.ceil(stop / size)):
                keys = epoch_keys(size, self.seed, number, _SALT + source)
                order = np.argsort(keys, kind="stable") if self.shuffle else np.arange(size)
                part = order[max(0, start - number * size) : min(size, stop - number * size)]
                found.append(self._begins[source] + (number - first) * size + part)
        return np.sort(np.concatenate(found))

    def _yielded(self, places: np.ndarray) -> list[int]:
        sources = np.searchsorted(self._begins, places, side="right") - 1
        sizes, first = np.array(self.sizes), np.array([self._first_pass(source) for source in range(len(self.sizes))])
        passes = first[sources] + (places - self._begins[sources]) // sizes[sources]
        return (self.rows[places] + self.total * (passes - self.epoch)).tolist()

    def _identity(self) -> dict[str, Any]:
        names = [quota.name for quota in self.quotas]
        return {**super()._identity(), "sources": [list(part) for part in zip(names, self.sizes, self.per_epoch, strict=True)]}

    def _twin(self, batch_size: int, num_replicas: int) -> SourceSampler:
        bucket_of, source_of, rows, lengths = self._own
        return SourceSampler(
            bucket_of, source_of=source_of, quotas=self.quotas, total=self.total, rows=rows, lengths=lengths, batch_size=batch_size,
            num_replicas=num_replicas, drop_last=self.drop_last, shuffle=self.shuffle, seed=self.seed,
        )  # fmt: skip

    def log_size(self) -> None:
        everything = sum(self.per_epoch)
        _LOG.info("%d rows an epoch of %d sources: %d batches a rank", everything, len(self.quotas), len(self))
        for quota, size, count in zip(self.quotas, self.sizes, self.per_epoch, strict=True):
            _LOG.info("  %s: %d of its %d rows an epoch (%.4g passes), %.2f %% of all", quota.name, count, size, count / size,
                      100 * count / everything)  # fmt: skip


def rows_of_an_epoch(quotas: Sequence[Quota], sizes: Sequence[int]) -> list[int]:
    """How many rows of each source an epoch has, at least one: with shares as many in all as there are, else `repeats` of each."""
    if quotas[0].share is None:
        return [max(1, round(quota.repeats * size)) for quota, size in zip(quotas, sizes, strict=True)]
    whole = sum(quota.share or 0 for quota in quotas)
    return [max(1, round((quota.share or 0) / whole * sum(sizes))) for quota in quotas]
