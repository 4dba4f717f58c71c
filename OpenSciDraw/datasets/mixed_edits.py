"""ArXiVParquetDatasetV4: figures and edits of two folders in one data set, as published configs ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from OpenSciDraw.datasets.arxiv_parquet import RowDataset, StoreRows
from OpenSciDraw.datasets.batch import Sample
from OpenSciDraw.datasets.caption_choice import Turn
from OpenSciDraw.datasets.legacy import LegacyRows
from OpenSciDraw.errors import UserError
from OpenSciDraw.registry import DATASETS
from OpenSciDraw.store.contract import Contract
from OpenSciDraw.store.encoded import EncodedStore

_GRADES = {"high": ("high",), "high+medium": ("high", "medium"), "high_medium": ("high", "medium"), "all": ()}


class JoinedRows:
    """Rows of several sources, one behind the other.

    Raises UserError where both carry a contract and they differ.
    """

    def __init__(self, parts: list[StoreRows | LegacyRows]):
        self.parts = parts
        self._first = np.cumsum([0, *(len(part) for part in parts)])
        contracts = [part.contract for part in parts if part.contract is not None]
        for other in contracts[1:]:
            contracts[0].require(other, ("latents", "text"), "the second of the joined folders")
        self.contract: Contract | None = contracts[0] if contracts else None

    def __len__(self) -> int:
        return int(self._first[-1])

    def _place(self, row: int) -> tuple[int, int]:
        """The number of the part that a row is in, and its own number there."""
        part = int(np.searchsorted(self._first, row, side="right")) - 1
        return part, row - int(self._first[part])

    def _at(self, row: int) -> tuple[StoreRows | LegacyRows, int]:
        part, own = self._place(row)
        return self.parts[part], own

    def buckets(self) -> np.ndarray:
        return np.concatenate([part.buckets() for part in self.parts])

    def reference_sizes(self) -> np.ndarray:
        """(rows,) a number that is the same for rows whose references are of one number and size, 0 for those without."""
        found, most = [], 0
        for part in self.parts:
            sizes = part.store.reference_sizes() if isinstance(part, StoreRows) else part.reference_sizes()
            found.append(np.zeros(len(part), np.int32) if sizes is None else np.where(sizes > 0, sizes + most, 0))
            most = int(found[-1].max(initial=most))
        return np.concatenate(found)

    def sample_id(self, row: int) -> str:
        part, own = self._at(row)
        return part.sample_id(own)

    def ids(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.ids()

    def sample(self, row: int) -> Sample:
        part, own = self._at(row)
        return part.sample(own)

    @property
    def is_described(self) -> bool:
        return any(isinstance(part, StoreRows) and part.is_described for part in self.parts)

    def sample_in(self, row: int, turn: Turn) -> Sample:
        part, own = self._at(row)
        return part.sample_in(own, turn) if isinstance(part, StoreRows) else part.sample(own)

    def empty_text(self) -> Tensor | None:
        return next((text for part in self.parts if (text := part.empty_text()) is not None), None)

    def text_lengths(self) -> np.ndarray | None:
        lengths = [part.text_lengths() for part in self.parts]
        return None if any(part is None for part in lengths) else np.concatenate([part for part in lengths if part is not None])


@DATASETS.register("ArXiVParquetDatasetV4")
class ArXiVParquetDatasetV4(RowDataset):
    """Figures under `<base_dir>/<gen_parquet_path>` and edits under `<base_dir>/<edit_parquet_path>`; one of them may be None.

    Each is a store of ours or an older layout (V3, and V4 for edits). `quality_filter` ('high', 'high+medium', 'all') keeps
    figures of these quality grades; edits have none. A batch is of figures or of edits; gen_loss_weight and edit_loss_weight
    scale their losses.

    Raises:
        UserError: no such folder, none given, or something that is no known layout.
    """

    def __init__(
        self, *, base_dir: str, gen_parquet_path: str | None = None, edit_parquet_path: str | None = None,
        quality_filter: str | None = None, num_train_examples: int | None = None, with_text: bool = True, stat_data: bool = False,
    ):  # fmt: skip
        grades = {gen_parquet_path: _GRADES[quality_filter or "all"]}
        folders = {path: Path(base_dir).expanduser() / path for path in (gen_parquet_path, edit_parquet_path) if path is not None}
        if not folders:
            raise UserError("ArXiVParquetDatasetV4 needs dataset.gen_parquet_path, dataset.edit_parquet_path, or both.")
        parts: list[StoreRows | LegacyRows] = []
        for path, folder in folders.items():
            if not folder.is_dir():
                raise UserError(f"dataset: no folder {folder}. Correct base_dir, gen_parquet_path and edit_parquet_path.")
            if EncodedStore.is_store(folder):
                parts.append(StoreRows(folder, with_text))
            else:
                parts.append(LegacyRows(folder, grades.get(path, ())))
        rows = JoinedRows(parts)
        sizes = rows.reference_sizes()
        alike = sizes if sizes.any() else None
        super().__init__(rows, ", ".join(map(str, folders.values())), num_train_examples, stat_data, alike)
