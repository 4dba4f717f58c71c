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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from OpenSciDraw.prepare.papers import SKIPPED_FOLDERS, TAR_BLOCK, PaperSource, RejectedPaper, readable
from OpenSciDraw.prepare.settings import Limits

_LOG = logging.getLogger("OpenSciDraw")
_USELESS = frozenset(  # never read by LaTeX for a figure, and often large
    ".mp4 .avi .mov .mpg .mpeg .zip .gz .tgz .bz2 .xz .7z .rar .h5 .hdf5 .npy .npz .pkl .pt .pth .ckpt .safetensors "
    ".mat .fits .exe .dll .so .o .a .class .jar .pyc .iso .dmg .pack .idx".split()
)  # fmt: skip
_COMPRESSED_PICTURE = re.compile(r"(?i).+\.(e?ps|pdf|svg)\.gz")
_BLOCK = 1 << 20
_BAD_NAME = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ)
# What Python's readers raise on hostile archives: they trust lengths and offsets in the file.
_DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error, EOFError, NotImplementedError,
    OverflowError, RecursionError, LookupError, UnicodeError,
)  # fmt: skip
_Member = TypeVar("_Member")
_File = tuple[str, Any]  # name, stream (None: a link, a device, encrypted)


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
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        count += len(files)
        if count > limits.files:
            raise RejectedPaper(f"too many files: more than {limits.files}")


def _unpack_stream(raw: Any, folder: Path, limits: Limits, notes: list[str], depth: int = 0) -> None:
    head = raw.peek(TAR_BLOCK)[:TAR_BLOCK]
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
    return bool(wanted) and not SKIPPED_FOLDERS.intersection(path.parts)


def _note(notes: list[str], text: str) -> None:
    if len(notes) < 20:
        notes.append(readable(text)[:500])


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
