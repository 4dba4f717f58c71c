"""Finding papers: folders of projects, e-prints, bulk archives; each once."""

from __future__ import annotations

import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from OpenSciDraw.errors import UserError

_ARCHIVES = re.compile(r"(?i)(.+?)(\.tar\.gz|\.tgz|\.gz|\.tar|\.zip|\.pdf)")
_ARXIV = re.compile(r"(\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?\d{7})(?:v(\d+))?")
_BULK_MEMBER = re.compile(r"\d{4}/[^/]+\.(gz|pdf)")
SKIPPED_FOLDERS = frozenset({".git", ".svn", ".hg", "node_modules", "__pycache__", "__MACOSX"})
TAR_BLOCK = 512
_LOG = logging.getLogger("OpenSciDraw")


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
        path = readable(str(self.path))
        return path if self.size < 0 else f"{path}#{self.paper_id}"


@dataclass(frozen=True)
class Dropped:
    """A paper or a picture that gave no row. `reason` is 'kind: details'; figure_id is '' for a whole paper."""

    paper_id: str
    figure_id: str
    source: str
    reason: str


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
        return [PaperSource(readable(path.parent.name), path.parent)]
    return _papers_in_file(path, path.name)


def _papers_in_file(path: Path, name: str) -> list[PaperSource]:
    members = _bulk_members(path) if name.lower().endswith(".tar") else []
    return members or [PaperSource(readable(_stem(name)), path)]


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
            yield PaperSource(readable(name), folder)
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
                    folders += [] if entry.name in SKIPPED_FOLDERS else [entry.name]
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


def readable(text: str) -> str:
    """A file's name as text that can be written anywhere: bytes that are not UTF-8 become backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _bulk_members(path: Path) -> list[PaperSource]:
    """The e-prints in a bulk archive; none when it is some other tar. Only its headers are read."""
    members = []
    end = path.stat().st_size
    with path.open("rb") as file:
        while any(header := file.read(TAR_BLOCK)):
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
                stem = readable(_stem(PurePosixPath(member.name).name))
                members.append(PaperSource(stem, path, file.tell(), member.size))
            file.seek(min(end, file.tell() - (-member.size // TAR_BLOCK) * TAR_BLOCK))
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
    return [replace(paper, paper_id=readable(name)) for paper, name in zip(group, before, strict=True)]


def _rank(paper: PaperSource) -> tuple[bool, int, str, int]:
    version = _ARXIV.fullmatch(paper.paper_id)
    return paper.path.suffix.lower() == ".pdf", -int((version and version[2]) or 0), str(paper.path), paper.offset
