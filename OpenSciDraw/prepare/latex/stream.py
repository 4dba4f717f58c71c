"""Texts on a stack that are read from the top, as TeX reads its input: files, and macros' expansions above them."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from dataclasses import dataclass

_SPACE = re.compile(r"(?:[ \t]|\n(?![ \t]*\n))*")
_WORD, _WORD_AT = re.compile(r"[A-Za-z]+"), re.compile(r"[A-Za-z@]+")
_BRACES = re.compile(r"\\(?:url|path|nolinkurl)\s*\{[^{}\n]*\}|\\.|%[^\n]*|[{}]", re.DOTALL)  # a % in an address is no comment
_BRACKETS = re.compile(r"\\.|%[^\n]*|[{}\]]", re.DOTALL)
_MAX_OPTION = 4_000  # characters of an optional argument
MAX_OPEN_BRACKETS = 1_000  # that never close: more are not looked at, for each costs _MAX_OPTION


class Braces:
    """Where each brace of a text closes. One pass, whatever is nested in what; 16 bytes a brace."""

    def __init__(self, text: str):
        self._starts, self._ends = array("q"), array("q")
        opened = array("q")
        for token in _BRACES.finditer(text):
            if token[0] == "{":
                opened.append(len(self._starts))
                self._starts.append(token.start())
                self._ends.append(-1)
            elif token[0] == "}" and opened:
                self._ends[opened.pop()] = token.start()

    def closing(self, start: int) -> int:
        """Where the brace that opens at `start` closes; -1 if it does not."""
        index = bisect_left(self._starts, start)
        return self._ends[index] if index < len(self._starts) and self._starts[index] == start else -1


def closing_bracket(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes, outside of braces; -1 when it is not near."""
    depth = 0
    for token in _BRACKETS.finditer(text, start + 1, start + _MAX_OPTION):
        depth += (token[0] == "{") - (token[0] == "}")
        if token[0] == "]" and depth == 0:
            return token.start()
        if depth < 0:
            break
    return -1


@dataclass
class Buffer:
    """A text and how far it is read."""

    text: str
    pos: int = 0
    context: int = -1  # of a file: its number; -1 for a macro's expansion
    at_letter: bool = False
    braces: Braces | None = None  # made when it is asked for

    def closing(self, start: int) -> int:
        """Where the brace that opens at `start` closes; -1 if it does not."""
        if self.braces is None:
            self.braces = Braces(self.text)
        return self.braces.closing(start)

    def word(self, start: int) -> re.Match[str] | None:
        """The name of the control word whose backslash stands before `start`."""
        return (_WORD_AT if self.at_letter else _WORD).match(self.text, start)


class TextStack:
    """`scanned` counts characters that were looked at again, which hostile input can make quadratic."""

    def __init__(self) -> None:
        self.stack: list[Buffer] = []
        self.scanned = 0
        self._open_brackets = 0

    def pop(self) -> None:
        self.stack.pop()

    def push(self, text: str) -> None:
        """What is read next. In macros @ is a letter: it was where they were defined, if they have it in names."""
        self.scanned += len(text)
        self.stack.append(Buffer(text, at_letter=True))

    def settle(self) -> Buffer | None:
        """The text that comes next, past spaces, comments and expansions that are used up; never past a file's end."""
        while self.stack:
            buffer = self.stack[-1]
            space = _SPACE.match(buffer.text, buffer.pos)
            buffer.pos = space.end() if space else buffer.pos
            if buffer.text.startswith("%", buffer.pos):
                end = buffer.text.find("\n", buffer.pos)
                buffer.pos = len(buffer.text) if end < 0 else end + 1
            elif buffer.pos < len(buffer.text):
                return buffer
            elif buffer.context >= 0:
                return None
            else:
                self.pop()
        return None

    def argument(self) -> str | None:
        """The next argument, without its braces; None where there is none."""
        buffer = self.settle()
        if buffer is None or buffer.text[buffer.pos] == "}":
            return None
        if buffer.text[buffer.pos] == "{":
            end = buffer.closing(buffer.pos)
            if end < 0:
                return None
            inner, buffer.pos = buffer.text[buffer.pos + 1 : end], end + 1
            self.scanned += len(inner) // 8  # copied: quick, but not free
            return inner
        word = buffer.word(buffer.pos + 1)
        end = buffer.pos + 1 if buffer.text[buffer.pos] != "\\" else (word.end() if word else buffer.pos + 2)
        found, buffer.pos = buffer.text[buffer.pos : end], end
        return found

    def optional(self) -> str | None:
        """The next argument in square brackets; None where there is none (then nothing is consumed but spaces)."""
        return self._until_bracket() if self._next_is("[") else None

    def _until_bracket(self) -> str | None:
        buffer = self.stack[-1]
        end = closing_bracket(buffer.text, buffer.pos) if self._open_brackets < MAX_OPEN_BRACKETS else -1
        if end < 0:
            self._open_brackets += 1
            return None
        inner, buffer.pos = buffer.text[buffer.pos + 1 : end], end + 1
        return inner

    def _next_is(self, text: str) -> bool:
        buffer = self.settle()
        return buffer is not None and buffer.text.startswith(text, buffer.pos)

    def opens(self) -> bool:
        """Whether an argument in braces comes next."""
        return self._next_is("{")

    def star(self) -> bool:
        return self.mark("*")

    def mark(self, text: str) -> bool:
        """Past `text`, if it comes next."""
        if not self._next_is(text):
            return False
        self.stack[-1].pos += len(text)
        return True

    def skip_spaces(self) -> None:
        buffer = self.stack[-1]
        while buffer.text[buffer.pos : buffer.pos + 1] in (" ", "\t"):
            buffer.pos += 1
        if buffer.text[buffer.pos : buffer.pos + 1] == "\n" and buffer.text[buffer.pos + 1 : buffer.pos + 2] != "\n":
            buffer.pos += 1
