"""Answers of an endpoint, each kept as soon as it is there: no call is paid twice. And what judges found, in their words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from OpenSciDraw.evaluation.rubric import reasons
from OpenSciDraw.utils.endpoint import BadAnswer, Endpoint
from OpenSciDraw.utils.files import parse_json, write_json

T = TypeVar("T")
CACHE = "judge"  # folder of a judge's answers, in an evaluation's


def asked(
    endpoint: Endpoint, folder: Path, messages: list[dict[str, Any]], parse: Callable[[str], T], identity: Mapping[str, Any],
    about: Mapping[str, Any],
) -> T:  # fmt: skip
    """What `parse` makes of the answer, which is kept in `folder` with `about`. One kept for `identity` and messages costs no call.

    Raises:
        BadAnswer: no answer that `parse` takes, after all tries.
    """
    key = json.dumps([identity, messages], sort_keys=True)
    file = folder / f"{blake2b(key.encode(), digest_size=16).hexdigest()}.json"
    try:
        return parse(_text_of(_kept(file)))
    except BadAnswer:  # none kept, or a file that someone changed
        answer = endpoint.ask(messages, parse)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**about, **answer})
        return parse(answer["text"])


def findings(folder: Path) -> dict[str, list[str]]:
    """What judges have found wrong, in their words, by the picture's id; `folder` is an evaluation's.

    Of several answers about one picture (after it was drawn again, say) the latest of each axis and round counts.
    """
    kept: dict[tuple[str, str], tuple[float, list[str]]] = {}
    for file in sorted((folder / CACHE).glob("*.json")):
        about = _kept(file)
        text = _text_of(about)
        if "id" in about and text:
            key, when = (str(about["id"]), f"{about.get('axis')} {about.get('round')}"), file.stat().st_mtime
            if key not in kept or kept[key][0] <= when:
                kept[key] = when, reasons(text)
    found: dict[str, list[str]] = {}
    for (identity, _), (_, said) in sorted(kept.items()):
        found[identity] = list(dict.fromkeys([*found.get(identity, ()), *said]))
    return found


def _kept(file: Path) -> dict[str, Any]:
    try:
        answer = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _text_of(answer: Mapping[str, Any]) -> str:
    """The kept answer's text; "" where there is none."""
    text = answer.get("text")
    return text if isinstance(text, str) else ""
