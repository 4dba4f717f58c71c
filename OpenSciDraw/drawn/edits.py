"""Edits of drawn figures: a figure before and after, the instruction, what changes, and what must stay.

The figures are diagrams of the styles "small" and "house", and bar charts of "small". Both pictures of an edit are drawn from
a description of the scene, element by element with random strokes of its own, so that what is not edited has the same pixels.
Three styles are lessons for a model that has never edited (docs/edit.md). "mosaic" asks to change nothing, "letters" to give cells
other colours by their labels: mosaic.py and letters.py say what for. "repaint" gives two or more shapes of a small diagram other
colours by their labels, so that what is to be learned, to find a label in the picture, decides many pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from OpenSciDraw.drawn import house, small
from OpenSciDraw.drawn.canvas import Canvas, Node
from OpenSciDraw.drawn.figure import DrawnFigure, truth_of
from OpenSciDraw.drawn.letters import Box, draw_letters
from OpenSciDraw.drawn.mosaic import draw_mosaic
from OpenSciDraw.drawn.pieces import a, listing
from OpenSciDraw.errors import UserError

STYLES = ("small", "house", "mosaic", "letters", "repaint")
_PLACES = {  # how an instruction names the places of a layout
    "row of two": ("on the left", "on the right"), "row of three": ("on the left", "in the middle", "on the right"),
    "column of two": ("at the top", "at the bottom"), "column of three": ("at the top", "in the middle", "at the bottom"),
    "square": ("at the top left", "at the top right", "at the bottom left", "at the bottom right"),
    "fork": ("at the top", "at the bottom left", "at the bottom right"),
    "join": ("at the top left", "at the top right", "at the bottom"),
}  # fmt: skip
_ROOM = 5  # px around an arrow's line that its head takes
_UNSTEADY = {"house": 2}  # px that a shape's strokes leave its box by


@dataclass(frozen=True)
class Look:
    """A shape, its colour and its label."""

    shape: str
    color: str
    label: str


@dataclass(frozen=True)
class Scene:
    """A diagram: what stands at the places of a layout, and arrows (from, to) between places."""

    layout: str
    nodes: dict[int, Look]
    arrows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Bars:
    """A bar chart: names, heights as shares of the axis, and the colour."""

    names: tuple[str, ...]
    heights: tuple[float, ...]
    color: str


@dataclass(frozen=True)
class DrawnEdit:
    """An edit: the figure before and after it, and the places in pixels that it changes.

    The caption of `after` is the instruction, and its ground truth has a key `edit`: {kind, instruction, boxes, before: the
    ground truth before, kept: ids of components that stay as they are}.
    """

    id: str
    kind: str
    instruction: str
    before: DrawnFigure
    after: DrawnFigure
    boxes: tuple[Box, ...]


Change = tuple[Any, Any, str]  # the scene before, the scene after, the instruction


# -- what can be asked for ---------------------------------------------------------------------------
def _recolour(rng: random.Random, scene: Scene, style: str) -> Change | None:
    place = rng.choice(sorted(scene.nodes))
    look = scene.nodes[place]
    color = rng.choice([c for c in (house.COLORS if style == "house" else small.COLORS) if c != look.color])
    verb = rng.choice((f"Make '{look.label}' {color}.", f"Change the colour of '{look.label}' to {color}."))
    return scene, _with(scene, place, replace(look, color=color)), verb


def _repaint(rng: random.Random, scene: Scene, style: str) -> Change:
    places = rng.sample(sorted(scene.nodes), rng.randint(2, len(scene.nodes)))
    new = {place: rng.choice([color for color in small.COLORS if color != scene.nodes[place].color]) for place in places}
    nodes = {place: replace(look, color=new.get(place, look.color)) for place, look in scene.nodes.items()}
    said = [f"'{scene.nodes[place].label}' {color}" for place, color in new.items()]
    return scene, replace(scene, nodes=nodes), f"Make {listing(said)}."


def _relabel(rng: random.Random, scene: Scene, style: str) -> Change | None:
    place = rng.choice(sorted(scene.nodes))
    look = scene.nodes[place]
    label = rng.choice([c for c in small.LETTERS if c not in {other.label for other in scene.nodes.values()}])
    said = rng.choice((f"Rename '{look.label}' to '{label}'.", f"Replace the label '{look.label}' by '{label}'."))
    return scene, _with(scene, place, replace(look, label=label)), said


def _reshape(rng: random.Random, scene: Scene, style: str) -> Change | None:
    place = rng.choice(sorted(scene.nodes))
    look = scene.nodes[place]
    shape = rng.choice([c for c in (house.SHAPES if style == "house" else small.SHAPES) if c != look.shape])
    if len(look.label) > 1:  # a word may not fit into every shape
        return None
    return scene, _with(scene, place, replace(look, shape=shape)), f"Turn '{look.label}' into {a(shape)}."


def _remove(rng: random.Random, scene: Scene, style: str) -> Change | None:
    place = rng.choice(sorted(scene.nodes))
    after = _without(scene, place)
    lost = len(scene.arrows) - len(after.arrows)
    its = " and its arrows" if lost > 1 else " and its arrow" if lost else ""
    return scene, after, f"{rng.choice(('Remove', 'Delete'))} '{scene.nodes[place].label}'{its}."


def _add(rng: random.Random, scene: Scene, style: str) -> Change | None:
    place = rng.choice(sorted(scene.nodes))
    before, look = _without(scene, place), scene.nodes[place]
    new = [arrow for arrow in scene.arrows if place in arrow][:1]
    after = replace(scene, arrows=(*before.arrows, *new))
    text = f"Add {a(f'{look.color} {look.shape}')} labelled '{look.label}' {_PLACES[scene.layout][place]}"
    for source, target in new:
        text += f", with an arrow from '{scene.nodes[source].label}' to '{scene.nodes[target].label}'"
    return before, after, f"{text}."


def _move(rng: random.Random, scene: Scene, style: str) -> Change | None:
    free = rng.choice(sorted(scene.nodes))
    before = _without(scene, free)
    loose = [place for place in before.nodes if not any(place in arrow for arrow in before.arrows)]
    if not loose:
        return None
    place = rng.choice(sorted(loose))
    look = before.nodes[place]
    nodes = {at: other for at, other in before.nodes.items() if at != place} | {free: look}
    return before, replace(before, nodes=nodes), f"Move '{look.label}' to the place {_PLACES[scene.layout][free]}."


def _swap(rng: random.Random, scene: Scene, style: str) -> Change | None:
    one, other = sorted(rng.sample(sorted(scene.nodes), 2))
    nodes = {**scene.nodes, one: scene.nodes[other], other: scene.nodes[one]}
    names = f"'{scene.nodes[one].label}' and '{scene.nodes[other].label}'"
    stay = " The arrows stay where they are." if scene.arrows else ""
    return scene, replace(scene, nodes=nodes), f"Swap {names}.{stay}"


def _reverse(rng: random.Random, scene: Scene, style: str) -> Change | None:
    at = rng.randrange(len(scene.arrows))
    source, target = scene.arrows[at]
    arrows = (*scene.arrows[:at], (target, source), *scene.arrows[at + 1 :])
    names = f"from '{scene.nodes[source].label}' to '{scene.nodes[target].label}'"
    return scene, replace(scene, arrows=arrows), rng.choice((f"Reverse the arrow {names}.", f"Turn the arrow {names} around."))


def _redirect(rng: random.Random, scene: Scene, style: str) -> Change | None:
    at = rng.randrange(len(scene.arrows))
    source, target = scene.arrows[at]
    pairs = {frozenset(pair) for pair in small.LAYOUTS[scene.layout][2]} - {frozenset(arrow) for arrow in scene.arrows}
    others = [place for place in scene.nodes if place not in (source, target) and frozenset((source, place)) in pairs]
    if not others:
        return None
    new = rng.choice(sorted(others))
    arrows = (*scene.arrows[:at], (source, new), *scene.arrows[at + 1 :])
    label = {place: scene.nodes[place].label for place in (source, target, new)}
    text = f"Let the arrow from '{label[source]}' point to '{label[new]}' instead of '{label[target]}'."
    return scene, replace(scene, arrows=arrows), text


def _bar(rng: random.Random, bars: Bars, style: str) -> Change | None:
    at = rng.randrange(len(bars.names))
    left = [height for height in small.HEIGHTS if height not in bars.heights]
    if not left:
        return None
    height = rng.choice(left)
    heights = (*bars.heights[:at], height, *bars.heights[at + 1 :])
    return bars, replace(bars, heights=heights), f"Set the bar '{bars.names[at]}' to {height:.0%} of the axis."


_CHANGES: dict[str, Callable[[random.Random, Any, str], Change | None]] = {
    "recolour": _recolour, "relabel": _relabel, "reshape": _reshape, "add": _add, "remove": _remove, "move": _move, "swap": _swap,
    "reverse": _reverse, "redirect": _redirect, "bar": _bar, "repaint": _repaint,
}  # fmt: skip
KINDS = tuple(kind for kind in _CHANGES if kind != "repaint")  # which is of the style "repaint" alone


def _with(scene: Scene, place: int, look: Look) -> Scene:
    return replace(scene, nodes={**scene.nodes, place: look})


def _without(scene: Scene, place: int) -> Scene:
    nodes = {at: look for at, look in scene.nodes.items() if at != place}
    return replace(scene, nodes=nodes, arrows=tuple(arrow for arrow in scene.arrows if place not in arrow))


# -- an edit -----------------------------------------------------------------------------------------
def draw_edit(seed: int, index: int, style: str = "small") -> DrawnEdit:
    """Edit `index` of the sequence `seed`: a pure function of its arguments. Raises UserError for a style that cannot be edited."""
    if style not in STYLES:
        raise UserError(f"Figures of style {style!r} cannot be edited. Styles of edits: {', '.join(STYLES)}.")
    if style in ("mosaic", "letters"):
        return _lesson(seed, index, style)
    key = f"edit:{style}:{seed}:{index}"
    rng = random.Random(key)
    name = f"drawn-edit-{style}-{seed}-{index:07d}"
    kinds = ["repaint"] if style == "repaint" else [kind for kind in KINDS if kind != "bar" or style == "small"]
    change = None
    while change is None:  # not everything can be asked of every scene
        kind = rng.choice(kinds)
        change = _CHANGES[kind](rng, _bars(rng) if kind == "bar" else _scene(rng, style), style)
    first, second, instruction = change
    before, after = _draw(first, style, key, f"{name}.source"), _draw(second, style, key, name)
    boxes, kept = _differences(before.truth, after.truth, _UNSTEADY.get(style, 0))
    about = {"kind": kind, "instruction": instruction, "boxes": [list(box) for box in boxes], "kept": kept, "before": before.truth}
    after = DrawnFigure(name, after.image, instruction, {**after.truth, "edit": about})
    return DrawnEdit(name, kind, instruction, before, after, boxes)


def _lesson(seed: int, index: int, style: str) -> DrawnEdit:
    """A mosaic, or cells with letters: pictures without components, arrows or labels that a metric knows."""
    boxes: tuple[Box, ...] = ()
    if style == "letters":
        kind, (source, result, said, boxes) = "letters", draw_letters(seed, index)
    else:
        kind, (source, said) = "keep", draw_mosaic(seed, index)
        result = source
    name = f"drawn-edit-{style}-{seed}-{index:07d}"
    truth = {"kind": style, "width": small.SIDE, "height": small.SIDE, "components": [], "arrows": [], "labels": []}
    about = {"kind": kind, "instruction": said, "boxes": [list(box) for box in boxes], "kept": [], "before": truth}
    before, after = DrawnFigure(f"{name}.source", source, "", truth), DrawnFigure(name, result, said, {**truth, "edit": about})
    return DrawnEdit(name, kind, said, before, after, boxes)


def _bars(rng: random.Random) -> Bars:
    count = rng.randint(2, 3)
    names = tuple(sorted(rng.sample(small.LETTERS, count)))
    return Bars(names, tuple(rng.sample(small.HEIGHTS, count)), rng.choice(small.COLORS))


def _scene(rng: random.Random, style: str) -> Scene:
    """A diagram as style "small" or "house" draws it, with at least one arrow."""
    layouts, shapes, colors = (
        (house.LAYOUTS, house.SHAPES, house.COLORS) if style == "house" else (tuple(small.LAYOUTS), small.SHAPES, small.COLORS)
    )
    layout = rng.choice(layouts)
    places, (width, height), pairs = small.LAYOUTS[layout]
    looks = [rng.choice(shapes) for _ in places]
    labels = small.labels(rng, looks, width, height)
    nodes = {at: Look(shape, rng.choice(colors), label) for at, (shape, label) in enumerate(zip(looks, labels, strict=True))}
    joined = [pair for pair in pairs if rng.random() < 0.75] or [pairs[0]]
    return Scene(layout, nodes, tuple((one, two) if rng.random() < 0.6 else (two, one) for one, two in joined))


def _draw(scene: Scene | Bars, style: str, key: str, name: str) -> DrawnFigure:
    canvas: Canvas = house.HouseCanvas(random.Random(key)) if style == "house" else small.SmallCanvas(random.Random(key))
    if isinstance(scene, Bars):
        kind, caption = "bars", small.draw_bars(canvas, scene.names, scene.heights, scene.color)
    else:
        kind, caption = "diagram", _draw_diagram(canvas, scene, key)
    return DrawnFigure(name, canvas.finish(), caption, truth_of(kind, canvas))


def _draw_diagram(canvas: Canvas, scene: Scene, key: str) -> str:
    places, (width, height), _ = small.LAYOUTS[scene.layout]
    nodes: dict[int, Node] = {}
    for at, look in sorted(scene.nodes.items()):
        canvas.rng = random.Random(f"{key}:{at}:{look.shape}")
        scale = small.LETTER if len(look.label) == 1 else 1.0
        nodes[at] = canvas.node(look.shape, *places[at], width, height, look.color, look.label, scale)
    for source, target in scene.arrows:
        canvas.rng = random.Random(f"{key}:{source}:{target}")
        canvas.arrow(nodes[source], nodes[target], small.ports(scene.layout, nodes[source], nodes[target]))
    return small.describe(canvas, scene.layout, sorted(nodes))


# -- what changes ------------------------------------------------------------------------------------
def _differences(before: dict[str, Any], after: dict[str, Any], room: int) -> tuple[tuple[Box, ...], list[str]]:
    """Boxes of the components and arrows that differ, in either picture, and the ids of those in `after` that do not."""
    boxes: list[Box] = []
    for mine, other in ((before, after), (after, before)):
        there = [_seen(component) for component in other["components"]]
        changed = [part["box"] for part in mine["components"] if _seen(part) not in there]
        boxes += [(x0 - room, y0 - room, x1 + room, y1 + room) for x0, y0, x1, y1 in changed]
        arrows = [_line(arrow) for arrow in other["arrows"]]
        for arrow in mine["arrows"]:
            if _line(arrow) not in arrows:
                xs, ys = ([round(point[axis]) for point in arrow["points"]] for axis in (0, 1))
                boxes.append((min(xs) - _ROOM, min(ys) - _ROOM, max(xs) + _ROOM, max(ys) + _ROOM))
    unique = tuple(dict.fromkeys(boxes))
    there = [_seen(component) for component in before["components"]]
    return unique, [component["id"] for component in after["components"] if _seen(component) in there]


def _seen(component: dict[str, Any]) -> tuple[Any, ...]:
    return component["shape"], component["color"], component["label"], tuple(component["box"])


def _line(arrow: dict[str, Any]) -> tuple[Any, ...]:
    return arrow["directed"], tuple(map(tuple, arrow["points"]))
