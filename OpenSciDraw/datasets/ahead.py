"""What the data workers do before a batch is asked for: they read it, and draw its noise."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset, Sampler

from OpenSciDraw import flow
from OpenSciDraw.datasets.arxiv_parquet import RowDataset
from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.datasets.caption_choice import Turn

Rows = Sequence[int] | tuple[list[int], list[int]]  # a batch, alone or with the rows that are read after it


class Numbered(Sampler[tuple[int, Any, int]]):
    """The sampler's batches, each with the micro-step that it will be, and the epoch.

    `first` is the micro-step of the next batch when iteration starts, `epoch` that of all batches until it ends.
    """

    def __init__(self, sampler: Any):
        self.sampler, self.first, self.epoch = sampler, 0, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, Any, int]]:
        epoch = self.epoch
        return ((number, rows, epoch) for number, rows in enumerate(self.sampler, self.first))


class BatchReader(Dataset[Batch]):
    """Maps a numbered batch of indices to the batch: DataLoader with batch_size=None.

    Noise is half a million normals for a figure of 1024 px; it is a function of (seed, micro-step, sample), so who draws it
    changes nothing. Batches of pixels leave it to the training process, which knows the latents' shape.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, Rows, int]) -> Batch:
        micro_step, rows, epoch = item
        turn = {"turn": Turn(self.seed, epoch)} if isinstance(self.dataset, RowDataset) else {}  # others have one caption a row
        batch: Batch = self.dataset.batch(*rows, **turn) if isinstance(rows, tuple) else self.dataset.batch(rows, **turn)
        if batch.latents is None:
            return batch
        noise = flow.keyed_noise(self.seed, micro_step, batch.sample_ids, (batch.latents[0].numel(),))
        return replace(batch, noise=noise, micro_step=micro_step)


class ReadAhead(Sampler[tuple[list[int], list[int]]]):
    """The sampler's batches, each with the rows of the next `batches` ones that the same data worker is going to read.

    (DataLoader deals batches to its `workers` in turn.)
    """

    def __init__(self, sampler: Any, workers: int, batches: int):
        self.sampler, self.stride, self.batches = sampler, max(1, workers), batches

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[list[int], list[int]]]:
        source = iter(self.sampler)
        queue = deque(itertools.islice(source, self.stride * self.batches + 1))
        while queue:
            coming = itertools.islice(queue, self.stride, None, self.stride)
            yield queue[0], [row for batch in coming for row in batch]
            queue.popleft()
            queue.extend(itertools.islice(source, 1))
