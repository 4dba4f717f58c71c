"""ArXiVParquetDatasetV2 and its siblings: encoded figures, read for training."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from OpenSciDraw.datasets.batch import BadRow, Batch, Sample, collate
from OpenSciDraw.datasets.caption_choice import Turn, chosen_caption
from OpenSciDraw.datasets.legacy import LegacyRows
from OpenSciDraw.errors import UserError
from OpenSciDraw.registry import DATASETS
from OpenSciDraw.store.contract import Contract
from OpenSciDraw.store.encoded import EncodedStore
from OpenSciDraw.store.files import Folder, LocalFolder
from OpenSciDraw.store.remote_files import RemoteFolder
from OpenSciDraw.utils.files import is_remote

_LOG = logging.getLogger("OpenSciDraw")
_MAX_SUBSTITUTES = 16


class Rows(Protocol):
    """What a layout on disk must offer: sizes and ids at once, tensors one by one."""

    contract: Contract | None

    def __len__(self) -> int: ...
    def buckets(self) -> np.ndarray: ...
    def sample_id(self, row: int) -> str: ...
    def ids(self) -> Iterable[str]: ...
    def sample(self, row: int) -> Sample: ...
    def empty_text(self) -> Tensor | None: ...
    def text_lengths(self) -> np.ndarray | None: ...


@runtime_checkable
class DescribedRows(Rows, Protocol):
    """Rows of which more may be said than one caption."""

    is_described: bool

    def sample_in(self, row: int, turn: Turn) -> Sample:
        """As `sample`, with the caption of that turn."""
        ...


class StoreRows:
    """Rows of our own store (OpenSciDraw/store/table.py)."""

    def __init__(self, folder: Path | Folder, with_text: bool):
        folder = LocalFolder(folder) if isinstance(folder, Path) else folder
        self.store = EncodedStore(folder, with_text)
        if not folder.has("rejected.jsonl"):  # what `encode` writes last
            _LOG.warning(
                "%s: encoding was not finished: only the %d figures that are there are used. Run the same "
                "`scienceflow encode` command to finish it.", folder.name, len(self.store.figures)
            )  # fmt: skip
        latents = self.store.figures.contract
        text = self.store.text.contract.text if self.store.text is not None else {}
        self.contract: Contract | None = replace(latents, text=text)
        self.is_described = self.store.figures.is_described

    def __len__(self) -> int:
        return len(self.store.figures)

    def buckets(self) -> np.ndarray:
        figures = self.store.figures
        return np.stack([figures.numbers("bucket_h"), figures.numbers("bucket_w")], axis=1)

    def sample_id(self, row: int) -> str:
        return self.store.figures.value("id", row)

    def ids(self) -> Iterator[str]:
        """One shard's at a time are in memory."""
        for column in self.store.figures.batches("id"):
            yield from column.to_pylist()

    def will_need(self, rows: Sequence[int]) -> None:
        """These are read next: begin to fetch them."""
        self.store.figures.will_need(rows)
        if self.store.text is not None:
            self.store.text.will_need(self.store.text_row[list(rows)].tolist())
        if self.store.references is not None:
            self.store.references.will_need([at for row in rows for at in self.store.references_of(row)])

    def sample(self, row: int) -> Sample:
        """A figure with its main caption."""
        text = self.store.text
        return self._sample(
            row, self.store.figures.value("caption", row), None if text is None else text.tensor(int(self.store.text_row[row]))
        )

    def sample_in(self, row: int, turn: Turn) -> Sample:
        captions, weights = self.store.captions(row)
        if not captions:
            return self.sample(row)
        at = chosen_caption(weights, turn, self.sample_id(row))
        return self._sample(row, captions[at], None if self.store.text is None else self.store.caption_text(row, at))

    def _sample(self, row: int, caption: str, text: Tensor | None) -> Sample:
        figures, references = self.store.figures, self.store.references
        made_of = [] if references is None else [references.tensor(at) for at in self.store.references_of(row)]
        return Sample(
            id=figures.value("id", row),
            caption=caption,
            latents=figures.tensor(row),
            text=text,
            references=tuple(made_of),
            edit_boxes=self.store.edit_boxes(row),
            unprompted=self.store.unprompted(row),
            mask=self.store.mask(row),
            weight=self.store.weight(row),
        )

    def empty_text(self) -> Tensor | None:
        return None if self.store.text is None else self.store.empty_text()

    def text_lengths(self) -> np.ndarray | None:
        return None if self.store.text is None else self.store.text.lengths()[self.store.text_row]


