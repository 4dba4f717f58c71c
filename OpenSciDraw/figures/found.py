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
from OpenSciDraw.figures.described import CAPTION_COLUMNS, Described, Wanted, described_row
from OpenSciDraw.figures.edits import REFERENCE_COLUMNS, named_in
from OpenSciDraw.figures.refs import FigureRef, FileRef, Rejection
from OpenSciDraw.figures.row_filter import RowFilter
from OpenSciDraw.figures.rows import resolve

IMAGE_COLUMNS = ("image", "file_name", "path", "image_path", "target_image_path")
_BUCKET = ("bucket_w", "bucket_h")
PICTURES = frozenset(".png .apng .jpg .jpeg .jpe .jfif .webp .gif .tif .tiff .bmp".split())
VECTOR = frozenset(".pdf .svg .svgz .eps .ps .emf .wmf".split())
OTHER = frozenset(".avif .heic .heif .jp2 .jxl .ppm .pgm .pbm .pnm .tga .psd .ico".split())


class Listing:
    """What was found so far. Ids are unique; `root` is the folder that they are relative to."""

    def __init__(
        self, root: Path, image_column: str | None, wanted: Wanted, min_quality: str | None = None,
        where: Mapping[str, Any] | None = None, reference_column: str | None = None, mask_column: str | None = None,
    ):  # fmt: skip
        self.root = os.path.abspath(root)
        self.wanted = wanted
        self.filter = RowFilter(min_quality, where or {})
        self._columns = {
            "image": (image_column, IMAGE_COLUMNS), "reference": (reference_column, REFERENCE_COLUMNS),
            "mask": (mask_column, ()), "weight": (wanted.weight, ()),
        }  # fmt: skip
        self.refs: list[FigureRef] = []
        self.rejections: list[Rejection] = []
        self.named: set[str] = set()  # files that lists name
        self._captions: dict[str, tuple[str, ...]] = {}  # of each id

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
        captions = ref.captions or (ref.caption,)
        first = self._captions.get(ref.id)
        if first is not None and first != captions:
            ref = replace(ref, id=f"{ref.id}#{hashlib.sha256(chr(0).join(captions).encode()).hexdigest()[:12]}")
            first = self._captions.get(ref.id)
        if first is not None:
            return self.reject(ref.id, ref.source, "listed twice: with the same caption")
        self._captions[ref.id] = captions
        self.refs.append(ref)

    def add_file(
        self, path: Path, said: Described | RejectedFigure, bucket: tuple[int, int] | None = None, references: Iterable[Path] = (),
        mask: Path | None = None,
    ) -> None:  # fmt: skip
        """A picture in a file of its own, and what is said of it, or why nothing is."""
        identity, references = self.id_of(path), list(references)
        self.named |= {str(path), *map(str, references)} | ({str(mask)} if mask is not None else set())
        try:
            ref = self._file(path)
            if isinstance(said, RejectedFigure):
                raise said
            made_of = tuple(self.beside("reference", reference) for reference in references)
            masked_by = None if mask is None else self.beside("mask", mask)
            self.add(replace(said.of(ref), bucket=bucket, references=made_of, mask=masked_by))
        except RejectedFigure as error:
            self.reject(identity, path, str(error))

    def _file(self, path: Path) -> FileRef:
        status = _file_status(path, identity := self.id_of(path))
        return FileRef(identity, "", str(path), status.st_size, changed(status))

    def beside(self, kind: str, path: Path) -> FileRef:
        """A picture that belongs to a figure: a 'reference' that it starts from, or its 'mask'. Raises RejectedFigure."""
        try:
            return self._file(path)
        except RejectedFigure as error:
            raise RejectedFigure(f"{kind}: {self.id_of(path)}: {error}") from error

    def column(self, kind: str, found: Iterable[str]) -> str | None:
        """The column of the 'image', 'reference', 'mask' or 'weight' among those found."""
        given, known = self._columns[kind]
        present = set(found)
        return next((name for name in ((given,) if given else known) if name in present), None)

    def asks_for(self, kind: str) -> bool:
        """Whether the config names this column."""
        return self._columns[kind][0] is not None

    def require_columns(self, columns: Mapping[str, str | None], found: Iterable[str], file: Path) -> None:
        """Raises UserError unless a list or table with the columns `found` has all that the config names, picture and caption."""
        present = list(found)
        for kind, column in columns.items():
            if column is None and (kind == "image" or self.asks_for(kind)):
                given, known = self._columns[kind]
                raise self._no_column(kind, given, known, present, file)
        for name in self.wanted.captions:
            if name not in present:
                raise self._no_column("caption", name, (), present, file)
        if not self.wanted.names(present) and not self.wanted.optional:
            raise self._no_column("caption", None, CAPTION_COLUMNS, present, file)

    @staticmethod
    def _no_column(kind: str, given: str | None, known: Iterable[str], found: Iterable[str], file: Path) -> UserError:
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
    said: Described | RejectedFigure
    try:
        path = resolve(file.parent, row.get(columns["image"] or ""))
        references = [resolve(file.parent, name) for name in named_in(row.get(columns["reference"] or ""))]
        masks = [resolve(file.parent, name) for name in named_in(row.get(columns["mask"] or ""))]
    except RejectedFigure as error:
        return listing.reject(where, place, str(error))
    try:
        said = described_row(row, listing.wanted.names(row), listing.wanted)
    except RejectedFigure as error:
        said = error
    listing.add_file(path, said, _bucket_of(row), references, masks[0] if masks else None)


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
