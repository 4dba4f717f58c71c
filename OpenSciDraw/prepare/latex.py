"""A LaTeX source tree -> its figures: one LatexFigure for each picture, with the caption that belongs to it.

The document is made flat (latex_macros), its environments, groups, pictures and captions become a tree
(latex_tree), and a picture belongs to the caption of the smallest part of the tree that holds both. Where
several captions stand beside each other, pictures and captions pair in order; what stays ambiguous is
reported and never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from OpenSciDraw.prepare.caption_text import readable
from OpenSciDraw.prepare.latex_macros import MARKS, Expander, Flat
from OpenSciDraw.prepare.latex_source import GRAPHICS, Project, normal
from OpenSciDraw.prepare.latex_tree import Caption, Picture, Scope, parse
from OpenSciDraw.prepare.settings import Limits

_REFERENCE = re.compile(r"\\(?:[Cc]?ref|autoref|[vV]ref|subref|Cref|[A-Za-z]{0,8}ref)\*?\s*\{([^{}]{1,300})\}")
_BREAK = re.compile(
    r"\n[ \t]*\n|\\par(?![A-Za-z])|\\(?:chapter|section|subsection|subsubsection|paragraph)\*?\s*(?:\[[^\]]*\])?\{[^{}]*\}|"
    r"\\(?:begin|end)\{(?:document|abstract|itemize|enumerate|thebibliography)\}|\\item(?![A-Za-z])"
)
_FLOATS = re.compile(r"\\begin\{((?:wrap|side|SC|floating|margin)?(?:figure|table)\*?)\}.*?\\end\{\1\}", re.DOTALL)
_PREAMBLE = re.compile(
    r"\\(usepackage|usetikzlibrary|usepgfplotslibrary|pgfplotsset|tikzset|definecolor|colorlet|pgfmathdeclarefunction|tikzstyle|"
    r"pgfdeclarelayer|pgfsetlayers|ctikzset|tikzcdset|forestset)(?![A-Za-z])"
)
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
    document every TeX file is one.
    """
    project = Project(root, limits)
    mains = project.main_files()
    found = PaperFigures(problems=project.problems, main_files=mains)
    candidates = mains or project.tex_files()
    if not candidates:
        project.problem("no TeX file")
    seen: set[str] = set()
    for main in candidates:
        if main in seen:
            continue
        flat = Expander(project, _known_macros()).run(main)
        seen |= flat.files
        for figure in _Document(project, flat, main, len({f.figure_id for f in found.figures})).figures():
            if len(found.figures) >= limits.figures:
                project.problem(f"more than {limits.figures} pictures: the rest is left out")
                return found
            if not any(_same(figure, other) for other in found.figures):
                found.figures.append(figure)
    return found


def _same(a: LatexFigure, b: LatexFigure) -> bool:
    """The same picture with the same caption: two main documents of one paper."""
    drawn = (a.graphic, a.page, a.options, a.tikz)
    return drawn == (b.graphic, b.page, b.options, b.tikz) and a.reason is None and _captions(a) == _captions(b)


def _captions(figure: LatexFigure) -> tuple[str, str]:
    return figure.caption, figure.parent_caption


def _known_macros() -> frozenset[str]:
    from OpenSciDraw.prepare.caption_text import _CITES, _GONE_1, _KEEP_1, _KEEP_2

    return frozenset([*_CITES, *_GONE_1, *_KEEP_1, *_KEEP_2])


@dataclass
class _Unit:
    """Pictures that share a caption: a figure as a reader counts them."""

    pictures: list[tuple[Picture, str, str]]  # picture, its own caption, its own label
    caption: Caption | None
    label: str
    reason: str | None = None


