"""Structure: what a picture of a drawn figure shows, read back by classical vision, against the figure's ground truth.

    components          true shapes (bars, curves) that were found; shapes that do not belong cost as much as missing ones:
                        the total is the larger of the two counts
    shape, colour       of the true components: found, and of the right shape or palette colour
    arrows              true arrows found between the right two components in the right direction, lines without a head
                        between the right two; wrong ones cost as above
    labels              labels read exactly at their component (case, spaces and look-alikes such as 0 and O aside)
    one_letter_labels   the same for labels of one letter alone
    plot_kind           diagram, bar chart or line plot
    trend               of each curve; of a bar chart the order of its bars by height

Components are paired with what was read by place (at most a quarter of the picture's side away: a model may arrange a
figure a little differently), the label, colour and shape deciding between neighbours. Containers, tables, the lines of
networks and scatter plots' points are not read. benchmarks/run_structure.py measures what the reading misses in faultless
figures, and how the scores fall when figures are spoiled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from OpenSciDraw.drawn.plots import TRENDS
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.base import PictureMetric, Scores
from OpenSciDraw.reading.figure import ReadComponent, ReadFigure
from OpenSciDraw.reading.glyphs import same_text
from OpenSciDraw.reading.vision import read_figure
from OpenSciDraw.registry import METRICS

if TYPE_CHECKING:
    from pathlib import Path

    from OpenSciDraw.config import EvaluateConfig
    from OpenSciDraw.evaluation.examples import Example

TOLERANCE = 0.25  # of the picture's longer side: how far a component may stand from its place
VERSION = 2  # raise it when a picture may be read otherwise than before
_UNREAD = ("table", "scatter")
_ROUND = {"circle": "ellipse"}


def require_opencv() -> None:
    """Raises UserError, with what to install, where the package is missing."""
    if find_spec("cv2") is None:
        raise UserError("Reading what a picture shows needs OpenCV: pip install 'OpenSciDraw[evaluate]'.")


class ReadingMetric(PictureMetric):
    """A metric of what `read_structure` finds in a picture."""

    def __init__(self, settings: EvaluateConfig, folder: Path):
        super().__init__(settings, folder)
        require_opencv()


@METRICS.register("structure")
class Structure(ReadingMetric):
    """See the module's text. Applies to examples with ground truth ('drawn:…')."""

    def identity(self) -> dict[str, Any]:
        return {"version": VERSION}

    def score(self, picture: Image.Image | None, example: Example) -> Scores:
        return score_structure(picture, example)


def read_structure(picture: Image.Image) -> ReadFigure:
    """What the metric sees in a picture: components with shape, colour, label and box, arrows, axes, curves."""
    return read_figure(picture)


def score_structure(picture: Image.Image | None, example: Any) -> Scores:
    """(hits, total) by name; {} where the example has no ground truth of a kind that is read.

    `example` needs `truth`, `width` and `height`; a picture of another size is resized to them first.
    """
    truth = example.truth
    if truth is None or truth["kind"] in _UNREAD:
        return {}
    size = (example.width, example.height)
    if picture is not None and picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    read = None if picture is None else read_structure(picture)
    plot = truth.get("plot", {}).get("kind")
    side = max(example.width, example.height)
    scores: Scores = {"plot_kind": (float(read is not None and _kind(read) == (plot or "diagram")), 1.0)}
    if plot == "line":
        return scores | _score_curves(read, truth["plot"]["series"])
    parts = [part for part in truth["components"] if part["shape"] != "container"]
    found = [] if read is None else read.components
    pairs = pair_parts(parts, found, side)
    scores |= score_parts(parts, found, pairs)
    if plot == "bar":
        return scores | _score_order(parts, found, pairs, truth["plot"]) | _score_ticks(read, truth, side)
    if truth["kind"] != "network":
        scores |= score_arrows(truth, parts, read, pairs)
    return scores


def _kind(read: ReadFigure) -> str:
    if read.axes is None:
        return "diagram" if read.components else "nothing"
    return "line" if read.curves and not read.components else "bar" if read.components else "axes"


