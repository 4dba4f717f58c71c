"""FigureDataset: figures that are encoded while training, without a store."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from OpenSciDraw.config import EncodeConfig
from OpenSciDraw.datasets.arxiv_parquet import RowDataset
from OpenSciDraw.datasets.batch import Sample
from OpenSciDraw.datasets.caption_choice import Turn, chosen_caption
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.fitting import Prepared, prepare, to_model_range
from OpenSciDraw.figures.listing import FigureRef, RejectedFigure, figures_of
from OpenSciDraw.registry import DATASETS
from OpenSciDraw.store.contract import Contract

_LOG = logging.getLogger("OpenSciDraw")


class FigureRows:
    """Rows of `encode.figures`' sources, decoded at each read. Raises UserError when none is usable."""

    contract: Contract | None = None  # nothing is encoded yet: the model of the config encodes it

    def __init__(self, encode: EncodeConfig):
        self.encode = encode
        refs, rejected = figures_of(encode)
        with ThreadPoolExecutor(8) as pool:  # sizes decide the buckets, so every figure is opened once
            opened = list(tqdm(pool.map(self._sizes, refs), total=len(refs), desc="sizes", unit="figure"))
        usable = [(ref, sizes) for ref, sizes in zip(refs, opened, strict=True) if sizes is not None]
        _LOG.info("%s: %d figures, %d rejected", encode.figures, len(usable), len(rejected) + len(refs) - len(usable))
        if not usable:
            raise UserError(f"{encode.figures}: no usable figure. `scienceflow encode` writes the reasons to rejected.jsonl.")
        self.refs = [ref for ref, _ in usable]
        self.is_described = any(ref.captions or ref.mask is not None or ref.weight != 1 for ref in self.refs)
        self._buckets = np.array([sizes[0] for _, sizes in usable], dtype=np.int32)
        known: dict[tuple[tuple[int, int], ...], int] = {}
        kinds = np.array([known.setdefault(sizes[1:], len(known)) for _, sizes in usable], dtype=np.int32)
        self.reference_sizes = kinds if any(ref.references for ref in self.refs) else None

    def _sizes(self, ref: FigureRef) -> tuple[tuple[int, int], ...] | None:
        """(height, width) of the figure's bucket and of those of its references."""
        try:
            item = prepare(ref, self.encode)
        except RejectedFigure as error:
            _LOG.warning("%s rejected: %s", ref.id, error)
            return None
        return tuple((part.bucket.height, part.bucket.width) for part in (item, *item.references))

    def __len__(self) -> int:
        return len(self.refs)

    def buckets(self) -> np.ndarray:
        return self._buckets

    def sample_id(self, row: int) -> str:
        return self.refs[row].id

    def ids(self) -> list[str]:
        return [ref.id for ref in self.refs]

    def sample(self, row: int) -> Sample:
        """A figure with its main caption. Raises RejectedFigure (a ValueError) when it cannot be read any more."""
        return self._sample(row, self.refs[row].caption)

    def sample_in(self, row: int, turn: Turn) -> Sample:
        ref = self.refs[row]
        return self._sample(row, ref.captions[chosen_caption(ref.caption_weights, turn, ref.id)] if ref.captions else ref.caption)

    def _sample(self, row: int, caption: str) -> Sample:
        item: Prepared = prepare(self.refs[row], self.encode)
        return Sample(
            item.ref.id, caption, pixels=to_model_range(item.pixels), mask=item.mask, weight=item.ref.weight,
            references=tuple(to_model_range(reference.pixels) for reference in item.references),
            edit_boxes=torch.tensor(item.edit_boxes) if item.edit_boxes else None,
        )  # fmt: skip

    def text_lengths(self) -> None:
        return None

    def empty_text(self) -> Tensor | None:
        return None


@DATASETS.register("FigureDataset")
class FigureDataset(RowDataset):
    """Figures of a folder, list or Parquet (as `encode.figures`), encoded online: needs no `scienceflow encode`.

    Slower at each step than a store and free of its disk space; use it for small sets and trials.
    """

    def __init__(self, *, encode: EncodeConfig, num_train_examples: int | None = None, stat_data: bool = False):
        rows = FigureRows(encode)
        super().__init__(rows, str(encode.figures), num_train_examples, stat_data, rows.reference_sizes)
