"""Papers' sources as they come: arXiv e-prints, bulk archives, LaTeX projects. Unpacked without trusting them.

An e-print is a gzipped tar, a single gzipped .tex file, or a PDF (a paper without source). arXiv's bulk archives
(arXiv_src_1501_001.tar) hold e-prints; each is read from its place in the archive. A folder in which .tex files
lie is one paper with all that is below it; other folders are piles that are searched.
"""

from __future__ import annotations

import errno
import gzip
import logging
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader, RawIOBase
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from OpenSciDraw.errors import UserError
from OpenSciDraw.prepare.settings import Limits

_LOG = logging.getLogger("OpenSciDraw")
_ARCHIVES = re.compile(r"(?i)(.+?)(\.tar\.gz|\.tgz|\.gz|\.tar|\.zip|\.pdf)")
_ARXIV = re.compile(r"(\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?\d{7})(?:v(\d+))?")
_BULK_MEMBER = re.compile(r"\d{4}/[^/]+\.(gz|pdf)")
_SKIPPED_FOLDERS = frozenset({".git", ".svn", ".hg", "node_modules", "__pycache__", "__MACOSX"})
_USELESS = frozenset(  # never read by LaTeX for a figure, and often large
    ".mp4 .avi .mov .mpg .mpeg .zip .gz .tgz .bz2 .xz .7z .rar .h5 .hdf5 .npy .npz .pkl .pt .pth .ckpt .safetensors "
    ".mat .fits .exe .dll .so .o .a .class .jar .pyc .iso .dmg .pack .idx".split()
)  # fmt: skip
_COMPRESSED_PICTURE = re.compile(r"(?i).+\.(e?ps|pdf|svg)\.gz")
_BLOCK = 1 << 20
_TAR_BLOCK = 512
_BAD_NAME = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ)
# What Python's readers raise on hostile archives: they trust lengths and offsets in the file.
_DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error, EOFError, NotImplementedError,
    OverflowError, RecursionError, LookupError, UnicodeError,
)  # fmt: skip
_Member = TypeVar("_Member")
_File = tuple[str, Any]  # name, stream (None: a link, a device, encrypted)


class RejectedPaper(ValueError):
    """A paper that cannot be used. The message is the reason: 'kind: details'."""


@dataclass(frozen=True, slots=True)
class PaperSource:
    """A paper: its id, and the file or folder it lies in; of a bulk archive's member also where (bytes)."""

    paper_id: str
    path: Path
    offset: int = 0
    size: int = -1  # -1: the whole file, or a folder

    @property
    def name(self) -> str:
        """For a reader: where the paper is."""
        path = _readable(str(self.path))
        return path if self.size < 0 else f"{path}#{self.paper_id}"


@dataclass(frozen=True)
class Dropped:
    """A paper or a picture that gave no row. `reason` is 'kind: details'; figure_id is '' for a whole paper."""

    paper_id: str
    figure_id: str
    source: str
    reason: str


# -- finding ---------------------------------------------------------------------------------------
def find_papers(sources: Sequence[str | Path]) -> tuple[list[PaperSource], list[Dropped]]:
    """All papers of files and folders, sorted by id, each id once; and what stands back behind another of its id.

    Of an arXiv paper in several versions the newest counts, and its source rather than its PDF. Other papers that
    share a name are told apart by their folders.

    Raises:
        UserError: a source that is not there, or no paper at all.
    """
    found: list[PaperSource] = []
    for given in sources:
        path = Path(given).expanduser()
        if not path.exists():
            raise UserError(f"There is no source {given} (working directory: {Path.cwd()}).")
        found += _papers_in(path.absolute())
    if not found:
        raise UserError(
            f"No paper in {', '.join(map(str, sources))}. Looked for e-prints (.tar.gz, .tgz, .gz, .tar, .zip, arXiv ids without "
            "extension), arXiv's bulk archives, and folders with .tex files."
        )
    return _unique(found)


