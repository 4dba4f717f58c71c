"""Flat LaTeX -> the figures in it, each a tree of environments and groups with the pictures and captions inside."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from OpenSciDraw.prepare.latex.pairs import Caption, Picture, Scope, caption_of, turn
from OpenSciDraw.prepare.latex.stream import MAX_OPEN_BRACKETS, Braces, closing_bracket

_TOKEN = re.compile(
    "\\\\begin\\s*\\{([^{}]{0,100})\\}|\\\\end\\s*\\{([^{}]{0,100})\\}|([{}])|\\\\([A-Za-z]+)(\\*?)|\\\\.|\x01(\\d+)\x02|\x03(\\d+)\x04",
    re.DOTALL,
)
_BLANK = re.compile(r"\s*")
_FILE_KEY = re.compile(r"(?:file|figure|psfile)\s*=\s*([^,\s]+)")
_TYPE_KEY = re.compile(r"type\s*=\s*\{?\s*(\w+)")
_MATRIX_STYLE = re.compile(r"\s*(?:@[^{}]{0,100})?(?=\{)")
_PANELS = frozenset({"subfigure", "subcaptionblock", "subfloat", "subcaptiongroup"})
_OTHER_FLOATS = re.compile(r"(?:.*table|tab|tbl|algorithm\w*|.*listing|.*code|program|video|minted)\*?", re.IGNORECASE)
_FIGURE = re.compile(r"(?!sub).*(?:figure|figures|fig|figurehere|figwindow)\*?")
# Outside of figures only these hold pictures and captions together; all else (multicols, itemize …) is transparent.
_BOXES = frozenset(
    "center minipage flushleft flushright tabular tabularx framed tcolorbox strip floatrow subfigrow adjustbox wrapfloat "
    "subfigmatrix columns column mdframed".split()
)
_CAPTIONS = (
    "caption captionof subcaption captionbox captionabove captionbelow figcaption fcaption contcaption sidecaptionof tcaption "
    "topcaption bottomcaption".split()
)
_PICTURES = (
    "includegraphics adjincludegraphics includesvg plotone plotfiddle epsfbox epsffile pgfimage tcbincludegraphics "
    "pdftexfigure".split()
)
_DIAGRAMS = "xymatrix Qcircuit xygraph chemfig Tree".split()
_COUNTS = {"plottwo": 2, "plotthree": 3, "plotfour": 4}
_MAX_LETTERS = 80  # of text between a picture outside of figures and its caption
_LETTERS = re.compile(r"[^\W\d_]")


@dataclass(eq=False)
class _Open:
    """A scope that is being read: `environment` is None for a group in braces."""

    scope: Scope
    environment: str | None
    is_figure: bool = False
    kind: str = ""  # of its captions, by \captionsetup{type=…}
    angle: str = ""  # of \rotatebox


def parse(text: str, depth: int) -> Iterator[Scope]:
    """The figures of a flat text, in order. Scopes that are nested deeper than `depth` are taken with what holds them."""
    yield from _Parser(text, depth).figures()


class _Parser:
    def __init__(self, text: str, depth: int):
        self.text, self.depth = text, depth
        self.braces = Braces(text)
        self.position = 0
        self.context = 0
        self.paths: tuple[str, ...] = ()
        self.extensions: tuple[str, ...] = ()
        self.stack = [_Open(Scope(), "document")]
        self.inside = 0  # figures that are open
        self.deeper = 0  # braces that are open beyond the depth
        self.letters = 0  # of text since the last picture or caption outside of figures
        self.open_brackets = 0
        self.found: list[Scope] = []
        self.commands: dict[str, Callable[[str], None]] = {
            **dict.fromkeys(_PICTURES, self._picture), **dict.fromkeys(("epsfig", "psfig", "special"), self._keyed_picture),
            **dict.fromkeys(_COUNTS, self._pictures), **dict.fromkeys(_DIAGRAMS, self._diagram), "tikz": self._inline_tikz,
            **dict.fromkeys(("fig", "leftfig", "rightfig", "boxedfig"), self._aastex_panel), "EPSFIGURE": self._eps_figure,
            **dict.fromkeys(("subfloat", "subfigure", "sidesubfloat", "subbottom", "subtop", "subcaptionbox"), self._panel),
            **dict.fromkeys(_CAPTIONS, self._caption), **dict.fromkeys(("ttabbox", "capbtabbox"), self._table_box),
            **dict.fromkeys(("teaser", "FIGURE"), self._figure_group), "rotatebox": self._rotated, "label": self._label,
            "graphicspath": self._graphicspath, "DeclareGraphicsExtensions": self._set_extensions,
            "captionsetup": self._captionsetup, "ContinuedFloat": self._continued, "figure": self._figure_command,
            "endfigure": self._figure_command, "footnote": self._skip_argument, "thanks": self._skip_argument,
        }  # fmt: skip

    def figures(self) -> Iterator[Scope]:
        while (token := _TOKEN.search(self.text, self.position)) is not None:
            if not self.inside:
                self._count_text(self.position, token.start())
            self.position = token.end()
            self._take(token)
            yield from self.found
            self.found.clear()
        while len(self.stack) > 1:  # what is never closed ends with the document
            self._finish(self.stack.pop())
        self._end_run()
        yield from self.found

    def _take(self, token: re.Match[str]) -> None:
        begin, end, brace, word, star, context, tikz = token.groups()
        if word is not None:
            if word in self.commands:
                self.commands[word](word + star)
            else:
                self.position -= len(star)
        elif brace == "{":
            self._open(Scope(), None)
        elif brace == "}":
            self._close_group()
        elif begin is not None:
            self._begin(begin.strip())
        elif end is not None:
            self._end(end.strip())
        elif context is not None:
            self.context = int(context)
        elif tikz is not None:
            self._add(Picture("", context=self.context, tikz=int(tikz)))

    # -- outside of figures ------------------------------------------------------------------------
    def _count_text(self, start: int, end: int) -> None:
        """Pictures and captions with more than a little text between them have nothing to do with each other."""
        if self.letters <= _MAX_LETTERS and end > start:
            self.letters += len(_LETTERS.findall(self.text, start, min(end, start + 1000)))
            if self.letters > _MAX_LETTERS:
                self._end_run()

    def _end_run(self) -> None:
        """Pictures and captions outside of figures that stand together are one (of \\captionof)."""
        run = Scope()
        for open_ in reversed(self.stack):
            run = Scope([*open_.scope.items, *([run] if run.items else [])], open_.scope.is_panel, label=open_.scope.label)
            open_.scope.items, open_.scope.label = [], ""
        if run.holds(Picture) and run.holds(Caption):
            run.is_loose = True
            self.found.append(run)

    # -- scopes ------------------------------------------------------------------------------------
    def _open(self, scope: Scope, environment: str | None, is_figure: bool = False, angle: str = "") -> None:
        if len(self.stack) >= self.depth:
            self.deeper += environment is None
        else:
            if is_figure and not self.inside:
                self._end_run()
            self.inside += is_figure
            self.stack.append(_Open(scope, environment, is_figure, angle=angle))

    def _close_group(self) -> None:
        if self.deeper:
            self.deeper -= 1
        elif self.stack[-1].environment is None:
            self._finish(self.stack.pop())

    def _finish(self, closed: _Open) -> None:
        if closed.angle:
            turn(closed.scope, closed.angle)
        self.inside -= closed.is_figure
        if closed.is_figure and not self.inside:
            self.letters = 0
            if closed.scope.holds(Picture):
                self.found.append(closed.scope)
        elif closed.scope.items:
            self.stack[-1].scope.items.append(closed.scope)

    def _begin(self, name: str) -> None:
        bare = name.rstrip("*")
        if bare in ("overpic", "Overpic"):
            options, file = self._option() or "", self._argument()
            self._add(Picture(file or "", options, self.context, self.paths, self.extensions))
        is_figure = _FIGURE.fullmatch(name) is not None or bare in ("wrapfloat", "scheme", "chart", "graph")
        if is_figure or bare in _BOXES or bare in _PANELS or self.inside or _OTHER_FLOATS.fullmatch(name):
            self._open(Scope(is_panel=bare in _PANELS), name, is_figure)

    def _end(self, name: str) -> None:
        bare = name.rstrip("*")
        for index in range(len(self.stack) - 1, 0, -1):
            if (self.stack[index].environment or "").rstrip("*") == bare:
                self.deeper = 0
                while len(self.stack) > index:
                    self._finish(self.stack.pop())
                return

    def _add(self, item: Picture | Caption | Scope) -> None:
        self.stack[-1].scope.items.append(item)
        self.letters = 0

    def _environment(self) -> _Open:
        """The innermost environment or panel."""
        return next(open_ for open_ in reversed(self.stack) if open_.environment is not None or open_.scope.is_panel)

    # -- pictures ----------------------------------------------------------------------------------
    def _picture(self, word: str) -> None:
        if self.text.startswith("<", self.position):  # beamer's overlays
            self.position = max(self.position, self.text.find(">", self.position, self.position + 50) + 1)
        options, second = self._option() or "", self._option()
        name = self._argument()
        if name is None:
            return
        if word == "pdftexfigure":  # drawn by another program, with its text in LaTeX
            return self._add(Picture("", context=self.context, tikz=rf"\def\svgwidth{{12cm}}\input{{{name}}}"))
        if word == "includesvg" and not name.lower().endswith(".svg"):
            name += ".svg"
        if second:  # [llx,lly][urx,ury]
            options = f"viewport={options.replace(',', ' ')} {second.replace(',', ' ')}" + (",clip" if word.endswith("*") else "")
        self._add(Picture(name, options, self.context, self.paths, self.extensions))

    def _keyed_picture(self, word: str) -> None:
        argument = self._argument() or ""
        found = _FILE_KEY.search(argument)
        if found and (word != "special" or found[0].startswith("psfile")):
            angle = re.search(r"angle\s*=\s*(-?\d+)", argument)
            options = f"angle={angle[1]}" if angle and word != "special" else ""
            self._add(Picture(found[1].strip("{}"), options, self.context, self.paths, self.extensions))

    def _pictures(self, word: str) -> None:
        for _ in range(_COUNTS[word.rstrip("*")]):
            self._picture("includegraphics")

    def _inline_tikz(self, word: str) -> None:
        start = self.position
        options = self._option()
        content = self._argument() if self._next() == "{" else None
        if content is None:
            self.position = start
        elif self.inside:
            source = "\\tikz" + (f"[{options}]" if options is not None else "") + f"{{{content}}}"
            self._add(Picture("", context=self.context, tikz=source))

    def _diagram(self, word: str) -> None:
        """\\xymatrix@C=1em{…} and its like, that are set in formulas."""
        start = self.position
        style = _MATRIX_STYLE.match(self.text, start)
        self.position = style.end() if style else start
        content = self._argument()
        if content is None:
            self.position = start
        elif self.inside:
            source = f"\\{word}{style[0].strip() if style else ''}{{{content}}}"
            self._add(Picture("", context=self.context, tikz=source if word == "chemfig" else f"${source}$"))

    def _rotated(self, word: str) -> None:
        self._option()
        angle = (self._argument() or "").strip()
        if self._next() == "{":
            self.position += 1
            self._open(Scope(), None, angle=angle if re.fullmatch(r"-?\d{1,3}(\.\d*)?", angle) else "")

    # -- figures and panels by commands --------------------------------------------------------------
    def _figure_command(self, word: str) -> None:
        if word.startswith("end"):
            self._end("figure")
        else:
            self._option()
            self._open(Scope(), "figure", is_figure=True)

    def _figure_group(self, word: str) -> None:
        """\\teaser{…} and JHEP's \\FIGURE{…}; within a figure INFORMS' \\FIGURE{picture}{caption}{note}."""
        self._option()
        if self._next() != "{":
            return
        start, end = self.position, self.braces.closing(self.position)
        if self.inside and end >= 0:
            self.position = end + 1
            self._caption("caption")
        self.position = start + 1
        self._open(Scope(), None, is_figure=True)

    def _eps_figure(self, word: str) -> None:
        self._option()
        name, caption = self._argument(), self._argument()
        if name is not None and caption is not None:
            picture = Picture(name.partition(",")[0], "", self.context, self.paths, self.extensions)
            self.found.append(Scope([picture, caption_of(caption)]))

    def _aastex_panel(self, word: str) -> None:
        """AASTeX 6: \\fig{file}{width}{caption} within \\gridline."""
        start = self.position
        name, _, caption = self._argument(), self._argument(), self._argument()
        if name is None or caption is None or not self.inside:
            self.position = start
            return
        picture = Picture(name, "", self.context, self.paths, self.extensions)
        self._add(Scope([picture], is_panel=True, caption=caption))

    def _panel(self, word: str) -> None:
        caption = ""
        while (option := self._option()) is not None:
            caption = option
        if word.startswith("subcaptionbox"):
            caption = self._argument() or ""
            while self._option() is not None:
                pass
        if self._next() == "{":
            self.position += 1
            own = caption_of(caption)
            self._open(Scope(is_panel=True, caption=own.text, label=own.label), None)

    def _table_box(self, word: str) -> None:
        """floatrow's box of a table: no caption of it is a figure's."""
        while self._option() is not None:
            pass
        self._argument()
        self._argument()

    # -- captions and labels ---------------------------------------------------------------------------
    def _caption(self, word: str) -> None:
        bare = word.rstrip("*")
        kind = (self._argument() or "").strip() if bare.endswith("captionof") else self._kind()
        self._option()
        text = self._argument()
        if text is None or kind != "figure":
            return
        if bare == "subcaption":
            self._environment().scope.is_panel = True
        self._add(caption_of(text, starred=word.endswith("*")))

    def _kind(self) -> str:
        """What a \\caption here is of: 'figure', or the like of 'table'."""
        for open_ in reversed(self.stack):
            if open_.kind:
                return open_.kind
            if open_.is_figure:
                break
            if open_.environment is not None and open_.environment not in _BOXES and _OTHER_FLOATS.fullmatch(open_.environment):
                return "table"
        return "figure"

    def _captionsetup(self, word: str) -> None:
        self._option()
        if found := _TYPE_KEY.search(self._argument() or ""):
            self._environment().kind = found[1] if len(self.stack) > 1 else ""

    def _continued(self, word: str) -> None:
        for open_ in self.stack:
            open_.scope.continued = open_.is_figure

    def _label(self, word: str) -> None:
        name = (self._argument() or "").strip()
        for open_ in reversed(self.stack):
            last = open_.scope.items[-1] if open_.scope.items else None
            if isinstance(last, Caption) and not last.label:
                last.label = name
                return
            if open_.environment is not None or open_.scope.is_panel:
                open_.scope.label = open_.scope.label or name
                return

    def _graphicspath(self, word: str) -> None:
        argument = self._argument() or ""
        found = re.findall(r"\{([^{}]*)\}", argument) or ([argument] if argument.strip() else [])
        self.paths = tuple(path.strip().strip('"') for path in found)

    def _set_extensions(self, word: str) -> None:
        named = [extension.strip() for extension in (self._argument() or "").split(",")]
        self.extensions = tuple(extension for extension in named if re.fullmatch(r"\.[\w.-]{1,30}", extension))

    def _skip_argument(self, word: str) -> None:
        self._option()
        self._argument()

    # -- arguments ---------------------------------------------------------------------------------
    def _next(self) -> str:
        blank = _BLANK.match(self.text, self.position)
        start = blank.end() if blank else self.position
        if self.text[start : start + 1] in ("{", "["):
            self.position = start
        return self.text[start : start + 1]

    def _argument(self) -> str | None:
        """What stands in the braces that come next; None where there are none."""
        return self._until(self.braces.closing(self.position)) if self._next() == "{" else None

    def _option(self) -> str | None:
        if self._next() != "[" or self.open_brackets > MAX_OPEN_BRACKETS:
            return None
        end = closing_bracket(self.text, self.position)
        self.open_brackets += end < 0
        return self._until(end)

    def _until(self, end: int) -> str | None:
        if end < 0:
            return None
        inner, self.position = self.text[self.position + 1 : end], end + 1
        return inner
