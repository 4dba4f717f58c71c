"""The files of a LaTeX project: which is the main one, what a name in it refers to, and what a file says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from OpenSciDraw.prepare.settings import Limits

GRAPHICS = (".pdf", ".png", ".jpg", ".jpeg", ".eps", ".ps", ".svg", ".gif", ".tif", ".tiff", ".bmp", ".webp")
_SKIPPED_FOLDERS = frozenset({".git", ".svn", ".hg", "node_modules", "__pycache__", "__MACOSX"})
_DOCUMENT = re.compile(r"^[^%\n]*?\\document(?:class|style)\s*(?:\[([^\]]*)\])?\s*\{\s*([^}\s]*)\s*\}", re.MULTILINE)
_START_BYTES = 200_000
_PARTS = frozenset({"standalone", "subfiles"})  # classes of files that others input
_CONTROL = dict.fromkeys([*range(9), *range(11, 13), *range(14, 32), 127])  # marks of our own use them; TeX has no need


class Project:
    """The files below `root`, by their relative names. Links that lead out of it are not there."""

    def __init__(self, root: Path, limits: Limits):
        self.root = Path(os.path.realpath(root))
        self.limits = limits
        self.problems: list[str] = []
        self._read_bytes = 0
        self._files: dict[str, Path] = {}
        self._folded: dict[str, list[str]] = {}
        for folder, folders, names in os.walk(self.root):
            folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
            for name in sorted(names):
                self._add(Path(folder) / name)
                if len(self._files) > limits.files:
                    self.problem(f"more than {limits.files} files: the rest is not looked at")
                    return

    def _add(self, path: Path) -> None:
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(self.root):
            return
        if path.is_file():
            relative = path.relative_to(self.root).as_posix()
            self._files[relative] = path
            self._folded.setdefault(relative.lower(), []).append(relative)

    def problem(self, text: str) -> None:
        if len(self.problems) < 50:
            self.problems.append(text.encode("utf-8", "backslashreplace").decode()[:500])

    def tex_files(self) -> list[str]:
        return [name for name in self._files if name.lower().endswith((".tex", ".ltx", ".latex"))]

    def find(self, name: str, folders: Sequence[str], extensions: Iterable[str]) -> str | None:
        """The file that `name` refers to, seen from one of `folders`; with one of `extensions` ('' as it is).

        Case is disregarded only where that leaves one file: a paper written on another system.
        """
        for fold in (False, True):
            for extension in extensions:
                for folder in folders:
                    relative = normal(folder, name + extension)
                    if relative is None:
                        continue
                    if not fold and relative in self._files:
                        return relative
                    if fold and len(same := self._folded.get(relative.lower(), [])) == 1:
                        return same[0]
        return None

    def path(self, relative: str) -> Path:
        return self._files[relative]

    def read(self, relative: str) -> str:
        """A TeX file's text; '' (and a problem) when it is too much or none. UTF-8, else Latin-1, which is never wrong."""
        path = self._files[relative]
        try:
            size = path.stat().st_size
            if self._read_bytes + size > self.limits.tex_bytes:
                self.problem(f"{relative}: more than {self.limits.tex_bytes} bytes of TeX: not read")
                return ""
            self._read_bytes += size
            data = path.read_bytes()
        except OSError as error:
            self.problem(f"{relative}: {error.strerror}")
            return ""
        return decode(data)

    def _start_of(self, relative: str) -> str:
        """A TeX file's first part, where \\documentclass stands."""
        with self._files[relative].open("rb") as file:
            return decode(file.read(_START_BYTES))

    def main_files(self) -> list[str]:
        """Documents in the order to read them: named by arXiv's 00README, or with \\documentclass; parts of others last."""
        named, ignored = self._readme()
        if named:
            return named
        mains: list[tuple[bool, int, str]] = []
        for name in self.tex_files():
            found = _DOCUMENT.search(self._start_of(name)) if name not in ignored else None
            if found:
                mains.append((found[2] in _PARTS, name.count("/"), name))
        return [name for _, _, name in sorted(mains)]

    def _readme(self) -> tuple[list[str], set[str]]:
        """Main files and ignored files that arXiv's 00README names."""
        top: list[str] = []
        ignored: set[str] = set()
        for readme in ("00README.json", "00README.XXX", "00readme.xxx"):
            if readme not in self._files:
                continue
            text = self.read(readme)
            if readme.endswith("json"):
                pairs = _json_uses(text)
            else:
                pairs = [(words[0], words[1]) for words in map(str.split, text.splitlines()) if len(words) > 1]
            top += [name for name, use in pairs if use in ("toplevel", "toplevelfile") and name in self._files]
            ignored |= {name for name, use in pairs if use == "ignore"}
        return top, ignored


def _json_uses(text: str) -> list[tuple[str, str]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return []
    sources = content.get("sources", []) if isinstance(content, dict) else []
    entries = [entry for entry in sources if isinstance(entry, dict)] if isinstance(sources, list) else []
    return [(str(entry.get("filename", "")), str(entry.get("usage", ""))) for entry in entries]


def decode(data: bytes) -> str:
    """Text with '\\n' line ends and no control characters."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16", "replace")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROL)


def normal(folder: str, name: str) -> str | None:
    """A relative name without '.' and '..'; None when it leaves the root."""
    if "\0" in name or len(name) > 1000 or name.startswith(("/", "~")):
        return None
    parts: list[str] = []
    for part in PurePosixPath(folder, name.replace("\\", "/")).parts:
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts) or None
