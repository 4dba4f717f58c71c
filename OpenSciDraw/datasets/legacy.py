"""Encoded layouts that existed before the store: V1 (tensors in the row), V2 and V3 (npz beside the Parquet).

They record nothing of how they were made, so they load with the contract that the config declares and a
warning; shapes are still checked row by row. docs/data-formats.md lists the columns.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from OpenSciDraw.datasets.batch import Sample
from OpenSciDraw.errors import UserError
from OpenSciDraw.store import Contract

_LOG = logging.getLogger("OpenSciDraw")
_SMALL = ("image_path", "caption", "cache_path", "bucket_w", "bucket_h")
_FAT_ROW_GROUP = 4  # rows


class LegacyRows:
    """Rows of `<folder>/**/*.parquet` in layout V1, V2 or V3, recognised by its columns.

    Raises:
        UserError: no Parquet file, unknown columns, or files of different layouts.
    """

    contract: Contract | None = None

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.files = sorted(folder.glob("**/*.parquet"))
        if not self.files:
            raise UserError(f"{folder}: neither a store (figures/) nor *.parquet files of an older layout here.")
        schemas = {self._layout(path) for path in self.files}
        if len(schemas) > 1:
            raise UserError(f"{folder}: files of different layouts ({', '.join(sorted(schemas))}). Keep them apart.")
        self.layout = schemas.pop()
        tables = [
            pq.read_table(path, columns=[c for c in _SMALL if c in pq.read_schema(path).names]) for path in self.files
        ]
        self.table = pa.concat_tables(tables, promote_options="default")
        self._file_of = np.repeat(np.arange(len(tables)), [t.num_rows for t in tables])
        self._first = np.cumsum([0, *[t.num_rows for t in tables]])
        if self.layout == "V1":
            self._warn_row_groups()

    @staticmethod
    def _layout(path: Path) -> str:
        names = set(pq.read_schema(path).names)
        if {"latents", "text_embeds", "bucket_w", "bucket_h"} <= names:
            return "V1"
        if {"cache_path", "vae_h_shape"} <= names:
            return "V3"
        if {"cache_path", "latent_shape"} <= names:
            return "V2"
        raise UserError(
            f"{path}: unknown layout with columns {sorted(names)}. Known: the store of `scienceflow encode`, V1 "
            "(latents, text_embeds in the row), V2 (cache_path, latent_shape), V3 (cache_path, vae_h_shape)."
        )

    def _warn_row_groups(self) -> None:
        metadata = pq.read_metadata(self.files[0])
        rows = metadata.num_rows / max(1, metadata.num_row_groups)
        if rows > _FAT_ROW_GROUP:
            _LOG.warning(
                "%s has %.0f rows in a row group: reading one row decodes all of them, which was measured at 11 to "
                "190 times the cost of one row per row group. Encode again for speed.", self.files[0], rows
            )  # fmt: skip

    def __len__(self) -> int:
        return self.table.num_rows

    def buckets(self) -> np.ndarray:
        return np.stack([self.table.column(name).to_numpy() for name in ("bucket_h", "bucket_w")], axis=1).astype(np.int32)

    def sample_id(self, row: int) -> str:
        name = "cache_path" if self.layout != "V1" else "image_path"
        return str(self.table.column(name)[row].as_py())

    def ids(self) -> list[str]:
        return [str(i) for i in self.table.column("cache_path" if self.layout != "V1" else "image_path").to_pylist()]

    def empty_text(self) -> Tensor | None:
        return None  # never stored in these layouts: the model encodes it

    def sample(self, row: int) -> Sample:
        """Raises OSError, ValueError or KeyError when the row's data are missing or not what the row says."""
        arrays = self._from_row(row) if self.layout == "V1" else self._from_npz(row)
        latents = torch.from_numpy(arrays["latents"]).float()
        expected = tuple(int(self.table.column(name)[row].as_py()) // 8 for name in ("bucket_h", "bucket_w"))
        if tuple(latents.shape[-2:]) != expected:
            raise ValueError(f"latents are {tuple(latents.shape)}, the bucket asks for (…, {expected[0]}, {expected[1]})")
        return Sample(self.sample_id(row), self.table.column("caption")[row].as_py() or "", latents, self._text(arrays))

    @staticmethod
    def _text(arrays: dict[str, np.ndarray]) -> Tensor:
        """Text with `text_ids` is FLUX's: pads belong to it. Text with a mask alone is trimmed to its tokens."""
        text = torch.from_numpy(arrays["text"])
        if "text_ids" in arrays or "mask" not in arrays:
            return text
        return text[torch.from_numpy(arrays["mask"]).bool()]

    def _from_npz(self, row: int) -> dict[str, np.ndarray]:
        path = (self.folder / self.table.column("cache_path")[row].as_py()).resolve()
        if not path.is_relative_to(self.folder):
            raise ValueError(f"cache_path leads out of {self.folder}")
        out: dict[str, np.ndarray] = {}
        with np.load(path, allow_pickle=False) as data:
            for key, target in (
                ("latents", "latents"), ("text_embeds", "text"), ("prompt_embeds", "text"), ("text_mask", "mask"),
                ("attention_mask", "mask"), ("text_ids", "text_ids"),
            ):  # fmt: skip
                if key in data.files:
                    out[target] = data[key]
            if "vae_h" in data.files:
                moments = data["vae_h"]
                out["latents"] = moments[: moments.shape[0] // 2]  # mean || logvar: the mean is the mode
        if not {"latents", "text"} <= out.keys():
            raise KeyError(f"{path} lacks {sorted({'latents', 'text'} - out.keys())}")
        return out

    def _from_row(self, row: int) -> dict[str, np.ndarray]:
        file = int(self._file_of[row])
        values = _read_row(self.files[file], row - int(self._first[file]))

        def array(name: str, dtype: Any, shape: list[int]) -> np.ndarray:
            return np.frombuffer(values[name], dtype=dtype).reshape(shape).copy()

        text_shape = values["text_embeds_shape"]
        out = {
            "latents": array("latents", np.float32, values["latent_shape"]),
            "text": array("text_embeds", np.float16, text_shape),
        }
        if values.get("text_mask") is not None:
            out["mask"] = array("text_mask", np.int8, [-1]).reshape(text_shape[0])
        return out


@lru_cache(maxsize=32)
def _row_groups(path: Path) -> tuple[pq.ParquetFile, np.ndarray]:
    file = pq.ParquetFile(path)
    counts = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
    return file, np.cumsum([0, *counts])


def _read_row(path: Path, row: int) -> dict[str, Any]:
    file, starts = _row_groups(path)
    group = int(np.searchsorted(starts, row, side="right")) - 1
    wanted = ("latents", "latent_shape", "text_embeds", "text_embeds_shape", "text_mask")
    columns = [name for name in wanted if name in file.schema_arrow.names]
    return file.read_row_group(group, columns=columns).slice(row - int(starts[group]), 1).to_pylist()[0]
