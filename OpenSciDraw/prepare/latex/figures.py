"""A LaTeX source tree -> its figures: one LatexFigure for each picture, with the caption that belongs to it.

The document is made flat (macros), its environments, groups, pictures and captions become a tree
(tree), and each picture finds its caption there (pairs).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from OpenSciDraw.prepare.latex.caption_text import known_macros, readable
from OpenSciDraw.prepare.latex.macros import MARKS, Expander, Flat
from OpenSciDraw.prepare.latex.pairs import Caption, Picture, Unit, units
from OpenSciDraw.prepare.latex.source import GRAPHICS, Project, normal
from OpenSciDraw.prepare.latex.tree import parse
from OpenSciDraw.prepare.settings import Limits

_REFERENCE = re.compile(
    r"\\(?:[A-Za-z]{0,10}ref|[cC](?:page)?refrange)\*?\s*(?:\{([^{}]{1,300})\}(?:\{([^{}]{1,300})\})?|\[([^\[\]]{1,300})\])"
)
_BREAK = re.compile(
    r"\n[ \t]*\n|\\par(?![A-Za-z])|\\(?:chapter|(?:sub)*section|paragraph)\*?\s*(?:\[[^\]]{0,500}\])?\{[^{}]{0,500}\}|"
    r"\\(?:begin|end)\{(?:document|abstract|itemize|enumerate|thebibliography)\}|\\item(?![A-Za-z])"
)
_FLOAT = re.compile(r"\\(begin|end)\{(?:wrap|side|SC|floating|margin|sideways|long)?(?:figure|table)\*?\}")
_PREAMBLE = re.compile(
    r"\\(usepackage|usetikzlibrary|usepgfplotslibrary|usepgflibrary|pgfplotsset|tikzset|definecolor|colorlet|tikzstyle|ctikzset|"
    r"pgfmathdeclarefunction|pgfdeclarelayer|pgfsetlayers|tikzcdset|forestset|pgfkeys|pgfplotscreateplotcyclelist|pgfplotstableread|"
    r"setlength|newlength)(?![A-Za-z])"
)
_ARGUMENT_OPENS = re.compile(r"\s*(?:=\s*)?(?:(\\[A-Za-z]+)|([\[{]))")
_TAKES_MACROS = {"setlength": 2, "newlength": 1, "pgfplotstableread": 3}  # \\setlength\\x{3cm}: so many arguments
_DRAWABLE = (*GRAPHICS, ".epsi", ".epsf")
_MAX_CONTEXT_CHARS, _MAX_CONTEXT_PARAGRAPHS = 4000, 8


@dataclass(frozen=True)
class LatexFigure:
    """One picture of a figure.

    `graphic` is its file, or `tikz` its source (with the `preamble` it needs), or `reason` says why there is neither.
    `caption` is the panel's own where it has one (then `parent_caption` is the figure's), else the figure's.
    """

    figure_id: str
    panel: str
    caption: str
    parent_caption: str = ""
    panels: int = 1
    label: str = ""
    context: str = ""
    tex_file: str = ""
    graphic: Path | None = None
    page: int = 1
    options: str = ""  # of \\includegraphics, as written
    tikz: str | None = None
    preamble: str = ""
    reason: str | None = None


@dataclass
class PaperFigures:
    figures: list[LatexFigure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    main_files: list[str] = field(default_factory=list)


def read_figures(root: Path, limits: Limits) -> PaperFigures:
    """The figures of the LaTeX source below `root`, in order. What is wrong with the source is in `problems`.

    Files that no main document inputs are not read: a reader of the paper does not see them. Without any main
    document every TeX file is one. A picture with the same caption in two documents of a paper is given once.
    """
    project = Project(root, limits)
    found = PaperFigures(problems=project.problems, main_files=project.main_files())
    if not found.main_files:
        project.problem("no TeX file")
    read: set[str] = set()
    seen: set[tuple[object, ...]] = set()
    number = 0
    for main in found.main_files:
        if main in read:
            continue
        flat = Expander(project, known_macros()).run(main)
        read |= flat.files
        document = _Document(project, flat, main, number)
        for figure in document.figures():
            if len(found.figures) >= limits.figures:
                project.problem(f"more than {limits.figures} pictures: the rest is left out")
                return found
            drawn = (figure.graphic, figure.page, figure.options, figure.tikz, figure.caption, figure.parent_caption)
            if figure.reason is not None or drawn not in seen:
                found.figures.append(figure)
                seen.add(drawn)
        number = document.number
    return found


class _Document:
    """`number` counts the figures, on from those of the documents before."""

    def __init__(self, project: Project, flat: Flat, main: str, number: int):
        self.project, self.flat, self.main = project, flat, main
        self.number = number
        self._preamble: str | None = None
        self._paragraphs: list[str] = []
        self._texts: dict[int, str] = {}  # readable, by number of paragraph
        self._referring: dict[str, list[int]] | None = None  # paragraphs, by the label that they refer to

    def figures(self) -> Iterator[LatexFigure]:
        before: Caption | None = None
        for scope in parse(self.flat.text, self.project.limits.depth):
            for unit in units(scope):
                if unit.caption is None and scope.is_loose:
                    continue  # a picture in the text
                if unit.caption is None and scope.continued and unit.reason is None:
                    unit.caption = before
                before = unit.caption
                self.number += 1
                yield from self._unit_figures(unit)

    def _unit_figures(self, unit: Unit) -> Iterator[LatexFigure]:
        parent = readable(MARKS.sub("", unit.caption.text)) if unit.caption else ""
        texts = {caption: readable(MARKS.sub("", caption)) for _, caption, _ in unit.pictures}
        for index, (picture, own, label) in enumerate(unit.pictures):
            caption = texts[own]
            file, folder = self._context(picture.context)
            yield replace(
                self._picture(picture, folder, unit.reason),
                figure_id=f"fig{self.number}",
                panel=_letters(index) if len(unit.pictures) > 1 else "",
                caption=caption or parent,
                parent_caption=parent if caption else "",
                panels=len(unit.pictures),
                label=label or unit.label,
                context=self._context_of({label, unit.label} - {""}),
                tex_file=file.encode("utf-8", "backslashreplace").decode(),
            )

    def _context(self, number: int) -> tuple[str, str]:
        return self.flat.contexts[number] if 0 <= number < len(self.flat.contexts) else (self.main, "")

    def _picture(self, picture: Picture, folder: str, reason: str | None) -> LatexFigure:
        """The picture alone: file, or TikZ source, or why there is none."""
        figure = LatexFigure("", "", "", options=picture.options, reason=reason)
        if reason is not None:
            return figure
        if picture.tikz is not None:
            source = self.flat.tikz[picture.tikz] if isinstance(picture.tikz, int) else picture.tikz
            return replace(figure, tikz=MARKS.sub("", source), preamble=self._tikz_preamble())
        name = _file_name(picture.name, self.main)
        path = self._find_graphic(name, picture, folder)
        if path is None:
            return replace(figure, reason=f"file not found: {name!r}"[:300])
        page = re.search(r"(?:^|,)\s*page\s*=\s*\{?(\d{1,5})", picture.options)
        return replace(figure, graphic=self.project.path(path), page=int(page[1]) if page else 1)

    def _find_graphic(self, name: str, picture: Picture, folder: str) -> str | None:
        """As LaTeX looks: the folder of the document, then \\graphicspath, with the name as it is or an extension."""
        if not name:
            return None
        tex_folder, main_folder = self._context(picture.context)[0].rpartition("/")[0], self.main.rpartition("/")[0]
        is_whole = name.lower().endswith(_DRAWABLE)
        own = (*picture.extensions, *(kind for kind in GRAPHICS if kind not in picture.extensions))
        extensions = ("", *own) if is_whole else (*own, "")
        stem = name.rpartition(".")[0] if is_whole else ""
        converted = ("-eps-converted-to.pdf", *GRAPHICS)  # by pdflatex or by arXiv, from the file that is named
        for bases in ((folder, main_folder), (tex_folder, "")):  # the second: where authors mean it, who run TeX elsewhere
            folders = list(dict.fromkeys(bases))
            for entry in picture.paths:
                joined = [normal(base, entry, folder_name=True) for base in dict.fromkeys(bases)]
                folders += [there for there in joined if there is not None]
            found = self.project.find(name, folders, extensions)
            if found is None and stem:
                found = self.project.find(stem, folders, converted)
            if found is not None:
                return found if found.lower().endswith(_DRAWABLE) else None
        return None

    def _tikz_preamble(self) -> str:
        """Packages, libraries and styles that stand in the document, and the author's macros."""
        if self._preamble is None:
            text = self.flat.text
            ends = ((found.start(), _statement_end(text, found[1], found.end())) for found in _PREAMBLE.finditer(text))
            lines = [text[start:end] for start, end in ends]
            self._preamble = MARKS.sub("", "\n".join(dict.fromkeys([*lines, *self.flat.definitions])))[:200_000]
        return self._preamble

    # -- context -----------------------------------------------------------------------------------
    def _context_of(self, labels: set[str]) -> str:
        """The paragraphs that refer to one of the labels, each once, in order."""
        if not labels:
            return ""
        if self._referring is None:
            self._referring = self._index()
        numbers = sorted({number for label in labels for number in self._referring.get(label, [])})[:_MAX_CONTEXT_PARAGRAPHS]
        for number in numbers:
            if number not in self._texts:
                self._texts[number] = readable(self._paragraphs[number][:20_000])
        return "\n\n".join(dict.fromkeys(self._texts[number] for number in numbers))[:_MAX_CONTEXT_CHARS]

    def _index(self) -> dict[str, list[int]]:
        text = MARKS.sub("", self.flat.text)
        body = _without_floats(text.partition("\\begin{document}")[2] or text)
        referring: dict[str, list[int]] = {}
        for paragraph in _BREAK.split(body):
            groups = [group for match in _REFERENCE.finditer(paragraph) for group in match.groups("")]
            names = {name.strip() for group in groups for name in group.split(",")} - {""}
            if names:
                self._paragraphs.append(paragraph)
            for name in names:
                referring.setdefault(name, []).append(len(self._paragraphs) - 1)
        return referring


