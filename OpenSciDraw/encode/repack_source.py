"""What `repack` reads: rows of a store or of an older layout, how they were made, and whether the declared model made them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from OpenSciDraw.config import Config
from OpenSciDraw.config.data_checks import MIXED_DATASET
from OpenSciDraw.datasets.arxiv_parquet import StoreRows
from OpenSciDraw.datasets.batch import Sample
from OpenSciDraw.datasets.legacy import LegacyRows
from OpenSciDraw.encode.work import Place
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel, build_model
from OpenSciDraw.store.contract import SCHEMA_VERSION, Contract
from OpenSciDraw.store.encoded import EMPTY_PROMPT
from OpenSciDraw.store.shard import (
    FIGURE_SCHEMA,
    not_finite,
    text_key,
)

PROBED_ROWS = 8  # first rows that are read beforehand: for sizes, and to see whether they are of the declared model
_SAME_TEXT = 0.1  # relative error: 0.013 between bf16 and fp32 of one encoder (embedded model), near 1 between two captions
_LOG = logging.getLogger("OpenSciDraw")


@dataclass
class Source:
    """Rows to repack, how they were made, and for each the first row with its caption, (rows,) int64."""

    folder: Path
    rows: LegacyRows | StoreRows
    contract: Contract
    with_text: bool
    model: FigureModel | None  # that the config declares
    table: pa.Table = field(init=False)  # the small columns
    first: np.ndarray = field(init=False)
    is_repeated: np.ndarray = field(init=False)  # whether the row's caption occurs in other rows as well
    without_caption: np.ndarray = field(init=False)  # rows whose text is that of the empty prompt

    def __post_init__(self) -> None:
        self.table = self.rows.table if isinstance(self.rows, LegacyRows) else self.rows.store.figures.table
        keys = np.array([text_key(caption or "") for chunk in self.captions().iterchunks() for caption in chunk.to_pylist()], "S16")
        _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        self.first, self.is_repeated = first[inverse], counts[inverse] > 1
        self.without_caption = np.flatnonzero(keys == text_key(EMPTY_PROMPT))

    @property
    def kinds(self) -> Sequence[str]:
        return ("figures", "text") if self.with_text else ("figures",)

    def captions(self) -> pa.ChunkedArray:
        return self.table.column("caption")

    def columns(self, row: int) -> dict[str, Any]:
        """The small columns of a row of figures/."""
        if isinstance(self.rows, LegacyRows):
            columns = self.rows.figure_columns(row)
            return {**columns, "text_key": text_key(columns["caption"])}
        names = [name for name in self.table.column_names if name in FIGURE_SCHEMA.names]
        return self.table.select(names).slice(row, 1).to_pylist()[0]

    def stamp(self, start: int, stop: int) -> Any:
        """Changes when the tensors of these rows do: their checksums, or the sizes of the files that they lie in."""
        if isinstance(self.rows, LegacyRows):
            return self.rows.files_of(start, stop)
        store = self.rows.store
        stamp = store.figures.numbers("checksum")[start:stop].tolist()
        return stamp if store.text is None else [stamp, store.text.numbers("checksum")[store.text_row[start:stop]].tolist()]

    def sample(self, row: int) -> Sample | str:
        """A row with its tensors in bf16, or why it is rejected."""
        try:
            sample = self.rows.sample(row)
        except (OSError, ValueError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
        parts = {"latents": sample.latents, "text": sample.text if self.with_text else None}
        halves = {name: part.bfloat16() for name, part in parts.items() if part is not None}
        for name, half in halves.items():
            if wrong := not_finite(half):  # finite in fp32, and too large for bf16
                return f"{name} with numbers that are not finite: {wrong}"
        halved = replace(sample, latents=halves["latents"], text=halves.get("text"))
        return self._misfit(halved) or halved

    def _misfit(self, sample: Sample) -> str | None:
        """What tells that a row is not of the declared model."""
        if self.model is None:
            return None
        assert sample.latents is not None
        channels = self.contract.latents["channels"]
        if len(sample.latents) != channels:
            return f"not of the declared model: {len(sample.latents)} channels of latents, {channels} declared"
        if sample.text is None:
            return None
        width, longest = self.contract.text["width"], self.contract.text["max_sequence_length"]
        if sample.text.shape[1] != width or len(sample.text) > longest:
            return f"not of the declared model: text {tuple(sample.text.shape)}, at most {(longest, width)} declared"
        try:
            self.model.collate_text([sample.text])
        except UserError as error:
            return f"not of the declared model: {error}"
        return None


def open_store(folder: Path, config: Config | None) -> Source:
    if config is not None:
        raise UserError(f"{folder} is a store and carries its own contract. Leave --config out.")
    rows = StoreRows(folder, with_text=(folder / "text").is_dir())
    assert rows.contract is not None
    if rows.store.references is not None:
        raise UserError(f"{folder} holds edits with what they start from, and `repack` copies figures alone. Encode it again.")
    if rows.store.figures.is_described:
        raise UserError(
            f"{folder} says more of its figures than one caption each (several captions, masks or weights), which `repack` does "
            "not copy. Encode it again."
        )
    if (dtype := rows.contract.text.get("stored_dtype", "bfloat16")) != "bfloat16":
        raise UserError(f"{folder}: text stored as {dtype} would be rounded a second time. Encode it again instead.")
    origin = {**rows.contract.origin, "repacked": f"from {folder}"}
    contract = replace(rows.contract, origin=origin, schema=SCHEMA_VERSION)
    return Source(folder, rows, contract, rows.store.text is not None, None)


def open_legacy(folder: Path, config: Config | None) -> Source:
    """Rows that carry no contract, with the declared one: made from configs alone, no weights are read."""
    if config is None:
        raise UserError(
            f"{folder} carries no contract: nothing there says which model its rows were encoded with. Declare it by a config "
            "of that model: --config CONFIG.py (model_type, pretrained_model_name_or_path, max_sequence_length)."
        )
    rows, model = LegacyRows(folder), build_model(config, Place.here().device())
    if rows.reference_sizes() is not None:
        raise UserError(
            f"{folder} holds edits with what they start from (layout {rows.layout}), and `repack` copies figures alone. "
            f"Train on it as it is: dataset = dict(type={MIXED_DATASET!r}, edit_parquet_path=...)."
        )
    model.load_empty_vae()
    given = config.dataset.contract or {}
    model.contract().require_declared(given)
    if model.vae_precision == "auto":  # these latents are there already
        model.vae_precision = given.get("vae_precision", "fp32")
    contract = model.contract()
    origin = {**contract.origin, "repacked": f"declared, repacked from {folder} (layout {rows.layout})"}
    origin["text_computed_in"] = "not recorded"
    declared = replace(contract, origin=origin, picture={"fit": "not recorded"})
    return Source(folder, rows, declared, config.text == "stored", model)


def empty_prompt(source: Source) -> Tensor | None:
    """(L, D) embedding of the empty prompt; None where a row of the source has it, as its caption.

    Raises UserError when it is nowhere and the text encoder cannot be loaded.
    """
    if any(isinstance(source.sample(row), Sample) for row in source.without_caption):
        return None
    if isinstance(source.rows, StoreRows):
        return source.rows.empty_text()
    assert source.model is not None
    try:
        source.model.load_text_encoder()
    except UserError as error:
        raise UserError(
            f"{source.folder} has no embedding of the empty prompt, which caption dropout and guidance need, and the text "
            "encoder that makes it cannot be loaded. Run repack where it is, or set text = 'online' in the config to repack the "
            f"latents alone.\n{error}"
        ) from error
    _compare_text(source)
    empty = source.model.encode_prompts([EMPTY_PROMPT])[0].cpu()
    source.model.free_text_encoder()
    return empty


def _compare_text(source: Source) -> None:
    """Encode the first readable caption anew: says whether the declared text encoder is the one of the source."""
    samples = (source.sample(row) for row in range(min(PROBED_ROWS, len(source.first))))
    sample = next((sample for sample in samples if isinstance(sample, Sample)), None)
    if sample is None or source.model is None:
        return
    assert sample.text is not None
    ours, theirs = source.model.encode_prompts([sample.caption])[0].float().cpu(), sample.text.float()
    error = ((ours - theirs).norm() / ours.norm()).item() if ours.shape == theirs.shape else math.inf
    if error > _SAME_TEXT:
        _LOG.warning(
            "%s: the caption of %s encodes to %s here, %s there, relative error %.2f: the declared text encoder, its layers or its "
            "template are not those of the data, and the empty prompt will not go with them.", source.folder, sample.id,
            tuple(ours.shape), tuple(theirs.shape), error,
        )  # fmt: skip
    else:
        _LOG.info("the declared text encoder gives the text of %s with relative error %.4f", sample.id, error)
