"""WebDataset tars: how figures in them are listed, and how one is read again by its place in the file.

Files of one name up to its first dot are one figure: x.png with x.txt or x.json, x.mask.png, x.source.png. Nothing is unpacked, so
that names lead nowhere; a listing reads headers and captions, and remembers where each picture begins.
"""

from __future__ import annotations

import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.figures.described import NOTHING, Described, described_json, described_text
from OpenSciDraw.figures.edits import MOST_REFERENCES, beside, masks_beside
from OpenSciDraw.figures.found import OTHER, PICTURES, VECTOR, Listing, changed
from OpenSciDraw.figures.refs import SpanRef

CAPTION_FILES = (".txt", ".caption", ".json")  # beside a picture; the first that is there counts
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MOST_HEADER_BYTES = 1 << 20  # of one read: a header's own size field could ask for all memory
_MOST_CAPTION_BYTES = 1 << 24
_TAR_ERRORS = (tarfile.TarError, OSError, ValueError, EOFError)


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int


class _Bounded:
    """A file of which no read is larger than a header may be: tarfile believes the sizes that it finds."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes, over {_MOST_HEADER_BYTES}")
        return self._file.read(size)


def add_tar(listing: Listing, file: Path) -> None:
    """The figures of a tar; of its pictures only the places are read here. A tar that ends early keeps those before."""
    identity = listing.id_of(file)
    if file.name.lower().endswith(COMPRESSED):
        return listing.reject(identity, file, "compressed tar: a figure in it has no place of its own. Unpack it to .tar (gunzip)")
    listing.filter.require_none(file)
    samples: defaultdict[str, dict[str, _Member]] = defaultdict(dict)
    with file.open("rb") as opened:
        try:
            for member in _members(listing, file, opened):
                folder, name = os.path.split(member.name)
                stem, _, end = name.partition(".")
                parts = samples[os.path.join(folder, stem)]
                if parts.setdefault(end.lower(), member) is not member:
                    listing.reject(f"{identity}#{member.name}", f"{file}#{member.name}", "listed twice: a second file of this name")
        except _TAR_ERRORS as error:
            listing.reject(identity, file, f"damaged tar: {error}")
        status = os.fstat(opened.fileno())
        for key in sorted(samples):
            _add_sample(listing, file, opened, changed(status), key, samples[key])


def _members(listing: Listing, file: Path, opened: IO[bytes]) -> Iterator[_Member]:
    """The plain files of a tar whose names do not begin with a dot; of other kinds (links, devices) a rejection each."""
    size = os.fstat(opened.fileno()).st_size
    with tarfile.open(fileobj=_Bounded(opened), mode="r:", errors="surrogateescape") as tar:  # type: ignore[call-overload]
        for entry in tar:
            tar.members = []  # type: ignore[attr-defined]  # else every header of the file stays in memory
            name = os.path.normpath(entry.name)
            if entry.isdir() or os.path.basename(name).startswith("."):
                continue
            where = f"{listing.id_of(file)}#{name}"
            if not entry.isreg() or entry.issparse():
                listing.reject(where, f"{file}#{name}", "not a file: a link, a device or a sparse file in a tar")
            elif entry.offset_data + entry.size > size:
                raise tarfile.ReadError(f"{name} goes beyond the end of the file")
            else:
                yield _Member(name, entry.offset_data, entry.size)


def _add_sample(listing: Listing, file: Path, opened: IO[bytes], changed_ns: int, key: str, parts: Mapping[str, _Member]) -> None:
    """One name's files. Pictures of two kinds (x.png, x.jpg) share the caption; files of other kinds are not looked at."""
    suffixes = PICTURES | VECTOR | OTHER
    by_name = {part.name: part for end, part in parts.items() if os.path.splitext(f"x.{end}")[1] in suffixes}
    own = [part for part in by_name.values() if os.path.splitext(part.name)[0] == key]
    made_of, mask = beside(list(by_name)).get(key, []), masks_beside(list(by_name)).get(key)
    identity = listing.id_of(file)

    def ref_of(part: _Member) -> SpanRef:
        if not part.size:
            raise RejectedFigure("empty file")
        return SpanRef(f"{identity}#{part.name}", "", f"{file}#{part.name}", part.size, changed_ns, str(file), part.offset)

    for part in own or list(by_name.values())[:1]:
        try:
            if not own:
                raise RejectedFigure(f"no caption: it belongs to {key}.png or the like, which is not there")
            if (suffix := os.path.splitext(part.name)[1].lower()) not in PICTURES:
                raise RejectedFigure(f"unsupported format: convert {suffix} to PNG first")
            if len(made_of) > MOST_REFERENCES:
                raise RejectedFigure(f"references: {len(made_of)} of them, at most {MOST_REFERENCES}")
            said = _said(listing, key, opened, parts)
            references = tuple(ref_of(by_name[name]) for name in made_of)
            listing.add(replace(said.of(ref_of(part)), references=references, mask=None if mask is None else ref_of(by_name[mask])))
        except RejectedFigure as error:
            listing.reject(f"{identity}#{part.name}", f"{file}#{part.name}", str(error))


def _said(listing: Listing, key: str, opened: IO[bytes], parts: Mapping[str, _Member]) -> Described:
    """What the file beside a picture says of it. Raises RejectedFigure."""
    end = next((end for suffix in CAPTION_FILES if (end := suffix[1:]) in parts), None)
    if end is None and listing.wanted.optional:
        return NOTHING
    if end is None:
        raise RejectedFigure(f"no caption: expected {os.path.basename(key)}.txt, .caption or .json beside it")
    part = parts[end]
    if part.size > _MOST_CAPTION_BYTES:
        raise RejectedFigure(f"caption unreadable: {part.name} has {part.size} bytes, over {_MOST_CAPTION_BYTES}")
    opened.seek(part.offset)
    data = opened.read(part.size)
    return described_json(part.name, data, listing.wanted) if end == "json" else described_text(data, listing.wanted)