def middle_of(box: Sequence[float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def same_shape(part: dict[str, Any], read: ReadComponent) -> bool:
    return _ROUND.get(part["shape"], part["shape"]) == _ROUND.get(read.shape, read.shape)


def pair_parts(parts: Sequence[dict[str, Any]], found: Sequence[ReadComponent], side: float) -> dict[int, int]:
    """Place of a true component -> place of what was read: nearest pairs first, ties by label, colour and shape."""
    costs = []
    for i, part in enumerate(parts):
        for k, read in enumerate(found):
            apart = math.dist(middle_of(part["box"]), read.middle) / side
            if apart <= TOLERANCE:
                wrong = 0.06 * (part["color"] != read.color) + 0.04 * (not same_shape(part, read))
                wrong += 0.08 * (not same_text(read.label, part["label"]))
                costs.append((apart + wrong, i, k))
    pairs: dict[int, int] = {}
    for _, i, k in sorted(costs):
        if i not in pairs and k not in pairs.values():
            pairs[i] = k
    return pairs


def score_parts(parts: Sequence[dict[str, Any]], found: Sequence[ReadComponent], pairs: dict[int, int]) -> Scores:
    """What `parts` (with shape, color, label) and the components that were read have in common; `pairs` as of `pair_parts`."""
    couples = [(part, found[pairs[i]] if i in pairs else None) for i, part in enumerate(parts)]
    count = float(len(parts))
    scores: Scores = {"components": (float(len(pairs)), float(max(len(parts), len(found))))}
    scores["colour"] = (float(sum(r is not None and r.color == p["color"] for p, r in couples)), count)
    if all(part["shape"] != "bar" for part in parts):
        scores["shape"] = (float(sum(r is not None and same_shape(p, r) for p, r in couples)), count)
    named = [(p, r is not None and same_text(r.label, p["label"])) for p, r in couples if p["label"]]
    for name, chosen in (("labels", named), ("one_letter_labels", [c for c in named if len(c[0]["label"]) == 1])):
        if chosen:
            scores[name] = (float(sum(right for _, right in chosen)), float(len(chosen)))
    return scores


def score_arrows(
    truth: dict[str, Any], parts: Sequence[dict[str, Any]], read: ReadFigure | None, pairs: dict[int, int]
) -> Scores:
    """The arrows of `truth` against those that were read between the paired parts."""
    known = {part["id"] for part in parts}
    true_arrows = [a for a in truth["arrows"] if a["source"] in known and a["target"] in known]
    wanted = {arrow_key(a["source"], a["target"], a["directed"]) for a in true_arrows}
    if read is None:
        return {"arrows": (0.0, float(len(wanted)))} if wanted else {}
    name = {k: parts[i]["id"] for i, k in pairs.items()}  # a shape that does not belong keeps its number as its name
    seen = {arrow_key(name.get(a.source, str(a.source)), name.get(a.target, str(a.target)), a.directed) for a in read.arrows}
    total = max(len(wanted), len(seen))
    return {"arrows": (float(len(wanted & seen)), float(total))} if total else {}


def arrow_key(source: str, target: str, directed: bool) -> tuple[str, str, bool]:
    return (source, target, True) if directed else (min(source, target), max(source, target), False)


def _score_order(
    parts: Sequence[dict[str, Any]], found: Sequence[ReadComponent], pairs: dict[int, int], plot: dict[str, Any]
) -> Scores:
    """Bars by height: the order of those that are read must be the true one, and none may be missing."""
    if len(plot["series"]) != 1:
        return {}
    heights = [found[pairs[i]].box[3] - found[pairs[i]].box[1] if i in pairs else -1.0 for i in range(len(parts))]
    order = sorted(range(len(parts)), key=lambda i: heights[i])
    wanted = sorted(range(len(parts)), key=lambda i: plot["series"][0]["values"][i])
    return {"trend": (float(len(pairs) == len(parts) and order == wanted), 1.0)}


def _score_ticks(read: ReadFigure | None, truth: dict[str, Any], side: float) -> Scores:
    """Names of bars, each read within a tenth of the picture's side of its place."""
    names = set(truth["plot"]["categories"])
    ticks = [label for label in truth["labels"] if label["role"] == "tick" and label["text"] in names and len(label["text"]) == 1]
    if not ticks:
        return {}
    hits = 0
    for label in ticks:
        near = [] if read is None else [t for t in read.texts if math.dist(middle_of(t.box), middle_of(label["box"])) < 0.1 * side]
        hits += any(same_text(text.text, label["text"]) for text in near)
    return {"labels": (float(hits), float(len(ticks))), "one_letter_labels": (float(hits), float(len(ticks)))}


def _score_curves(read: ReadFigure | None, series: Sequence[dict[str, Any]]) -> Scores:
    curves = {} if read is None else read.curves
    hits = [s for s in series if s["color"] in curves]
    right = sum(_trend(curves[s["color"]]) == s["trend"] for s in hits)
    total = float(max(len(series), len(curves)))
    return {"components": (float(len(hits)), total), "trend": (float(right), float(len(series)))}


def _trend(points: np.ndarray) -> str:
    """The trend whose curve correlates best with the points (n, 2), x to the right and y down."""
    t = (points[:, 0] - points[0, 0]) / max(1e-6, points[-1, 0] - points[0, 0])
    height = -points[:, 1]
    if np.ptp(height) < 0.12 * np.ptp(points[:, 0]):
        return "constant"
    best = {
        name: float(np.corrcoef(height, [curve(float(x)) for x in t])[0, 1])
        for name, (_, curve) in TRENDS.items() if name != "constant"
    }  # fmt: skip
    return max(best, key=lambda name: best[name])


def draw_reading(picture: Image.Image, read: ReadFigure, scale: int = 3) -> Image.Image:
    """The picture, enlarged, with what was read drawn over it: boxes with shape, colour and label, and arrows."""
    out = picture.convert("RGB").resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)
    pen, face = ImageDraw.Draw(out), ImageFont.load_default(size=11)
    for part in read.components:
        box = [value * scale for value in part.box]
        pen.rectangle(box, outline=(220, 0, 160), width=1)
        pen.text((box[0], max(0, box[1] - 12)), f"{part.color} {part.shape} {part.label!r}", fill=(220, 0, 160), font=face)
    for arrow in read.arrows:
        a, b = ([v * scale for v in read.components[k].middle] for k in (arrow.source, arrow.target))
        pen.line([*a, *b], fill=(0, 150, 0), width=2)
        if arrow.directed:
            x, y = a[0] + 0.7 * (b[0] - a[0]), a[1] + 0.7 * (b[1] - a[1])
            pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=(0, 150, 0))
    return out
