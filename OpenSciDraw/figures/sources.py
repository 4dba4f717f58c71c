"""How each kind of figure source is listed: folders with captions beside pictures, JSON lines, CSV, Parquet, Arrow."""

from __future__ import annotations

import csv
import hashlib
import logging
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.figures.refs import FigureRef, FileRef, Rejection, RowRef
from OpenSciDraw.figures.row_filter import SOURCE, RowFilter
from OpenSciDraw.figures.rows import ARROW_ERRORS, columns_of, resolve, schema_of
from OpenSciDraw.utils.files import parse_json

_LOG = logging.getLogger("OpenSciDraw")
IMAGE_COLUMNS = ("image", "file_name", "path", "image_path", "target_image_path")
CAPTION_COLUMNS = ("caption", "text", "prompt")
ID_COLUMN = b"id_column"  # in a table's metadata: the column with ids of its own, as `scienceflow prepare` writes it
LIST_NAMES = ("metadata.jsonl", "metadata.csv", "captions.jsonl", "captions.csv")
CAPTION_FILES = (".txt", ".caption", ".json")  # beside a picture; the first that is there counts
_BUCKET = ("bucket_w", "bucket_h")
_PICTURES = frozenset(".png .apng .jpg .jpeg .jpe .jfif .webp .gif .tif .tiff .bmp".split())
_VECTOR = frozenset(".pdf .svg .svgz .eps .ps .emf .wmf".split())
_OTHER = frozenset(".avif .heic .heif .jp2 .jxl .ppm .pgm .pbm .pnm .tga .psd .ico".split())
_MAX_CSV_FIELD = 1 << 24  # characters


class Listing:
    """What was found so far. Ids are unique; `root` is the folder that they are relative to."""

    def __init__(
        self, root: Path, image_column: str | None, caption_column: str | None, min_quality: str | None = None,
        where: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self.root = os.path.abspath(root)
        self.caption_column = caption_column
        self.filter = RowFilter(min_quality, where or {})
        self._columns = {"image": (image_column, IMAGE_COLUMNS), "caption": (caption_column, CAPTION_COLUMNS)}
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

    def add_file(self, path: Path, caption: object, bucket: tuple[int, int] | None = None) -> None:
        """A picture in a file of its own. `caption`: a text, UTF-8 bytes, a RejectedFigure, or None for none."""
        identity = self.id_of(path)
        self.named.add(str(path))
        try:
            status = _file_status(path, identity)
            self.add(FileRef(identity, clean_caption(caption), str(path), status.st_size, changed(status), bucket=bucket))
        except RejectedFigure as error:
            self.reject(identity, path, str(error))

    def column(self, kind: str, found: Iterable[str]) -> str | None:
        """The column of the 'image' or 'caption' among those found."""
        given, known = self._columns[kind]
        present = set(found)
        return next((name for name in ((given,) if given else known) if name in present), None)

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


def scan(listing: Listing, path: Path) -> None:
    """List a file or folder. Raises UserError when it cannot be read or is of a kind that is not a source."""
    try:
        if path.is_dir():
            _scan_folder(listing, path)
        elif path.suffix.lower() == ".jsonl":
            _add_rows(listing, path, jsonl_rows(path))
        elif path.suffix.lower() == ".csv":
            _add_rows(listing, path, _csv_rows(path))
        elif path.suffix.lower() in (".parquet", ".arrow"):
            _add_table(listing, path)
        else:
            raise UserError(f"{path} is not a list of figures. Allowed: a folder, .jsonl, .csv, .parquet or .arrow.")
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}.") from error


