"""MixedSources: several stores in one data set, each with its share, its weight in the loss, and what it is for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from OpenSciDraw.config import SourceConfig
from OpenSciDraw.datasets.arxiv_parquet import RowDataset, StoreRows
from OpenSciDraw.datasets.batch import Sample
from OpenSciDraw.datasets.caption_choice import Turn
from OpenSciDraw.datasets.legacy import LegacyRows
from OpenSciDraw.datasets.mixed_edits import JoinedRows
from OpenSciDraw.datasets.source_sampler import Quota, SourceSampler
from OpenSciDraw.errors import UserError
from OpenSciDraw.registry import DATASETS
from OpenSciDraw.store.encoded import EncodedStore


class SourceRows(JoinedRows):
    """Rows of several sources, one behind the other. The id of a row is 'source/id', so that ids of two sources never meet."""

    is_described = True

    def __init__(self, parts: list[StoreRows | LegacyRows], sources: Sequence[SourceConfig]):
        super().__init__(parts)
        self.sources = list(sources)

    def source_of(self) -> np.ndarray:
        """(rows,) number of each row's source."""
        return np.repeat(np.arange(len(self.parts)), [len(part) for part in self.parts])

    def sample_id(self, row: int) -> str:
        at, own = self._place(row)
        return f"{self.sources[at].label}/{self.parts[at].sample_id(own)}"

    def ids(self) -> Iterator[str]:
        for source, part in zip(self.sources, self.parts, strict=True):
            for name in part.ids():
                yield f"{source.label}/{name}"

    def sample(self, row: int) -> Sample:
        return self._of_source(row, super().sample(row))

    def sample_in(self, row: int, turn: Turn) -> Sample:
        return self._of_source(row, super().sample_in(row, turn))

    def _of_source(self, row: int, sample: Sample) -> Sample:
        at = self._place(row)[0]
        source = self.sources[at]
        return replace(
            sample, id=self.sample_id(row), weight=sample.weight * source.weight, source=at, keeps_base=source.keep_base
        )


@DATASETS.register("MixedSources")
class MixedSources(RowDataset):
    """The stores (or older layouts) of `dataset.sources`, whose paths start at `base_dir`.

    Raises:
        UserError: no such folder, something that is no known layout, sources that were encoded in different ways.
    """

    def __init__(
        self, *, base_dir: str, sources: Sequence[SourceConfig], num_train_examples: int | None = None, with_text: bool = True,
        stat_data: bool = False,
    ):  # fmt: skip
        parts: list[StoreRows | LegacyRows] = []
        for source in sources:
            folder = Path(base_dir).expanduser() / Path(source.path).expanduser()
            if not folder.is_dir():
                raise UserError(f"dataset.sources: no folder {folder} (base_dir / path). Encode it first, or correct the path.")
            parts.append(StoreRows(folder, with_text) if EncodedStore.is_store(folder) else LegacyRows(folder))
        rows = SourceRows(parts, sources)
        sizes = rows.reference_sizes()
        where = ", ".join(source.label for source in sources)
        super().__init__(rows, where, num_train_examples, stat_data, sizes if sizes.any() else None)
        self.sources = list(sources)
        self._source_of = rows.source_of()

    def sampler(self, bucket_of: np.ndarray, *, rows: np.ndarray, **options: Any) -> SourceSampler:
        """Of the dataset's `rows`, as a sampler is made of them; each source with its quota."""
        quotas = [Quota(source.label, source.share, source.repeats) for source in self.sources]
        return SourceSampler(
            bucket_of, source_of=self._source_of[rows], quotas=quotas, total=len(self), rows=rows, **options
        )
