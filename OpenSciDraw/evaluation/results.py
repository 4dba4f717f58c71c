"""What was measured, picture by picture: results.jsonl, which is added to as it goes, so that a second run goes on.

A line: `id`, `metric`, `scores` {name: [hits, total]}, `example`, `picture` and `method` (short hashes of the prompt with
its ground truth, of the picture file's bytes, of what the metric says of itself), and `failure` (why the picture counts as
a failure) where there is one. Of lines for the same example and metric the last one counts. The result of a metric of sets
is one line with the id '*' and scores {name: [value, low, high]}.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from OpenSciDraw.evaluation.examples import Example
from OpenSciDraw.utils.files import json_objects

_LOG = logging.getLogger("OpenSciDraw")

FILE = "results.jsonl"
WHOLE_SET = "*"  # the id of a set's result


def digest(value: Any) -> str:
    """A short hash of anything that JSON can hold, or of bytes."""
    raw = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, default=str).encode()
    return blake2b(raw, digest_size=8).hexdigest()


def digest_of(example: Example) -> str:
    """What makes an example the same one: another prompt, size, truth, rubric or reference file is another example."""
    edit = [[[source.id, source.size_bytes] for source in example.sources], example.edit_boxes] if example.sources else []
    file = example.reference
    compared = [file.name, file.stat().st_size] if isinstance(file, Path) else []
    return digest([example.prompt, example.width, example.height, example.truth, example.rubric, *edit, *compared])


@dataclass(frozen=True)
class Result:
    """One picture by one metric; the module says what the fields are. `retry`: to be tried again by the next run."""

    id: str
    metric: str
    scores: dict[str, tuple[float, ...]]
    example: str
    picture: str | None
    method: str
    failure: str | None = None
    retry: bool = False

    def is_of(self, example: str, picture: str | None, method: str) -> bool:
        return not self.retry and (self.example, self.picture, self.method) == (example, picture, method)


class Results:
    """The results of one evaluation's folder; several threads may add. Processes that share a folder add to a `part` each."""

    def __init__(self, folder: Path, part: str = ""):
        self.path = folder / f"{Path(FILE).stem}{part}.jsonl"  # what this process adds to; the others' are read
        self._lock = threading.Lock()
        self._by_key: dict[tuple[str, str], Result] = {}
        for path in [*(path for path in sorted(folder.glob(f"{Path(FILE).stem}*.jsonl")) if path != self.path), self.path]:
            if path.is_file():
                self._read(path)

    def _read(self, path: Path) -> None:
        """A last line that was cut off by the end of a process is taken away, and measured again."""
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        found, broken = json_objects(whole)
        for values in found:
            try:
                result = Result(**{**values, "scores": {name: tuple(numbers) for name, numbers in values["scores"].items()}})
                self._by_key[result.metric, result.id] = result
            except (TypeError, KeyError, AttributeError):
                broken += 1
        if broken:
            _LOG.warning("%s: %d line(s) cannot be read; what they said is measured again", path, broken)
        if len(whole) < len(raw) and path == self.path:  # another process may be writing its own
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def get(self, metric: str, identity: str) -> Result | None:
        return self._by_key.get((metric, identity))

    def of(self, metric: str, ids: Iterable[str] | None = None) -> list[Result]:
        """Those of a metric: of the ids given, in that order, or of all."""
        if ids is None:
            return [result for (name, _), result in self._by_key.items() if name == metric]
        found = (self.get(metric, identity) for identity in ids)
        return [result for result in found if result is not None]

    def add(self, results: Sequence[Result]) -> None:
        with self._lock:
            self._by_key |= {(result.metric, result.id): result for result in results}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                for result in results:
                    values = {name: value for name, value in asdict(result).items() if value not in (None, False)}
                    values.setdefault("picture", None)
                    file.write(json.dumps(values, ensure_ascii=False) + "\n")
