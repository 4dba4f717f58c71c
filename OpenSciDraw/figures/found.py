"""What was found in a figure source so far: figures, what is left out, and whose caption is whose."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.figures.edits import REFERENCE_COLUMNS, Boxes, boxes_in, named_in
from OpenSciDraw.figures.refs import FigureRef, FileRef, Rejection
from OpenSciDraw.figures.row_filter import RowFilter
from OpenSciDraw.figures.rows import resolve

IMAGE_COLUMNS = ("image", "file_name", "path", "image_path", "target_image_path")
CAPTION_COLUMNS = ("caption", "text", "prompt")
_BUCKET = ("bucket_w", "bucket_h")
VECTOR = frozenset(".pdf .svg .svgz .eps .ps .emf .wmf".split())
OTHER = frozenset(".avif .heic .heif .jp2 .jxl .ppm .pgm .pbm .pnm .tga .psd .ico".split())


class Listing:
    """What was found so far. Ids are unique; `root` is the folder that they are relative to."""

    def __init__(
        self, root: Path, image_column: str | None, caption_column: str | None, min_quality: str | None = None,
        where: Mapping[str, Any] | None = None, reference_column: str | None = None,
    ):  # fmt: skip
        self.root = os.path.abspath(root)
        self.caption_column = caption_column
        self.filter = RowFilter(min_quality, where or {})
        self._columns = {
            "image": (image_column, IMAGE_COLUMNS), "caption": (caption_column, CAPTION_COLUMNS),
            "reference": (reference_column, REFERENCE_COLUMNS),
        }  # fmt: skip
        self.refs: list[FigureRef] = []
        self.rejections: list[Rejection] = []
        self.named: set[str] = set()  # files that lists name
        self._captions: dict[str, str] = {}  # of each id

    def id_of(self, path: Path | str) -> str:
        """Path relative to the root, or absolute outside of it."""
        path = os.path.abspath(path)
        inside = os.path.commonpath([self.root, path]) == self.root
        return Path(os.path.relpath(path, self.root) if inside else path).as_posix()

    def reject(self, identity: str, source: Path | str, reason: str) -> None:
        self.rejections.append(Rejection(_printable(identity), _printable(str(source)), reason))

    def leave_out(self, identity: str, source: str, reason: str, folder: Path, *names: object) -> None:
        """A row that does not count; its pictures, named in `folder`, are none that lie there without a list either."""
        self.reject(identity, source, reason)
        for name in names:
            with suppress(RejectedFigure):
                self.named.add(str(resolve(folder, name)))

    def add(self, ref: FigureRef) -> None:
        first = self._captions.get(ref.id)
        if first is not None and first != ref.caption:
            ref = replace(ref, id=f"{ref.id}#{hashlib.sha256(ref.caption.encode()).hexdigest()[:12]}")
            first = self._captions.get(ref.id)
        if first is not None:
            return self.reject(ref.id, ref.source, "listed twice: with the same caption")
        self._captions[ref.id] = ref.caption
        self.refs.append(ref)

    def add_file(
        self, path: Path, caption: object, bucket: tuple[int, int] | None = None, references: Iterable[Path] = (), boxes: Boxes = ()
    ) -> None:
        """A picture in a file of its own. `caption`: a text, UTF-8 bytes, a RejectedFigure, or None for none."""
        identity, references = self.id_of(path), list(references)
        self.named |= {str(path), *map(str, references)}
        try:
            ref = replace(self._file(path), caption=clean_caption(caption), bucket=bucket)
            made_of = tuple(self.reference(reference) for reference in references)
            self.add(replace(ref, references=made_of, edit_boxes=boxes))
        except RejectedFigure as error:
            self.reject(identity, path, str(error))

    def _file(self, path: Path) -> FileRef:
        status = _file_status(path, identity := self.id_of(path))
        return FileRef(identity, "", str(path), status.st_size, changed(status))

    def reference(self, path: Path) -> FileRef:
        """A picture that an edit starts from. Raises RejectedFigure."""
        try:
            return self._file(path)
        except RejectedFigure as error:
            raise RejectedFigure(f"reference: {self.id_of(path)}: {error}") from error

    def column(self, kind: str, found: Iterable[str]) -> str | None:
        """The column of the 'image', 'caption' or 'reference' among those found."""
        given, known = self._columns[kind]
        present = set(found)
        return next((name for name in ((given,) if given else known) if name in present), None)

    def asks_for(self, kind: str) -> bool:
        """Whether the config names this column."""
        return self._columns[kind][0] is not None

    def no_column(self, kind: str, found: Iterable[str], file: Path) -> UserError:
        given, known = self._columns[kind]
        missing = f"no column {given!r}" if given else f"no column for the {kind} (known: {', '.join(known)})"
        return UserError(f"{file}: {missing}. It has: {', '.join(found)}. Set encode.{kind}_column to one of these.")


def _bucket_of(row: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height) that a published list names; None where it names none."""
    try:
        width, height = (int(row[name]) for name in _BUCKET)
    except (KeyError, TypeError, ValueError):
        return None
    return width, height


def names_in(value: object) -> list[Any]:
    with suppress(RejectedFigure):
        return named_in(value)
    return []


def add_path_row(
    listing: Listing, file: Path, where: str, place: str, row: Mapping[str, Any], columns: Mapping[str, str | None]
) -> None:
    """A row of a list or table that names its pictures by their paths."""
    try:
        path = resolve(file.parent, row.get(columns["image"] or ""))
        references = [resolve(file.parent, name) for name in named_in(row.get(columns["reference"] or ""))]
        boxes = boxes_in(row)
    except RejectedFigure as error:
        return listing.reject(where, place, str(error))
    listing.add_file(path, row.get(columns["caption"] or ""), _bucket_of(row), references, boxes)


def clean_caption(raw: object) -> str:
    """A caption, as a text or UTF-8 bytes, without blanks around it; lines end as on Unix, whatever wrote the file.

    Raises RejectedFigure: `raw` itself when it is one, and when there is no text or it is not Unicode.
    """
    if isinstance(raw, RejectedFigure):
        raise raw
    try:
        caption = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
        if not isinstance(caption, str):
            raise RejectedFigure("no caption" if raw is None else f"no caption: {type(raw).__name__}, not a text")
        caption.encode()
    except UnicodeError as error:
        raise RejectedFigure(f"caption not UTF-8: {error.reason}") from error  # type: ignore[attr-defined]
    if not (caption := caption.replace("\r\n", "\n").replace("\r", "\n").strip()):
        raise RejectedFigure("empty caption")
    return caption


def changed(status: os.stat_result) -> int:
    """When a file was last written, moved in or given other rights, in ns: the later of both times, for copies keep the one."""
    return max(status.st_mtime_ns, status.st_ctime_ns)


def _file_status(path: Path, identity: str) -> os.stat_result:
    """Size and times of a picture file. Raises RejectedFigure when it can be no figure, by its name or size."""
    if _printable(identity) != identity:
        raise RejectedFigure("file name not UTF-8: rename it")
    suffix = path.suffix.lower()
    if suffix in VECTOR:
        raise RejectedFigure(f"vector format: convert {suffix} to PNG first (pdftoppm -png, rsvg-convert)")
    if suffix in OTHER:
        raise RejectedFigure(f"unsupported format: convert {suffix} to PNG first")
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RejectedFigure("file not found") from error
    except OSError as error:
        raise RejectedFigure(f"unreadable: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise RejectedFigure("not a file")
    if not status.st_size:
        raise RejectedFigure("empty file")
    return status


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
