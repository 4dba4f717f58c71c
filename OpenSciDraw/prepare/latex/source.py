"""The files of a LaTeX project: which is the main one, what a name in it refers to, and what a file says."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from OpenSciDraw.prepare.settings import Limits
from OpenSciDraw.utils.files import parse_json

GRAPHICS = (".pdf", ".png", ".jpg", ".jpeg", ".eps", ".ps", ".svg", ".gif", ".tif", ".tiff", ".bmp", ".webp")
_SKIPPED_FOLDERS = frozenset({".git", ".svn", ".hg", "node_modules", "__pycache__", "__MACOSX"})
_DOCUMENT = re.compile(r"\\document(?:class|style)(?![A-Za-z])|\\begin\s*\{document\}")
_CLASS = re.compile(r"\\documentclass\s*(?:\[[^\]]{0,2000}\])?\s*\{\s*([^{}\s]{0,200})\s*\}")
_COMMENT = re.compile(r"(?<!\\)%.*")
_INPUT = re.compile(
    r"\\(?:(?:input|include|subfile|subfileinclude|@input)(?![A-Za-z])|(?:sub)?import\s*\{([^{}\n]{0,200})\})\s*\{?([^{}\s\\]{1,200})"
)
_START_BYTES = 2_000_000  # of each TeX file, to see what it inputs
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

    def main_files(self) -> list[str]:
        """Documents in the order to read them: named by arXiv's 00README, or those that no other file inputs.

        Without any document (\\documentclass or \\begin{document}) these are all TeX files that no other inputs.
        """
        named, ignored = self._readme()
        if named:
            return named
        mains: list[tuple[bool, int, str]] = []
        inputs: dict[str, set[str]] = {}
        names = [name for name in self.tex_files() if name not in ignored]
        for name in names:
            text = _COMMENT.sub("", self._start_of(name))
            inputs[name] = self._inputs_of(name, text)
            if _DOCUMENT.search(text):
                found = _CLASS.search(text)
                mains.append((found is not None and found[1] in _PARTS, name.count("/"), name))
        ordered = [name for _, _, name in sorted(mains)] or names
        reached: set[str] = set()
        waiting = [part for name in ordered for part in inputs[name]]
        while waiting:
            if (name := waiting.pop()) not in reached:
                reached.add(name)
                waiting += inputs.get(name, ())
        return [name for name in ordered if name not in reached] or ordered

    def _start_of(self, relative: str) -> str:
        with self._files[relative].open("rb") as file:
            return decode(file.read(_START_BYTES))

    def _inputs_of(self, relative: str, text: str) -> set[str]:
        """The files that a file inputs, as far as its text says so without macros."""
        here = relative.rpartition("/")[0]
        found: set[str] = set()
        for match in _INPUT.finditer(text):
            name = match[2].strip().strip('"') if match[1] is None else f"{match[1].strip()}/{match[2].strip()}"
            path = self.find(name, (here, ""), (".tex", "", ".ltx")) if name else None
            if path is not None and path != relative:
                found.add(path)
        return found

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
        content = parse_json(text)
    except ValueError:
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


def normal(folder: str, name: str, *, folder_name: bool = False) -> str | None:
    """A relative name without '.' and '..'; None when it leaves the root, or is the root where a file is named."""
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
    return "/".join(parts) or ("" if folder_name else None)
