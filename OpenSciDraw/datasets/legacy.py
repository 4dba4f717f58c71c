"""Encoded layouts that existed before the store: V1 (tensors in the row), V2 and V3 (npz beside the Parquet).

They record nothing of how they were made, so they load with the contract that the config declares and a
warning; shapes are still checked row by row. docs/data-formats.md lists the columns.
"""

from __future__ import annotations

import logging
import os
import zipfile
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from OpenSciDraw.datasets.batch import Sample
from OpenSciDraw.errors import UserError
from OpenSciDraw.store import Contract

_LOG = logging.getLogger("OpenSciDraw")
_ALWAYS = {"caption", "bucket_w", "bucket_h"}
_LAYOUTS = {  # the columns that tell a layout
    "V1": _ALWAYS | {"image_path", "latents", "latent_shape", "text_embeds", "text_embeds_shape"},
    "V2": _ALWAYS | {"cache_path", "latent_shape"},
    "V3": _ALWAYS | {"cache_path", "vae_h_shape"},
}
_LATENT_SHAPES, _TEXT_SHAPES = ("latent_shape", "vae_h_shape"), ("text_embeds_shape", "prompt_embeds_shape")
_SMALL = ("image_path", "caption", "cache_path", "bucket_w", "bucket_h", *_LATENT_SHAPES, *_TEXT_SHAPES)
_FAT_ROW_GROUP = 4  # rows
_ROWS_OF_STRIDE = 1000
_NPZ_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # of damaged files, beside OSError and ValueError


