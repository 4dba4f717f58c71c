"""The judge of the published protocol: reference and drawn picture side by side, one call for each axis.

SciForma (2026), evaluation of SciFormaBench-2K, as its released script reckons:

    axis score   max(0, 1 - sum of weights / clip(n, 1, 30)); critical 1, moderate 0.5, minor 0; n items of the axis; an error whose
                 text begins with "Wrong" weighs nothing
    overall      the mean of the axes that have items, at least 0.01; 0 where the judge calls the picture broken and names no
                 error, and then there are no axis scores
    rounds       each picture is judged `judge_rounds` times, and scores are means

Three things are not as there. A call that fails counts as 0 and is asked again later, not as faultless. An axis without items costs
no call. The request has temperature 0, but neither a seed nor a JSON schema: the answer is checked here instead.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.answers import asked
from OpenSciDraw.evaluation.base import NotScored, Scores
from OpenSciDraw.evaluation.instructions import own_instructions, read_instructions
from OpenSciDraw.evaluation.judge import Judge
from OpenSciDraw.evaluation.results import digest
from OpenSciDraw.evaluation.rubric import WEIGHTS, answer_object, axis_score
from OpenSciDraw.evaluation.scoring import read_picture
from OpenSciDraw.registry import METRICS
from OpenSciDraw.utils.endpoint import BadAnswer

if TYPE_CHECKING:
    from OpenSciDraw.config import EvaluateConfig
    from OpenSciDraw.evaluation.examples import Example

VERSION = 1
KEYS = {"component": "components", "arrow": "arrows", "text": "text_labels"}  # of a published rubric
NAMES = {"component": "components", "arrow": "arrows", "text": "text"}  # of the scores, as the other judge calls them
OVERALL = "overall"
_WEIGHTS = {**WEIGHTS, "minor": 0.0}
_MOST_SIDE, _QUALITY, _DESCRIPTION = 1024, 85, 300  # pixels of the longer side; of the JPEG; characters of the prompt that are sent
_LEAST = 0.01  # of an overall score that is not of a broken picture
_KINDS = (("hallucinated", 30), ("garbled", 30), ("unreadable", 30), ("missing", 15), ("wrong", 15))  # word, where it may stand


@dataclass(frozen=True)
class Judged:
    """One axis: the weights of its errors, and whether the judge calls the picture broken."""

    weights: list[float]
    broken: bool


@METRICS.register("judge_published")
class PublishedJudge(Judge):
    """See the module's text. Examples need a rubric with the published keys, and a reference picture."""

    def __init__(self, settings: EvaluateConfig, folder: Path):
        super().__init__(settings, folder)
        file = settings.judge_instructions
        self.instructions = own_instructions() if file is None else read_instructions(Path(file).expanduser())

    def check(self, examples: Sequence[Example]) -> None:
        for example in examples:
            items_of(example)
        without = [example.id for example in examples if example.reference is None]
        if without:
            raise UserError(
                f"judge_published compares with a reference picture, and {len(without)} of {len(examples)} examples have none; the "
                f"first is {without[0]!r}. Name them under `reference`, or give bench --references."
            )

    def identity(self) -> dict[str, Any]:
        return {**self._of_call(), "rounds": self.settings.judge_rounds}

    def _of_call(self) -> dict[str, Any]:
        texts = [self.instructions.system, self.instructions.question]
        return {"version": VERSION, "url": self.endpoint.url, "model": self.endpoint.model, "instructions": digest(texts)}

    def score(self, picture: Image.Image | None, example: Example) -> Scores:
        items = items_of(example)
        judged = {axis: found for axis, found in items.items() if found}
        if not judged:
            return {}
        failed: Scores = {NAMES[axis]: (0.0, 1.0) for axis in judged} | {OVERALL: (0.0, 1.0)}
        if picture is None:
            return failed
        pair = [as_jpeg(_reference(example)), as_jpeg(picture)]
        try:
            rounds = [
                {axis: self._judged(axis, found, example, pair, number) for axis, found in judged.items()}
                for number in range(self.settings.judge_rounds)
            ]
        except BadAnswer as error:
            raise NotScored(f"judge: {error}", failed) from error
        return mean_of([scores_of(found, {axis: len(items[axis]) for axis in found}) for found in rounds])

    def _judged(self, axis: str, items: list[str], example: Example, pair: Sequence[str], number: int) -> Judged:
        system, question = self.instructions.texts(axis, example.prompt[:_DESCRIPTION], items)
        pictures = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}} for data in pair]
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": system},
            {"role": "user", "content": [*pictures, {"type": "text", "text": question}]},
        ]
        about = {"id": example.id, "axis": NAMES[axis], "round": number}
        identity = {**self._of_call(), "round": number}
        return asked(self.endpoint, self.cache, messages, lambda text: parse_errors(text, axis), identity, about)


