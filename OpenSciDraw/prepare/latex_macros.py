"""A LaTeX document as one flat text: inputs in place, the author's macros expanded, comments and dead branches gone.

pylatexenc parses LaTeX but expands no macros and reads no inputs, so this part is our own. It works as TeX does,
on a stack of texts that are read from the top, but only the author's own macros are expanded; all else is copied.
TeX's groups are not followed: a macro keeps its last definition. Every loop is bounded by `Limits`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from OpenSciDraw.prepare.latex_conditions import NO_CONDITION, Conditions, Macro
from OpenSciDraw.prepare.latex_source import Project, normal
from OpenSciDraw.prepare.latex_stream import Buffer

# Marks in the flat text: \x01n\x02 the file context n begins, \x03n\x04 stands for TikZ picture n.
MARKS = re.compile("\x01(\\d+)\x02|\x03(\\d+)\x04")
TIKZ = ("tikzpicture", "pgfpicture", "circuitikz", "tikzcd", "forest", "pspicture", "feynman", "picture")
_VERBATIM = frozenset("verbatim verbatim* Verbatim lstlisting minted comment filecontents filecontents* alltt listing".split())
_NEXT = re.compile(r"[\\%]")
_PARAMETER = re.compile(r"#(#|[1-9])")
# What figures are found by is never redefined: papers wrap \includegraphics or \caption to tune their looks.
STRUCTURE = frozenset(
    "begin end input include import subimport subfile includegraphics caption captionof subcaption subfloat subfigure "
    "subcaptionbox label ref autoref cref Cref eqref pageref graphicspath epsfig psfig epsfbox epsffile plotone plottwo "
    "includesvg documentclass usepackage figure endfigure table endtable centering par item section subsection paragraph "
    "textbf textit emph cite citep citet footnote left right frac sqrt sum int document tikz resizebox scalebox rotatebox".split()
)
_NEW_COMMANDS = ("newcommand", "renewcommand", "providecommand", "DeclareRobustCommand", "newrobustcmd")
_DEFINING = re.compile(
    r"\\(newcommand|renewcommand|providecommand|DeclareRobustCommand|newrobustcmd|DeclareMathOperator|newenvironment|"
    r"renewenvironment|NewDocumentCommand|DeclareDocumentCommand|newif|def|RequirePackage|usepackage)(?![A-Za-z@])\*?"
)


@dataclass
class Flat:
    """The flat text; `contexts` (file, folder of its relative names) and `tikz` are what its marks point to."""

    text: str = ""
    contexts: list[tuple[str, str]] = field(default_factory=list)
    tikz: list[str] = field(default_factory=list)
    definitions: list[str] = field(default_factory=list)  # the author's own, as written: TikZ pictures need them
    files: set[str] = field(default_factory=set)


class Expander(Conditions):
    """One document, read once. `known` are macros that local styles must not redefine."""

    def __init__(self, project: Project, known: frozenset[str]):
        super().__init__()
        self.project, self.known = project, known
        self.flat = Flat()
        self._environments: dict[str, tuple[Macro, str]] = {}
        self._out: list[str] = []
        self._emitted = self._expansions = 0
        self._only: set[str] | None = None
        self._handlers: dict[str, Callable[[str], None]] = {
            **dict.fromkeys(("input", "include", "subfile", "import", "subimport", "InputIfFileExists"), self._input),
            **dict.fromkeys(_NEW_COMMANDS, self._newcommand),
            **dict.fromkeys(("def", "gdef", "edef", "xdef"), self._def),
            **dict.fromkeys([f"{what}DocumentCommand" for what in ("New", "Renew", "Provide", "Declare")], self._document),
            **dict.fromkeys(("newenvironment", "renewenvironment", "provideenvironment"), self._newenvironment),
            **dict.fromkeys(("newtoggle", "newbool", "newboolean"), self.new_switch),
            **dict.fromkeys(("toggletrue", "togglefalse", "booltrue", "boolfalse", "setboolean"), self.set_switch),
            **dict.fromkeys(("iftoggle", "ifbool", "ifthenelse"), self.if_braces),
            **dict.fromkeys(("usepackage", "RequirePackage", "documentclass"), self._package),
            **dict.fromkeys(("fi", "else", "or"), self.end_branch),
            **dict.fromkeys(("verb", "lstinline", "mintinline"), self._verb),
            "let": self._let, "DeclareMathOperator": self._operator, "newif": self.newif, "begin": self._begin,
            "end": self._end, "makeatletter": self._at, "makeatother": self._at, "endinput": self._endinput,
            "includeonly": self._includeonly, "xspace": self._xspace, "csname": self._csname,
        }  # fmt: skip

    def run(self, main: str) -> Flat:
        """The flat text of the document whose main file is `main`."""
        folder = main.rpartition("/")[0]
        self._push_file(main, folder)
        largest = 4 * self.project.limits.tex_bytes
        while self.stack:
            buffer = self.stack[-1]
            found = _NEXT.search(buffer.text, buffer.pos)
            if found is None:
                self._emit(buffer.text[buffer.pos :])
                self.pop()
                continue
            self._emit(buffer.text[buffer.pos : found.start()])
            buffer.pos = found.start()
            if self._emitted > largest or self.scanned > 16 * largest:
                self.project.problem(f"{main}: its macros expand to more than {largest} bytes: the rest is not read")
                break
            if found[0] == "%":
                self._comment(buffer)
            else:
                self._control(buffer)
        self.flat.text = "".join(self._out)
        return self.flat

    # -- reading -----------------------------------------------------------------------------------
    def _emit(self, text: str) -> None:
        if text:
            self._out.append(text)
            self._emitted += len(text)

    def _push_file(self, name: str, folder: str) -> None:
        self.flat.files.add(name)
        self.flat.contexts.append((name, folder))
        self.stack.append(Buffer(self.project.read(name), context=len(self.flat.contexts) - 1))
        self._emit(f"\x01{len(self.flat.contexts) - 1}\x02")

    def pop(self) -> None:
        if self.stack.pop().context >= 0 and self.stack:
            self._emit(f"\x01{self._context()}\x02")

    def _context(self) -> int:
        return next(buffer.context for buffer in reversed(self.stack) if buffer.context >= 0)

    def _comment(self, buffer: Buffer) -> None:
        end = buffer.text.find("\n", buffer.pos)
        buffer.pos = len(buffer.text) if end < 0 else end + 1
        while buffer.text[buffer.pos : buffer.pos + 1] in (" ", "\t"):
            buffer.pos += 1
        if buffer.text[buffer.pos : buffer.pos + 1] == "\n":
            self._emit("\n")  # an empty line after a comment still ends the paragraph

    def _control(self, buffer: Buffer) -> None:
        word = buffer.word(buffer.pos + 1)
        if word is None:
            self._emit(buffer.text[buffer.pos : buffer.pos + 2])
            buffer.pos += 2
            return
        name, buffer.pos = word[0], word.end()
        if name in self._handlers:
            self._handlers[name](name)
        elif name in self.macros and self._count():
            self._expand(name, self.macros[name])
        elif name.startswith("if") and not NO_CONDITION.fullmatch(name):
            self.read_if(name)
        elif name[:-4] in self.switches and name.endswith("true"):
            self.switches[name[:-4]] = True
        elif name[:-5] in self.switches and name.endswith("false"):
            self.switches[name[:-5]] = False
        else:
            self._emit("\\" + name)

    def _count(self) -> bool:
        """Whether one more expansion is allowed."""
        self._expansions += 1
        if self._expansions == self.project.limits.expansions:
            self.project.problem(f"more than {self._expansions} macro expansions: further macros are left as they are")
        return self._expansions < self.project.limits.expansions and len(self.stack) < 4 * self.project.limits.depth

    # -- macros --------------------------------------------------------------------------------------
    def _expand(self, name: str, macro: Macro) -> None:
        values: list[str] = []
        for kind, extra in macro.kinds:
            if kind == "m":
                values.append(self.argument() or "")
            elif kind == "o":
                given = self.optional()
                values.append(extra if given is None else given)
            elif kind == "s":
                values.append("*" if self.star() else "")
            elif not self._delimited(kind, extra, values):
                return self._emit("\\" + name)
        if not macro.kinds:
            self.skip_spaces()
        body = (
            _PARAMETER.sub(lambda m: "#" if m[1] == "#" else _value(values, int(m[1])), macro.body)
            if "#" in macro.body
            else macro.body
        )
        self.scanned += len(body)
        self.push(body)

    def _delimited(self, kind: str, text: str, values: list[str]) -> bool:
        """'t': `text` must follow; 'd': an argument that ends where `text` does. False when the text is not there."""
        buffer = self.settle()
        if buffer is None:
            return False
        if kind == "t":
            buffer.pos += len(text) if (follows := buffer.text.startswith(text, buffer.pos)) else 0
            return follows
        end = buffer.text.find(text, buffer.pos)
        if end < 0:
            return False
        value, buffer.pos = buffer.text[buffer.pos : end], end + len(text)
        values.append(value[1:-1] if value.startswith("{") and value.endswith("}") else value)
        return True

    def _newcommand(self, which: str) -> None:
        self.star()
        name, count, default, body = self.argument(), self.optional(), self.optional(), self.argument()
        if name is None or body is None:
            return
        number = int(count) if count and count.strip().isdecimal() else 0
        kinds = (([("o", default)] if default is not None else []) + [("m", "")] * min(number, 9))[: max(number, 0)]
        self._define(name, Macro(tuple(kinds), body), keep=which == "providecommand")
        head = f"[{number}]" + (f"[{default}]" if default is not None else "") if number else ""
        self.flat.definitions.append(f"\\providecommand{{{name}}}{{}}\\renewcommand{{{name}}}{head}{{{body}}}")

    def _define(self, name: str, macro: Macro, keep: bool = False) -> None:
        name = name.strip().lstrip("\\")
        if name and name not in STRUCTURE and not (keep and name in self.macros):
            self.macros[name] = macro

    def _def(self, which: str) -> None:
        name, buffer = self.argument(), self.settle()
        if name is None or not name.startswith("\\") or buffer is None:
            return
        brace = buffer.text.find("{", buffer.pos)
        if brace < 0 or brace - buffer.pos > 200:
            return
        parameters, buffer.pos = buffer.text[buffer.pos : brace], brace
        body = self.argument()
        if body is None:
            return
        kinds: list[tuple[str, str]] = []
        for index, part in enumerate(re.split(r"#[1-9]", parameters.rstrip("\n"))):
            if index:
                kinds.append(("d", part) if part.strip() else ("m", ""))
            elif part.strip():
                kinds.append(("t", part.strip()))
        self._define(name, Macro(tuple(kinds), body))
        self.flat.definitions.append(f"\\def{name}{parameters}{{{body}}}")

    def _let(self, which: str) -> None:
        name, buffer = self.argument(), self.settle()
        if buffer is not None and buffer.text[buffer.pos] == "=":
            buffer.pos += 1
        target = self.argument()
        if name is None or target is None or not name.startswith("\\"):
            return
        macro = self.macros.get(target.lstrip("\\"), Macro((), target + ("" if len(target) < 3 else " ")))
        if target != name:
            self._define(name, macro)

    def _operator(self, which: str) -> None:
        self.star()
        name, text = self.argument(), self.argument()
        if name is not None and text is not None:
            self._define(name, Macro((), f"\\operatorname{{{text}}}"))
            self.flat.definitions.append(f"\\providecommand{{{name}}}{{\\mathrm{{{text}}}}}")

    def _document(self, which: str) -> None:
        name, spec, body = self.argument(), self.argument(), self.argument()
        if name is None or spec is None or body is None:
            return
        kinds: list[tuple[str, str]] = []
        for token in re.finditer(r"([mosvbOd])\s*(\{[^{}]*\})?", spec):
            kind = {"O": "o", "v": "m", "b": "m"}.get(token[1], token[1])
            kinds.append((kind if kind in "mos" else "o", token[2][1:-1] if token[1] == "O" and token[2] else ""))
        self._define(name, Macro(tuple(kinds), body))

    def _newenvironment(self, which: str) -> None:
        self.star()
        name, count, default = self.argument(), self.optional(), self.optional()
        begin, end = self.argument(), self.argument()
        if name is None or begin is None or end is None or name in STRUCTURE or name.rstrip("*") in ("figure", "table"):
            return
        number = min(int(count), 9) if count and count.strip().isdecimal() else 0
        kinds = ([("o", default)] if default is not None else []) + [("m", "")] * number
        self._environments[name] = (Macro(tuple(kinds[:number]), begin), end)

    # -- environments ----------------------------------------------------------------------------------
    def _begin(self, which: str) -> None:
        buffer = self.stack[-1]
        name = (self.argument() or "").strip()
        if name in _VERBATIM:
            end = buffer.text.find(f"\\end{{{name}}}", buffer.pos)
            buffer.pos = end + len(name) + 6 if end >= 0 else buffer.pos
        elif name in TIKZ and (end := self._end_of(buffer, name)) >= 0:
            self.flat.tikz.append(f"\\begin{{{name}}}" + buffer.text[buffer.pos : end])
            self._emit(f"\x03{len(self.flat.tikz) - 1}\x04")
            buffer.pos = end
        elif name in self._environments and self._count():
            self._expand(f"begin{{{name}}}", self._environments[name][0])
        else:
            self._emit(f"\\begin{{{name}}}")

    def _end_of(self, buffer: Buffer, name: str) -> int:
        """Behind the \\end that belongs to the \\begin just read; -1 when it is not in this text."""
        depth = 1
        for token in re.finditer(rf"\\(begin|end)\{{{re.escape(name)}\}}|\\.|%[^\n]*", buffer.text[buffer.pos :], re.DOTALL):
            depth += {"begin": 1, "end": -1}.get(token[1] or "", 0)
            if depth == 0:
                return buffer.pos + token.end()
        self.scanned += len(buffer.text) - buffer.pos
        return -1

    def _end(self, which: str) -> None:
        name = (self.argument() or "").strip()
        if name in self._environments and self._count():
            self.push(self._environments[name][1])
        else:
            self._emit(f"\\end{{{name}}}")
            if name == "document":
                self.stack.clear()

    def _verb(self, which: str) -> None:
        buffer = self.stack[-1]
        if which != "verb":
            self.optional()
        if which == "mintinline":
            self.argument()
        mark = buffer.text[buffer.pos : buffer.pos + 1].replace("*", buffer.text[buffer.pos + 1 : buffer.pos + 2] or "*")
        start = buffer.pos + (2 if buffer.text.startswith("*", buffer.pos) else 1)
        end = buffer.text.find("}" if mark == "{" else mark, start) if mark else -1
        if end >= 0:
            self._emit(re.sub(r"([\\{}$&#^_%~])", "", buffer.text[start:end]))
            buffer.pos = end + 1

    # -- files ---------------------------------------------------------------------------------------------
    def _input(self, which: str) -> None:
        folder = self.flat.contexts[self._context()][1]
        here = self.flat.contexts[self._context()][0].rpartition("/")[0]
        if which in ("import", "subimport"):
            moved = normal(folder if which == "subimport" else "", self._plain(self.argument()) or ".")
            folder, here = moved or "", moved or ""
        name = self._plain(self.argument() if self._opens() else self._bare_name())
        if which == "include" and self._only is not None and name not in self._only:
            return
        if not name:
            return
        path = self.project.find(name, dict.fromkeys((folder, here)), (".tex", "", ".ltx"))  # type: ignore[arg-type]
        open_files = [self.flat.contexts[b.context][0] for b in self.stack if b.context >= 0]
        if path is None:
            self.project.problem(f"input not found: {name!r} (in {open_files[-1]})")
        elif path.endswith((".pdf_tex", ".eps_tex")):
            self._emit(f"\\pdftexfigure{{{name}}}")
        elif path in open_files or len(open_files) >= self.project.limits.depth:
            self.project.problem(f"input {name!r} goes round in circles (in {open_files[-1]})")
        else:
            self._push_file(path, path.rpartition("/")[0] if which == "subfile" else folder)

    def _opens(self) -> bool:
        buffer = self.settle()
        return buffer is not None and buffer.text[buffer.pos] == "{"

    def _bare_name(self) -> str | None:
        buffer = self.settle()
        found = re.compile(r"[^\s\\{}%]+").match(buffer.text, buffer.pos) if buffer is not None else None
        if found is None or buffer is None:
            return None
        buffer.pos = found.end()
        return found[0]

    def _plain(self, text: str | None) -> str:
        """A file name with its parameterless macros expanded."""
        for _ in range(10):
            changed = re.sub(r"\\([A-Za-z]+) ?", lambda m: self.body_of(m[1]), text or "")
            if changed == text:
                break
            text = changed[:1000]
        return (text or "").strip().strip('"')

    def _endinput(self, which: str) -> None:
        while self.stack[-1].context < 0:
            self.stack.pop()
        self.pop()

    def _includeonly(self, which: str) -> None:
        self._only = {name.strip() for name in self._plain(self.argument()).split(",")}

    def _package(self, which: str) -> None:
        options, names = self.optional(), self.argument() or ""
        self._emit(f"\\{which}" + (f"[{options}]" if options is not None else "") + f"{{{names}}}")
        for name in names.split(","):
            style = self.project.find(name.strip(), ("",), (".cls" if which == "documentclass" else ".sty",))
            if style is not None and style not in self.flat.files:
                self.flat.files.add(style)
                self._load_style(self.project.read(style))

    def _load_style(self, text: str) -> None:
        """Only the macros of a local style that an author would call: no internals (@), none that are known otherwise."""
        before, environments, stack = dict(self.macros), dict(self._environments), self.stack
        count = len(self.flat.definitions)
        for found in _DEFINING.finditer(text):
            if found[1] in ("RequirePackage", "usepackage"):
                continue
            self.stack = [Buffer(text, found.end(), 0, at_letter=True)]
            self._handlers[found[1]](found[1])
        self.stack = stack
        for name, macro in list(self.macros.items()):
            if macro is not before.get(name) and ("@" in name + macro.body or name in self.known):
                del self.macros[name]
                if name in before:
                    self.macros[name] = before[name]
        for name, (macro, end) in list(self._environments.items()):
            if name not in environments and "@" in macro.body + end:
                del self._environments[name]
        del self.flat.definitions[count:]

    # -- the rest ------------------------------------------------------------------------------------------------
    def _at(self, which: str) -> None:
        self.stack[-1].at_letter = which == "makeatletter"

    def _xspace(self, which: str) -> None:
        buffer = self.settle()
        if buffer is not None and buffer.text[buffer.pos] not in ".,;:!?/'’)]}-~\\":
            self._emit(" ")

    def _csname(self, which: str) -> None:
        buffer = self.stack[-1]
        end = buffer.text.find("\\endcsname", buffer.pos)
        if 0 <= end - buffer.pos < 200:
            name = buffer.text[buffer.pos : end]
            buffer.pos = end + len("\\endcsname")
            self.push(f"\\{name} " if name.isalpha() else "")


def _value(values: list[str], number: int) -> str:
    return values[number - 1] if number <= len(values) else ""
