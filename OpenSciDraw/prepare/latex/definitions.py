"""How authors define macros and environments: \\newcommand, \\def, \\let, xparse and the like."""

from __future__ import annotations

import re
from collections.abc import Callable

from OpenSciDraw.prepare.latex.conditions import NO_VALUE, Conditions, Macro
from OpenSciDraw.prepare.latex.stream import Braces, Buffer

# What figures are found by is never redefined: papers wrap \includegraphics or \caption to tune their looks.
STRUCTURE = frozenset(
    "begin end input include import subimport subfile includegraphics caption captionof subcaption subfloat subfigure "
    "subcaptionbox label ref autoref cref Cref eqref pageref graphicspath epsfig psfig epsfbox epsffile plotone plottwo "
    "includesvg documentclass usepackage figure endfigure table endtable centering par item section subsection paragraph "
    "textbf textit emph cite citep citet footnote left right frac sqrt sum int document tikz resizebox scalebox rotatebox "
    "captionsetup ensuremath".split()
)
_NEW_COMMANDS = ("newcommand", "renewcommand", "providecommand", "DeclareRobustCommand", "newrobustcmd", "renewrobustcmd")
_ARGUMENT = re.compile(r"([mosvbOdDrRgGt+!lu])\s*")
_GIVEN_MARKS = frozenset("dDrR")
_DEFINING = re.compile(
    r"\\(newcommand|renewcommand|providecommand|DeclareRobustCommand|newrobustcmd|DeclareMathOperator|newenvironment|"
    r"renewenvironment|NewDocumentCommand|DeclareDocumentCommand|newif|def|graphicspath|DeclareGraphicsExtensions|RequirePackage|usepackage)(?![A-Za-z@])\*?"
)
_INTERNAL = re.compile(r"\\(?:@|[A-Za-z]+@)")


