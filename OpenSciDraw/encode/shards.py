"""One shard of `scienceflow encode`: figures and captions through the model, and their rows written, by whichever engine."""

from __future__ import annotations

import itertools
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from OpenSciDraw.config import EncodeConfig
from OpenSciDraw.encode.batches import BatchSizes, by_length
from OpenSciDraw.encode.work import Instruction, Work, keys_of, seen_by
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.buckets import Bucket
from OpenSciDraw.figures.fitting import Prepared, prepare, to_model_range
from OpenSciDraw.figures.listing import FigureRef, RejectedFigure, Rejection, content_of
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.store.contract import Contract
from OpenSciDraw.store.shard import (
    EDIT_TEXT_SCHEMA,
    REFERENCE_SCHEMA,
    TEXT_SCHEMA,
    Row,
    figure_schema,
    instruction_key,
    name_row,
    not_finite,
    text_key,
    write_shard,
)
from OpenSciDraw.utils.background import HostCopies, stacked

_NO_PIXELS = torch.empty(0, dtype=torch.uint8)
Text = str | Instruction
EncodedCaption = tuple[Text, HostCopies, int]  # and its place among the copies


def encode_captions(
    model: FigureModel, work: Work, contract: Contract, sizes: BatchSizes, bar: tqdm, encode: EncodeConfig
) -> None:
    """Encode and write a shard of captions in this thread."""
    write_captions(work, texts_of(model, work, sizes, bar, encode), contract)


def texts_of(model: FigureModel, work: Work, sizes: BatchSizes, bar: tqdm, encode: EncodeConfig) -> Iterator[EncodedCaption]:
    """The texts of a shard in their order with their embeddings: all captions, or all instructions with the pictures they edit."""
    if not isinstance(work.items[0], Instruction):
        yield from caption_batches(model, work.items, sizes, bar)
        return
    for text in work.items:
        bar.update(1)
        try:
            pictures = [to_model_range(prepare(reference, encode).pixels) for reference in text.references]
        except RejectedFigure:
            continue  # its edit is rejected for this too, and named there
        yield text, HostCopies(model.encode_instructions([text.caption], [pictures])), 0


def caption_batches(model: FigureModel, captions: Sequence[str], sizes: BatchSizes, bar: tqdm) -> Iterator[EncodedCaption]:
    """Captions in their order with their embeddings; those of a window that are alike in length are encoded together."""
    for window in by_length(model.prompt_lengths(captions), len(captions), sizes.captions):
        found: dict[int, tuple[HostCopies, int]] = {}
        for batch in window:
            encoded = sizes.whole_or_halves(lambda part: HostCopies(model.encode_prompts([captions[at] for at in part])), batch)
            for part, copies in encoded:
                found |= {at: (copies, place) for place, at in enumerate(part)}
                bar.update(len(part))
        for at in sorted(found):
            yield captions[at], *found[at]


def write_captions(work: Work, encoded: Iterable[EncodedCaption], contract: Contract) -> None:
    """Write a shard of captions, row by row: a whole one may not fit into memory."""
    rows = (_caption_row(caption, copies.wait()[place], contract) for caption, copies, place in encoded)
    schema = EDIT_TEXT_SCHEMA if isinstance(work.items[0], Instruction) else TEXT_SCHEMA
    write_shard(work.path, schema, rows, contract, {"work": work.digest})


def _caption_row(text: Text, embedding: Tensor, contract: Contract) -> Row:
    if isinstance(text, Instruction):
        row = Row({"key": text.key, "caption": text.caption, "seen": seen_by(text.references)}, embedding)
    else:
        row = Row({"key": text_key(text), "caption": text}, embedding)
    if wrong := not_finite(embedding):
        computed = contract.origin.get("text_computed_in", "its type")
        raise UserError(
            f"The text encoder, computing in {computed}, gives numbers that are not finite ({wrong}) for {name_row(row.columns)}: "
            "nothing can be trained on them. A model that overflows in fp16 does not in bf16: set mixed_precision = 'bf16'."
        )
    return row


class Decoder:
    """Decodes and fits one figure, in a data worker."""

    def __init__(self, refs: Sequence[FigureRef], encode: EncodeConfig):
        self.refs, self.encode = refs, encode

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> Prepared | Rejection:
        ref = self.refs[index]
        try:
            return replace(prepare(ref, self.encode), references=())  # they have shards of their own; here they were looked at
        except RejectedFigure as error:
            content = content_of(ref)
            return Rejection(ref.id, ref.source, str(error), None if content is None else content.hex())