class LegacyRows:
    """Rows of `<folder>/**/*.parquet` in layout V1, V2 or V3, recognised by its columns.

    Raises:
        UserError: no Parquet file, unreadable ones, unknown columns, or files of different layouts.
    """

    contract: Contract | None = None

    def __init__(self, folder: Path):
        self.folder = Path(os.path.abspath(folder))
        layouts = {path: _layout(path) for path in sorted(folder.glob("**/*.parquet")) if not path.name.startswith(".")}
        if not layouts:
            raise UserError(f"{folder}: neither a store (figures/) nor *.parquet files of an older layout here.")
        if len(set(layouts.values())) > 1:
            first = {layout: path for path, layout in reversed(layouts.items())}
            found = ", ".join(f"{layout}: {path}" for layout, path in sorted(first.items()))
            raise UserError(f"{folder}: files of different layouts ({found}). Keep them apart, one folder for each.")
        self.files, self.layout = list(layouts), next(iter(layouts.values()))
        if self.layout == "V3":
            self._keep_training_files()
        tables = [pq.read_table(path, columns=[c for c in _SMALL if c in pq.read_schema(path).names]) for path in self.files]
        self.table = pa.concat_tables(tables, promote_options="default")
        self._file_of = np.repeat(np.arange(len(tables)), [t.num_rows for t in tables])
        self._first = np.cumsum([0, *[t.num_rows for t in tables]])
        self._stride = self._common_stride()
        if self.layout == "V1":
            self._warn_row_groups()

    def _keep_training_files(self) -> None:
        kept = [path for path in self.files if path.name.endswith("_train.parquet")]
        if not kept:
            raise UserError(f"{self.folder}: layout V3 without a *_train.parquet file. There: {self.files[0]} …")
        if len(kept) < len(self.files):
            _LOG.info("%s: %d file(s) that are not *_train.parquet left out", self.folder, len(self.files) - len(kept))
        self.files = kept

    def _warn_row_groups(self) -> None:
        metadata = pq.read_metadata(self.files[0])
        rows = metadata.num_rows / max(1, metadata.num_row_groups)
        if rows > _FAT_ROW_GROUP:
            _LOG.warning(
                "%s has %.0f rows in a row group: reading one row decodes all of them, which was measured at 11 to "
                "190 times the cost of one row per row group. Encode again for speed.", self.files[0], rows
            )  # fmt: skip

    def _common_stride(self) -> int:
        """Pixels of one latent along a side, as most of the first rows say: 8 in the large models' VAEs."""
        strides: Counter[int] = Counter()
        for row in range(min(len(self), _ROWS_OF_STRIDE)):
            shape, height = self._declared(_LATENT_SHAPES, row), self._value("bucket_h", row)
            if shape and height and shape[-2] and height % shape[-2] == 0:
                strides[height // shape[-2]] += 1
        if len(self) and not strides:
            raise UserError(f"{self.folder}: no row's latent shape divides its bucket (latent_shape, bucket_h, bucket_w).")
        return strides.most_common(1)[0][0] if strides else 1

    def __len__(self) -> int:
        return self.table.num_rows

    def _value(self, column: str, row: int) -> Any:
        return self.table.column(column)[row].as_py()

    def _declared(self, columns: tuple[str, ...], row: int) -> list[int] | None:
        """The shape that the row says, in whichever of the columns it says it."""
        values = [self._value(column, row) for column in columns if column in self.table.column_names]
        return next((value for value in values if value is not None), None)

    def buckets(self) -> np.ndarray:
        sides = [self.table.column(name).fill_null(0).to_numpy() for name in ("bucket_h", "bucket_w")]
        return np.stack(sides, axis=1).astype(np.int32)

    @property
    def _id_column(self) -> str:
        return "image_path" if self.layout == "V1" else "cache_path"

    def sample_id(self, row: int) -> str:
        return str(self._value(self._id_column, row))

    def ids(self) -> list[str]:
        return [str(i) for i in self.table.column(self._id_column).to_pylist()]

    def text_lengths(self) -> None:
        return None

    def empty_text(self) -> Tensor | None:
        return None  # never stored in these layouts: the model encodes it

    def sample(self, row: int) -> Sample:
        """Latents (C, h, w) fp32 and text (L, D) as stored.

        Raises OSError, ValueError or KeyError when the row's data are missing or not what the row says.
        """
        arrays = self._from_row(row) if self.layout == "V1" else self._from_npz(row)
        self._check("latents", arrays["latents"], self._declared(_LATENT_SHAPES, row))
        self._check("text", arrays["text"], self._declared(_TEXT_SHAPES, row))
        latents = arrays["latents"]
        if self.layout == "V3":
            latents = latents[: len(latents) // 2]  # mean || logvar: the mean is the mode
        if latents.ndim == 4 and latents.shape[1] == 1:
            latents = latents[:, 0]  # Qwen's VAE is one for films: (C, 1, h, w)
        bucket = (self._value("bucket_h", row) or 0, self._value("bucket_w", row) or 0)
        if latents.ndim != 3 or tuple(side * self._stride for side in latents.shape[-2:]) != bucket:
            raise ValueError(f"latents are {latents.shape}, the bucket {bucket} asks for sides of 1/{self._stride} of its own")
        caption = self._value("caption", row) or ""
        return Sample(self.sample_id(row), caption, torch.from_numpy(latents).float(), _text(arrays))

    @staticmethod
    def _check(name: str, array: np.ndarray, declared: list[int] | None) -> None:
        if array.dtype.kind != "f":
            raise ValueError(f"{name} are {array.dtype}, not floating-point numbers")
        if declared is not None and array.shape != tuple(declared):
            raise ValueError(f"{name} are {array.shape}, the row says {tuple(declared)}")

    def _from_npz(self, row: int) -> dict[str, np.ndarray]:
        name = self._value("cache_path", row)
        path = Path(os.path.normpath(self.folder / (name or "..")))
        if not path.is_relative_to(self.folder):
            raise ValueError(f"cache_path {name!r} leads out of {self.folder}")
        parts = {"latents": ("vae_h",) if self.layout == "V3" else ("latents",), "text": ("text_embeds", "prompt_embeds")}
        try:
            with _open_npz(path) as data:
                if "text_ids" not in data.files:  # with them it is FLUX's text, whose pads belong to it
                    parts["mask"] = ("text_mask", "attention_mask")
                out = {part: data[key] for part, keys in parts.items() for key in keys if key in data.files}
        except _NPZ_ERRORS as error:
            raise ValueError(f"{path}: damaged npz file: {error}") from error
        lacking = [" or ".join(parts[part]) for part in ("latents", "text") if part not in out]
        if lacking:
            raise ValueError(f"{path} lacks {', '.join(lacking)}")
        return out

    def _from_row(self, row: int) -> dict[str, np.ndarray]:
        file = int(self._file_of[row])
        values = _read_row(self.files[file], row - int(self._first[file]))

        def array(name: str, dtype: Any, shape: list[int] | None) -> np.ndarray:
            if values[name] is None or shape is None:
                raise ValueError(f"{name} or its shape is empty")
            return np.frombuffer(values[name], dtype=dtype).reshape(shape).copy()

        out = {
            "latents": array("latents", np.float32, values["latent_shape"]),
            "text": array("text_embeds", np.float16, values["text_embeds_shape"]),
        }
        if values.get("text_mask") is not None:
            out["mask"] = array("text_mask", np.int8, [-1])
        return out


def _layout(path: Path) -> str:
    try:
        names = set(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}. Copy it again, or move it away.") from error
    layout = next((layout for layout, columns in _LAYOUTS.items() if columns <= names), None)
    if layout is None:
        known = "; ".join(f"{layout}: {', '.join(sorted(columns))}" for layout, columns in _LAYOUTS.items())
        raise UserError(
            f"{path}: unknown layout with columns {', '.join(sorted(names))}. Known are the store of `scienceflow encode` and "
            f"older layouts with at least these columns: {known}."
        )
    return layout


def _open_npz(path: Path) -> NpzFile:
    data = np.load(path, allow_pickle=False)
    if not isinstance(data, NpzFile):
        raise ValueError(f"{path} is not an npz file")
    return data


def _text(arrays: dict[str, np.ndarray]) -> Tensor:
    """(L, D); text with a mask is trimmed to its tokens."""
    text, mask = arrays["text"], arrays.get("mask")
    if text.ndim != 2:
        raise ValueError(f"text is {text.shape}, expected (tokens, width)")
    if mask is not None:
        if mask.shape != text.shape[:1] or not mask.any():
            raise ValueError(f"the text's mask is {mask.shape} with {np.count_nonzero(mask)} tokens, the text {text.shape}")
        text = text[mask.astype(bool)]
    return torch.from_numpy(text)


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
