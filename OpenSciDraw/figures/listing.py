"""Figures in: (id, caption, picture) from a folder, a list, Parquet or the drawing program.

Listing reads captions and file sizes, never pixels: 700,000 figures are a list of small objects. `load_figure`
reads one picture when it is needed. What cannot be used is returned with a reason, never left out in silence.
An id is where the figure lies, relative to the source (path with its extension, or file#row), so it is the same
on every machine and does not move when other figures come or go.

A source is one of
- a folder, searched with its subfolders: pictures with a caption in x.txt, x.caption or x.json (keys caption, text
  or prompt) beside x.png; lists (metadata.jsonl, metadata.csv, captions.jsonl, captions.csv); *.parquet; *.arrow
  (as Hugging Face `datasets` saves them). Names that begin with a dot are not looked at;
- a .tar as WebDataset has them (or a folder of such): x.png with x.txt or x.json, one figure for each name up to its first dot;
- a .jsonl or .csv list with the picture's path and its caption, or a .parquet or .arrow file, with the picture's
  bytes, {bytes, path} or path. Relative paths start at the list's folder and must stay inside it;
- 'drawn:COUNT[:seed=S][:size=PIXELS][:style=STYLE][:edit]': figures that the program draws; with `edit`, pairs of
  figures before and after an edit, with instructions (drawn/edits.py; styles small, the default then, house, mosaic, letters
  and repaint).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from OpenSciDraw.config import EncodeConfig
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.figures.refs import DrawnRef, FigureRef, FileRef, Rejection, RowRef, content_of, load_figure
from OpenSciDraw.utils.files import unfinished

__all__ = [
    "DrawnRef", "FigureRef", "FileRef", "RejectedFigure", "Rejection", "RowRef", "content_of", "figures_of", "list_figures",
    "load_figure", "write_rejected",
]  # fmt: skip
_DRAWN = "drawn:COUNT[:seed=S][:size=PIXELS][:style=STYLE][:edit]"


def list_figures(
    source: str | Path,
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    max_figures: int | None = None,
    min_quality: str | None = None,
    where: Mapping[str, Any] | None = None,
    reference_column: str | None = None,
    *,
    caption_weights: Sequence[float] = (),
    caption_lines: bool = False,
    mask_column: str | None = None,
    weight_column: str | None = None,
    optional_captions: bool = False,
    note_columns: Sequence[str] = (),
) -> tuple[list[FigureRef], list[Rejection]]:
    """List the figures of a source, sorted by id, and what is left out at sight, with reasons.

    What a source may be stands in the module's text.

    Columns are found by name (image, file_name, path, image_path or target_image_path; caption, text or prompt) unless given.
    Edits name the pictures that they start from: x.source.png (x.source2.png, …) beside x.png, or a column source_image,
    source_image_path, reference_image (…), and may say by `edit_bboxes` where they change something: see edits.py.
    A figure may have several captions: a list in its row or .json, several `caption_column`s with `caption_weights`, or with
    `caption_lines` the lines of its .txt. x.mask.png beside x.png, or `mask_column`, says where it counts in the loss, and
    `weight_column` (also a key of x.json) how much.
    A second caption for one picture is kept under the id 'path#hash of the caption'. Figures without a caption
    are rejected: they would teach nothing; with `optional_captions` they are listed, with "" as caption. `note_columns` are
    columns (or keys of x.json) with further texts about a figure, kept where they are there. `max_figures` keeps the first
    ones, `min_quality` ('low', 'medium', 'high') rows of such a tier (columns quality, quality_tier), `where` rows with these
    values ({'split': 'gen_768'}).

    Raises UserError when the source is missing, unknown or without usable figures, has no such columns, or several splits
    of which none is chosen.
    """
    if str(source).startswith("drawn:"):
        return _list_drawn(str(source), max_figures), []
    from OpenSciDraw.figures.described import Wanted
    from OpenSciDraw.figures.found import Listing
    from OpenSciDraw.figures.sources import scan

    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"There is no figure source {source} (working directory: {Path.cwd()}). {_allowed()}")
    captions = (caption_column,) if isinstance(caption_column, str) else tuple(caption_column or ())
    wanted = Wanted(captions, tuple(caption_weights), caption_lines, weight_column, optional_captions, tuple(note_columns))
    root = path if path.is_dir() else path.parent
    listing = Listing(root, image_column, wanted, min_quality, where, reference_column, mask_column)
    scan(listing, path)
    listing.filter.require_one_split(source)
    if not listing.refs:
        raise UserError(_nothing(source, listing.rejections))
    listing.refs.sort(key=lambda ref: ref.id)
    listing.rejections.sort(key=lambda rejection: rejection.id)
    return listing.refs[:max_figures], listing.rejections


def figures_of(
    encode: EncodeConfig, optional_captions: bool = False, note_columns: Sequence[str] = ()
) -> tuple[list[FigureRef], list[Rejection]]:
    """The figures of `encode.figures`, read by that section's keys, as `list_figures` has them."""
    return list_figures(
        str(encode.figures), encode.image_column, encode.caption_column, encode.max_figures, encode.min_quality, encode.where,
        encode.reference_column, caption_weights=encode.caption_weights, caption_lines=encode.caption_lines,
        mask_column=encode.mask_column, weight_column=encode.weight_column, optional_captions=optional_captions,
        note_columns=note_columns,
    )  # fmt: skip


