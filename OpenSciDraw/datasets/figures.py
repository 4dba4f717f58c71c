"""Figures in: (id, caption, picture) from a folder, a list, Parquet or the drawing program.

Listing reads captions and file sizes, never pixels: 700,000 figures are a list of small objects. `load_figure`
reads one picture when it is needed. What cannot be used is returned with a reason, never left out in silence.
An id is where the figure lies, relative to the source (path with its extension, or file#row), so it is the same
on every machine and does not move when other figures come or go.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from PIL import Image

from OpenSciDraw.datasets.decode import MAX_ASPECT_RATIO, MAX_IMAGE_PIXELS, MIN_SIDE, RejectedFigure, decode_picture
from OpenSciDraw.errors import UserError
from OpenSciDraw.utils.files import unfinished

if TYPE_CHECKING:
    from OpenSciDraw.datasets.drawn import DrawnFigure

__all__ = [
    "DrawnRef", "FigureRef", "FileRef", "RejectedFigure", "Rejection", "RowRef", "list_figures", "load_figure",
    "write_rejected",
]  # fmt: skip
_MAX_FILE_BYTES = 1 << 30  # a 16-bit RGB picture of MAX_IMAGE_PIXELS, uncompressed, has 0.6 GB
_DRAWN = "drawn:COUNT[:seed=S][:size=PIXELS][:style=STYLE]"


@dataclass(frozen=True, slots=True)
class FigureRef:
    """A figure that was listed and not yet read.

    `source` names for a reader where it is: a file path, 'file#row' or the drawing program's own figure.
    `size_bytes` and `changed_ns` are those of the file that holds it (for a row: the whole file; 0 for drawn figures), so
    that a figure that was replaced can be told from the one that was encoded. `bucket` is (width, height) where a list names it.
    """

    id: str
    caption: str
    source: str
    size_bytes: int
    changed_ns: int = field(compare=False)
    bucket: tuple[int, int] | None = field(default=None, kw_only=True)

    def read(self) -> bytes:
        """The picture file's bytes. Raises RejectedFigure when they cannot be read."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class FileRef(FigureRef):
    """A figure in a file of its own: `source` is its path."""

    def read(self) -> bytes:
        if self.size_bytes > _MAX_FILE_BYTES:
            raise RejectedFigure(f"too large: a file of {self.size_bytes} bytes, over {_MAX_FILE_BYTES}")
        try:
            return Path(self.source).read_bytes()
        except OSError as error:
            raise RejectedFigure(f"unreadable: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class RowRef(FigureRef):
    """A figure in row `row` of a Parquet or Arrow file: column `column` holds bytes or {bytes, path}."""

    file: str
    column: str
    row: int

    def read(self) -> bytes:
        from OpenSciDraw.datasets.figure_rows import read_cell

        return read_cell(self.file, self.column, self.row)


@dataclass(frozen=True, slots=True)
class DrawnRef(FigureRef):
    """A figure that the program draws again whenever it is read."""

    seed: int
    index: int
    size: int
    style: str

    def draw(self) -> DrawnFigure:
        """Picture, caption and ground truth."""
        from OpenSciDraw.datasets.drawn import draw_figure

        return draw_figure(self.seed, self.index, self.size, style=self.style)

    def read(self) -> bytes:
        png = BytesIO()
        self.draw().image.save(png, "PNG", compress_level=1)
        return png.getvalue()


@dataclass(frozen=True)
class Rejection:
    """A figure that is left out. `reason` is 'kind: details'; `content` the hash of its file, where it was read."""

    id: str
    source: str
    reason: str
    content: str | None = None


def load_figure(
    figure: FigureRef | bytes,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    min_side: int = MIN_SIDE,
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
) -> Image.Image:
    """The figure as an upright 8-bit RGB picture, transparency on white, colours in sRGB.

    See `decode_picture` for what is converted. Limits are in pixels and long side / short side;
    figures that the program draws are within them.

    Raises RejectedFigure with the reason.
    """
    if isinstance(figure, DrawnRef):
        return figure.draw().image
    data = figure.read() if isinstance(figure, FigureRef) else figure
    return decode_picture(data, max_image_pixels, min_side, max_aspect_ratio)


def content_of(ref: FigureRef) -> bytes | None:
    """Hash of a figure's file or cell; None where it cannot be read, or is drawn."""
    try:
        return None if isinstance(ref, DrawnRef) else xxhash.xxh3_128_digest(ref.read())
    except RejectedFigure:
        return None


def list_figures(
    source: str | Path,
    image_column: str | None = None,
    caption_column: str | None = None,
    max_figures: int | None = None,
    min_quality: str | None = None,
    where: Mapping[str, Any] | None = None,
) -> tuple[list[FigureRef], list[Rejection]]:
    """List the figures of a source, sorted by id, and what is left out at sight, with reasons.

    A source is one of
    - a folder, searched with its subfolders: pictures with a caption in x.txt, x.caption or x.json (keys caption, text
      or prompt) beside x.png; lists (metadata.jsonl, metadata.csv, captions.jsonl, captions.csv); *.parquet; *.arrow
      (as Hugging Face `datasets` saves them). Names that begin with a dot are not looked at;
    - a .jsonl or .csv list with the picture's path and its caption, or a .parquet or .arrow file, with the picture's
      bytes, {bytes, path} or path. Relative paths start at the list's folder and must stay inside it;
    - 'drawn:COUNT[:seed=S][:size=PIXELS][:style=STYLE]': figures that the program draws.

    Columns are found by name (image, file_name, path, image_path or target_image_path; caption, text or prompt) unless given.
    A second caption for one picture is kept under the id 'path#hash of the caption'. Figures without a caption
    are rejected: they would teach nothing. `max_figures` keeps the first ones, `min_quality` ('low', 'medium', 'high') rows
    of such a tier (columns quality, quality_tier), `where` rows with these values ({'split': 'gen_768'}).

    Raises UserError when the source is missing, unknown or without usable figures, has no such columns, or several splits
    of which none is chosen.
    """
    if str(source).startswith("drawn:"):
        return _list_drawn(str(source), max_figures), []
    from OpenSciDraw.datasets.figure_lists import Listing, scan

    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"There is no figure source {source} (working directory: {Path.cwd()}). {_allowed()}")
    listing = Listing(path if path.is_dir() else path.parent, image_column, caption_column, min_quality, where)
    scan(listing, path)
    listing.filter.require_one_split(source)
    if not listing.refs:
        raise UserError(_nothing(source, listing.rejections))
    listing.refs.sort(key=lambda ref: ref.id)
    listing.rejections.sort(key=lambda rejection: rejection.id)
    return listing.refs[:max_figures], listing.rejections


