"""Flat LaTeX -> the figures in it, each a tree of environments and groups with the pictures and captions inside."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from OpenSciDraw.prepare.latex_stream import closing_bracket, matching_braces

_TOKEN = re.compile(
    "\\\\begin\\s*\\{([^{}]*)\\}|\\\\end\\s*\\{([^{}]*)\\}|([{}])|\\\\([A-Za-z@]+)\\*?|\\\\.|\x01(\\d+)\x02|\x03(\\d+)\x04",
    re.DOTALL,
)
_BLANK = re.compile(r"\s*")
_LABEL = re.compile(r"\\label\s*\{([^{}]*)\}")
_FILE_KEY = re.compile(r"(?:file|figure)\s*=\s*([^,]+)")
_PANELS = frozenset({"subfigure", "subcaptionblock", "subfloat", "subcaptiongroup"})
_OTHER_FLOATS = re.compile(r"(?:.*table|algorithm|listing|code|scheme|video|lstlisting|minted|algorithmic)\*?", re.IGNORECASE)
_NO_GROUP = "picture with text in LaTeX (.pdf_tex): not drawn"


@dataclass(frozen=True)
class Picture:
    """A picture as written: file name and options, or TikZ (its number in Flat.tikz, or source)."""

    name: str
    options: str = ""
    context: int = 0
    paths: tuple[str, ...] = ()  # of \graphicspath
    tikz: int | str | None = None
    reason: str | None = None


@dataclass(eq=False)
class Caption:
    text: str
    label: str = ""


@dataclass(eq=False)
class Scope:
    """An environment or group. A panel's `caption` is the one that its command was given."""

    items: list[Picture | Caption | Scope] = field(default_factory=list)
    is_panel: bool = False
    caption: str = ""
    label: str = ""

    def holds_picture(self) -> bool:
        return any(isinstance(item, Picture) or isinstance(item, Scope) and item.holds_picture() for item in self.items)


@dataclass(eq=False)
class _Open:
    """A scope that is being read: `environment` is None for a group in braces."""

    scope: Scope
    environment: str | None
    is_figure: bool = False


def parse(text: str, depth: int) -> Iterator[Scope]:
    """The figures of a flat text, in order. Scopes that are nested deeper than `depth` are taken with what holds them."""
    yield from _Parser(text, depth).figures()


