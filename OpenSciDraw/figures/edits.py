"""Edits in figure sources: which pictures a figure was made from, and where it differs from them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.utils.files import parse_json

REFERENCE_COLUMNS = (
    "source_image_path", "source_image", "source_images", "reference_image", "reference_images", "reference_image_path",
)  # fmt: skip
BOX_COLUMN = "edit_bboxes"
MOST_REFERENCES, _MOST_BOXES = 8, 1000
_BESIDE = re.compile(r"(?P<stem>.+)\.source(?P<number>\d*)")
_MASK = ".mask"
Boxes = tuple[tuple[float, float, float, float], ...]


def beside(names: Sequence[str]) -> dict[str, list[str]]:
    """Names of reference pictures by the stem of the figure that they belong to: x.source.png, x.source2.png, … of x.png."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if match := _BESIDE.fullmatch(PurePath(name).stem):
            found.setdefault(match["stem"], []).append((int(match["number"] or 1), name))
    return {stem: [name for _, name in sorted(numbered)] for stem, numbered in found.items()}


def masks_beside(names: Sequence[str]) -> dict[str, str]:
    """Names of masks by the stem of the figure that they belong to: x.mask.png of x.png; of several, the first."""
    found = ((PurePath(name).stem, name) for name in sorted(names, reverse=True))
    return {stem.removesuffix(_MASK): name for stem, name in found if stem.endswith(_MASK) and stem != _MASK}


def named_in(value: object) -> list[Any]:
    """The pictures that a cell of a reference column names: none, one, or a list of them.

    Raises RejectedFigure for more than the models take.
    """
    if value is None or value == "" or value == b"" or (isinstance(value, float) and math.isnan(value)):
        return []
    names = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(names) > MOST_REFERENCES:
        raise RejectedFigure(f"references: {len(names)} of them, at most {MOST_REFERENCES}")
    return names


def boxes_in(row: Mapping[str, Any]) -> Boxes:
    """`edit_bboxes` of a row: [[x0, y0, x1, y1], …] in pixels, as a list or as JSON; none where it is empty.

    Raises RejectedFigure for anything else.
    """
    value = row.get(BOX_COLUMN)
    try:
        if isinstance(value, bytes):
            value = value.decode()
        if isinstance(value, str):
            value = parse_json(value) if value.strip() else None
        if value is None:
            return ()
        boxes = tuple(tuple(float(number) for number in box) for box in value)
    except (ValueError, TypeError) as error:
        raise RejectedFigure(f"{BOX_COLUMN}: not [[x0, y0, x1, y1], …]: {error}") from error
    for box in boxes:
        if len(box) != 4 or not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3] or len(boxes) > _MOST_BOXES:
            raise RejectedFigure(f"{BOX_COLUMN}: {box!r} among {len(boxes)} is no box x0 < x1, y0 < y1")
    return boxes  # type: ignore[return-value]  # mypy does not see the length
