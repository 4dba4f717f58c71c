"""Encoded layouts that existed before the store: V1 (tensors in the row), V2, V3 and V4, edits (npz beside the Parquet).

They record nothing of how they were made, so they load with the contract that the config declares and a
warning; shapes are still checked row by row. `scienceflow repack` (OpenSciDraw/encode/repack.py) turns them into a store.
docs/data-formats.md lists the columns.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from OpenSciDraw.datasets.batch import Sample
from OpenSciDraw.datasets.npz_files import TEXT, latents_of, read_npz, require_numbers, text_of
from OpenSciDraw.datasets.row_groups import RowStream, cost_of_a_row
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.edits import BOX_COLUMN, boxes_in
from OpenSciDraw.store.contract import Contract

_LOG = logging.getLogger("OpenSciDraw")
_ALWAYS = {"caption", "bucket_w", "bucket_h"}
_LAYOUTS = {  # the columns that tell a layout
    "V1": _ALWAYS | {"image_path", "latents", "latent_shape", "text_embeds", "text_embeds_shape"},
    "V2": _ALWAYS | {"cache_path", "latent_shape"},
    "V3": _ALWAYS | {"cache_path", "vae_h_shape"},
    "V4": _ALWAYS | {"cache_path", "source_vae_h_shape", "target_vae_h_shape"},
}
_LATENT_SHAPES, _TEXT_SHAPES = ("latent_shape", "vae_h_shape", "target_vae_h_shape"), ("text_embeds_shape", "prompt_embeds_shape")
_SOURCE_SHAPE, _GRADE = "source_vae_h_shape", "quality_grade"
_SMALL = ("image_path", "caption", "cache_path", "bucket_w", "bucket_h", "aspect_ratio", *_LATENT_SHAPES, *_TEXT_SHAPES,
          _SOURCE_SHAPE, BOX_COLUMN, _GRADE)  # fmt: skip
_FAT_ROW_GROUP = 4  # rows
_LEAST_SPREAD = 1e-3  # median / root mean square of bf16 numbers: >= 0.01 even in text with outliers, < 1e-4 of fp16's bits
_ROWS_OF_STRIDE = 1000


class LegacyRows:
    """Rows of `<folder>/**/*.parquet` in layout V1, V2, V3 or V4 (edits), recognised by its columns.

    `grades`: only rows whose quality_grade is one of these.

    Raises:
        UserError: no Parquet file, unreadable ones, unknown columns, or files of different layouts.
    """

    contract: Contract | None = None

    def __init__(self, folder: Path, grades: Sequence[str] = ()):
        self.folder = Path(os.path.abspath(folder))
        layouts = {path: _layout(path) for path in sorted(folder.glob("**/*.parquet")) if not path.name.startswith(".")}
        if not layouts:
            raise UserError(f"{folder}: neither a store (figures/) nor *.parquet files of an older layout here.")
        if len(set(layouts.values())) > 1:
            first = {layout: path for path, layout in reversed(layouts.items())}
            found = ", ".join(f"{layout}: {path}" for layout, path in sorted(first.items()))
            raise UserError(f"{folder}: files of different layouts ({found}). Keep them apart, one folder for each.")
        self.files, self.layout = list(layouts), next(iter(layouts.values()))
        if self.layout in ("V3", "V4"):
            self._keep_training_files()
        tables = [pq.read_table(path, columns=[c for c in _SMALL if c in pq.read_schema(path).names]) for path in self.files]
        self.table = pa.concat_tables(tables, promote_options="default")
        if grades:
            self._keep_grades(grades)
        self._file_of = np.repeat(np.arange(len(tables)), [t.num_rows for t in tables])
        self._first = np.cumsum([0, *[t.num_rows for t in tables]])
        self._stride = self._common_stride()
        self._stream = RowStream()
        if self.layout == "V1" and len(self):
            try:
                self._refuse_other_halves()
                self._warn_of_cost()
            except (OSError, ValueError) as error:  # that row is a bad one; others may be sound
                _LOG.warning("%s: the first row cannot be read (%s)", self.files[0], error)

    def _keep_training_files(self) -> None:
        kept = [path for path in self.files if path.name.endswith("_train.parquet")]
        if not kept:
            raise UserError(f"{self.folder}: layout {self.layout} without a *_train.parquet file. There: {self.files[0]} …")
        if len(kept) < len(self.files):
            _LOG.info("%s: %d file(s) that are not *_train.parquet left out", self.folder, len(self.files) - len(kept))
        self.files = kept

    def _keep_grades(self, grades: Sequence[str]) -> None:
        if self.layout == "V1" or _GRADE not in self.table.column_names:
            raise UserError(f"{self.folder}: its rows say no {_GRADE}, by which dataset.quality_filter chooses. Leave it out.")
        kept = pc.is_in(pc.utf8_upper(self.table.column(_GRADE).cast(pa.string())), pa.array([grade.upper() for grade in grades]))
        before, self.table = self.table.num_rows, self.table.filter(kept)
        _LOG.info("%s: %d of %d rows have %s %s", self.folder, self.table.num_rows, before, _GRADE, " or ".join(grades))

    def _refuse_other_halves(self) -> None:
        """16-bit integers are read as bf16, which neither numpy nor Parquet has; of fp16's bits that makes nonsense."""
        for name in ("latents", "text_embeds"):
            if _is_halves(pq.read_schema(self.files[0]).field(name).type):
                numbers = np.abs(_floats(self._stream.read(self.files[0], 0), name, np.float32))
                if np.median(numbers) < _LEAST_SPREAD * np.sqrt(np.mean(numbers.astype(np.float64) ** 2)):
                    raise UserError(
                        f"{self.files[0]}: {name} are 16-bit integers that are not the bits of bfloat16 numbers (of float16?). "
                        "Write them as halffloat or float."
                    )

    def _warn_of_cost(self) -> None:
        """Say what one row costs where it lies among others or as a list, timed on this very file."""
        path = self.files[0]
        metadata, schema = pq.read_metadata(path), pq.read_schema(path)
        rows = metadata.num_rows / max(1, metadata.num_row_groups)
        lists = [name for name in ("latents", "text_embeds") if not _is_bytes(schema.field(name).type)]
        if rows <= _FAT_ROW_GROUP and not lists:
            return
        cost = cost_of_a_row(path)
        why = [f"{rows:.0f} rows in a row group"] if rows > _FAT_ROW_GROUP else []
        why += [f"{' and '.join(lists)} as lists of numbers"] if lists else []
        _LOG.warning(
            "%s has %s: one row of %.3g MB takes %.2g ms at random, %.0f times a plain read of as many bytes, and passes over "
            "%.3g MB. `scienceflow repack %s OUT --config CONFIG.py` makes it one read.", path, " and ".join(why),
            cost.row_bytes / 1e6, 1e3 * cost.seconds, cost.seconds / cost.plain_seconds, cost.passed_bytes / 1e6, self.folder,
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

    def figure_columns(self, row: int) -> dict[str, Any]:
        """The row's columns of a store's figures/, but for its text's key and tensor; the picture is taken to fill its bucket."""
        width, height = self._value("bucket_w", row), self._value("bucket_h", row)
        known = self._value("aspect_ratio", row) if "aspect_ratio" in self.table.column_names else None
        return {
            "id": self.sample_id(row), "caption": self._value("caption", row) or "", "bucket_w": width, "bucket_h": height,
            "aspect_ratio": height / width if known is None else known, "placement": [0, 0, width, height],
        }  # fmt: skip

    def files_of(self, start: int, stop: int) -> list[tuple[str, int]]:
        """Names and sizes (bytes; -1 where one is missing) of the files that the tensors of these rows lie in."""
        if self.layout == "V1":
            names = [str(self.files[file].relative_to(self.folder)) for file in np.unique(self._file_of[start:stop])]
        else:
            names = self.table.column("cache_path").slice(start, stop - start).fill_null("").to_pylist()
        paths = [(name, self.folder / name) for name in names]
        return [(name, path.stat().st_size if path.exists() else -1) for name, path in paths]

    def reference_sizes(self) -> np.ndarray | None:
        """(rows,) a number that is the same for edits whose sources are of one size; None where there are no edits."""
        if self.layout != "V4":
            return None
        shapes = [tuple(shape or ()) for shape in self.table.column(_SOURCE_SHAPE).to_pylist()]
        known: dict[tuple[int, ...], int] = {}
        return np.array([known.setdefault(shape, len(known) + 1) for shape in shapes], dtype=np.int32)

    def text_lengths(self) -> None:
        return None

    def empty_text(self) -> Tensor | None:
        return None  # never stored in these layouts: the model encodes it

    def sample(self, row: int) -> Sample:
        """Latents (C, h, w) fp32 and text (L, D) as stored.

        Raises OSError, ValueError or KeyError when the row's data are missing or not what the row says.
        """
        arrays = self._from_row(row) if self.layout == "V1" else self._from_npz(row)
        require_numbers("latents", arrays["latents"], self._declared(_LATENT_SHAPES, row))
        require_numbers("text", arrays["text"], self._declared(_TEXT_SHAPES, row))
        latents = latents_of(arrays["latents"], is_posterior=self.layout in ("V3", "V4"))
        bucket = (self._value("bucket_h", row) or 0, self._value("bucket_w", row) or 0)
        if latents.ndim != 3 or tuple(side * self._stride for side in latents.shape[-2:]) != bucket:
            raise ValueError(f"latents are {latents.shape}, the bucket {bucket} asks for sides of 1/{self._stride} of its own")
        caption = self._value("caption", row) or ""
        references: tuple[Tensor, ...] = ()
        if "source" in arrays:
            require_numbers("the source", arrays["source"], self._declared((_SOURCE_SHAPE,), row))
            references = (torch.from_numpy(latents_of(arrays["source"], is_posterior=True)).float(),)
        target, boxes = torch.from_numpy(latents).float(), self._boxes(row, bucket) if references else None
        return Sample(self.sample_id(row), caption, target, text_of(arrays), references=references, edit_boxes=boxes)

    def _boxes(self, row: int, bucket: tuple[int, int]) -> Tensor | None:
        """Boxes of an edit, in pixels of the bucket, as fractions of it. Raises RejectedFigure (a ValueError) for what is none."""
        boxes = boxes_in({BOX_COLUMN: self._value(BOX_COLUMN, row)}) if BOX_COLUMN in self.table.column_names else ()
        height, width = bucket
        return torch.tensor(boxes) / torch.tensor([width, height, width, height]) if boxes else None

    def _from_npz(self, row: int) -> dict[str, np.ndarray]:
        parts = {"latents": {"V3": ("vae_h",), "V4": ("target_vae_h",)}.get(self.layout, ("latents",)), "text": TEXT}
        if self.layout == "V4":
            parts["source"] = ("source_vae_h",)
        return read_npz(self.folder, self._value("cache_path", row), parts)

    def _from_row(self, row: int) -> dict[str, np.ndarray]:
        file = int(self._file_of[row])
        batch = self._stream.read(self.files[file], row - int(self._first[file]))

        def shaped(name: str, shape: str, bytes_of: Any) -> np.ndarray:
            declared = batch.column(shape)[0].as_py()
            if declared is None or batch.column(name).null_count:
                raise ValueError(f"{name} or its shape is empty")
            return _floats(batch, name, bytes_of).reshape(declared).copy()

        out = {
            "latents": shaped("latents", "latent_shape", np.float32),
            "text": shaped("text_embeds", "text_embeds_shape", np.float16),
        }
        if "text_mask" in batch.schema.names and not batch.column("text_mask").null_count:
            out["mask"] = _flat(batch, "text_mask", np.int8)
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


# -- tensors in the rows of a Parquet file ---------------------------------------------------------


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _is_halves(kind: pa.DataType) -> bool:
    """Whether these are lists, however deep, of 16-bit integers."""
    while pa.types.is_nested(kind) and not pa.types.is_struct(kind):
        kind = kind.value_type
    return pa.types.is_uint16(kind) or pa.types.is_int16(kind)


def _flat(batch: pa.RecordBatch, name: str, bytes_of: Any) -> np.ndarray:
    """(numbers,) of the one row's value: bytes are of type `bytes_of`, lists (of lists …) of their own."""
    column = batch.column(name)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if _is_bytes(column.type):
        return np.frombuffer(column[0].as_buffer(), dtype=bytes_of)
    while pa.types.is_nested(column.type) and not pa.types.is_struct(column.type):
        column = column.flatten()
    if column.null_count:
        raise ValueError(f"{name} has {column.null_count} empty numbers")
    return column.to_numpy(zero_copy_only=False)


def _floats(batch: pa.RecordBatch, name: str, bytes_of: Any) -> np.ndarray:
    """(numbers,) fp16 or fp32; 16-bit integers are the bits of bf16 numbers."""
    numbers = _flat(batch, name, bytes_of)
    if numbers.dtype in (np.uint16, np.int16):
        return (numbers.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32) if numbers.dtype == np.float64 else numbers
