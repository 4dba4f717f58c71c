"""Edits: whether a picture is what the instruction asked for, and whether the rest is as it was.

    done          1 where all that the edit changes is as it should be: new and changed components with their shape, colour, label
                  and place, none left of what should be gone, changed arrows in the right direction; of a bar its height
    kept          components and arrows that the edit leaves alone, read back as they were
    kept_pixels   share of the pixels outside the edit's boxes that are those of the source, within 10 % of a channel's range

`done` and `kept` need ground truth ('drawn:…:edit'), read by the eyes of the structure metric; `kept_pixels` needs the boxes
(`edit_bboxes`) and a source of the picture's shape.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.base import Scores
from OpenSciDraw.evaluation.structure import ReadingMetric, middle_of, pair_parts, read_structure, same_shape
from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.reading.figure import ReadComponent, ReadFigure
from OpenSciDraw.reading.glyphs import same_text
from OpenSciDraw.registry import METRICS

if TYPE_CHECKING:

    from OpenSciDraw.evaluation.examples import Example

VERSION = 1
_NEAR = 0.15  # of the longer side: a component within it stands at its place
_HEIGHT = 0.08  # of the longer side: how far a bar may be off
_LEVEL = 25  # of 255: a pixel that differs by less is the same; the small model's VAE alone moves 1 % of them further
_MARGIN = 3  # px around boxes that are not compared: the VAE blurs


@METRICS.register("edit")
class Edit(ReadingMetric):
    """See the module's text. Applies to examples that edit a picture."""

    def identity(self) -> dict[str, Any]:
        return {"version": VERSION}

    def score(self, picture: Image.Image | None, example: Example) -> Scores:
        if not example.sources:
            return {}
        size = (example.width, example.height)
        if picture is not None and picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        scores: Scores = {}
        if example.truth is not None and "edit" in example.truth:
            scores |= _score_truth(None if picture is None else read_structure(picture), example.truth, max(size))
        if example.edit_boxes:
            scores |= _score_pixels(picture, example)
        return scores


# -- by ground truth -----------------------------------------------------------------------------------
def _score_truth(read: ReadFigure | None, after: dict[str, Any], side: int) -> Scores:
    before, kept_ids = after["edit"]["before"], set(after["edit"]["kept"])
    parts = after["components"]
    found = [] if read is None else read.components
    pairs = pair_parts(parts, found, side)
    labels = {part["id"]: part["label"] for part in parts}
    seen = set() if read is None else _read_arrows(read, parts, pairs)
    now, was = _arrows(after), _arrows(before)
    right = [i in pairs and _is_there(part, found[pairs[i]], side) for i, part in enumerate(parts)]
    changed = [ok for ok, part in zip(right, parts, strict=True) if part["id"] not in kept_ids]
    gone = [part for part in before["components"] if not any(_same(part, other) for other in parts)]
    left = [part for part in gone if any(_is_there(part, other, side) for other in found)]
    wrong_arrows = {arrow for arrow in was - now if set(arrow) <= set(labels.values())} & seen
    kept = [ok for ok, part in zip(right, parts, strict=True) if part["id"] in kept_ids]
    done = read is not None and all(changed) and not left and now - was <= seen and not wrong_arrows
    done &= bool(changed) or not kept or any(kept)  # where all is gone, nothing was removed
    kept += [arrow in seen for arrow in sorted(now & was)]
    scores: Scores = {"done": (float(done), 1.0)}
    if kept:
        scores["kept"] = (float(sum(kept)), float(len(kept)))
    return scores


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("shape", "color", "label", "box"))


def _is_there(part: dict[str, Any], read: ReadComponent, side: int) -> bool:
    """Whether what was read is this component, at its place."""
    if read.color != part["color"] or math.dist(middle_of(part["box"]), read.middle) > _NEAR * side:
        return False
    if part["shape"] == "bar":
        return abs((read.box[3] - read.box[1]) - (part["box"][3] - part["box"][1])) <= _HEIGHT * side
    return same_shape(part, read) and same_text(read.label, part["label"])


def _arrows(truth: dict[str, Any]) -> set[tuple[str, str]]:
    """Arrows by the labels of their ends."""
    label = {part["id"]: part["label"] for part in truth["components"]}
    return {(label[arrow["source"]], label[arrow["target"]]) for arrow in truth["arrows"]}


def _read_arrows(read: ReadFigure, parts: list[dict[str, Any]], pairs: dict[int, int]) -> set[tuple[str, str]]:
    label = {k: parts[i]["label"] for i, k in pairs.items()}
    return {(label[a.source], label[a.target]) for a in read.arrows if a.directed and a.source in label and a.target in label}


# -- by pixels -----------------------------------------------------------------------------------------
def _score_pixels(picture: Image.Image | None, example: Example) -> Scores:
    try:
        source = example.source_images()[0]
    except RejectedFigure as error:
        raise UserError(f"The source of {example.id!r} cannot be used: {error}. Replace it or leave the edit out.") from error
    size = (example.width, example.height)
    if source.width * size[1] != source.height * size[0]:
        return {}
    outside = np.ones((size[1], size[0]), dtype=bool)
    for x0, y0, x1, y1 in example.edit_boxes:
        rows = slice(max(0, math.floor(y0) - _MARGIN), max(0, math.ceil(y1) + _MARGIN))
        columns = slice(max(0, math.floor(x0) - _MARGIN), max(0, math.ceil(x1) + _MARGIN))
        outside[rows, columns] = False
    if not outside.any():
        return {}
    if picture is None:
        return {"kept_pixels": (0.0, 1.0)}
    source = source if source.size == size else source.resize(size, Image.Resampling.LANCZOS)
    same = np.abs(np.asarray(picture, np.int16) - np.asarray(source, np.int16)).max(axis=2) <= _LEVEL
    return {"kept_pixels": (float(same[outside].mean()), 1.0)}