class _Parser:
    def __init__(self, text: str, depth: int):
        self.text, self.depth = text, depth
        self.closes = matching_braces(text)
        self.position = 0
        self.context = 0
        self.paths: tuple[str, ...] = ()
        self.stack = [_Open(Scope(), "document")]
        self.deeper = 0  # braces that are open beyond the depth
        self.found: list[Scope] = []  # figures outside of any environment
        commands: dict[str, Callable[[str], None]] = {
            **dict.fromkeys(("includegraphics", "adjincludegraphics", "includesvg", "plotone", "plotfiddle", "epsfbox", "epsffile",
                             "pdftexfigure", "includestandalone"), self._picture),
            **dict.fromkeys(("epsfig", "psfig"), self._keyed_picture),
            **dict.fromkeys(("fig", "leftfig", "rightfig", "boxedfig"), self._aastex_panel),
            **dict.fromkeys(("subfloat", "subfigure", "sidesubfloat", "subbottom", "subcaptionbox"), self._panel),
            **dict.fromkeys(("caption", "captionof", "subcaption", "captionbox"), self._caption),
            "plottwo": self._two_pictures, "label": self._label, "graphicspath": self._graphicspath,
            "tikz": self._inline_tikz, "xymatrix": self._inline_tikz, "captionsetup": self._skip_argument,
        }  # fmt: skip
        self.commands = commands

    def figures(self) -> Iterator[Scope]:
        while (token := _TOKEN.search(self.text, self.position)) is not None:
            self.position = token.end()
            yield from self.found
            self.found.clear()
            begin, end, brace, word, context, tikz = token.groups()
            if word is not None:
                if word in self.commands:
                    self.commands[word](word)
            elif brace == "{":
                self._open(Scope(), None)
            elif brace == "}":
                self._close_group()
            elif begin is not None:
                self._begin(begin.strip())
            elif end is not None:
                yield from self._end(end.strip())
            elif context is not None:
                self.context = int(context)
            elif tikz is not None:
                self._add(Picture("", context=self.context, tikz=int(tikz)))
        yield from self.found
        while len(self.stack) > 1:  # what is never closed ends with the document
            yield from self._finish(self.stack.pop())

    # -- scopes ------------------------------------------------------------------------------------
    def _open(self, scope: Scope, environment: str | None, is_figure: bool = False) -> None:
        if len(self.stack) >= self.depth:
            self.deeper += environment is None
        else:
            self.stack.append(_Open(scope, environment, is_figure))

    def _close_group(self) -> None:
        if self.deeper:
            self.deeper -= 1
        elif self.stack[-1].environment is None:
            self._finish_into_parent(self.stack.pop())

    def _finish_into_parent(self, closed: _Open) -> None:
        if closed.scope.items:
            self.stack[-1].scope.items.append(closed.scope)

    def _finish(self, closed: _Open) -> Iterator[Scope]:
        if closed.is_figure and not any(open_.is_figure for open_ in self.stack):
            if closed.scope.holds_picture():
                yield closed.scope
        else:
            self._finish_into_parent(closed)

    def _begin(self, name: str) -> None:
        bare = name.rstrip("*")
        if bare == "overpic" or bare == "Overpic":
            options, file = self._option() or "", self._argument()
            self._add(Picture(file or "", options, self.context, self.paths))
            self._open(Scope(), name)
            return
        figure = bare.endswith("figure") and bare != "subfigure" or bare in ("figurehere", "figwindow") or name == "wrapfloat"
        self._open(Scope(is_panel=bare in _PANELS), name, figure)

    def _end(self, name: str) -> Iterator[Scope]:
        for index in range(len(self.stack) - 1, 0, -1):
            if self.stack[index].environment == name:
                self.deeper = 0
                while len(self.stack) > index:
                    yield from self._finish(self.stack.pop())
                return

    def _add(self, item: Picture | Caption) -> None:
        self.stack[-1].scope.items.append(item)

    def _environment(self) -> _Open:
        """The innermost environment or panel."""
        return next(open_ for open_ in reversed(self.stack) if open_.environment is not None or open_.scope.is_panel)

    # -- commands ----------------------------------------------------------------------------------
    def _picture(self, word: str) -> None:
        options = self._option() or ""
        second = self._option()
        name = self._argument()
        if name is None:
            return
        if word == "includesvg" and not name.lower().endswith(".svg"):
            name += ".svg"
        reason = _NO_GROUP if word == "pdftexfigure" else None
        trim = f",viewport={options.replace(',', ' ')} {second.replace(',', ' ')}" if second else ""  # [llx,lly][urx,ury]
        self._add(Picture(name, trim or options, self.context, self.paths, reason=reason))

    def _keyed_picture(self, word: str) -> None:
        found = _FILE_KEY.search(self._argument() or "")
        if found:
            self._add(Picture(found[1].strip(), "", self.context, self.paths))

    def _two_pictures(self, word: str) -> None:
        for _ in range(2):
            self._picture(word)

    def _aastex_panel(self, word: str) -> None:
        """AASTeX 6: \\fig{file}{width}{caption} within \\gridline."""
        if not any(open_.is_figure for open_ in self.stack):
            return
        start = self.position
        name, _, caption = self._argument(), self._argument(), self._argument()
        if name is None or caption is None:
            self.position = start
            return
        picture = Picture(name, "", self.context, self.paths)
        self.stack[-1].scope.items.append(Scope([picture], is_panel=True, caption=caption))

    def _panel(self, word: str) -> None:
        caption = self._argument() or "" if word == "subcaptionbox" else ""
        while (option := self._option()) is not None:
            caption = caption if word == "subcaptionbox" else option
        if self._next() == "{":
            self.position += 1
            label = _LABEL.search(caption)
            self._open(Scope(is_panel=True, caption=_LABEL.sub("", caption), label=label[1] if label else ""), None)

    def _caption(self, word: str) -> None:
        kind = (self._argument() or "").strip() if word == "captionof" else "figure"
        self._option()
        text = self._argument()
        if text is None or kind != "figure":
            return
        label = _LABEL.search(text)
        caption = Caption(_LABEL.sub("", text), label[1].strip() if label else "")
        if word == "subcaption":
            self._environment().scope.is_panel = True
        if word == "captionof" and not any(open_.is_figure for open_ in self.stack):
            self._figure_around(caption)
        elif not self._in_other_float():
            self._add(caption)

    def _in_other_float(self) -> bool:
        """Whether the innermost float is a table or the like, whose captions are none of figures."""
        for open_ in reversed(self.stack):
            if open_.is_figure:
                return False
            if open_.environment is not None and _OTHER_FLOATS.fullmatch(open_.environment):
                return True
        return False

    def _figure_around(self, caption: Caption) -> None:
        """\\captionof{figure} outside of figures: the environment around it becomes one, or takes the picture before it."""
        self._add(caption)
        open_ = next((o for o in reversed(self.stack[1:]) if o.environment not in (None, "document")), None)
        if open_ is not None:
            open_.is_figure = True
            return
        scope = self.stack[-1].scope
        before = scope.items[-2:-1]
        del scope.items[-2:]
        if before and not isinstance(before[0], Caption):
            self.found.append(Scope([*before, caption]))

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

    def _inline_tikz(self, word: str) -> None:
        start = self.position
        options = self._option()
        content = self._argument() if self._next() == "{" else None
        if content is None:
            self.position = start
        elif any(open_.is_figure for open_ in self.stack):
            source = f"\\{word}" + (f"[{options}]" if options is not None else "") + f"{{{content}}}"
            self._add(Picture("", context=self.context, tikz=f"${source}$" if word == "xymatrix" else source))

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
        return self._until(self.closes.get(self.position, -1)) if self._next() == "{" else None

    def _option(self) -> str | None:
        return self._until(closing_bracket(self.text, self.position)) if self._next() == "[" else None

    def _until(self, end: int) -> str | None:
        if end < 0:
            return None
        inner, self.position = self.text[self.position + 1 : end], end + 1
        return inner
