"""A store folder: figures, the pictures that edits start from, and the embeddings of captions, joined."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from OpenSciDraw.errors import UserError
from OpenSciDraw.store.files import Folder, LocalFolder
from OpenSciDraw.store.shard import (
    FIGURE_PARTS,
    KEY_BYTES,
    MASK_CELL,
    TEXT_PARTS,
    instruction_key,
    text_key,
)
from OpenSciDraw.store.table import KEY_TYPE, StoreTable
from OpenSciDraw.utils.files import parse_json

EMPTY_PROMPT = ""


class EncodedStore:
    """A store folder: figures and, where `text` was stored, their captions' embeddings.

    Raises:
        UserError: as StoreTable; captions without embeddings.
    """

    def __init__(self, folder: Path | Folder, with_text: bool):
        place: Folder = LocalFolder(folder) if isinstance(folder, Path) else folder
        self.folder = place.name
        self.figures = StoreTable(place.files("figures"), FIGURE_PARTS)
        self.references: StoreTable | None = None
        if self.figures.has_edits:
            self.references = StoreTable(place.files("references"), FIGURE_PARTS)
            keys = self.references.take("key")
            what = "pictures that edits start from, in references/,"
            self._reference_rows, self._first_reference = self._join_keys("references", keys, what)
        self.text: StoreTable | None = None
        if with_text:
            if not place.has("text"):
                raise UserError(
                    f"{self.folder} holds latents only (it was encoded with text='online'). Set text = 'online', or encode "
                    "the captions too: text = 'stored' and `scienceflow encode`."
                )
            self.text = StoreTable(place.files("text"), TEXT_PARTS)
            self.text_row, self._unprompted_row = self._join()

    @staticmethod
    def is_store(folder: Path) -> bool:
        return (folder / "figures").is_dir()

    def _join(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows in the text table of each figure's caption, and of the empty prompt with the pictures that it edits, (rows,) int64.

        None where the text encoder does not read these pictures: then there is one empty prompt.
        """
        assert self.text is not None
        keys = self.text.take("key")
        order = np.argsort(keys)
        keys = keys[order]
        empty = np.array([text_key(EMPTY_PROMPT)], dtype=KEY_TYPE)
        self._empty_row = self._lookup(keys, order, empty, "embeddings of the empty prompt in text/")[0]
        rows = self._lookup(keys, order, self.figures.take("text_key"), "embeddings of captions in text/")
        if self.figures.is_described:
            unsorted = np.empty_like(keys)
            unsorted[order] = keys
            self._caption_rows, self._first_caption = self._join_keys("caption_keys", unsorted, "embeddings of captions in text/")
        if self.references is None or "pictures" not in self.text.contract.text:
            return rows, None
        of_each = (made_of for batch in self.figures.batches("references") for made_of in batch.to_pylist())
        wanted = np.array([instruction_key(EMPTY_PROMPT, made_of) for made_of in of_each], dtype=KEY_TYPE)
        return rows, self._lookup(keys, order, wanted, "embeddings of the empty prompt with pictures, in text/,")

    def _join_keys(self, column: str, keys: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the table with `keys` that a column of all figures names, one behind the other, and where those of each begin,
        (rows + 1,) int64."""
        order = np.argsort(keys)
        wanted = np.frombuffer(self.figures.bytes_of(column), dtype=KEY_TYPE)
        counts = self.figures.numbers(f"{column}_bytes") // KEY_BYTES
        first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return self._lookup(keys[order], order, wanted, what), first

    def captions(self, row: int) -> tuple[list[str], list[float]]:
        """All captions of a figure and their weights, of sum 1; nothing where it has one alone."""
        found = self.figures.value("captions", row) if self.figures.is_described else b""
        texts, weights = parse_json(found) if found else ([], [])
        return texts, weights

    def caption_text(self, row: int, at: int) -> Tensor:
        """(L, D) embedding of the caption `at` of a figure that has several."""
        assert self.text is not None
        return self.text.tensor(int(self._caption_rows[self._first_caption[row] + at]))

    def mask(self, row: int) -> Tensor | None:
        """Where a figure counts in the loss, (bucket_h / 8, bucket_w / 8) uint8; None: everywhere.

        Raises ValueError when the stored mask is not of that size.
        """
        found = self.figures.value("mask", row) if self.figures.is_described else b""
        if not found:
            return None
        height, width = (int(self.figures.numbers(name)[row]) // MASK_CELL for name in ("bucket_h", "bucket_w"))
        reader = zlib.decompressobj()
        cells = reader.decompress(found, height * width + 1)
        if len(cells) != height * width:
            raise ValueError(f"{self.folder}, row {row}: a mask that is not {height} x {width}")
        return torch.from_numpy(np.frombuffer(cells, np.uint8).reshape(height, width).copy())

    def weight(self, row: int) -> float:
        """How much a figure counts in the loss."""
        return float(self.figures.numbers("loss_weight")[row]) if self.figures.is_described else 1.0

    def references_of(self, row: int) -> list[int]:
        """Rows in `references` of the pictures that a figure was made from."""
        if self.references is None:
            return []
        return self._reference_rows[self._first_reference[row] : self._first_reference[row + 1]].tolist()

    def edit_boxes(self, row: int) -> Tensor | None:
        """(n, 4) boxes of an edit as fractions of the picture; None for what is none, or says nothing of its boxes."""
        found = self.figures.value("edit_boxes", row) if self.references is not None else b""
        return torch.from_numpy(np.frombuffer(found, np.float32).reshape(-1, 4).copy()) if found else None

    def reference_sizes(self) -> np.ndarray | None:
        """(rows,) a number that is the same for figures with references of equal sizes, and 0 without; None where none has any."""
        if self.references is None:
            return None
        shapes = np.unique(self.references.numbers("shape"), axis=0, return_inverse=True)[1].reshape(-1)[self._reference_rows]
        known: dict[bytes, int] = {}
        kinds, first = np.zeros(len(self.figures), dtype=np.int32), self._first_reference
        for row in np.flatnonzero(np.diff(first)).tolist():
            kinds[row] = known.setdefault(shapes[first[row] : first[row + 1]].tobytes(), len(known) + 1)
        return kinds

    def _lookup(self, keys: np.ndarray, rows: np.ndarray, wanted: np.ndarray, what: str) -> np.ndarray:
        """Of each `wanted` key its row; `keys` are sorted, `rows` are theirs."""
        order = np.argsort(wanted)  # searching in order finds its way in the processor's cache: ten times as fast
        place = np.searchsorted(keys, wanted[order]).clip(max=len(keys) - 1)
        missing = int((keys[place] != wanted[order]).sum())
        if missing:
            raise UserError(
                f"{self.folder}: {missing} {what} are missing. "
                "Run the same `scienceflow encode` command to finish it. If it has nothing left to do, rejected.jsonl says why it "
                "refused them: mend or remove these, and encode to a new folder."
            )
        found = np.empty_like(rows, shape=len(wanted))
        found[order] = rows[place]
        return found

    def unprompted(self, row: int) -> Tensor | None:
        """(L, D) of the empty prompt with the pictures that a figure was made from; None where that is the empty prompt alone."""
        if self.text is None or self._unprompted_row is None or not self.references_of(row):
            return None
        return self.text.tensor(int(self._unprompted_row[row]))

    def empty_text(self) -> Tensor:
        """(L, D) embedding of the empty prompt."""
        assert self.text is not None
        return self.text.tensor(int(self._empty_row))
