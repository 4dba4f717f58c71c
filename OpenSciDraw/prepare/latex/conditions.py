"""TeX's conditions, as far as they can be known without TeX; of the others the first branch is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from OpenSciDraw.prepare.latex.stream import TextStack

_BRANCH = re.compile(r"\\(if[A-Za-z@]*|else|fi|or)(?![A-Za-z@])|\\.|%[^\n]*", re.DOTALL)
NO_CONDITION = re.compile(  # names that start like TeX's conditions but take their branches in braces, or none
    r"iff|ifthenelse|if(bool|toggle|def|undef|cs\w+|str\w+|blank|num\w+|dim\w+|field\w*|list\w*|name\w*|entry\w*|boolexpr|package\w*|"
    r"class\w*|value|Boolean\w*|NoValue\w*|false@|true@)"
)
_TRUE = frozenset("iftrue ifpdf ifpdftex ifPDFTeX ifpdfoutput".split())
_FALSE = frozenset("iffalse ifxetex ifluatex ifXeTeX ifLuaTeX iftutex ifvmode ifinner ifvoid ifeof".split())
_NUMBERS = re.compile(r"\s*([-\d]{1,9})\s*([<>=])\s*([-\d]{1,9})(?![\d.])")
_COMPARED = re.compile(
    r"(?:[^\n\\<>=]|\\[A-Za-z@]+(?![A-Za-z@])){0,80}?[<>=](?:\s*[-\d.]+|\s*\\[A-Za-z@]+)?(?:pt|cm|mm|in|em|ex)? ?"
)
# The engine that a paper is for, as far as tests go: pdfTeX, which knows these and nothing of the author's yet.
_PRIMITIVES = frozenset("pdfoutput pdfcompresslevel pdftexversion includegraphics relax pdfminorversion".split())
_VALUE_TESTS = ("NoValue", "Value", "Boolean", "Blank")
NO_VALUE = "-NoValue-"  # xparse's mark of an optional argument that is not given


@dataclass(frozen=True)
class Macro:
    """`kinds`: (m, ''), (o, default) in brackets, (s, '') a star, (t, text that must follow), (d, text that ends it) of \\def,
    (p, '()') a pair of delimiters."""

    kinds: tuple[tuple[str, str], ...]
    body: str


class Conditions(TextStack):
    """`switches` are those of \\newif, toggles and booleans; `macros` the author's own."""

    def __init__(self) -> None:
        super().__init__()
        self.macros: dict[str, Macro] = dict.fromkeys(("empty", "@empty"), Macro((), ""))
        self.switches: dict[str, bool] = {}
        self.in_math = False
        self._conditions = 0  # that are open

    def condition_handlers(self) -> dict[str, Callable[[str], None]]:
        return {
            "newif": self._newif,
            **dict.fromkeys(("newtoggle", "newbool", "newboolean"), self._new_switch),
            **dict.fromkeys("toggletrue togglefalse booltrue boolfalse setboolean settoggle setbool".split(), self._set_switch),
            **dict.fromkeys(("iftoggle", "ifbool", "ifthenelse"), self._if_braces),
            **dict.fromkeys(("ifdef", "ifundef", "ifcsdef", "ifcsundef", "@ifundefined"), self._if_defined),
            **dict.fromkeys(("ifstrequal", "ifstrempty", "ifblank", "ifdefempty", "ifdefstring"), self._if_text),
            **dict.fromkeys([f"If{what}{sides}" for what in _VALUE_TESTS for sides in ("TF", "T", "F")], self._if_value),
            **dict.fromkeys(("fi", "else", "or"), self._end_branch),
            "@ifstar": self._if_star,
            "@ifnextchar": self._if_next,
        }  # fmt: skip

    def body_of(self, name: str) -> str:
        macro = self.macros.get(name)
        return macro.body if macro is not None and not macro.kinds else ""

    def plain(self, text: str | None) -> str:
        """A file name or the like with its parameterless macros expanded."""
        for _ in range(10):
            changed = re.sub(r"\\([A-Za-z@]+) ?", lambda m: self.body_of(m[1])[:1000], text or "")[:2000]
            if changed == text:
                break
            text = changed
        return (text or "").strip().strip('"')

    # -- switches -----------------------------------------------------------------------------------
    def _newif(self, which: str) -> None:
        name = (self.argument() or "").lstrip("\\")
        if name.startswith("if"):
            self.switches[name[2:]] = False

    def _new_switch(self, which: str) -> None:
        self.switches.setdefault((self.argument() or "").strip(), False)

    def _set_switch(self, which: str) -> None:
        name = (self.argument() or "").strip()
        self.switches[name] = (self.argument() or "").strip() == "true" if which.startswith("set") else which.endswith("true")

    # -- branches in braces -----------------------------------------------------------------------
    def _choose(self, holds: bool, sides: str = "TF") -> None:
        """Reads on with the branch that is taken; `sides` says which are there."""
        branches = {side: self.argument() or "" for side in sides}
        self.push(branches.get("T" if holds else "F", ""))

    def _if_braces(self, which: str) -> None:
        test = self.argument() or ""
        if name := re.fullmatch(r"\s*(\\not)?\s*\\(?:boolean|equal\s*\{([^{}]*)\})\s*\{([^{}]*)\}\s*", test):
            known = self.plain(name[2]) == self.plain(name[3]) if name[2] is not None else self.switches.get(name[3].strip(), True)
            return self._choose(known != bool(name[1]))
        if numbers := _NUMBERS.fullmatch(self.plain(test)):
            return self._choose(_compare(numbers))
        self._choose(self.switches.get(test.strip(), which == "ifthenelse"))

    def _if_defined(self, which: str) -> None:
        name = (self.argument() or "").strip().lstrip("\\")
        defined = name in self.macros or name in self.switches or name in _PRIMITIVES
        self._choose(defined != ("un" in which))

    def _if_text(self, which: str) -> None:
        text = self.argument() or ""
        if which in ("ifstrequal", "ifdefstring"):
            other = self.argument() or ""
            self._choose((self.plain(text) if which == "ifdefstring" else text) == other)
        else:
            self._choose(not (self.plain(text) if which == "ifdefempty" else text).strip())

    def _if_value(self, which: str) -> None:
        what, sides = re.findall(r"If(NoValue|Value|Boolean|Blank)([TF]+)", which)[0]
        text = (self.argument() or "").strip()
        given = text != NO_VALUE
        holds = {"NoValue": not given, "Value": given, "Blank": not text, "Boolean": text in ("*", "\\BooleanTrue")}
        self._choose(holds[what], sides)

    def _if_star(self, which: str) -> None:
        yes, no = self.argument() or "", self.argument() or ""
        self.push(yes if self.star() else no)

    def _if_next(self, which: str) -> None:
        mark, yes, no = self.argument() or "", self.argument() or "", self.argument() or ""
        buffer = self.settle()
        self.push(yes if mark and buffer is not None and buffer.text.startswith(mark, buffer.pos) else no)

    # -- \if … \else … \fi --------------------------------------------------------------------------
    def read_if(self, name: str) -> None:
        if name == "ifcase":
            return self._read_case()
        if self._holds(name):
            self._conditions += 1
        elif self._skip_branch(stop_at="else") == "else":
            self._conditions += 1

    def _read_case(self) -> None:
        buffer = self.settle()
        number = re.compile(r"(?:\\[A-Za-z@]+|\d{1,3}) ?").match(buffer.text, buffer.pos) if buffer is not None else None
        wanted = 0
        if number is not None and buffer is not None:
            buffer.pos = number.end()
            value = self.plain(number[0])
            wanted = int(value) if value.isdecimal() and len(value) < 4 else 0
        for _ in range(wanted):
            if (found := self._skip_branch(stop_at="or")) != "or":
                self._conditions += found == "else"
                return
        self._conditions += 1

    def _holds(self, name: str) -> bool:
        """Whether a condition holds; of one that cannot be known the first branch is taken."""
        if name == "ifmmode":
            return self.in_math
        if name in _TRUE or name in _FALSE:
            return name in _TRUE
        if name[2:] in self.switches:
            return self.switches[name[2:]]
        if name in ("ifx", "if", "ifcat"):
            return self._same(self.argument() or "", self.argument() or "")
        if name in ("ifdefined", "ifcsname"):
            return (self.argument() or "").lstrip("\\") in self.macros
        if name in ("ifnum", "ifdim"):
            return self._number_holds()
        if name == "ifodd":
            value = self.plain(self.argument())
            return not value.isdecimal() or value[-1] in "13579"
        return True

    def _same(self, a: str, b: str) -> bool:
        undefined = {"\\undefined", "\\@undefined", "\\relax"}
        if {a, b} & undefined and not {a, b} <= undefined:
            other = (b if a in undefined else a).lstrip("\\")
            return other not in self.macros and other not in _PRIMITIVES and "\\relax" not in (a, b)
        return a == b or self.macros.get(a[1:], a) == self.macros.get(b[1:], b)

    def _number_holds(self) -> bool:
        buffer = self.settle()
        test = _COMPARED.match(buffer.text, buffer.pos) if buffer is not None else None
        if test is None or buffer is None:
            return True
        buffer.pos = test.end()
        numbers = _NUMBERS.fullmatch(self.plain(test[0].replace("\\pdfoutput", "1")))
        return _compare(numbers) if numbers else True

    def _end_branch(self, which: str) -> None:
        if self._conditions:
            self._conditions -= 1
            if which != "fi":
                self._skip_branch(stop_at="")

    def _skip_branch(self, stop_at: str) -> str:
        """Past the \\fi of this condition, or its \\else or \\or where that is asked for. Returns which it was."""
        depth = 0
        while self.stack:
            buffer = self.stack[-1]
            for token in _BRANCH.finditer(buffer.text, buffer.pos):
                word = token[1] or ""
                if word.startswith("if"):
                    depth += not NO_CONDITION.fullmatch(word)
                elif depth == 0 and word and (word in ("fi", stop_at) or word == "else" and stop_at):
                    buffer.pos = token.end()
                    return word
                elif word == "fi":
                    depth -= 1
            if buffer.context >= 0:  # as TeX: a file's conditions end with it
                buffer.pos = len(buffer.text)
                break
            self.pop()
        return "fi"


def _compare(numbers: re.Match[str]) -> bool:
    try:
        a, sign, b = int(numbers[1]), numbers[2], int(numbers[3])
    except ValueError:  # '--3'
        return True
    return {"<": a < b, ">": a > b, "=": a == b}[sign]