def write_figures(work: Work, rows: list[Row], rejections: list[Rejection], contract: Contract) -> None:
    """Write a shard of encoded figures, or of pictures that edits start from."""
    facts = {"work": work.digest, "rejected": [vars(rejection) for rejection in rejections]}
    write_shard(work.path, _schema_of(work), rows, contract, facts)


def _schema_of(work: Work) -> pa.Schema:
    if work.path.parent.name == "references":
        return REFERENCE_SCHEMA
    described = any(ref.captions or ref.mask is not None or ref.weight != 1 for ref in work.items)
    return figure_schema(any(ref.references for ref in work.items), described)


def figure_rows(
    model: FigureModel, decoded: Iterator[Any], count: int, sizes: BatchSizes, bar: tqdm
) -> tuple[list[Row], list[Rejection]]:
    """The next `count` figures as the rows of a shard, bucket by bucket, so that reading finds neighbours.

    A batch of one bucket is encoded as soon as it is full, while the workers decode on.
    """
    waiting: defaultdict[Bucket, list[Prepared]] = defaultdict(list)
    encoded: defaultdict[Bucket, list[tuple[list[Prepared], HostCopies]]] = defaultdict(list)
    rejections: list[Rejection] = []
    for item in itertools.islice(decoded, count):
        if isinstance(item, Rejection):
            rejections.append(item)
            bar.update(1)
            continue
        waiting[item.bucket].append(item)
        if len(waiting[item.bucket]) >= sizes.of(item.bucket):
            encoded[item.bucket] += _encode_batch(model, waiting.pop(item.bucket), sizes, bar)
    for bucket, items in waiting.items():
        encoded[bucket] += _encode_batch(model, items, sizes, bar)
    rows = []
    for items, latents in (batch for bucket in sorted(encoded) for batch in encoded[bucket]):
        for item, tensor in zip(items, latents.wait()[0], strict=True):
            if wrong := not_finite(tensor):
                content = None if item.content is None else item.content.hex()
                rejections.append(Rejection(item.ref.id, item.ref.source, f"latents that are not finite: {wrong}", content))
            else:
                rows.append(_figure_row(item, tensor, model.text_sees_pictures))
    return rows, rejections


def _encode_batch(
    model: FigureModel, items: list[Prepared], sizes: BatchSizes, bar: tqdm
) -> Iterator[tuple[list[Prepared], HostCopies]]:
    """Figures of one bucket without their pixels, and their latents in the store's bf16, on their way to the CPU."""

    def encode(part: Sequence[Prepared]) -> HostCopies:
        pixels = stacked([item.pixels for item in part], model.device)
        return HostCopies([model.encode_images(to_model_range(pixels)).to(torch.bfloat16)])

    for part, latents in sizes.whole_or_halves(encode, items):
        bar.update(len(part))
        yield [replace(item, pixels=_NO_PIXELS) for item in part], latents  # a whole shard waits: not its pixels as well


def _figure_row(item: Prepared, latents: Tensor, sees_pictures: bool) -> Row:
    """The row of a figure; a shard's schema takes the columns that it has."""
    references = keys_of(item.ref.references)
    seen = references if sees_pictures else b""
    captions, weights = item.ref.captions, item.ref.caption_weights
    columns = {
        "id": item.ref.id,
        "key": text_key(item.ref.id),
        "caption": item.ref.caption,
        "text_key": instruction_key(item.ref.caption, seen),
        "captions": json.dumps([captions, weights]).encode() if captions else b"",
        "caption_keys": b"".join(instruction_key(caption, seen) for caption in captions),
        "mask": b"" if item.mask is None else zlib.compress(item.mask.numpy().tobytes(), 9),
        "loss_weight": item.ref.weight,
        "references": references,
        "edit_boxes": np.asarray(item.edit_boxes, dtype=np.float32).tobytes(),
        "bucket_w": item.bucket.width,
        "bucket_h": item.bucket.height,
        "aspect_ratio": item.aspect_ratio,
        "placement": list(item.placement),
        "content": item.content,
    }
    return Row(columns, latents)