def items_of(example: Example) -> dict[str, list[str]]:
    """The items of each axis in the words of the published list; [] for an axis that has none.

    Raises:
        UserError: no rubric, or an item that is not written as the published ones are.
    """
    rubric = example.rubric or {}
    rubric = rubric["stage1_abstraction"] if isinstance(rubric.get("stage1_abstraction"), dict) else rubric
    if not rubric or not set(rubric) & set(KEYS.values()):
        raise UserError(
            f"{example.id}: judge_published needs a rubric with lists under {', '.join(KEYS.values())}, as SciFormaBench's are."
        )
    out = {}
    for axis, key in KEYS.items():
        items = rubric.get(key, [])
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise UserError(f"{example.id}: rubric[{key!r}] must be a list of objects, as in SciFormaBench.")
        out[axis] = [_WORDS[axis]({name: value for name, value in item.items() if isinstance(value, str)}) for item in items]
    return out


def _reference(example: Example) -> Image.Image:
    """The picture to compare with, whatever its shape. Raises UserError when it cannot be read."""
    if isinstance(example.reference, Path):
        found = read_picture(example.reference)
        if found.image is None:
            raise UserError(f"The reference {example.reference} of {example.id!r} cannot be used: {found.failure}. Replace it.")
        return found.image
    reference = example.reference_image()
    assert reference is not None  # `check` saw it
    return reference


def _component(item: dict[str, str]) -> str:
    return item.get("name", "?") + (f" — {item['description']}" if item.get("description") else "")


def _arrow(item: dict[str, str]) -> str:
    return f"{item.get('source', '?')} → {item.get('target', '?')}" + (f"  [{item['label']}]" if item.get("label") else "")


def _label(item: dict[str, str]) -> str:
    return f'"{item.get("text", "?")}" at {item.get("location", "?")}'


_WORDS = {"component": _component, "arrow": _arrow, "text": _label}


def as_jpeg(picture: Image.Image) -> str:
    """A picture as it is sent: at most 1024 px, JPEG of quality 85, in base64."""
    width, height = picture.size
    if max(width, height) > _MOST_SIDE:
        scale = _MOST_SIDE / max(width, height)
        picture = picture.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.LANCZOS)
    out = BytesIO()
    picture.convert("RGB").save(out, "JPEG", quality=_QUALITY)
    return base64.b64encode(out.getvalue()).decode()


def parse_errors(text: str, axis: str) -> Judged:
    """A judge's answer about one axis.

    Raises:
        BadAnswer: not an object with a list of errors under '<axis>_errors', each with a known severity under "s".
    """
    answer = answer_object(text)
    errors = answer.get(f"{axis}_errors")
    if not isinstance(errors, list):
        raise BadAnswer(f"the answer has no list under '{axis}_errors'")
    return Judged([_weight(axis, error) for error in errors], answer.get("aesthetic") == "broken")


def _weight(axis: str, error: Any) -> float:
    severity = error.get("s", error.get("severity")) if isinstance(error, dict) else None
    if not isinstance(severity, str) or severity not in _WEIGHTS:
        raise BadAnswer(f"{axis}: an error has no severity of {', '.join(_WEIGHTS)}: {severity!r:.40}")
    said = error.get("d", error.get("description"))
    words = said.lower() if isinstance(said, str) else ""
    kind = next((word for word, within in _KINDS if word in words[:within]), None)
    return 0.0 if kind == "wrong" else _WEIGHTS[severity]


def scores_of(judged: dict[str, Judged], items: dict[str, int]) -> dict[str, float]:
    """One round's scores of the axes that have items, and overall."""
    if any(found.broken for found in judged.values()) and not any(found.weights for found in judged.values()):
        return {OVERALL: 0.0}
    scores = {NAMES[axis]: axis_score(found.weights, items[axis]) for axis, found in judged.items()}
    return {**scores, OVERALL: max(_LEAST, sum(scores.values()) / len(scores))}


def mean_of(rounds: Sequence[dict[str, float]]) -> Scores:
    """The means over the rounds that have a score."""
    names = dict.fromkeys(name for scores in rounds for name in scores)
    found = {name: [scores[name] for scores in rounds if name in scores] for name in names}
    return {name: (sum(values) / len(values), 1.0) for name, values in found.items()}
