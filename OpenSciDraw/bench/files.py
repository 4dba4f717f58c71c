"""SciFormaBench's files as they are, read with a reason for every refusal.

    prompts/simple.json   {"validation_prompts": [text …], "resolution_list": [[width, height] …],
                           "gt_images": [{"year", "image_path"} …]}        all three in one order
    rubrics/simple.json   {"entries": [{"index", "image_path", "stage1_abstraction": {"components", "arrows", "text_labels"}} …]}

The name of the file is the difficulty: simple (also easy), medium, hard. `benchmark_simple.json` and
`benchmark_simple_rubrics.json` are the same under their earlier names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.figures.rows import resolve
from OpenSciDraw.utils.files import parse_json

_ORDER = ("simple", "easy", "medium", "hard")
_MOST_BYTES = 200_000_000  # of a file; the published ones have 1 to 5 MB


@dataclass(frozen=True)
class Bench:
    """`rows`: lines of a list of prompts as `evaluate` reads it; `difficulty` by id; `remarks`: what was left out, in words."""

    rows: list[dict[str, Any]]
    difficulty: dict[str, str]
    remarks: list[str]

    @property
    def difficulties(self) -> list[str]:
        return list(dict.fromkeys(self.difficulty.values()))

    def ids(self, difficulty: str | None = None) -> list[str]:
        return [name for name, found in self.difficulty.items() if difficulty in (None, found)]


def read_bench(prompts: Path, rubrics: Path, references: Path | None = None, limit: int | None = None) -> Bench:
    """The prompts of one file or of a folder of them, with their rubrics; the first `limit` of each difficulty.

    `references`: folder of the papers' figures, as `<year>/<image_path>` or `<image_path>`.

    Raises:
        UserError: a file is missing or written otherwise, a rubric belongs to no prompt, a reference is not there.
    """
    bench = Bench([], {}, [])
    for difficulty, first, second in _pairs(prompts, rubrics):
        _add(bench, difficulty, first, second, references, limit)
    if not bench.rows:
        raise UserError(f"{prompts} and {rubrics} hold no prompt with a rubric.")
    return bench


def _pairs(prompts: Path, rubrics: Path) -> list[tuple[str, Path, Path]]:
    """(difficulty, prompts, rubrics) of one pair of files, or of two folders with files of the same names."""
    for path in (prompts, rubrics):
        if not path.exists():
            raise UserError(f"{path} is not there. Give SciFormaBench's prompts and rubrics: two .json files, or their folders.")
    if prompts.is_dir() != rubrics.is_dir():
        raise UserError(f"{prompts} and {rubrics}: one is a file and one a folder. Give two files, or two folders.")
    if prompts.is_file():
        return [(_difficulty(prompts), prompts, rubrics)]
    files = [file for file in sorted(prompts.glob("*.json")) if not file.stem.endswith("_rubrics")]
    if not files:
        raise UserError(f"{prompts} holds no .json file of prompts.")
    pairs = []
    for file in files:
        candidates = [rubrics / f"{file.stem}_rubrics.json", *([rubrics / file.name] if rubrics != prompts else [])]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise UserError(f"{file} has no rubrics: there is no {candidates[-1]}.")
        pairs.append((_difficulty(file), file, found))
    rank = {name: at for at, name in enumerate(_ORDER)}
    return sorted(pairs, key=lambda pair: (rank.get(pair[0], len(rank)), pair[0]))


def _difficulty(file: Path) -> str:
    return file.stem.removeprefix("benchmark_")


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} has more than {_MOST_BYTES // 1_000_000} MB: this is another file.")
        found = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no object. Give SciFormaBench's prompts first and its rubrics second.")
    return found


def _add(bench: Bench, difficulty: str, first: Path, second: Path, references: Path | None, limit: int | None) -> None:
    found = _read(first)
    texts, sizes, figures = (found.get(key) for key in ("validation_prompts", "resolution_list", "gt_images"))
    if not isinstance(texts, list) or not isinstance(sizes, list) or len(texts) != len(sizes):
        raise UserError(f"{first}: validation_prompts and resolution_list must be lists of one length. Is this a file of prompts?")
    if references is not None and (not isinstance(figures, list) or len(figures) != len(texts)):
        raise UserError(f"{first}: gt_images must be a list as long as validation_prompts, for --references.")
    rubrics = _rubrics(second, len(texts))
    for index, text in enumerate(texts[:limit]):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{first}: validation_prompts[{index}] is no text: {text!r:.80}.")
        if index not in rubrics:
            continue
        identity = f"{difficulty}-{index:04d}"
        width, height = _size(f"{first}: resolution_list[{index}]", sizes[index])
        row = {"id": identity, "difficulty": difficulty, "prompt": text, "width": width, "height": height, "rubric": rubrics[index]}
        if references is not None:
            assert isinstance(figures, list)
            row["reference"] = str(_reference(f"{first}: gt_images[{index}]", references, figures[index]))
        bench.rows.append(row)
        bench.difficulty[identity] = difficulty
    asked = len(texts[:limit])
    if without := asked - len([index for index in rubrics if index < asked]):
        bench.remarks.append(f"{difficulty}: {without} of {asked} prompts have no rubric in {second.name} and are left out")


def _rubrics(path: Path, prompts: int) -> dict[int, dict[str, Any]]:
    entries = _read(path).get("entries")
    if not isinstance(entries, list):
        raise UserError(f"{path}: there is no list under 'entries'. Is this a file of rubrics?")
    rubrics: dict[int, dict[str, Any]] = {}
    for at, entry in enumerate(entries):
        rubric = entry.get("stage1_abstraction") if isinstance(entry, dict) else None
        if not isinstance(rubric, dict) or not rubric:
            continue  # the published script skips these as well; they are counted
        index = entry.get("index")
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < prompts or index in rubrics:
            raise UserError(f"{path}: entries[{at}]: index = {index!r:.40} is not that of one of the {prompts} prompts, each once.")
        rubrics[index] = rubric
    return rubrics


def _size(where: str, size: Any) -> tuple[int, int]:
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in size):
        raise UserError(f"{where} = {size!r:.60}: it must be [width, height] in whole pixels.")
    return size[0], size[1]


def _reference(where: str, folder: Path, figure: Any) -> Path:
    name, year = (figure.get(key) for key in ("image_path", "year")) if isinstance(figure, dict) else (None, None)
    if not isinstance(name, str) or not name or Path(name).is_absolute():
        raise UserError(f"{where}: image_path = {name!r:.80} must be a path from the folder of --references.")
    try:
        places = [resolve(folder, f"{year}/{name}"), resolve(folder, name)]
    except RejectedFigure as error:
        raise UserError(f"{where}: {error}.") from error
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"{where}: neither {places[0]} nor {places[1]} is there. --references takes the folder of the papers' figures.")
