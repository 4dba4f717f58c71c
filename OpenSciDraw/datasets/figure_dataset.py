"""FigureDataset: figures that are encoded while training, without a store."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from OpenSciDraw.datasets.arxiv_parquet import RowDataset
from OpenSciDraw.datasets.batch import Sample
from OpenSciDraw.datasets.buckets import best_bucket, fit
from OpenSciDraw.datasets.figures import FigureRef, RejectedFigure, list_figures, load_figure
from OpenSciDraw.errors import UserError
from OpenSciDraw.registry import DATASETS
from OpenSciDraw.store import Contract

_LOG = logging.getLogger("OpenSciDraw")


class FigureRows:
    """Rows of `encode.figures`' sources, decoded at each read. Raises UserError when none is usable."""

    contract: Contract | None = None  # nothing is encoded yet: the model of the config encodes it

    def __init__(self, figures: str, resolution: int):
        self.resolution = resolution
        refs, rejected = list_figures(figures)
        with ThreadPoolExecutor(8) as pool:  # sizes decide the buckets, so every figure is opened once
            sizes = list(tqdm(pool.map(self._size, refs), total=len(refs), desc="sizes", unit="figure"))
        usable = [(ref, size) for ref, size in zip(refs, sizes, strict=True) if size is not None]
        _LOG.info("%s: %d figures, %d rejected", figures, len(usable), len(rejected) + len(refs) - len(usable))
        if not usable:
            raise UserError(f"{figures}: no usable figure. `scienceflow encode` writes the reasons to rejected.jsonl.")
        self.refs = [ref for ref, _ in usable]
        self._buckets = np.array(
            [(b.height, b.width) for b in (best_bucket(w, h, resolution) for _, (w, h) in usable)], dtype=np.int32
        )

    @staticmethod
    def _size(ref: FigureRef) -> tuple[int, int] | None:
        try:
            return load_figure(ref).size
        except RejectedFigure as error:
            _LOG.warning("%s rejected: %s", ref.id, error)
            return None

    def __len__(self) -> int:
        return len(self.refs)

    def buckets(self) -> np.ndarray:
        return self._buckets

    def sample_id(self, row: int) -> str:
        return self.refs[row].id

    def ids(self) -> list[str]:
        return [ref.id for ref in self.refs]

    def sample(self, row: int) -> Sample:
        """Raises RejectedFigure (a ValueError) when the figure cannot be read any more."""
        ref = self.refs[row]
        image = load_figure(ref)
        fitted, _ = fit(image, best_bucket(image.width, image.height, self.resolution))
        pixels = torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)
        return Sample(ref.id, ref.caption, pixels=pixels.float() / 127.5 - 1.0)

    def empty_text(self) -> Tensor | None:
        return None


@DATASETS.register("FigureDataset")
class FigureDataset(RowDataset):
    """Figures of a folder, list or Parquet (as `encode.figures`), encoded online: needs no `scienceflow encode`.

    Slower at each step than a store and free of its disk space; use it for small sets and trials.
    """

    def __init__(self, *, figures: str, resolution: int, num_train_examples: int | None = None, stat_data: bool = False):
        super().__init__(FigureRows(figures, resolution), figures, num_train_examples, stat_data)