def _without_floats(text: str) -> str:
    """Figures and tables are no paragraphs: what stands in them is theirs."""
    kept: list[str] = []
    depth = end = 0
    for token in _FLOAT.finditer(text):
        if token[1] == "begin":
            if depth == 0:
                kept.append(text[end : token.start()])
            depth += 1
        elif depth:
            depth -= 1
            end = token.end()
    return "\n\n".join([*kept, text[end:] if depth == 0 else ""])


# -- small things ----------------------------------------------------------------------------------
def _letters(index: int) -> str:
    """a … z, aa, ab …"""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(97 + rest) + letters
    return letters


def _file_name(name: str, main: str) -> str:
    """The file name in \\includegraphics' argument, without quotes, braces and what TeX ignores."""
    name = MARKS.sub("", name).replace("\\jobname", main.rpartition("/")[2].rpartition(".")[0])
    name = re.sub(r"\\(?:detokenize|string|unexpanded|space)\b\s*", "", name)
    name = re.sub(r"\\([_%&# ])", r"\1", name)
    name = re.sub(r"[{}\"]", "", name)
    return " ".join(name.split())


def _statement_end(text: str, word: str, start: int) -> int:
    """Behind the arguments of \\word, which ends at `start`: in braces and brackets, or a macro where it takes one."""
    position = start
    for _ in range(_TAKES_MACROS.get(word, 8)):
        opening = _ARGUMENT_OPENS.match(text, position)
        if opening is None:
            break
        if opening[1] and word not in _TAKES_MACROS:
            break
        if opening[1]:
            position = opening.end()
            continue
        depth, closing = 0, -1
        for token in re.compile(r"\\.|[{}\[\]]", re.DOTALL).finditer(text, opening.start(2), opening.start(2) + 20_000):
            depth += (token[0] in "{[") - (token[0] in "}]")
            if depth == 0:
                closing = token.end()
                break
        if closing < 0:
            break
        position = closing
    return position