def _papers_in(path: Path) -> Iterable[PaperSource]:
    if path.is_dir():
        return _papers_in_folder(path)
    if path.suffix.lower() == ".tex":
        return [PaperSource(_readable(path.parent.name), path.parent)]
    return _papers_in_file(path, path.name)


def _papers_in_file(path: Path, name: str) -> list[PaperSource]:
    members = _bulk_members(path) if name.lower().endswith(".tar") else []
    return members or [PaperSource(_readable(_stem(name)), path)]


def _papers_in_folder(top: Path) -> Iterator[PaperSource]:
    """Papers below a folder. Linked files count, linked folders do not: they can lead in circles."""
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        files, folders, is_project = _entries(folder)
        eprints = [name for name in files if _is_eprint(name)]
        if is_project and not any(_ARXIV.fullmatch(_stem(name)) for name in eprints):
            alone = folder == top or _ARXIV.fullmatch(folder.name)
            name = folder.name if alone else folder.relative_to(top).as_posix()
            yield PaperSource(_readable(name), folder)
            continue
        for name in eprints:
            yield from _papers_in_file(folder / name, name)
        waiting += [folder / name for name in reversed(folders)]


def _entries(folder: Path) -> tuple[list[str], list[str], bool]:
    """Names of the files and folders to look at, sorted; and whether this is a LaTeX project or a checkout."""
    files, folders, is_project = [], [], False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                is_project |= entry.name == ".git"
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders += [] if entry.name in _SKIPPED_FOLDERS else [entry.name]
                elif entry.is_file():
                    files.append(entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}.") from error
    is_project |= any(name.lower().endswith(".tex") for name in files)
    return sorted(files), sorted(folders), is_project


def _stem(name: str) -> str:
    return found[1] if (found := _ARCHIVES.fullmatch(name)) else name


def _is_eprint(name: str) -> bool:
    """An archive, or a file without extension or a PDF that is named as arXiv names papers: other PDFs are figures."""
    return bool(_ARXIV.fullmatch(_stem(name)) or _ARCHIVES.fullmatch(name) and not name.lower().endswith(".pdf"))


