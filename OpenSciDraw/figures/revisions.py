"""Captions edited: a new revision of the list, so that the one that a store or a run was made from stays as it is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.figures.described import clean_caption
from OpenSciDraw.figures.facts import row_facts
from OpenSciDraw.figures.listing import FigureRef, FileRef, list_figures
from OpenSciDraw.utils.files import write_text

_NUMBER = re.compile(r"(.+)\.revision-(\d{4})\.jsonl")


@dataclass(frozen=True)
class Revision:
    """`path` is the new list, to be given as `encode.figures`; `keys` are what else the config must say then."""

    path: Path
    changed: int
    keys: dict[str, str]


def revise_captions(source: str | Path, captions: Mapping[str, str]) -> Revision:
    """Write a list of all figures of `source` in which those of the given ids have other captions.

    `source` is a folder or list as `list_figures` takes it, of pictures in files of their own. The list lies in the source's
    folder as NAME.revision-0001.jsonl; a list that is a revision itself gets the next number. Nothing that was there is changed.
    Of a figure with several captions the first one is replaced.

    Raises:
        UserError: as `list_figures`; an unknown id; an empty caption; pictures inside tables or tars, which a list cannot name.
    """
    path = Path(source).expanduser().absolute()
    refs, _ = list_figures(path)
    known = {ref.id for ref in refs}
    unknown = [identity for identity in captions if identity not in known]
    if unknown:
        raise UserError(f"{source}: no figure with the id {unknown[0]!r:.200}. Ids are those of `list_figures`.")
    inside = next((ref for ref in refs if not isinstance(ref, FileRef)), None)
    if inside is not None:
        raise UserError(
            f"{source}: {inside.id} lies inside a table or tar, and a list names pictures in files of their own. Edit its captions "
            "where it was made, or unpack the pictures into a folder first."
        )
    texts = {}
    for identity, caption in captions.items():
        try:
            texts[identity] = clean_caption(caption)
        except RejectedFigure as error:
            raise UserError(f"{identity}: {error}. A figure without a caption is left out; to do that, remove it.") from error
    root = path if path.is_dir() else path.parent
    facts = row_facts(path)
    rows = [_row(root, ref, texts.get(ref.id), facts.get(ref.source, ("", ""))) for ref in refs]
    changed = sum(texts.get(ref.id, ref.caption) != ref.caption for ref in refs)
    target = next_revision(path)
    write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    columns = {"mask": "encode.mask_column", "weight": "encode.weight_column"}
    keys = {"encode.figures": str(target)} | {key: name for name, key in columns.items() if any(name in row for row in rows)}
    return Revision(target, changed, keys)


def next_revision(source: Path) -> Path:
    """Where the next revision of a folder or list goes: the first number that is not there."""
    found = _NUMBER.fullmatch(source.name)
    folder, stem = (source, "captions") if source.is_dir() else (source.parent, found[1] if found else source.stem)
    taken = [int(match[2]) for name in os.listdir(folder) if (match := _NUMBER.fullmatch(name)) and match[1] == stem]
    return folder / f"{stem}.revision-{max(taken, default=0) + 1:04d}.jsonl"


def _row(root: Path, ref: FigureRef, caption: str | None, facts: tuple[str, str]) -> dict[str, Any]:
    """A line of the list: all that the source says of a figure."""

    def place(of: FigureRef) -> str:
        return Path(os.path.relpath(of.source, root)).as_posix()

    row: dict[str, Any] = {"image": place(ref)}
    if ref.captions:
        row |= {"captions": [caption or ref.captions[0], *ref.captions[1:]], "caption_weights": list(ref.caption_weights)}
    else:
        row["caption"] = caption or ref.caption
    if ref.references:
        row["source_images"] = [place(reference) for reference in ref.references]
    if ref.edit_boxes:
        row["edit_bboxes"] = [list(box) for box in ref.edit_boxes]
    if ref.mask is not None:
        row["mask"] = place(ref.mask)
    if ref.weight != 1.0:
        row["weight"] = ref.weight
    if ref.bucket is not None:
        row |= {"bucket_w": ref.bucket[0], "bucket_h": ref.bucket[1]}
    return row | {name: value for name, value in zip(("quality", "kind"), facts, strict=True) if value}