class Definitions(Conditions):
    """`known` are macros that local styles must not redefine; `definitions` the author's, for TikZ pictures to be compiled with."""

    def __init__(self, known: frozenset[str]) -> None:
        super().__init__()
        self.known = known
        self.definitions: list[str] = []
        self.environments: dict[str, tuple[Macro, Macro]] = {}

    def definition_handlers(self) -> dict[str, Callable[[str], None]]:
        environments = [f"{what}DocumentEnvironment" for what in ("New", "Renew", "Provide", "Declare")]
        return {
            **dict.fromkeys(_NEW_COMMANDS, self._newcommand),
            **dict.fromkeys(("def", "gdef", "edef", "xdef"), self._def),
            **dict.fromkeys([f"{what}DocumentCommand" for what in ("New", "Renew", "Provide", "Declare")], self._document),
            **dict.fromkeys(("newcommandx", "renewcommandx"), self._xargs),
            **dict.fromkeys(("newenvironment", "renewenvironment", "provideenvironment"), self._newenvironment),
            **dict.fromkeys(environments, self._document_environment),
            "let": self._let,
            "DeclareMathOperator": self._operator,
        }

    def _define(self, name: str, macro: Macro, keep: bool = False) -> None:
        name = name.strip().lstrip("\\")
        unknowable = name.startswith("if") and macro.body == "\\relax "  # \let\ifpdf\relax, before it is made a switch
        if name and name not in STRUCTURE and not (keep and name in self.macros) and not unknowable:
            self.macros[name] = macro

    def _counted(self, count: str | None, default: str | None) -> tuple[tuple[str, str], ...]:
        """Kinds of the arguments of \\newcommand{\\x}[count][default]."""
        number = min(int(count), 9) if count and count.strip().isdecimal() and len(count) < 9 else 0
        kinds = ([("o", default)] if default is not None else []) + [("m", "")] * number
        return tuple(kinds[:number])

    def _newcommand(self, which: str) -> None:
        self.star()
        name, count, default, body = self.argument(), self.optional(), self.optional(), self.argument()
        if name is None or body is None:
            return
        kinds = self._counted(count, default)
        self._define(name, Macro(kinds, body), keep=which == "providecommand")
        head = f"[{len(kinds)}]" + (f"[{default}]" if default is not None else "") if kinds else ""
        self.definitions.append(f"\\providecommand{{{name}}}{{}}\\renewcommand{{{name}}}{head}{{{body}}}")

    def _xargs(self, which: str) -> None:
        """\\newcommandx{\\x}[3][1=a, 2=b]{…}: arguments that are numbered are optional."""
        self.star()
        name, count, given, body = self.argument(), self.optional(), self.optional() or "", self.argument()
        if name is None or body is None:
            return
        defaults = {found[1]: found[2] or "" for found in re.finditer(r"([1-9])\s*(?:=([^,{}]*|\{[^{}]*\}))?(?:,|$)", given)}
        numbers = range(1, 1 + len(self._counted(count, None)))
        kinds = tuple(("o", defaults[str(n)].strip("{}")) if str(n) in defaults else ("m", "") for n in numbers)
        self._define(name, Macro(kinds, body))

    def _def(self, which: str) -> None:
        name, buffer = self.argument(), self.settle()
        if name is None or not name.startswith("\\") or buffer is None:
            return
        brace = buffer.text.find("{", buffer.pos, buffer.pos + 200)
        if brace < 0:
            return
        parameters, buffer.pos = buffer.text[buffer.pos : brace], brace
        body = self.argument()
        if body is None:
            return
        if name == "\\@captype":
            return self.push(f"\\captionsetup{{type={body.strip()}}}")
        kinds: list[tuple[str, str]] = []
        for index, part in enumerate(re.split(r"#[1-9]", parameters.rstrip("\n"))):
            if index:
                kinds.append(("d", part) if part.strip() else ("m", ""))
            elif part.strip():
                kinds.append(("t", part.strip()))
        self._define(name, Macro(tuple(kinds), body))
        self.definitions.append(f"\\def{name}{parameters}{{{body}}}")

    def _let(self, which: str) -> None:
        name = self.argument()
        self.mark("=")
        target = self.argument()
        if name is None or target is None or not name.startswith("\\"):
            return
        macro = self.macros.get(target.lstrip("\\"), Macro((), target + ("" if len(target) < 3 else " ")))
        if name == "\\@captype":
            self.push(f"\\captionsetup{{type={target}}}")
        elif target != name:
            self._define(name, macro)
            self.definitions.append(f"\\let{name}={target}")

    def _operator(self, which: str) -> None:
        self.star()
        name, text = self.argument(), self.argument()
        if name is not None and text is not None:
            self._define(name, Macro((), f"\\operatorname{{{text}}}"))
            self.definitions.append(f"\\providecommand{{{name}}}{{\\mathrm{{{text}}}}}")

    def _document(self, which: str) -> None:
        name, specification, body = self.argument(), self.argument(), self.argument()
        if name is None or specification is None or body is None:
            return
        self._define(name, Macro(_kinds(specification), body))
        self.definitions.append(f"\\DeclareDocumentCommand{{{name}}}{{{specification}}}{{{body}}}")

    def _newenvironment(self, which: str) -> None:
        self.star()
        name, count, default = self.argument(), self.optional(), self.optional()
        begin, end = self.argument(), self.argument()
        if name is not None and begin is not None and end is not None:
            self._define_environment(name, Macro(self._counted(count, default), begin), end)
            head = f"[{count}]" + (f"[{default}]" if default is not None else "") if count else ""
            self.definitions.append(
                f"\\makeatletter\\@ifundefined{{{name}}}{{\\newenvironment{{{name}}}{head}{{{begin}}}{{{end}}}}}{{}}\\makeatother"
            )

    def _document_environment(self, which: str) -> None:
        name, specification, begin, end = self.argument(), self.argument(), self.argument(), self.argument()
        if name is not None and specification is not None and begin is not None and end is not None:
            self._define_environment(name, Macro(_kinds(specification), begin), end)

    def _define_environment(self, name: str, begin: Macro, end: str) -> None:
        if name not in STRUCTURE and name.rstrip("*") not in ("figure", "table"):
            self.environments[name] = (begin, Macro((), end))

    # -- local styles ----------------------------------------------------------------------------------
    def load_style(self, text: str) -> list[str]:
        """The macros of a local style that an author would call: no internals (@), none that are known otherwise.

        Returns the names of the packages that it needs.
        """
        macros, environments, stack = dict(self.macros), dict(self.environments), self.stack
        count, packages, braces = len(self.definitions), list[str](), Braces(text)
        handlers = {**self.definition_handlers(), **self.condition_handlers()}
        for found in _DEFINING.finditer(text):
            near = max(0, found.start() - 200)
            if "%" in text[max(near, text.rfind("\n", near, found.start())) : found.start()]:
                continue
            self.stack = [Buffer(text, found.end(), 0, at_letter=True, braces=braces)]
            if found[1] in ("RequirePackage", "usepackage"):
                self.optional()
                packages += (self.argument() or "").split(",")
            elif found[1] in ("graphicspath", "DeclareGraphicsExtensions"):
                self.from_style(f"\\{found[1]}{{{self.argument() or ''}}}")
            else:
                handlers[found[1]](found[1])
        self.stack = stack
        for name, macro in list(self.macros.items()):
            if macro is not macros.get(name) and (_INTERNAL.search("\\" + name + macro.body) or name in self.known):
                del self.macros[name]
                if name in macros:
                    self.macros[name] = macros[name]
        for name, (begin, end) in list(self.environments.items()):
            if name not in environments and _INTERNAL.search(begin.body + end.body):
                del self.environments[name]
        del self.definitions[count:]
        return packages

    def from_style(self, command: str) -> None:
        """A command of a style that says where pictures are."""
        raise NotImplementedError


def _kinds(specification: str) -> tuple[tuple[str, str], ...]:
    """xparse's specification of arguments: 's O{3cm} m' -> kinds."""
    kinds: list[tuple[str, str]] = []
    braces, position = Braces(specification), 0
    while position < len(specification) and len(kinds) < 9:
        found = _ARGUMENT.match(specification, position)
        if found is None:
            position = max(position, braces.closing(position)) + 1  # past >{…}
            continue
        kind, position = found[1], found.end()
        marks, default = "", NO_VALUE
        if kind in _GIVEN_MARKS or kind == "t":
            wide = 1 if kind == "t" else 2
            marks, position = specification[position : position + wide], position + wide
        if kind in "ODRG" and (end := braces.closing(position)) >= 0:
            default, position = specification[position + 1 : end], end + 1
        if kind in "mvbgGlu":
            kinds.append(("m", ""))
        elif kind in "oO":
            kinds.append(("o", default))
        elif kind == "s" or kind == "t" and marks == "*":
            kinds.append(("s", ""))
        elif kind in _GIVEN_MARKS and len(marks) == 2:
            kinds.append(("p", marks + default))
    return tuple(kinds)