def _readable(text: str) -> str:
    """A file's name as text that can be written anywhere: bytes that are not UTF-8 become backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _bulk_members(path: Path) -> list[PaperSource]:
    """The e-prints in a bulk archive; none when it is some other tar. Only its headers are read."""
    members = []
    end = path.stat().st_size
    with path.open("rb") as file:
        while any(header := file.read(_TAR_BLOCK)):
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                _LOG.warning("%s is damaged after byte %d: papers after it cannot be read", path, file.tell() - len(header))
                break
            if member.size < 0:
                return []
            if not member.isdir():
                if not member.isreg() or not _BULK_MEMBER.fullmatch(member.name):
                    return []
                stem = _readable(_stem(PurePosixPath(member.name).name))
                members.append(PaperSource(stem, path, file.tell(), member.size))
            file.seek(min(end, file.tell() - (-member.size // _TAR_BLOCK) * _TAR_BLOCK))
    return members


def _unique(found: list[PaperSource]) -> tuple[list[PaperSource], list[Dropped]]:
    groups: dict[str, list[PaperSource]] = {}
    for paper in dict.fromkeys(found):  # a folder and a file in it may both be given
        arxiv = _ARXIV.fullmatch(paper.paper_id)
        groups.setdefault(arxiv[1] if arxiv else paper.paper_id, []).append(paper)
    papers, dropped = [], []
    for name, group in groups.items():
        if _ARXIV.fullmatch(name):
            best, *others = sorted(group, key=_rank) if len(group) > 1 else group
            papers.append(best if best.paper_id == name else replace(best, paper_id=name))
            dropped += [Dropped(name, "", other.name, f"other version: {best.name} is used") for other in others]
        else:
            papers += _told_apart(group) if len(group) > 1 else group
    papers.sort(key=lambda paper: paper.paper_id)
    seen: Counter[str] = Counter()
    for number, paper in enumerate(papers):  # still alike, as a/b.tar and the folder a/b: a number tells them apart
        seen[paper.paper_id] += 1
        if seen[paper.paper_id] > 1:
            papers[number] = replace(paper, paper_id=f"{paper.paper_id}#{seen[paper.paper_id]}")
    return papers, dropped


def _told_apart(group: list[PaperSource]) -> list[PaperSource]:
    """Papers of one name, with as many of their folders before it as it takes."""
    before = [paper.paper_id for paper in group]
    for folders in range(1, max(len(paper.path.parts) for paper in group) - 1):
        before = ["/".join([*paper.path.parts[1:-1][-folders:], paper.paper_id]) for paper in group]
        if len(set(before)) == len(group):
            break
    return [replace(paper, paper_id=_readable(name)) for paper, name in zip(group, before, strict=True)]


def _rank(paper: PaperSource) -> tuple[bool, int, str, int]:
    version = _ARXIV.fullmatch(paper.paper_id)
    return paper.path.suffix.lower() == ".pdf", -int((version and version[2]) or 0), str(paper.path), paper.offset


# -- unpacking ---------------------------------------------------------------------------------------
def unpack(source: PaperSource, folder: Path, limits: Limits) -> tuple[Path, list[str]]:
    """The paper's files: its own folder, or what its archive holds, written below `folder`; and what was left out.

    Written are regular files alone, under names that stay inside; links and devices never are. Bytes are counted
    as they are decompressed, so that a bomb stops at its limit and not at the disk's.

    Raises:
        RejectedPaper: a PDF without source, a damaged archive, more files or bytes than `limits` allow.
    """
    if source.path.is_dir():
        _check_folder(source.path, limits)
        return source.path, []
    folder.mkdir(parents=True)
    notes: list[str] = []
    try:
        with source.path.open("rb") as file:
            raw: Any = file if source.size < 0 else BufferedReader(_Part(file, source.offset, source.size))
            _unpack_stream(raw, folder, limits, notes)
    except _DAMAGED as error:
        raise RejectedPaper(f"damaged archive: {error or type(error).__name__}") from error
    return folder, notes


def _check_folder(folder: Path, limits: Limits) -> None:
    count = 0
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        count += len(files)
        if count > limits.files:
            raise RejectedPaper(f"too many files: more than {limits.files}")


def _unpack_stream(raw: Any, folder: Path, limits: Limits, notes: list[str], depth: int = 0) -> None:
    head = raw.peek(_TAR_BLOCK)[:_TAR_BLOCK]
    if head.startswith(b"\x1f\x8b"):
        if depth > 1:
            raise RejectedPaper("nested archive: gzip in gzip in gzip")
        with gzip.GzipFile(fileobj=raw) as inner:
            counted = BufferedReader(_Counted(inner, limits.unpacked_bytes), _BLOCK)
            _unpack_stream(counted, folder, limits, notes, depth + 1)
            while counted.read(_BLOCK):  # what follows the tar's end is only zeros, but then comes gzip's checksum
                pass
    elif _is_tar(head):
        with tarfile.open(fileobj=raw, mode="r|") as archive:
            _write_files(_tar_files(archive, _bounded(archive, limits)), folder, limits, notes)
    elif head.startswith(b"PK\x03\x04") and not depth:
        with _offsets_inside(), zipfile.ZipFile(raw) as package:
            _write_files(_zip_files(package, _bounded(package.infolist(), limits)), folder, limits, notes)
    elif b"%PDF-" in head[:64]:
        raise RejectedPaper("no source: the paper is a PDF only")
    elif head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        raise RejectedPaper("no source: the paper is PostScript only")
    elif not head.strip():
        raise RejectedPaper("empty file")
    elif b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):  # the marks of UTF-16
        raise RejectedPaper("unknown format: neither gzip, tar, zip nor TeX")
    else:
        _write_files([("main.tex", raw)], folder, limits, notes)


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")  # checks the header's sum: before 1988 there was no magic
    except tarfile.HeaderError:
        return False
    return True


def _bounded(members: Iterable[_Member], limits: Limits) -> Iterator[_Member]:
    for count, member in enumerate(members, 1):
        if count > limits.files:
            raise RejectedPaper(f"too many files: more than {limits.files}")
        yield member


def _tar_files(archive: tarfile.TarFile, members: Iterable[tarfile.TarInfo]) -> Iterator[_File]:
    for member in members:
        if member.size < 0:
            raise tarfile.ReadError("a file of negative size")
        if not member.isdir():
            yield member.name, archive.extractfile(member) if member.isreg() else None


def _zip_files(package: zipfile.ZipFile, members: Iterable[zipfile.ZipInfo]) -> Iterator[_File]:
    for member in members:
        is_file = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG) and not member.flag_bits & 1
        if not member.is_dir():
            with _offsets_inside():
                stream = package.open(member) if is_file else None
            yield member.filename, stream


@contextmanager
def _offsets_inside() -> Iterator[None]:
    """A zip names places in itself; those before its beginning are the system's error, not zipfile's."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise zipfile.BadZipFile("it names a place outside of itself") from error
    except ValueError as error:  # the same, of a stream in memory
        if "seek" not in str(error):
            raise
        raise zipfile.BadZipFile("it names a place outside of itself") from error