# -- folders -------------------------------------------------------------------------------------
def _scan_folder(listing: Listing, folder: Path) -> None:
    """Lists and tables first: pictures that one of them names need no caption beside them."""
    contents = list(_walk(folder))
    for directory, names in contents:
        for name in _tables(directory, names) + [name for name in names if name.lower() in LIST_NAMES]:
            scan(listing, directory / name)
    several: list[tuple[Path, list[str]]] = []  # captions that count for more than one picture
    for directory, names in contents:
        captions = {(stem, end.lower()): name for name in names for stem, end in [os.path.splitext(name)]}
        shared: dict[str, list[str]] = defaultdict(list)
        for name in names:
            path = Path(os.path.abspath(directory / name))
            kind = path.suffix.lower()
            if kind in _PICTURES | _VECTOR | _OTHER and str(path) not in listing.named:
                listing.filter.require_none(directory)
                beside = next((captions[key] for end in CAPTION_FILES if (key := (path.stem, end)) in captions), None)
                listing.add_file(path, _sidecar(path, beside, listing.caption_column))
                if beside is not None and kind in _PICTURES:
                    shared[beside].append(name)
        several += [(directory / caption, pictures) for caption, pictures in shared.items() if len(pictures) > 1]
    if several:
        caption, pictures = several[0]
        _LOG.warning("%d caption(s) lie beside several pictures of their name, and count for each of them; the first: %s beside %s",
                     len(several), caption, ", ".join(pictures))  # fmt: skip


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders and the names of their files, sorted; links are followed, each folder is visited once."""
    visited: set[str] = set()
    for directory, subfolders, names in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(directory)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(directory), sorted(name for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out folders that it may not read


def _tables(directory: Path, names: list[str]) -> list[str]:
    """Parquet and Arrow files; where `datasets` left a state.json it says which Arrow files count."""
    parquet = [name for name in names if name.lower().endswith(".parquet")]
    if "state.json" in names and "dataset_info.json" in names:
        try:
            saved = parse_json((directory / "state.json").read_bytes())
            return parquet + sorted(str(entry["filename"]) for entry in saved["_data_files"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{directory / 'state.json'} is not what `datasets` saves: {error!r}.") from error
    return parquet + [name for name in names if name.lower().endswith(".arrow") and not name.startswith("cache-")]


def _sidecar(path: Path, beside: str | None, key: str | None) -> object:
    """The caption in the file `beside` a picture. A RejectedFigure when it cannot be read."""
    if beside is None:
        return RejectedFigure(f"no caption: expected {path.stem}.txt, .caption or .json beside it")
    record = path.with_name(beside)
    try:
        if record.suffix.lower() != ".json":
            return record.read_bytes()
        values = parse_json(record.read_bytes())
    except OSError as error:
        return RejectedFigure(f"caption unreadable: {error}")
    except UnicodeDecodeError as error:
        return RejectedFigure(f"caption not UTF-8: {record.name}: {error}")
    except ValueError as error:
        return RejectedFigure(f"caption unreadable: {record.name}: {error}")
    keys = (key,) if key else CAPTION_COLUMNS
    found = next((values[name] for name in keys if name in values), None) if isinstance(values, dict) else None
    return RejectedFigure(f"no caption: {record.name} has no key {' or '.join(keys)}") if found is None else found


# -- lists ---------------------------------------------------------------------------------------
def _add_rows(listing: Listing, file: Path, rows: Iterator[tuple[int, dict[str, Any] | RejectedFigure]]) -> None:
    """Rows of a list with paths. The first row that has such a column decides which one it is."""
    keys: dict[str, None] = {}
    columns: dict[str, str | None] = {"image": None, "caption": None}
    for number, row in rows:
        where = f"{listing.id_of(file)}#{number}"
        if isinstance(row, RejectedFigure):
            listing.reject(where, f"{file}#{number}", str(row))
            continue
        keys.update(dict.fromkeys(row))
        for kind in columns:
            columns[kind] = columns[kind] or listing.column(kind, row)
        if (reason := listing.filter.reason(row)) is not None:
            listing.leave_out(where, f"{file}#{number}", reason, file.parent, row.get(columns["image"] or ""), row.get(SOURCE))
            continue
        try:
            path = resolve(file.parent, row.get(columns["image"] or ""))
        except RejectedFigure as error:
            listing.reject(where, f"{file}#{number}", str(error))
            continue
        listing.add_file(path, row.get(columns["caption"] or ""), _bucket_of(row))
    for kind, column in columns.items():
        if keys and column is None:
            raise listing.no_column(kind, keys, file)
    if keys:
        listing.filter.columns(keys, file)


def jsonl_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | RejectedFigure]]:
    """(line number, object) of every line that is not empty, or why it is none."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                yield number, RejectedFigure(f"not JSON: {error}")
                continue
            yield number, row if isinstance(row, dict) else RejectedFigure("not JSON: a line must be an object {…}")


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | RejectedFigure]]:
    previous = csv.field_size_limit(_MAX_CSV_FIELD)  # 131,072 characters otherwise; captions may be longer
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            reader = csv.DictReader(lines, restkey="(beyond the last column)", strict=True)
            for row in reader:
                yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: not CSV: {error}.") from error
    finally:
        csv.field_size_limit(previous)


