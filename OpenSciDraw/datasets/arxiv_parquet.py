"""ArXiVParquetDatasetV2 and its siblings: encoded figures, read for training."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from OpenSciDraw.datasets.batch import BadRow, Batch, Sample, collate
from OpenSciDraw.datasets.legacy import LegacyRows
from OpenSciDraw.errors import UserError
from OpenSciDraw.registry import DATASETS
from OpenSciDraw.store import Contract, EncodedStore

_LOG = logging.getLogger("OpenSciDraw")
_MAX_SUBSTITUTES = 16


class Rows(Protocol):
    """What a layout on disk must offer: sizes and ids at once, tensors one by one."""

    contract: Contract | None

    def __len__(self) -> int: ...
    def buckets(self) -> np.ndarray: ...
    def sample_id(self, row: int) -> str: ...
    def ids(self) -> list[str]: ...
    def sample(self, row: int) -> Sample: ...
    def empty_text(self) -> Tensor | None: ...
    def text_lengths(self) -> np.ndarray | None: ...


class StoreRows:
    """Rows of our own store (OpenSciDraw/store.py)."""

    def __init__(self, folder: Path, with_text: bool):
        self.store = EncodedStore(folder, with_text)
        if not (folder / "rejected.jsonl").exists():  # what `encode` writes last
            _LOG.warning(
                "%s: encoding was not finished: only the %d figures that are there are used. Run the same "
                "`scienceflow encode` command to finish it.", folder, len(self.store.figures)
            )  # fmt: skip
        latents = self.store.figures.contract
        text = self.store.text.contract.text if self.store.text is not None else {}
        self.contract: Contract | None = replace(latents, text=text)

    def __len__(self) -> int:
        return len(self.store.figures)

    def buckets(self) -> np.ndarray:
        figures = self.store.figures
        return np.stack([figures.numbers("bucket_h"), figures.numbers("bucket_w")], axis=1)

    def sample_id(self, row: int) -> str:
        return self.store.figures.value("id", row)

    def ids(self) -> list[str]:
        return self.store.figures.table.column("id").to_pylist()

    def sample(self, row: int) -> Sample:
        figures, text = self.store.figures, self.store.text
        return Sample(
            id=figures.value("id", row),
            caption=figures.value("caption", row),
            latents=figures.tensor(row),
            text=None if text is None else text.tensor(int(self.store.text_row[row])),
        )

    def empty_text(self) -> Tensor | None:
        return None if self.store.text is None else self.store.empty_text()

    def text_lengths(self) -> np.ndarray | None:
        return None if self.store.text is None else self.store.text.lengths()[self.store.text_row]


class RowDataset:
    """Rows with buckets, read by batches. `buckets` is (rows, 2) pixels (height, width).

    A row that cannot be read is replaced by the next readable one of its bucket, and is named in the batch's
    `bad`. Raises UserError when there is no row at all.
    """

    def __init__(self, rows: Rows, where: Path | str, num_train_examples: int | None, stat_data: bool):
        self.rows, self.where = rows, where
        self.buckets = self.rows.buckets()
        if num_train_examples is not None:
            self.buckets = self.buckets[:num_train_examples]
        if not len(self.buckets):
            raise UserError(f"{where}: the dataset has no rows. See rejected.jsonl there for the reasons.")
        self.bucket_of = np.unique(self.buckets, axis=0, return_inverse=True)[1].reshape(-1)
        self._is_held_out = np.zeros(len(self), dtype=bool)
        if stat_data:
            _LOG.info("%s", self.bucket_table())

    @property
    def contract(self) -> Contract | None:
        """How the rows were made; None for layouts that carry no contract."""
        return self.rows.contract

    def __len__(self) -> int:
        return len(self.buckets)

    def empty_text(self) -> Tensor | None:
        return self.rows.empty_text()

    def text_lengths(self) -> np.ndarray | None:
        """(rows,) tokens of each row's stored text; None where they are not known beforehand."""
        lengths = self.rows.text_lengths()
        return None if lengths is None else lengths[: len(self)]

    def bucket_table(self) -> str:
        """Rows per bucket, as text."""
        sizes, counts = np.unique(self.buckets, axis=0, return_counts=True)
        lines = [f"  {h:>5} x {w:<5} {n:>9}" for (h, w), n in zip(sizes.tolist(), counts.tolist(), strict=True)]
        return "\n".join(["height x width     rows", *lines])

    def held_out(self, count: int) -> np.ndarray:
        """`count` rows kept from training, (count,) sorted: those whose hashed ids are smallest, whatever their order.

        At most a tenth of the rows. From then on none of them stands in for a row that cannot be read.
        """
        if not count:
            return np.zeros(0, dtype=np.int64)
        ids = self.rows.ids()[: len(self)]
        keys = np.array([int.from_bytes(hashlib.blake2b(i.encode(), digest_size=8).digest(), "big") for i in ids])
        rows = np.sort(np.argsort(keys, kind="stable")[: min(count, len(self) // 10)])
        self._is_held_out[rows] = True
        return rows

    def read(self, row: int) -> Sample | BadRow:
        """One row, or why it cannot be read."""
        try:
            sample = self.rows.sample(row)
        except (OSError, ValueError, KeyError) as error:  # cut, damaged, missing files: npz and our store raise these
            return BadRow(self.rows.sample_id(row), f"{type(error).__name__}: {error}")
        return sample

    def __getitem__(self, row: int) -> Sample | BadRow:
        return self.read(row)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Read a batch; each bad row is replaced by the next readable row of its bucket.

        Where its bucket has none, the batch is shorter; a batch without any readable row becomes one row of
        another bucket, so that every rank has something to train on.

        Raises:
            UserError: too many rows after one another cannot be read.
        """
        rows: list[Sample | BadRow] = []
        taken = {*indices}
        for index in indices:
            rows.append(self.read(index))
            if isinstance(rows[-1], BadRow):
                same = self.bucket_of == self.bucket_of[index]
                rows += self._next_readable(same, index, taken)
        if not any(isinstance(row, Sample) for row in rows):
            rows += self._next_readable(np.ones(len(self), dtype=bool), indices[0], taken)
        if not any(isinstance(row, Sample) for row in rows):
            reasons = "; ".join(f"{row.id}: {row.reason}" for row in rows[:3] if isinstance(row, BadRow))
            raise UserError(
                f"{self.where}: {len(rows)} rows after one another cannot be read ({reasons}). "
                "Run `scienceflow verify` on the store."
            )
        return collate(rows)

    def _next_readable(self, among: np.ndarray, index: int, taken: set[int]) -> list[Sample | BadRow]:
        """The first readable row after `index` among those of the mask `among` (cyclic), behind those that were not.

        Rows that are tried are added to `taken` and not tried again. Held-out rows never replace others.
        """
        candidates = np.flatnonzero(among & (~self._is_held_out | self._is_held_out[index]))
        start = int(np.searchsorted(candidates, index, side="right"))
        tried: list[Sample | BadRow] = []
        for candidate in np.roll(candidates, -start)[:_MAX_SUBSTITUTES].tolist():
            if candidate in taken:
                continue
            taken.add(candidate)
            tried.append(self.read(candidate))
            if isinstance(tried[-1], Sample):
                break
        return tried


@DATASETS.register("ArXiVParquetDatasetV2", "ArXiVParquetDataset", "ArXiVParquetDatasetV3")
class ArXiVParquetDatasetV2(RowDataset):
    """Encoded figures under `<base_dir>/<parquet_base_path>`: our store, or the layouts V1, V2 and V3.

    The layout is recognised by its files, so the three names are one class.

    Raises:
        UserError: nothing there, or something that is no known layout.
    """

    def __init__(
        self, *, base_dir: str, parquet_base_path: str = "", num_train_examples: int | None = None,
        with_text: bool = True, stat_data: bool = False,
    ):  # fmt: skip
        folder = Path(base_dir).expanduser() / parquet_base_path
        if not folder.is_dir():
            raise UserError(
                f"dataset: no folder {folder} (base_dir / parquet_base_path). Run `scienceflow encode CONFIG.py` first, "
                "or correct the paths."
            )
        rows: Rows = StoreRows(folder, with_text) if EncodedStore.is_store(folder) else LegacyRows(folder)
        super().__init__(rows, folder, num_train_examples, stat_data)


class BatchReader(Dataset[Batch]):
    """Maps a batch's indices to the batch, in a data worker (DataLoader with batch_size=None)."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: Sequence[int]) -> Batch:  # type: ignore[override]
        return self.dataset.batch(indices)
