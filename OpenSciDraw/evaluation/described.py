"""Described: what a description says of its figure, where it says it plainly, against what is read in the picture. No ground truth.

    A red box labelled 'Encoder' and two blue ellipses labelled 'A' and 'B'. An arrow points from 'Encoder' to 'A'.

Shapes with a label in quotation marks are components; what stands between two labels in a sentence about arrows or lines joins
them. Places are not read. So components are paired with what was read in the picture by label, else by colour and shape, and are
then scored as the structure metric scores them (`components`, `colour`, `shape`, `labels`, `arrows`). {} for a description without
such a component.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from OpenSciDraw.drawn.canvas import COLORS, LABEL_ROOM
from OpenSciDraw.drawn.pieces import a
from OpenSciDraw.evaluation.base import Scores
from OpenSciDraw.evaluation.structure import (
    ReadingMetric,
    arrow_key,
    read_structure,
    same_shape,
    score_arrows,
    score_parts,
)
from OpenSciDraw.reading.figure import ReadComponent, ReadFigure
from OpenSciDraw.reading.glyphs import same_text
from OpenSciDraw.registry import METRICS

if TYPE_CHECKING:

    from OpenSciDraw.evaluation.examples import Example

_Q = r"(?:'([^'\n]{1,60}?)'|\"([^\"\n]{1,60}?)\"|‘([^’\n]{1,60}?)’|“([^”\n]{1,60}?)”)"
_LABELS = rf"{_Q}(?:(?:, and |, | and ){_Q})*"
_ANY_SHAPE = ("box", "block", "node", "module", "shape")  # no shape is asked for
_SHAPES = "|".join(sorted((*LABEL_ROOM, *_ANY_SHAPE), key=len, reverse=True))
_LABELLED = r"(?:is |are )?(?:labell?ed|named|called|marked)"
_COMPONENT = re.compile(rf"(?:\b({'|'.join(COLORS)}) )?\b({_SHAPES})(?:e?s)? {_LABELLED} ({_LABELS})")
_SENTENCE = re.compile(r"(?<=[.;])\s+")
_ARROWS, _LINES = re.compile(r"\barrows?\b|→|\bpoints? to\b", re.IGNORECASE), re.compile(r"\blines? (?:connects?|joins?)\b", re.I)
_TO = re.compile(rf"{_Q}\s*(?:to|→|points? to)\s+(?={_Q})")
_WITH = re.compile(rf"{_Q}\s*(?:with|and|to)\s+(?={_Q})")
_QUOTED = re.compile(_Q)


@dataclass(frozen=True)
class Description:
    """`parts`: {id, shape, color, label} ('' where the text does not say); `arrows`: {source, target, directed} by these ids."""

    parts: list[dict[str, Any]] = field(default_factory=list)
    arrows: list[dict[str, Any]] = field(default_factory=list)


def _labels(text: str) -> list[str]:
    return [next(group for group in match.groups() if group) for match in _QUOTED.finditer(text)]


def parse_description(text: str) -> Description:
    """The components and arrows that a text names plainly; of two components with one label the first counts."""
    parts: dict[str, dict[str, Any]] = {}
    for match in _COMPONENT.finditer(text):
        shape = "" if match[2] in _ANY_SHAPE else match[2]
        for label in _labels(match[3]):
            parts.setdefault(label, {"id": label, "shape": shape, "color": match[1] or "", "label": label})
    arrows = [arrow for arrow in _arrows(text) if arrow["source"] in parts and arrow["target"] in parts]
    return Description(list(parts.values()), arrows)


def _arrows(text: str) -> Iterator[dict[str, Any]]:
    for sentence in _SENTENCE.split(text):
        directed = _ARROWS.search(sentence) is not None
        if directed or _LINES.search(sentence):
            for match in (_TO if directed else _WITH).finditer(sentence):
                groups = [group for group in match.groups() if group]  # the first label, and the one that stands behind
                yield {"source": groups[0], "target": groups[1], "directed": directed}


def rubric_of_description(text: str) -> dict[str, list[str]]:
    """A judge's checklist of what a description names plainly; {} where it names nothing so."""
    found = parse_description(text)
    lines = {
        "components": [f"{_named(part)} labelled '{part['label']}'" for part in found.parts],
        "arrows": [
            f"an arrow from '{arrow['source']}' to '{arrow['target']}'" if arrow["directed"]
            else f"a line between '{arrow['source']}' and '{arrow['target']}'"
            for arrow in found.arrows
        ],
        "text": [f"the text '{label}'" for label in dict.fromkeys(_labels(text))],
    }  # fmt: skip
    return {axis: items for axis, items in lines.items() if items}