# -- tables --------------------------------------------------------------------------------------
def _add_table(listing: Listing, file: Path) -> None:
    """Rows of a Parquet or Arrow file; of its pictures only paths are read here."""
    identity = listing.id_of(file)
    try:
        status, schema = file.stat(), schema_of(file)
    except ARROW_ERRORS as error:
        return listing.reject(identity, file, f"unreadable: {error}")
    image, caption = listing.column("image", schema.names), listing.column("caption", schema.names)
    if image is None or caption is None:
        raise listing.no_column("image" if image is None else "caption", schema.names, file)
    by_path = _is_path(schema.field(image).type, file, image)
    own_id = name.decode() if (name := (schema.metadata or {}).get(ID_COLUMN)) is not None and not by_path else None
    needed = [caption, *([image] if by_path else []), *([own_id] if own_id else [])]
    names = list(dict.fromkeys([*needed, *listing.filter.columns(schema.names, file)]))
    try:
        for number, values in enumerate(columns_of(file, names)):
            row = dict(zip(names, values, strict=True))
            where, place = row[own_id].decode() if own_id else f"{identity}#{number:08d}", f"{file}#{number}"
            if (reason := listing.filter.reason(row)) is not None:
                listing.leave_out(where, place, reason, file.parent, row[image] if by_path else None, row.get(SOURCE))
            elif by_path:
                _add_path_row(listing, file, where, place, row[caption], row[image], _bucket_of(row))
            else:
                ref = RowRef(where, "", place, status.st_size, changed(status), str(file), image, number)
                _add_byte_row(listing, ref, row[caption])
    except ARROW_ERRORS as error:
        listing.reject(identity, file, f"unreadable: {error}")


def _is_path(kind: pa.DataType, file: Path, column: str) -> bool:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return True
    in_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if in_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return False
    raise UserError(
        f"{file}: column {column!r} is {kind}. A picture is binary, struct<bytes, path> or a path (string)."
        " Set encode.image_column to such a column."
    )


def _add_path_row(
    listing: Listing, file: Path, where: str, place: str, caption: object, name: object, bucket: tuple[int, int] | None
) -> None:
    try:
        path = resolve(file.parent, name)
    except RejectedFigure as error:
        return listing.reject(where, place, str(error))
    listing.add_file(path, caption, bucket)


def _add_byte_row(listing: Listing, ref: RowRef, caption: object) -> None:
    try:
        listing.add(replace(ref, caption=clean_caption(caption)))
    except RejectedFigure as error:
        listing.reject(ref.id, ref.source, str(error))


# -- one figure ----------------------------------------------------------------------------------
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
    if suffix in _VECTOR:
        raise RejectedFigure(f"vector format: convert {suffix} to PNG first (pdftoppm -png, rsvg-convert)")
    if suffix in _OTHER:
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