class _Document:
    def __init__(self, project: Project, flat: Flat, main: str, first: int):
        self.project, self.flat, self.main = project, flat, main
        self._number = first
        self._paragraphs: list[str] | None = None

    def figures(self) -> Iterator[LatexFigure]:
        for scope in parse(self.flat.text, self.project.limits.depth):
            for unit in _units(scope):
                self._number += 1
                yield from self._unit_figures(unit)

    def _unit_figures(self, unit: _Unit) -> Iterator[LatexFigure]:
        parent = readable(MARKS.sub("", unit.caption.text)) if unit.caption else ""
        texts = {caption: readable(MARKS.sub("", caption)) for _, caption, _ in unit.pictures}
        for index, (picture, own, label) in enumerate(unit.pictures):
            caption = texts[own]
            context, folder = self._context(picture.context)
            yield replace(
                self._picture(picture, folder, unit.reason),
                figure_id=f"fig{self._number}",
                panel=_letters(index) if len(unit.pictures) > 1 else "",
                caption=caption or parent,
                parent_caption=parent if caption else "",
                panels=len(unit.pictures),
                label=label or unit.label,
                context=self._referring({label, unit.label} - {""}),
                tex_file=context,
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
            return replace(figure, tikz=source, preamble=self._preamble())
        if picture.reason:
            return replace(figure, reason=picture.reason)
        name = _file_name(picture.name, self.main)
        path = self._find_graphic(name, picture, folder)
        if path is None:
            return replace(figure, reason=f"file not found: {name!r}"[:300])
        page = re.search(r"(?:^|,)\s*page\s*=\s*\{?(\d{1,5})", picture.options)
        return replace(figure, graphic=self.project.path(path), page=int(page[1]) if page else 1)

    def _find_graphic(self, name: str, picture: Picture, folder: str) -> str | None:
        """As LaTeX looks: the folder of the document, then \\graphicspath, with the name as it is or an extension."""
        tex_folder = self._context(picture.context)[0].rpartition("/")[0]
        main_folder = self.main.rpartition("/")[0]
        folders = list(dict.fromkeys([folder, main_folder, tex_folder]))
        for entry in picture.paths:
            folders += [joined for base in (folder, main_folder, tex_folder) if (joined := normal(base, entry)) is not None]
        extensions = ("", *GRAPHICS) if name.lower().endswith(GRAPHICS) else (*GRAPHICS, "")
        found = self.project.find(name, folders, extensions)
        if found is None and "." in name:  # converted by pdflatex or by arXiv from the file that is named
            stem = name.rpartition(".")[0]
            found = self.project.find(stem, folders, ("-eps-converted-to.pdf", *GRAPHICS))
        return found if found is not None and found.lower().endswith((*GRAPHICS, ".epsi", ".epsf")) else None

    def _preamble(self) -> str:
        """Packages, libraries and styles that stand in the document, and the author's macros."""
        lines = []
        for found in _PREAMBLE.finditer(self.flat.text):
            end = _statement_end(self.flat.text, found.end())
            lines.append(self.flat.text[found.start() : end])
        return MARKS.sub("", "\n".join(dict.fromkeys([*lines, *self.flat.definitions])))[:200_000]

    # -- context -----------------------------------------------------------------------------------
    def _referring(self, labels: set[str]) -> str:
        if not labels:
            return ""
        if self._paragraphs is None:
            body = _FLOATS.sub("\n\n", MARKS.sub("", self.flat.text.partition("\\begin{document}")[2] or self.flat.text))
            self._paragraphs = [p for p in _BREAK.split(body) if p and "ref" in p and _REFERENCE.search(p)]
        found: list[str] = []
        for paragraph in self._paragraphs:
            names = {name.strip() for match in _REFERENCE.finditer(paragraph) for name in match[1].split(",")}
            if names & labels:
                found.append(readable(paragraph[:20_000]))
                if len(found) == _MAX_CONTEXT_PARAGRAPHS:
                    break
        return "\n\n".join(dict.fromkeys(found))[:_MAX_CONTEXT_CHARS]


# -- pairing ---------------------------------------------------------------------------------------
def _units(scope: Scope, inside: bool = False) -> list[_Unit]:
    """The figures in a figure environment (or in what \\captionof makes one)."""
    groups = _grouped(scope)
    units: list[_Unit] = []
    for pictures, caption, reason in groups:
        if pictures:
            label = caption.label if caption is not None and caption.label else scope.label
            units.append(_Unit(pictures, caption, label, reason))
    return units


_Own = tuple[Picture, str, str]


def _grouped(scope: Scope) -> list[tuple[list[_Own], Caption | None, str | None]]:
    """(pictures, caption, why they cannot be paired) in a scope, from the inside out."""
    row: list[_Own | Caption] = []  # this level's pictures and captions in order
    done: list[tuple[list[_Own], Caption | None, str | None]] = []
    for item in scope.items:
        if isinstance(item, Picture):
            row.append((item, "", ""))
        elif isinstance(item, Caption):
            row.append(item)
        elif item.is_panel:
            row += _panel(item)
        else:
            inner = _grouped(item)
            if any(caption is not None for _, caption, _ in inner):
                captions = [c for _, c, _ in inner if c is not None]
                if any(pictures for pictures, c, _ in inner if c is not None):
                    done += inner
                else:
                    row += captions  # a box that only holds the caption
            else:
                row += [own for pictures, _, _ in inner for own in pictures]
    return done + _in_order(row)


def _panel(scope: Scope) -> list[_Own]:
    """Pictures of a panel, with its own caption and label."""
    pictures: list[_Own] = []
    captions: list[Caption] = []

    def collect(part: Scope) -> None:
        for item in part.items:
            if isinstance(item, Picture):
                pictures.append((item, "", ""))
            elif isinstance(item, Caption):
                captions.append(item)
            elif item.is_panel and item is not scope:
                pictures.extend(_panel(item))
            else:
                collect(item)

    collect(scope)
    own = scope.caption or (captions[0].text if len(captions) == 1 else "")
    return [(picture, caption or own, label or scope.label) for picture, caption, label in pictures]


def _in_order(row: list[_Own | Caption]) -> list[tuple[list[_Own], Caption | None, str | None]]:
    """Captions below their pictures (or above them), where there are several; else one caption for all."""
    captions = [item for item in row if isinstance(item, Caption)]
    pictures = [item for item in row if not isinstance(item, Caption)]
    if len(captions) <= 1 or not pictures:
        return [(pictures, captions[0] if captions else None, None)] if row else []
    above, below = isinstance(row[0], Caption), isinstance(row[-1], Caption)
    if above == below:
        return [(pictures, None, "ambiguous captions: several captions in one figure, above and below its pictures")]
    groups: list[tuple[list[_Own], Caption | None, str | None]] = []
    waiting: list[_Own] = []
    for item in row if below else reversed(row):
        if isinstance(item, Caption):
            groups.append((waiting if below else waiting[::-1], item, None))
            waiting = []
        else:
            waiting.append(item)
    return groups if below else groups[::-1]


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


def _statement_end(text: str, start: int) -> int:
    """Behind the arguments in braces and brackets that follow `start`."""
    position = start
    for _ in range(8):
        opening = re.compile(r"\s*(?:=\s*)?([\[{])").match(text, position)
        if opening is None:
            break
        depth, closing = 0, -1
        for token in re.compile(r"\\.|[{}\[\]]", re.DOTALL).finditer(text, opening.start(1), opening.start(1) + 20_000):
            depth += (token[0] in "{[") - (token[0] in "}]")
            if depth == 0:
                closing = token.end()
                break
        if closing < 0:
            break
        position = closing
    return position
