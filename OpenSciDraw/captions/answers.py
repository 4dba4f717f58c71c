"""Answers that were given, in one file of JSON lines: none that arrived is lost, and none is asked for twice."""

from __future__ import annotations

import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from OpenSciDraw.captions.prompts import VERSION, caption_in, request_text
from OpenSciDraw.captions.styles import Style
from OpenSciDraw.figures.refs import FigureRef
from OpenSciDraw.utils.endpoint import BadAnswer
from OpenSciDraw.utils.files import parse_json


def key_of(who: str, style: Style, ref: FigureRef, most_side: int, picture: bytes) -> str:
    """Names an answer by all that it depends on: model, instruction, what is told of the figure, and the file of its picture."""
    return _digest([VERSION, who, style.instruction, request_text(ref), most_side, blake2b(picture, digest_size=16).hexdigest()])


def place_of(who: str, style: Style, ref: FigureRef, most_side: int) -> str | None:
    """The same by where the picture lies, its file's size and times, so that it need not be read; None for drawn figures."""
    if not ref.size_bytes:
        return None
    place = [ref.source, ref.size_bytes, ref.changed_ns]
    return _digest([VERSION, who, style.instruction, request_text(ref), most_side, place])


def _digest(parts: list[Any]) -> str:
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


class Answers:
    """The file's lines by key and by place. One process at a time; its threads may share it.

    A line is on disk before `add` returns. The end of a file that a killed process was writing is left behind, as a line of
    its own that is none.
    """

    def __init__(self, file: Path):
        self._at: dict[str, int] = {}  # where the line of a key or place begins
        self._asking: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()
        self.broken = 0
        self._file = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        self._end = 0
        for line in self._file:
            self._note(line)
            self._end += len(line)
        if self._end and not line.endswith(b"\n"):
            self._file.seek(self._end)
            self._end += self._file.write(b"\n")

    def _note(self, line: bytes) -> None:
        try:
            row = parse_json(line)
            names = [row["key"], row["place"]]
            caption_in(row["text"])
        except (ValueError, LookupError, TypeError, AttributeError, BadAnswer):
            self.broken += bool(line.strip())
        else:
            self._at |= {name: self._end for name in names if isinstance(name, str)}

    def at(self, name: str | None) -> int | None:
        """Where the answer of a key or place lies in the file; None where there is none."""
        return None if name is None else self._at.get(name)

    def caption(self, at: int) -> str:
        """The caption in the answer there."""
        with self._lock:
            self._file.seek(at)
            line = self._file.readline()
        return caption_in(parse_json(line)["text"])

    def add(self, key: str, place: str | None, record: dict[str, Any]) -> int:
        """Keep an answer, and say where; `record` has its "text"."""
        line = json.dumps({"key": key, "place": place, **record}).encode() + b"\n"
        with self._lock:
            self._file.seek(self._end)
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            at = self._end
            self._at |= {name: at for name in (key, place) if name is not None}
            self._end += len(line)
            return at

    @contextmanager
    def asking(self, key: str) -> Iterator[None]:
        """One thread at a time asks for a key; the others find its answer."""
        with self._lock:
            lock = self._asking[key]
        with lock:
            yield
        with self._lock:
            self._asking.pop(key, None)

    def close(self) -> None:
        self._file.close()

    def usage(self) -> dict[str, int]:
        """Tokens that the servers counted, over all answers of the file."""
        total: defaultdict[str, int] = defaultdict(int)
        with self._lock:
            self._file.seek(0)
            for line in self._file:
                try:
                    counts = parse_json(line)["usage"].items()
                except (ValueError, LookupError, TypeError, AttributeError):
                    continue
                for name, count in counts:
                    total[str(name)] += count if isinstance(count, int) else 0
        return dict(total)