def _named(part: dict[str, Any]) -> str:
    return a(" ".join(filter(None, (part["color"], part["shape"] or "shape"))))


# -- against a picture -------------------------------------------------------------------------------
def pair_by_label(parts: Sequence[dict[str, Any]], found: Sequence[ReadComponent]) -> dict[int, int]:
    """Place of a part -> place of what was read: same label, or same colour and shape; the likest first."""
    costs = []
    for i, part in enumerate(parts):
        for k, read in enumerate(found):
            label = same_text(read.label, part["label"])
            color, shape = part["color"] in ("", read.color), part["shape"] == "" or same_shape(part, read)
            if label or (color and shape):
                costs.append((4 * (not label) + 2 * (not color) + (not shape), i, k))
    pairs: dict[int, int] = {}
    for _, i, k in sorted(costs):
        if i not in pairs and k not in pairs.values():
            pairs[i] = k
    return pairs


def _completed(parts: Sequence[dict[str, Any]], found: Sequence[ReadComponent], pairs: dict[int, int]) -> list[dict[str, Any]]:
    """The parts with the colours and shapes that the text leaves open, as they were read."""
    seen = {i: found[k] for i, k in pairs.items()}
    return [
        {**part, "color": part["color"] or seen[i].color, "shape": part["shape"] or seen[i].shape} if i in seen else part
        for i, part in enumerate(parts)
    ]


def score_described(picture: Image.Image | None, text: str) -> Scores:
    """(hits, total) by name; {} where the text names no component plainly."""
    said = parse_description(text)
    if not said.parts:
        return {}
    read = None if picture is None else read_structure(picture)
    found = [] if read is None else read.components
    pairs = pair_by_label(said.parts, found)
    parts = _completed(said.parts, found, pairs)
    return {**score_parts(parts, found, pairs), **score_arrows({"arrows": said.arrows}, parts, read, pairs)}


def differences(picture: Image.Image, text: str) -> list[tuple[str, str]]:
    """What is read otherwise than described: (what is wrong, how to put it right as an instruction to edit)."""
    said, read = parse_description(text), read_structure(picture)
    pairs = pair_by_label(said.parts, read.components)
    out = []
    for i, part in enumerate(said.parts):
        label, seen = part["label"], read.components[pairs[i]] if i in pairs else None
        if seen is None:
            out.append((f"'{label}' is missing", f"Add {_named(part)} labelled '{label}'."))
            continue
        if not same_text(seen.label, label):
            out.append((f"the label '{label}' cannot be read", f"Rename '{seen.label}' to '{label}'."))
        if part["color"] and seen.color != part["color"]:
            out.append((f"'{label}' is {seen.color}, not {part['color']}", f"Make '{label}' {part['color']}."))
        if part["shape"] and not same_shape(part, seen):
            out.append((f"'{label}' is drawn as {seen.shape}, not as {part['shape']}", f"Turn '{label}' into {a(part['shape'])}."))
    return out + _other_arrows(said, read, pairs)


def _other_arrows(said: Description, read: ReadFigure, pairs: dict[int, int]) -> list[tuple[str, str]]:
    name = {k: said.parts[i]["label"] for i, k in pairs.items()}
    wanted = {arrow_key(arrow["source"], arrow["target"], arrow["directed"]): arrow for arrow in said.arrows}
    drawn = [arrow for arrow in read.arrows if arrow.source in name and arrow.target in name]
    seen = {arrow_key(name[arrow.source], name[arrow.target], arrow.directed) for arrow in drawn}
    out = []
    for key, arrow in wanted.items():
        ends = f"from '{arrow['source']}' to '{arrow['target']}'"
        if key not in seen:
            out.append((f"the arrow {ends} is missing", f"Add an arrow {ends}."))
    for source, target, directed in sorted(seen - set(wanted)):
        ends = f"from '{source}' to '{target}'"
        out.append((f"the {'arrow' if directed else 'line'} {ends} does not belong there", f"Remove the arrow {ends}."))
    return out


@METRICS.register("described")
class Described(ReadingMetric):
    """See the module's text. Applies to examples whose prompt names components with labels."""

    def score(self, picture: Image.Image | None, example: Example) -> Scores:
        return score_described(picture, example.prompt)
