"""One figure of a source: where it lies, and how its picture is read when it is needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import xxhash
from PIL import Image

from OpenSciDraw.figures.decode import MAX_ASPECT_RATIO, MAX_IMAGE_PIXELS, MIN_SIDE, RejectedFigure, decode_picture

if TYPE_CHECKING:
    from OpenSciDraw.drawn.figure import DrawnFigure

MAX_FILE_BYTES = 1 << 30  # a 16-bit RGB picture of MAX_IMAGE_PIXELS, uncompressed, has 0.6 GB


@dataclass(frozen=True, slots=True)
class FigureRef:
    """A figure that was listed and not yet read.

    `source` names for a reader where it is: a file path, 'file#row' or the drawing program's own figure.
    `size_bytes` and `changed_ns` are those of the file that holds it (for a row: the whole file; 0 for drawn figures), so
    that a figure that was replaced can be told from the one that was encoded. `bucket` is (width, height) where a list names it.
    The result of an edit has the pictures that it was made from as `references`; its caption is the instruction, and `edit_boxes`,
    where they are known, are the places that the edit changes: x0, y0, x1, y1 in pixels of this picture.
    Of a figure with several captions, `captions` are all of them, `caption` the first, and `caption_weights`, of sum 1, how often
    each is trained on. `mask` is a picture whose brightness says where the figure counts in the loss, `weight` how much it does.
    `notes` are (column, text) of what else its source says of it, where that was asked for.
    """

    id: str
    caption: str
    source: str
    size_bytes: int
    changed_ns: int = field(compare=False)
    bucket: tuple[int, int] | None = field(default=None, kw_only=True)
    references: tuple[FigureRef, ...] = field(default=(), kw_only=True)
    edit_boxes: tuple[tuple[float, float, float, float], ...] = field(default=(), kw_only=True)
    captions: tuple[str, ...] = field(default=(), kw_only=True)
    caption_weights: tuple[float, ...] = field(default=(), kw_only=True)
    mask: FigureRef | None = field(default=None, kw_only=True)
    weight: float = field(default=1.0, kw_only=True)
    notes: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)

    def read(self) -> bytes:
        """The picture file's bytes. Raises RejectedFigure when they cannot be read."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class FileRef(FigureRef):
    """A figure in a file of its own: `source` is its path."""

    def read(self) -> bytes:
        if self.size_bytes > MAX_FILE_BYTES:
            raise RejectedFigure(f"too large: a file of {self.size_bytes} bytes, over {MAX_FILE_BYTES}")
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
        from OpenSciDraw.figures.rows import read_cell

        return read_cell(self.file, self.column, self.row)


@dataclass(frozen=True, slots=True)
class SpanRef(FigureRef):
    """A figure in a piece of a larger file, as tars have them: `size_bytes` bytes from `offset` on."""

    file: str
    offset: int

    def read(self) -> bytes:
        if self.size_bytes > MAX_FILE_BYTES:
            raise RejectedFigure(f"too large: a file of {self.size_bytes} bytes, over {MAX_FILE_BYTES}")
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size_bytes)
        except OSError as error:
            raise RejectedFigure(f"unreadable: {error.strerror}") from error
        if len(data) != self.size_bytes:
            raise RejectedFigure(f"truncated: {self.file} ends within it")
        return data


@dataclass(frozen=True, slots=True)
class DrawnRef(FigureRef):
    """A figure that the program draws again whenever it is read: one of its own, or an edit "before" or "after" it."""

    seed: int
    index: int
    size: int
    style: str
    edit: Literal["before", "after"] | None = field(default=None, kw_only=True)

    def draw(self) -> DrawnFigure:
        """Picture, caption and ground truth."""
        if self.edit is not None:
            from OpenSciDraw.drawn.edits import draw_edit

            edit = draw_edit(self.seed, self.index, self.style)
            return edit.before if self.edit == "before" else edit.after
        from OpenSciDraw.drawn.figure import draw_figure

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
    """Hash of a figure's file or cell, and its mask's; None where they cannot be read, or it is drawn."""
    try:
        mask = b"" if ref.mask is None else ref.mask.read()
        return None if isinstance(ref, DrawnRef) else xxhash.xxh3_128_digest(ref.read() + mask)
    except RejectedFigure:
        return None
