"""The list of figures with their new captions, as every command reads it: figures/ in the folder of `scienceflow caption`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from OpenSciDraw.captions.answers import Answers
from OpenSciDraw.captions.asking import Outcome
from OpenSciDraw.captions.styles import Style
from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.figures.refs import FigureRef, FileRef, load_figure
from OpenSciDraw.figures.tables import ID_COLUMN
from OpenSciDraw.utils.files import sync_to_disk, unfinished

LIST = "captions.jsonl"
_ROWS, _GROUP = 512, 16  # figures in a Parquet file, and in a row group: what a reader of one picture reads
_COLUMNS = {
    "id": pa.string(), "image": pa.large_binary(), "captions": pa.list_(pa.string()), "caption_weights": pa.list_(pa.float64()),
    "source_caption": pa.string(), "bucket_w": pa.int32(), "bucket_h": pa.int32(), "weight": pa.float64(),
    "mask": pa.large_binary(),
}  # fmt: skip


@dataclass(frozen=True)
class Captioned:
    """A figure with at least one new caption: `texts` are (style, caption, weight), the main one first."""

    ref: FigureRef
    texts: tuple[tuple[str, str, float], ...]


def captioned(refs: Sequence[FigureRef], styles: Sequence[Style], outcome: Outcome, answers: Answers) -> Iterator[Captioned]:
    """The figures that have a new caption, in the order of `refs`; read one by one, as there may be many."""
    for number, ref in enumerate(refs):
        if not any((number, style.name) in outcome.found for style in styles):
            continue
        texts: list[tuple[str, str, float]] = []
        for style in styles:
            if (at := outcome.found.get((number, style.name))) is not None:
                texts.append((style.name, answers.caption(at), style.weight))
            elif not style.is_asked and ref.caption:
                own, shares = ref.captions or (ref.caption,), ref.caption_weights or (1.0,)
                texts += [(style.name, text, style.weight * share) for text, share in zip(own, shares, strict=True)]
        yield Captioned(ref, tuple(texts))


def _row(figure: Captioned) -> dict[str, Any]:
    """The columns that both kinds of list have."""
    ref = figure.ref
    row: dict[str, Any] = {
        "id": ref.id, "captions": [text for _, text, _ in figure.texts],
        "caption_weights": [weight for *_, weight in figure.texts], "source_caption": ref.caption,
    }  # fmt: skip
    if ref.bucket is not None:
        row |= dict(zip(("bucket_w", "bucket_h"), ref.bucket, strict=True))
    if ref.weight != 1.0:
        row["weight"] = ref.weight
    return row


def write_list(figures: Iterator[Captioned], folder: Path, pictures_inside: bool, has_masks: bool) -> Counter[str]:
    """Write captions.jsonl, which names pictures by their paths, or Parquet files with the pictures in them.

    `has_masks`: any of the figures has one. In Parquet the others then get a white one, as its column holds one for each.
    What an earlier list of `folder` had and this one has not is removed. Returns how many of its figures have a mask and a
    weight, which the reader must ask for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needs: Counter[str] = Counter()
    before = {path.name for path in [*folder.glob("*.parquet"), folder / LIST] if path.is_file()}
    if pictures_inside:
        written = _write_parquet(figures, folder, needs, has_masks)
    else:
        written = {_write_lines(figures, folder / LIST, needs)}
    for name in before - written:
        (folder / name).unlink()
    return needs


def pictures_are_files(refs: Sequence[FigureRef]) -> bool:
    """Whether each picture, and its mask, lies in a file of its own."""
    return all(isinstance(ref, FileRef) and (ref.mask is None or isinstance(ref.mask, FileRef)) for ref in refs)


def _write_lines(figures: Iterator[Captioned], file: Path, needs: Counter[str]) -> str:
    with unfinished(file) as part, part.open("w", encoding="utf-8") as lines:
        for figure in figures:
            row = {**_row(figure), "file_name": figure.ref.source}
            if figure.ref.mask is not None:
                row["mask"] = figure.ref.mask.source
            needs.update(name for name in ("mask", "weight") if name in row)
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        lines.flush()
        os.fsync(lines.fileno())
    return file.name


def _white(file: bytes) -> bytes:
    """The mask of a figure that counts everywhere. Raises RejectedFigure."""
    png = BytesIO()
    Image.new("L", load_figure(file, min_side=1, max_aspect_ratio=float("inf")).size, 255).save(png, "PNG")
    return png.getvalue()


def _write_parquet(figures: Iterator[Captioned], folder: Path, needs: Counter[str], has_masks: bool) -> set[str]:
    written: set[str] = set()
    rows: list[dict[str, Any]] = []

    def write() -> None:
        name = f"{len(written):05d}.parquet"
        schema = pa.schema(_COLUMNS, metadata={ID_COLUMN: b"id"})
        with unfinished(folder / name) as part:
            table = pa.Table.from_pylist(rows, schema)
            pq.write_table(table, part, row_group_size=_GROUP, use_dictionary=False, write_statistics=False)
            sync_to_disk(part)
        written.add(name)
        rows.clear()

    for figure in figures:
        try:
            row = {**_row(figure), "image": figure.ref.read()}
            if has_masks:
                row["mask"] = _white(row["image"]) if figure.ref.mask is None else figure.ref.mask.read()
        except RejectedFigure:  # it was read to be asked about; who took it away since then finds it missing
            needs["unreadable"] += 1
            continue
        needs.update(["mask"] * (figure.ref.mask is not None) + ["weight"] * ("weight" in row))
        rows.append(row)
        if len(rows) == _ROWS:
            write()
    if rows or not written:
        write()
    return written