def _allowed() -> str:
    return f"Allowed: a folder, a .jsonl, .csv, .parquet or .arrow file, or {_DRAWN}."


def _nothing(source: str | Path, rejections: Sequence[Rejection]) -> str:
    if not rejections:
        return f"{source} holds no figures: no PNG, JPEG, WebP, GIF, TIFF or BMP, no list, no Parquet. {_allowed()}"
    kinds = Counter(rejection.reason.split(":")[0] for rejection in rejections)
    counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    first = rejections[0]
    return f"{source}: none of {len(rejections)} figures is usable ({counts}). The first: {first.id}: {first.reason}."


def _list_drawn(source: str, max_figures: int | None) -> list[FigureRef]:
    _, count, *options = source.split(":")
    values, style = {"seed": 0, "size": 256}, "rich"
    for option in options:
        name, _, value = option.partition("=")
        if name == "style":
            style, values["size"] = value, values["size"] if value == "rich" else 128
        elif name not in values or not value.isdecimal():
            raise UserError(f"Cannot read {option!r} in {source!r}. Write {_DRAWN}, for example drawn:2000:seed=1.")
        else:
            values[name] = int(value)
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"Cannot read the count {count!r} in {source!r}. Write {_DRAWN}, for example drawn:2000.")
    number = int(count) if max_figures is None else min(int(count), max_figures)
    return [_drawn_ref(values["seed"], index, values["size"], style) for index in range(number)]


def _drawn_ref(seed: int, index: int, size: int, style: str) -> DrawnRef:
    from OpenSciDraw.datasets.drawn import draw_figure

    figure = draw_figure(seed, index, size, style=style)  # a drawn figure's caption is known once it is drawn
    place = f"drawn:seed={seed}:size={size}:style={style}#{index}"
    return DrawnRef(f"{figure.id}-{size}px", figure.caption, place, 0, 0, seed, index, size, style)


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
