"""Pictures with scores, as published for M-DPO: rows of Parquet files, their latents and text in npz files beside."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from OpenSciDraw.datasets.batch import AXES, Sample
from OpenSciDraw.datasets.npz_files import TEXT, latents_of, read_npz, require_numbers, text_of
from OpenSciDraw.errors import UserError
from OpenSciDraw.store.contract import Contract

SCORES = tuple(f"{axis}_score" for axis in AXES)
NEEDED = ("group_id", "caption", "cache_path", "bucket_h", "bucket_w", "reward", *SCORES)
_TEXT_PATH = "text_cache_path"  # of an npz with the text alone; where there is none, it lies with the latents
_LATENTS = {"mode": ("latents",), "posterior": ("vae_h",)}


class ScoredRows:
    """Rows of `<folder>/**/*.parquet` with the columns NEEDED; `cache_path` and `text_cache_path` start from the folder.

    Absolute paths, as published rows have them, must lie below `root`, after `remapping` has replaced their beginnings.

    Other columns (aspect_ratio, shard) are not read. A row without a group_id is of no prompt and is left out (`nameless` counts
    them).

    Raises:
        UserError: no Parquet file, unreadable ones, or columns that are missing.
    """

    contract: Contract | None = None  # they record nothing of how they were made

    def __init__(self, folder: Path, with_text: bool, root: Path | None = None, remapping: Mapping[str, str] | None = None):
        self.folder, self.with_text = Path(os.path.abspath(folder)), with_text
        self.root, self.remapping = Path(os.path.abspath(root or folder)), dict(remapping or {})
        files = [path for path in sorted(folder.glob("**/*.parquet")) if not path.name.startswith(".")]
        if not files:
            raise UserError(f"{folder}: neither a store (figures/, groups.parquet) nor *.parquet files of scored pictures here.")
        table = pa.concat_tables([_read(path) for path in files], promote_options="default")
        has_prompt = table.column("group_id").is_valid()
        self.table = table.filter(has_prompt)
        self.nameless = table.num_rows - self.table.num_rows

    def __len__(self) -> int:
        return self.table.num_rows

    def numbers(self, column: str) -> np.ndarray:
        """(rows,) float64; NaN where there is none."""
        return self.table.column(column).cast(pa.float64()).fill_null(np.nan).to_numpy()

    def scores(self) -> np.ndarray:
        """(rows, D) in the order of AXES."""
        return np.stack([self.numbers(name) for name in SCORES], axis=1)

    def buckets(self) -> np.ndarray:
        sides = [self.table.column(name).fill_null(0).to_numpy() for name in ("bucket_h", "bucket_w")]
        return np.stack(sides, axis=1).astype(np.int32)

    def _text(self, column: str, row: int) -> str | None:
        if column not in self.table.column_names:
            return None
        value = self.table.column(column)[row].as_py()
        return None if value is None else str(value)

    def _npz(
        self, column: str, row: int, parts: Mapping[str, Sequence[str]], optional: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        """The arrays of the file that a row names. Raises as `read_npz`."""
        name = self._text(column, row)
        for begin, other in self.remapping.items():
            if name is not None and name.startswith(begin):
                name = other + name.removeprefix(begin)
                break
        folder = self.root if name is not None and os.path.isabs(name) else self.folder
        return read_npz(folder, name, parts, optional, column)

    def caption(self, row: int) -> str:
        return self._text("caption", row) or ""

    def sample_id(self, row: int) -> str:
        return str(self._text("cache_path", row))

    def ids(self) -> list[str]:
        return [str(path) for path in self.table.column("cache_path").to_pylist()]

    def latents(self, row: int) -> Tensor:
        """(C, h, w) fp32. Raises OSError or ValueError when they are missing or not of the row's bucket."""
        return self._latents(row, self._npz("cache_path", row, _LATENTS, tuple(_LATENTS)))

    def _latents(self, row: int, arrays: dict[str, np.ndarray]) -> Tensor:
        found = next((name for name in _LATENTS if name in arrays), None)
        if found is None:
            raise ValueError(f"{self.sample_id(row)} lacks {' or '.join(key for keys in _LATENTS.values() for key in keys)}")
        require_numbers("latents", arrays[found])
        latents = latents_of(arrays[found], is_posterior=found == "posterior")
        height, width = self.buckets_of(row)
        if latents.ndim != 3 or height * latents.shape[2] != width * latents.shape[1]:
            raise ValueError(f"latents are {latents.shape}, which is not the shape of the bucket {height} x {width}")
        return torch.from_numpy(latents).float()

    def buckets_of(self, row: int) -> tuple[int, int]:
        height, width = (self.table.column(name)[row].as_py() or 0 for name in ("bucket_h", "bucket_w"))
        return height, width

    def sample(self, row: int) -> Sample:
        """Latents, and the text where it is wanted. Raises OSError or ValueError when they are missing or damaged."""
        parts: dict[str, Sequence[str]] = dict(_LATENTS)
        text_path = self._text(_TEXT_PATH, row)
        if self.with_text and text_path is None:
            parts["text"] = TEXT
        arrays = self._npz("cache_path", row, parts, tuple(_LATENTS))
        text = None
        if self.with_text:
            given = arrays if text_path is None else self._npz(_TEXT_PATH, row, {"text": TEXT})
            require_numbers("text", given["text"])
            text = text_of(given)
        return Sample(self.sample_id(row), self.caption(row), self._latents(row, arrays), text)

    def empty_text(self) -> Tensor | None:
        return None  # not stored with them: the model encodes it

    def text_lengths(self) -> None:
        return None


def _read(path: Path) -> pa.Table:
    try:
        names = pq.read_schema(path).names
        lacking = [name for name in NEEDED if name not in names]
        if not lacking:
            return pq.read_table(path, columns=[*NEEDED, *(name for name in (_TEXT_PATH,) if name in names)])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}. Copy it again, or move it away.") from error
    raise UserError(
        f"{path} lacks the columns {', '.join(lacking)}: these are not scored pictures. PreferenceGroups reads a store with "
        f"groups.parquet beside its figures/, or Parquet files with the columns {', '.join(NEEDED)}."
    )
