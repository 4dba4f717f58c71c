"""TeX's conditions, as far as they can be known without TeX; of the others the first branch is read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from OpenSciDraw.prepare.latex_stream import TextStack

_BRANCH = re.compile(r"\\(if[A-Za-z@]*|else|fi|or)(?![A-Za-z@])|\\.|%[^\n]*", re.DOTALL)
NO_CONDITION = re.compile(
    r"iff|ifthenelse|if(bool|toggle|def|undef|cs\w+|str\w+|blank|num\w+|dim\w+|field\w*|list\w*|name\w*|entry\w*|boolexpr|package\w*|"
    r"class\w*|value|Boolean\w*|NoValue\w*|false@|true@)"
)
_TRUE = frozenset("iftrue ifpdf ifpdftex ifPDFTeX ifpdfoutput ifmmode ifvmode".split()) - {"ifmmode", "ifvmode"}
_FALSE = frozenset("iffalse ifxetex ifluatex ifXeTeX ifLuaTeX iftutex ifmmode ifvmode ifinner".split())


@dataclass(frozen=True)
class Macro:
    """`kinds`: m an argument, o an optional one, s a star, t text that must follow or end an argument (of \\def)."""

    kinds: tuple[tuple[str, str], ...]
    body: str


class Conditions(TextStack):
    """`switches` are those of \\newif, toggles and booleans; `macros` the author's own."""

    def __init__(self) -> None:
        super().__init__()
        self.macros: dict[str, Macro] = {}
        self.switches: dict[str, bool] = {}
        self._conditions = 0  # that are open

    def body_of(self, name: str) -> str:
        macro = self.macros.get(name)
        return macro.body if macro is not None and not macro.kinds else ""

    def newif(self, which: str) -> None:
        name = (self.argument() or "").lstrip("\\")
        if name.startswith("if"):
            self.switches[name[2:]] = False

    def new_switch(self, which: str) -> None:
        self.switches[(self.argument() or "").strip()] = False

    def set_switch(self, which: str) -> None:
        name = (self.argument() or "").strip()
        self.switches[name] = (self.argument() or "").strip() == "true" if which == "setboolean" else which.endswith("true")

    def if_braces(self, which: str) -> None:
        test, yes, no = self.argument() or "", self.argument() or "", self.argument() or ""
        name = re.sub(r"\\boolean\s*\{([^}]*)\}", r"\1", test).strip()
        self.push(yes if self.switches.get(name, which == "ifthenelse") else no)

    def read_if(self, name: str) -> None:
        if self._holds(name):
            self._conditions += 1
        elif self._skip_branch(stop_at_else=True) == "else":
            self._conditions += 1

    def _holds(self, name: str) -> bool:
        """Whether a condition holds; of one that cannot be known the first branch is taken."""
        if name in _TRUE or name in _FALSE:
            return name in _TRUE
        if name[2:] in self.switches:
            return self.switches[name[2:]]
        if name in ("ifx", "if", "ifcat"):
            a, b = self.argument() or "", self.argument() or ""
            undefined = {"\\undefined", "\\@undefined"}
            if undefined & {a, b}:
                other = (b if a in undefined else a).lstrip("\\")
                return other not in self.macros and other not in ("pdfoutput", "pdfcompresslevel", "includegraphics")
            return a == b or self.body_of(a.lstrip("\\")) == self.body_of(b.lstrip("\\")) != ""
        if name in ("ifdefined", "ifcsname"):
            return (self.argument() or "").lstrip("\\") in self.macros
        if name in ("ifnum", "ifdim", "ifodd"):
            buffer = self.settle()
            test = (
                re.compile(r"[^\n\\]*?(?:\\\w+)?[^\n\\]*?([-\d]+)\s*([<>=])\s*([-\d]+) ?").match(buffer.text, buffer.pos)
                if buffer
                else None
            )
            if test is not None and buffer is not None:
                buffer.pos = test.end()
                a, sign, b = test.groups()
                if a.lstrip("-").isdecimal() and b.lstrip("-").isdecimal():
                    return {"<": int(a) < int(b), ">": int(a) > int(b), "=": int(a) == int(b)}[sign]
        return True

    def end_branch(self, which: str) -> None:
        if self._conditions:
            self._conditions -= 1
            if which != "fi":
                self._skip_branch(stop_at_else=False)

    def _skip_branch(self, stop_at_else: bool) -> str:
        """Past the \\fi of this condition, or its \\else. Returns which it was."""
        depth = 0
        while self.stack:
            buffer = self.stack[-1]
            for token in _BRANCH.finditer(buffer.text, buffer.pos):
                word = token[1] or ""
                if word.startswith("if"):
                    depth += not NO_CONDITION.fullmatch(word)
                elif word == "fi" and depth == 0 or word == "else" and depth == 0 and stop_at_else:
                    buffer.pos = token.end()
                    return word
                elif word == "fi":
                    depth -= 1
            self.pop()
        return "fi"