def _allowed() -> str:
    return f"Allowed: a folder, a .jsonl, .csv, .parquet, .arrow or .tar file, or {_DRAWN}."


def _nothing(source: str | Path, rejections: Sequence[Rejection]) -> str:
    if not rejections:
        return f"{source} holds no figures: no PNG, JPEG, WebP, GIF, TIFF or BMP, no list, no Parquet. {_allowed()}"
    kinds = Counter(rejection.reason.split(":")[0] for rejection in rejections)
    counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    first = rejections[0]
    return f"{source}: none of {len(rejections)} figures is usable ({counts}). The first: {first.id}: {first.reason}."


def _list_drawn(source: str, max_figures: int | None) -> list[FigureRef]:
    _, count, *options = source.split(":")
    edit = "edit" in options
    values, style = {"seed": 0}, "small" if edit else "rich"
    for option in options:
        name, _, value = option.partition("=")
        if name == "style":
            style = value
        elif option != "edit" and (name not in ("seed", "size") or not value.isdecimal()):
            raise UserError(f"Cannot read {option!r} in {source!r}. Write {_DRAWN}, for example drawn:2000:seed=1.")
        elif option != "edit":
            values[name] = int(value)
    size = values.get("size", 256 if style == "rich" else 128)
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"Cannot read the count {count!r} in {source!r}. Write {_DRAWN}, for example drawn:2000.")
    if edit and values.get("size", 128) != 128:
        raise UserError(f"{source!r}: edits have 128 x 128 px. Leave size={size} out.")
    number = int(count) if max_figures is None else min(int(count), max_figures)
    return [(_edit_ref if edit else _drawn_ref)(values["seed"], index, size, style) for index in range(number)]


def _drawn_ref(seed: int, index: int, size: int, style: str) -> DrawnRef:
    from OpenSciDraw.drawn.figure import draw_figure

    figure = draw_figure(seed, index, size, style=style)  # a drawn figure's caption is known once it is drawn
    place = f"drawn:seed={seed}:size={size}:style={style}#{index}"
    return DrawnRef(f"{figure.id}-{size}px", figure.caption, place, 0, 0, seed, index, size, style)


def _edit_ref(seed: int, index: int, size: int, style: str) -> DrawnRef:
    from OpenSciDraw.drawn.edits import draw_edit

    edit = draw_edit(seed, index, style)
    place = f"drawn:seed={seed}:style={style}:edit#{index}"
    before = DrawnRef(f"{edit.id}.source", edit.before.caption, f"{place}.source", 0, 0, seed, index, size, style, edit="before")
    return DrawnRef(edit.id, edit.instruction, place, 0, 0, seed, index, size, style, edit="after", references=(before,),
                    edit_boxes=edit.boxes)  # fmt: skip


def write_rejected(path: str | Path, rejections: Iterable[Rejection]) -> None:
    """Write {id, source, reason} as JSON lines. The file is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as part, part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for rejection in rejections:
            said = {"id": rejection.id, "source": rejection.source, "reason": rejection.reason}
            file.write(json.dumps(said, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