def _write_files(files: Iterable[_File], folder: Path, limits: Limits, notes: list[str]) -> None:
    """Write streams below `folder`, within the limits. Of two files of a name the later one counts, as in tar."""
    total = 0
    for name, stream in files:
        inside = _inside(name)
        if inside is None or stream is None:
            _note(notes, f"left out {name!r}: " + ("it leads out of the archive" if inside is None else "not a regular file"))
        elif _is_useful(inside):
            try:
                path = folder / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as target:
                    total += _copy(stream, target, name, limits, total)
            except OSError as error:  # a name too long, a file where a folder is needed: costs that file
                if error.errno not in _BAD_NAME:
                    raise
                _note(notes, f"left out {name!r}: {error.strerror}")


def _is_useful(path: PurePosixPath) -> bool:
    wanted = path.suffix.lower() not in _USELESS or _COMPRESSED_PICTURE.fullmatch(path.name)
    return bool(wanted) and not _SKIPPED_FOLDERS.intersection(path.parts)


def _note(notes: list[str], text: str) -> None:
    if len(notes) < 20:
        notes.append(_readable(text)[:500])


def _inside(name: str) -> PurePosixPath | None:
    """Where a member is written, below the folder; None when its name leads elsewhere."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or "\0" in name or ".." in path.parts or path.is_absolute() or path.parts[0].endswith(":"):
        return None
    return path


def _copy(stream: IO[bytes], target: IO[bytes], name: str, limits: Limits, before: int) -> int:
    written = 0
    while block := stream.read(_BLOCK):
        written += len(block)
        if written > limits.file_bytes:
            raise RejectedPaper(f"too large: {name!r} has more than {limits.file_bytes} bytes")
        if before + written > limits.unpacked_bytes:
            raise RejectedPaper(f"too large: more than {limits.unpacked_bytes} bytes unpacked")
        target.write(block)
    return written


class _Part(RawIOBase):
    """Some bytes of a file as a file of their own."""

    def __init__(self, file: IO[bytes], offset: int, size: int):
        self._file, self._left = file, size
        file.seek(offset)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._left))
        self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)


class _Counted(RawIOBase):
    """A decompressed stream that ends in a RejectedPaper when it is longer than `limit` bytes."""

    def __init__(self, stream: Any, limit: int):
        self._stream, self._left = stream, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise RejectedPaper("too large: a compressed file grows beyond the limit for all unpacked bytes")
        buffer[: len(data)] = data
        return len(data)
