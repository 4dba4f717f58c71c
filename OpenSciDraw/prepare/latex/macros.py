"""A LaTeX document as one flat text: inputs in place, the author's macros expanded, comments and dead branches gone.

pylatexenc parses LaTeX but expands no macros and reads no inputs, so this part is our own. It works as TeX does,
on a stack of texts that are read from the top, but only the author's own macros are expanded; all else is copied.
TeX's groups are not followed: a macro keeps its last definition. Every loop is bounded by `Limits`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from OpenSciDraw.prepare.latex.conditions import NO_CONDITION, NO_VALUE, Macro
from OpenSciDraw.prepare.latex.definitions import Definitions
from OpenSciDraw.prepare.latex.source import GRAPHICS, Project, normal

# Marks in the flat text: \x01n\x02 the file context n begins, \x03n\x04 stands for TikZ picture n.
MARKS = re.compile("\x01(\\d+)\x02|\x03(\\d+)\x04")
TIKZ = frozenset(
    "tikzpicture pgfpicture circuitikz tikzcd forest pspicture feynman picture quantikz xy dependency bytefield "
    "sequencediagram ganttchart feynmandiagram fmffile psmatrix diagram".split()
)
_VERBATIM = frozenset("verbatim Verbatim lstlisting minted comment filecontents alltt listing BVerbatim LVerbatim".split())
_INPUTS = "input include subfile subfileinclude import subimport includefrom inputfrom subincludefrom subinputfrom @input".split()
_MATH = frozenset("equation align eqnarray gather multline displaymath math alignat flalign subequations".split())
_NEXT = re.compile(r"[\\%]")
_PARAMETER = re.compile(r"#(#|[1-9])")
_DRAWN_INPUT = re.compile(r"\.(?:pdf_tex|eps_tex|ps_tex|svg_tex|pstex_t|pdftex_t|eps_t|pdf_t|pstex)$", re.IGNORECASE)
_BLANK_LINE = re.compile(r"\n[ \t]*\n")


@dataclass
class Flat:
    """The flat text; `contexts` (file, folder of its relative names) and `tikz` are what its marks point to."""

    text: str = ""
    contexts: list[tuple[str, str]] = field(default_factory=list)
    tikz: list[str] = field(default_factory=list)
    definitions: list[str] = field(default_factory=list)  # the author's own, as written: TikZ pictures need them
    files: set[str] = field(default_factory=set)


class Expander(Definitions):
    """One document, read once. `known` are macros that local styles must not redefine."""

    def __init__(self, project: Project, known: frozenset[str]):
        super().__init__(known)
        self.project = project
        self.flat = Flat(definitions=self.definitions)
        self._out: list[str] = []
        self._emitted = self._expansions = 0
        self._largest = 4 * project.limits.tex_bytes
        self._only: set[str] | None = None
        self._left_out = set(_VERBATIM)
        self._handlers: dict[str, Callable[[str], None]] = {
            **self.condition_handlers(), **self.definition_handlers(),
            **dict.fromkeys(_INPUTS, self._input),
            **dict.fromkeys(("IfFileExists", "InputIfFileExists"), self._if_file),
            **dict.fromkeys(("usepackage", "RequirePackage", "documentclass"), self._package),
            **dict.fromkeys(("verb", "lstinline", "mintinline"), self._verb),
            **dict.fromkeys(("url", "path", "nolinkurl"), self._address),
            "begin": self._begin, "end": self._end, "makeatletter": self._at, "makeatother": self._at,
            "endinput": self._endinput, "includeonly": self._includeonly, "xspace": self._xspace, "csname": self._csname,
            "excludecomment": self._exclude, "ensuremath": self._ensuremath, "includestandalone": self._standalone,
        }  # fmt: skip

    def run(self, main: str) -> Flat:
        """The flat text of the document whose main file is `main`."""
        self._push_file(main, main.rpartition("/")[0])
        while self.stack:
            buffer = self.stack[-1]
            found = _NEXT.search(buffer.text, buffer.pos)
            if found is None:
                self._emit(buffer.text[buffer.pos :])
                self.pop()
                continue
            self._emit(buffer.text[buffer.pos : found.start()])
            buffer.pos = found.start()
            if self._emitted > self._largest or self.scanned > 4 * self._largest:
                self.project.problem(f"{main}: its macros expand to more than {self._largest} bytes: the rest is not read")
                break
            if found[0] == "%":
                self._comment(buffer.text, buffer.pos)
            else:
                self._control()
        self.flat.text = "".join(self._out)
        return self.flat

    # -- reading -----------------------------------------------------------------------------------
    def _emit(self, text: str) -> None:
        if not text:
            return
        self._out.append(text)
        self._emitted += len(text)
        if "$" in text:  # formulas do not go on after a paragraph's end, whatever is unbalanced in it
            last = _BLANK_LINE.split(text)
            self.in_math = (self.in_math and len(last) == 1) ^ (last[-1].count("$") % 2 == 1)
        elif self.in_math and _BLANK_LINE.search(text):
            self.in_math = False

    def _push_file(self, name: str, folder: str) -> None:
        self.flat.files.add(name)
        self.flat.contexts.append((name, folder))
        self.push(self.project.read(name))
        self.stack[-1].context = len(self.flat.contexts) - 1
        self.stack[-1].at_letter = False
        self._emit(f"\x01{len(self.flat.contexts) - 1}\x02")

    def pop(self) -> None:
        if self.stack.pop().context >= 0 and self.stack:
            self._emit(f"\x01{self._context()}\x02")

    def _context(self) -> int:
        return next(buffer.context for buffer in reversed(self.stack) if buffer.context >= 0)

    def _comment(self, text: str, start: int) -> None:
        end = text.find("\n", start)
        after = len(text) if end < 0 else end + 1
        while text[after : after + 1] in (" ", "\t"):
            after += 1
        self.stack[-1].pos = after
        if text[after : after + 1] == "\n":
            self._emit("\n")  # an empty line after a comment still ends the paragraph

    def _control(self) -> None:
        buffer = self.stack[-1]
        word = buffer.word(buffer.pos + 1)
        if word is None:
            escaped = buffer.text[buffer.pos : buffer.pos + 2]
            buffer.pos += 2
            self.in_math = {"\\(": True, "\\[": True, "\\)": False, "\\]": False}.get(escaped, self.in_math)
            self._out.append(escaped)
            self._emitted += 2
            return
        name, buffer.pos = word[0], word.end()
        if name in self.macros and self._count():
            self._expand(name, self.macros[name])
        elif name in self._handlers:
            self._handlers[name](name)
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
        body = macro.body
        if "#" in body:
            if len(body) + body.count("#") * max(map(len, values), default=0) > self._largest:
                self.scanned += 8 * self._largest  # which ends the reading
                return
            body = _PARAMETER.sub(lambda m: "#" if m[1] == "#" else _value(values, int(m[1])), body)
        self.push(body)

    def _delimited(self, kind: str, text: str, values: list[str]) -> bool:
        """'t': `text` must follow; 'd': an argument that ends where `text` does; 'p': one between two marks, if there.
        False when the text is not there."""
        if kind == "t":
            return self.mark(text)
        buffer = self.settle()
        if kind == "p":
            there = buffer is not None and buffer.text.startswith(text[0], buffer.pos)
            end = buffer.text.find(text[1], buffer.pos, buffer.pos + 2000) if buffer is not None and there else -1
            values.append(text[2:] or NO_VALUE if end < 0 or buffer is None else buffer.text[buffer.pos + 1 : end])
            if end >= 0 and buffer is not None:
                buffer.pos = end + 1
            return True
        end = buffer.text.find(text, buffer.pos, buffer.pos + 20_000) if buffer is not None else -1
        if end < 0 or buffer is None:
            return False
        value, buffer.pos = buffer.text[buffer.pos : end], end + len(text)
        values.append(value[1:-1] if value.startswith("{") and value.endswith("}") else value)
        return True

    def _ensuremath(self, which: str) -> None:
        formula = self.argument() or ""
        self.push(formula if self.in_math else f"${formula}$")

    # -- environments ----------------------------------------------------------------------------------
    def _begin(self, which: str) -> None:
        buffer = self.stack[-1]
        name = (self.argument() or "").strip()
        bare = name.rstrip("*")
        if name in self.environments and self._count():
            self._expand(f"begin{{{name}}}", self.environments[name][0])
        elif bare in self._left_out:
            end = buffer.text.find(f"\\end{{{name}}}", buffer.pos)
            self.scanned += len(buffer.text) - buffer.pos if end < 0 else 0
            buffer.pos = end + len(name) + 6 if end >= 0 else buffer.pos
        elif bare in TIKZ and (end := self._end_of(name)) >= 0:
            self.flat.tikz.append(f"\\begin{{{name}}}" + buffer.text[buffer.pos : end])
            self._emit(f"\x03{len(self.flat.tikz) - 1}\x04")
            buffer.pos = end
        else:
            if bare == "document" and len(self._open_files()) > 1:
                return
            self.in_math |= bare in _MATH
            self._emit(f"\\begin{{{name}}}")

    def _end_of(self, name: str) -> int:
        """Behind the \\end that belongs to the \\begin just read; -1 when it is not in this text."""
        buffer, depth = self.stack[-1], 1
        tokens = re.compile(rf"\\(begin|end)\s*\{{{re.escape(name)}\}}|\\.|%[^\n]*", re.DOTALL)
        for token in tokens.finditer(buffer.text, buffer.pos):
            depth += {"begin": 1, "end": -1}.get(token[1] or "", 0)
            if depth == 0:
                return token.end()
        self.scanned += 4 * (len(buffer.text) - buffer.pos)
        return -1

    def _end(self, which: str) -> None:
        name = (self.argument() or "").strip()
        if name in self.environments and self._count():
            self._expand(f"end{{{name}}}", self.environments[name][1])
        elif name != "document":
            self.in_math &= name.rstrip("*") not in _MATH
            self._emit(f"\\end{{{name}}}")
        elif len(self._open_files()) > 1:  # a document that is a part of this one: standalone, subfiles, docmute
            self._endinput(which)
        else:
            self._emit("\\end{document}")
            self.stack.clear()

    def _exclude(self, which: str) -> None:
        self._left_out.add((self.argument() or "comment").strip())

    def _verb(self, which: str) -> None:
        buffer = self.stack[-1]
        if which != "verb":
            self.optional()
        if which == "mintinline":
            self.argument()
        self.star()
        mark = buffer.text[buffer.pos : buffer.pos + 1]
        end = buffer.text.find("}" if mark == "{" else mark, buffer.pos + 1, buffer.pos + 2000) if mark.strip() else -1
        if end >= 0 and "\n" not in buffer.text[buffer.pos : end]:
            self._emit(re.sub(r"([\\{}$&#^_%~])", "", buffer.text[buffer.pos + 1 : end]))
            buffer.pos = end + 1

    def _address(self, which: str) -> None:
        """A % in it is no comment."""
        buffer = self.stack[-1]
        found = re.compile(r"\s*\{([^{}\n]*)\}").match(buffer.text, buffer.pos)
        if found is None:
            return self._emit("\\" + which)
        buffer.pos = found.end()
        self._emit(f"\\{which}{{" + re.sub(r"(?<!\\)%", r"\\%", found[1]) + "}")

    # -- files ---------------------------------------------------------------------------------------------
    def _open_files(self) -> list[str]:
        return [self.flat.contexts[buffer.context][0] for buffer in self.stack if buffer.context >= 0]

    def _input(self, which: str) -> None:
        file, folder = self.flat.contexts[self._context()]
        if "import" in which or "from" in which:
            base = folder if which.startswith("sub") else self._open_files()[0].rpartition("/")[0]
            moved = normal(base, self.plain(self.argument()), folder_name=True)
            if moved is None:
                self.argument()
                return self.project.problem(f"import leaves the paper's folder (in {file})")
            folder = moved
        name = self.plain(self.argument() if self.opens() else self._bare_name())
        if not name or which == "include" and self._only is not None and name not in self._only:
            return
        path = self._find_input(name, folder)
        open_files = self._open_files()
        if path is None:
            self.project.problem(f"input not found: {name!r} (in {file})")
        elif _DRAWN_INPUT.search(path):
            self._emit(f"\\pdftexfigure{{{path}}}")
        elif path in open_files or len(open_files) >= self.project.limits.depth:
            self.project.problem(f"input {name!r} goes round in circles (in {file})")
        elif path.lower().endswith(GRAPHICS):
            self.project.problem(f"input {name!r} is a picture (in {file})")
        else:
            self._push_file(path, path.rpartition("/")[0] if which.startswith("subfile") else folder)

    def _find_input(self, name: str, folder: str) -> str | None:
        """Where TeX looks first; then where authors mean it, when only the folder that it is run in differs."""
        file = self._open_files()
        folders = dict.fromkeys((folder, file[0].rpartition("/")[0], file[-1].rpartition("/")[0], ""))
        return self.project.find(name, list(folders), (".tex", "", ".ltx"))

    def _if_file(self, which: str) -> None:
        name, yes, no = self.plain(self.argument()), self.argument() or "", self.argument() or ""
        folder = self.flat.contexts[self._context()][1]
        there = self._find_input(name, folder) is not None
        self.push((yes + f"\\input{{{name}}}" if which[0] == "I" and which[1] == "n" else yes) if there else no)

    def _standalone(self, which: str) -> None:
        """A picture that is a document of its own: compiled where its PDF is there, else read."""
        self.optional()
        name = self.plain(self.argument())
        folders = [self.flat.contexts[self._context()][1], self._open_files()[0].rpartition("/")[0]]
        drawn = self.project.find(name, folders, GRAPHICS) is not None
        self.push(f"\\includegraphics{{{name}}}" if drawn else f"\\input{{{name}}}")

    def _bare_name(self) -> str | None:
        buffer = self.settle()
        found = re.compile(r"[^\s\\{}%]+").match(buffer.text, buffer.pos) if buffer is not None else None
        if found is None or buffer is None:
            return self.argument() if buffer is not None and buffer.text.startswith("\\", buffer.pos) else None
        buffer.pos = found.end()
        return found[0]

    def _endinput(self, which: str) -> None:
        while self.stack[-1].context < 0:
            self.stack.pop()
        self.pop()

    def _includeonly(self, which: str) -> None:
        self._only = {name.strip() for name in self.plain(self.argument()).split(",")}

    def _package(self, which: str) -> None:
        options, names = self.optional(), self.argument() or ""
        if which == "documentclass" and len(self._open_files()) > 1:
            return
        self._emit(f"\\{which}" + (f"[{options}]" if options is not None else "") + f"{{{names}}}")
        waiting = [name.strip() + (".cls" if which == "documentclass" else ".sty") for name in names.split(",")]
        folder = self._open_files()[0].rpartition("/")[0]
        while waiting:
            style = self.project.find(waiting.pop(0), (folder, ""), ("",))
            if style is not None and style not in self.flat.files:
                self.flat.files.add(style)
                waiting += [name.strip() + ".sty" for name in self.load_style(self.project.read(style))]

    def from_style(self, command: str) -> None:
        self._emit(command)

    # -- the rest ------------------------------------------------------------------------------------------------
    def _at(self, which: str) -> None:
        self.stack[-1].at_letter = which == "makeatletter"

    def _xspace(self, which: str) -> None:
        buffer = self.settle()
        if buffer is not None and buffer.text[buffer.pos] not in ".,;:!?/'’)]}-~\\":
            self._emit(" ")

    def _csname(self, which: str) -> None:
        buffer = self.stack[-1]
        end = buffer.text.find("\\endcsname", buffer.pos, buffer.pos + 200)
        if end >= 0:
            name = buffer.text[buffer.pos : end]
            buffer.pos = end + len("\\endcsname")
            self.push(f"\\{name} " if name.isalpha() else "")


def _value(values: list[str], number: int) -> str:
    return values[number - 1] if number <= len(values) else ""
