"""What a judge is asked about a figure, and the score that its answer gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.utils.endpoint import BadAnswer
from OpenSciDraw.utils.files import parse_json

if TYPE_CHECKING:
    from OpenSciDraw.evaluation.examples import Example

AXES = ("components", "arrows", "text")
WEIGHTS = {"critical": 1.0, "moderate": 0.5}
MOST_ITEMS = 30  # of an axis that count in the denominator


def rubric_of(example: Example, directed: bool = True) -> dict[str, list[str]]:
    """The items of each axis, from the example's rubric, or from its ground truth; {} where there is neither.

    `directed`: arrows go from one part to another; else they only connect them.

    Raises:
        UserError: a rubric with an unknown axis or an item that cannot be put into words.
    """
    if example.rubric is not None:
        return _own_rubric(example.id, example.rubric, directed)
    truth = example.truth
    if not truth or not truth.get("components"):
        return {}
    named = [part for part in truth["components"] if part["label"]]
    names = {part["id"]: f"'{part['label']}'" for part in named}  # what has no label cannot be pointed at in words
    items = {
        "components": [f"a {part['color']} {part['shape']} labelled '{part['label']}'" for part in named],
        "arrows": [
            _arrow_text(names[arrow["source"]], names[arrow["target"]], None, directed and arrow["directed"])
            for arrow in truth.get("arrows", ())
            if arrow["source"] in names and arrow["target"] in names
        ],
        "text": [f"the text '{label['text']}' ({label['role']})" for label in truth.get("labels", ())],
    }
    return {axis: found for axis, found in items.items() if found}


def _arrow_text(source: str, target: str, label: str | None, directed: bool) -> str:
    text = f"an arrow from {source} to {target}" if directed else f"a line between {source} and {target}"
    return f"{text}, labelled '{label}'" if label else text


def _own_rubric(identity: str, rubric: Mapping[str, Any], directed: bool) -> dict[str, list[str]]:
    aliases = {"text_labels": "text", "labels": "text"}
    if isinstance(rubric.get("stage1_abstraction"), dict):  # an entry of the published rubric files
        rubric = rubric["stage1_abstraction"]
    out: dict[str, list[str]] = {}
    for key, items in rubric.items():
        axis = aliases.get(key, key)
        if axis not in AXES or not isinstance(items, list):
            raise UserError(f"{identity}: rubric[{key!r}]: a rubric has lists under {', '.join(AXES)} and nothing else.")
        for item in items:
            text = _item_text(item, directed)
            if text is None:
                raise UserError(
                    f"{identity}: rubric[{key!r}]: {item!r:.80} is neither a text nor an object with a name or description, "
                    "with source and target, or with a text."
                )
            out.setdefault(axis, []).append(text)
    return out


def _item_text(item: Any, directed: bool) -> str | None:
    """An item in words: a text, {name, description}, {source, target, label} or {text, location}; None for anything else."""
    if isinstance(item, str):
        return item if item.strip() else None
    if not isinstance(item, dict):
        return None
    said = {key: value.strip() for key, value in item.items() if isinstance(value, str) and value.strip()}
    if "source" in said and "target" in said:
        return _arrow_text(f"'{said['source']}'", f"'{said['target']}'", said.get("label"), directed)
    if "text" in said:
        return f"the text '{said['text']}'" + (f" ({said['location']})" if "location" in said else "")
    return ": ".join(said[key] for key in ("name", "description") if key in said) or None


def axis_score(weights: Sequence[float], items: int) -> float:
    """max(0, 1 - sum of weights / clip(items, 1, 30))."""
    return max(0.0, 1.0 - sum(weights) / min(max(items, 1), MOST_ITEMS))


def parse_answer(text: str, rubric: Mapping[str, Sequence[str]], directed: bool = True) -> dict[str, list[float]]:
    """A judge's answer -> the weights of the errors of each axis of the rubric.

    `directed` False: errors that are about an arrow's direction alone weigh nothing, should the judge report them anyway.

    Raises:
        BadAnswer: not the one JSON object that was asked for (a code fence around it is allowed), an axis missing, an
            unknown severity or an item that the checklist does not have.
    """
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", text, re.DOTALL)
    try:
        answer = parse_json(fenced[1] if fenced else text)
    except ValueError as error:
        raise BadAnswer(f"the answer is not JSON: {text[:120]!r}") from error
    if not isinstance(answer, dict):
        raise BadAnswer(f"the answer is no object: {text[:120]!r}")
    found: dict[str, list[float]] = {}
    for axis, items in rubric.items():
        errors = answer.get(axis)
        if not isinstance(errors, list):
            raise BadAnswer(f"the answer has no list under {axis!r}")
        weights = [_weight(axis, error, len(items)) for error in errors]
        ignored = axis == "arrows" and not directed
        kept = zip(weights, errors, strict=True)
        found[axis] = [weight for weight, error in kept if not (ignored and error.get("direction") is True)]
    return found


def _weight(axis: str, error: Any, items: int) -> float:
    severity = error.get("severity") if isinstance(error, dict) else None
    if not isinstance(severity, str) or severity not in WEIGHTS:
        got = f"{severity!r:.40}" if isinstance(severity, str) else f"{type(error).__name__} without one"
        raise BadAnswer(f"{axis}: an error has no severity of {', '.join(WEIGHTS)}: {got}")
    item = error.get("item")
    if item is None:
        return WEIGHTS[severity]
    if isinstance(item, bool) or not isinstance(item, int) or not 1 <= item <= items:
        got = str(item)[:40] if isinstance(item, int) else type(item).__name__
        raise BadAnswer(f"{axis}: item {got} is not among 1 to {items}")
    return WEIGHTS[severity]