class RowDataset:
    """Rows with buckets, read by batches. `buckets` is (rows, 2) pixels (height, width).

    `alike` (rows,) int, where given: only rows of one number may be in one batch (edits: references of the same sizes).

    A row that cannot be read is replaced by the next readable one of its bucket, and is named in the batch's
    `bad`. Raises UserError when there is no row at all.

    `left_out`: what was there and is not a row, with the reason; the run lists it.
    """

    left_out: Sequence[BadRow] = ()

    def __init__(
        self, rows: Rows, where: Path | str, num_train_examples: int | None, stat_data: bool, alike: np.ndarray | None = None
    ):
        self.rows, self.where = rows, where
        self.buckets = self.rows.buckets()
        if num_train_examples is not None:
            self.buckets = self.buckets[:num_train_examples]
        if not len(self.buckets):
            raise UserError(f"{where}: the dataset has no rows. See rejected.jsonl there for the reasons.")
        sides = self.buckets.astype(np.int64)
        self.bucket_of = np.unique(sides[:, 0] << 32 | sides[:, 1], return_inverse=True)[1].reshape(-1).astype(np.int32)
        self.has_edits = alike is not None
        if alike is not None:
            kinds = self.bucket_of.astype(np.int64) << 32 | alike[: len(self.buckets)]
            self.bucket_of = np.unique(kinds, return_inverse=True)[1].reshape(-1).astype(np.int32)
        self._is_held_out = np.zeros(len(self), dtype=bool)
        self._announced: set[int] = set()
        if stat_data:
            _LOG.info("%s", self.bucket_table())

    @property
    def contract(self) -> Contract | None:
        """How the rows were made; None for layouts that carry no contract."""
        return self.rows.contract

    @property
    def is_described(self) -> bool:
        """Whether more is said of some rows than one caption: several captions, a mask, a weight."""
        return isinstance(self.rows, DescribedRows) and self.rows.is_described

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
        ids = itertools.islice(self.rows.ids(), len(self))
        keys = np.frombuffer(b"".join(hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids), dtype=">u8")
        rows = np.sort(np.argsort(keys, kind="stable")[: min(count, len(self) // 10)])
        self._is_held_out[rows] = True
        return rows

    def read(self, row: int, turn: Turn | None = None) -> Sample | BadRow:
        """One row, or why it cannot be read; without a `turn` with its main caption."""
        try:
            if turn is not None and isinstance(self.rows, DescribedRows) and self.rows.is_described:
                return self.rows.sample_in(row, turn)
            sample = self.rows.sample(row)
        except (OSError, ValueError, KeyError) as error:  # cut, damaged, missing files: npz and our store raise these
            return BadRow(self.rows.sample_id(row), f"{type(error).__name__}: {error}")
        return sample

    def __getitem__(self, row: int) -> Sample | BadRow:
        return self.read(row)

    def _announce(self, rows: Sequence[int]) -> None:
        """Rows that are read next, in this order, are fetched side by side; each is asked for once."""
        if isinstance(self.rows, StoreRows):
            self.rows.will_need([row for row in rows if row not in self._announced])
            self._announced = set(rows)

    def batch(self, indices: Sequence[int], coming: Sequence[int] = (), turn: Turn | None = None) -> Batch:
        """Read a batch; each bad row is replaced by the next readable row of its bucket.

        Where its bucket has none, the batch is shorter; a batch without any readable row becomes one row of
        another bucket, so that every rank has something to train on. The rows `coming`, of which this process's
        next batches will be, are fetched meanwhile. Of several captions of a figure `turn` chooses one.

        Raises:
            UserError: too many rows after one another cannot be read.
        """
        size = len(self)  # a number of more than one pass over the rows says which pass it is of: source_sampler.py
        turns = [None if turn is None else turn.later(index // size) for index in indices]
        indices = [index % size for index in indices]
        self._announce([*indices, *(index % size for index in coming)])
        rows: list[Sample | BadRow] = []
        taken = {*indices}
        for index, own in zip(indices, turns, strict=True):
            rows.append(self.read(index, own))
            if isinstance(rows[-1], BadRow):
                same = self.bucket_of == self.bucket_of[index]
                rows += self._next_readable(same, index, taken, own)
        if not any(isinstance(row, Sample) for row in rows):
            rows += self._next_readable(np.ones(len(self), dtype=bool), indices[0], taken, turn)
        if not any(isinstance(row, Sample) for row in rows):
            reasons = "; ".join(f"{row.id}: {row.reason}" for row in rows[:3] if isinstance(row, BadRow))
            raise UserError(
                f"{self.where}: {len(rows)} rows after one another cannot be read ({reasons}). "
                "Run `scienceflow verify` on the store."
            )
        return collate(rows)

    def _next_readable(self, among: np.ndarray, index: int, taken: set[int], turn: Turn | None) -> list[Sample | BadRow]:
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
            tried.append(self.read(candidate, turn))
            if isinstance(tried[-1], Sample):
                break
        return tried


@DATASETS.register("ArXiVParquetDatasetV2", "ArXiVParquetDataset", "ArXiVParquetDatasetV3")
class ArXiVParquetDatasetV2(RowDataset):
    """Encoded figures under `<base_dir>/<parquet_base_path>`: our store, or the layouts V1, V2 and V3.

    The layout is recognised by its files, so the three names are one class. A store may lie in cloud storage (abfs://,
    s3://, gs://, hf://); `cache_dir` (None: the user's cache) then holds its indices, and rows of up to `cache_gb`.

    Raises:
        UserError: nothing there, or something that is no known layout.
    """

    def __init__(
        self, *, base_dir: str, parquet_base_path: str = "", num_train_examples: int | None = None,
        with_text: bool = True, stat_data: bool = False, cache_dir: str | None = None, cache_gb: float = 50.0,
    ):  # fmt: skip
        if is_remote(base_dir):
            remote = RemoteFolder(f"{base_dir.rstrip('/')}/{parquet_base_path}", cache_dir, int(cache_gb * 1e9))
            remote_rows = StoreRows(remote, with_text)
            super().__init__(remote_rows, remote.name, num_train_examples, stat_data, remote_rows.store.reference_sizes())
            return
        folder = Path(base_dir).expanduser() / parquet_base_path
        if not folder.is_dir():
            raise UserError(
                f"dataset: no folder {folder} (base_dir / parquet_base_path). Run `scienceflow encode CONFIG.py` first, "
                "or correct the paths."
            )
        if EncodedStore.is_store(folder):
            rows = StoreRows(folder, with_text)
            super().__init__(rows, folder, num_train_examples, stat_data, rows.store.reference_sizes())
        else:
            legacy = LegacyRows(folder)
            super().__init__(legacy, folder, num_train_examples, stat_data, legacy.reference_sizes())
