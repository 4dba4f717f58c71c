"""Shapes of a slide that PowerPoint has no preset for: their outlines, with connection sites of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from OpenSciDraw.vectorize.figure import CYLINDER_CAP, TRAPEZOID_DROP, Point, Shape


def element(tag: str, **attributes: str) -> Any:
    from pptx.oxml.ns import qn
    from pptx.oxml.xmlchemy import OxmlElement

    made = OxmlElement(tag)
    assert made.tag == qn(tag)
    for key, value in attributes.items():
        made.set(key, value)
    return made


def middles(shape: Shape) -> list[Point]:
    """The middles of the sides of a shape: top, left, bottom, right."""
    x0, y0, x1, y1 = shape.path
    drop = TRAPEZOID_DROP / 2 * (y1 - y0) if shape.kind == "trapezoid" else 0.0
    return [((x0 + x1) / 2, y0 + drop), (x0, (y0 + y1) / 2), ((x0 + x1) / 2, y1 - drop), (x1, (y0 + y1) / 2)]


def free_form(made: Any, shape: Shape, sites: Sequence[Point], size: tuple[int, int]) -> None:
    """Replace the geometry of a rectangle by the shape's outline with its own connection sites."""
    wide, high = size
    form = element("a:custGeom")
    for tag in ("a:avLst", "a:gdLst", "a:ahLst"):
        form.append(element(tag))
    ties = element("a:cxnLst")
    for u, v in sites:
        tie = element("a:cxn", ang="0")
        tie.append(element("a:pos", x=str(round(u * wide)), y=str(round(v * high))))
        ties.append(tie)
    form.append(ties)
    form.append(element("a:rect", l="0", t="0", r="r", b="b"))
    paths = element("a:pathLst")
    path = element("a:path", w=str(wide), h=str(high))
    for step in _outline(shape, wide, high):
        path.append(step)
    paths.append(path)
    form.append(paths)
    geometry = made.element.spPr.prstGeom
    geometry.addprevious(form)
    geometry.getparent().remove(geometry)


def _outline(shape: Shape, wide: int, high: int) -> list[Any]:
    """The steps of a path of `wide` x `high` EMU; angles of arcs are in 60,000ths of a degree, clockwise."""

    def step(tag: str, x: float, y: float) -> Any:
        made = element(tag)
        made.append(element("a:pt", x=str(round(x)), y=str(round(y))))
        return made

    def arc(across: float, down: float, start: int, swing: int) -> Any:
        turn = {"stAng": str(start * 60000), "swAng": str(swing * 60000)}
        return element("a:arcTo", wR=str(round(across)), hR=str(round(down)), **turn)

    x0, y0, x1, y1 = shape.path
    scale = wide / (x1 - x0)
    if corners := shape.corners():
        points = [((x - x0) * scale, (y - y0) * scale) for x, y in corners]
        return [step("a:moveTo", *points[0]), *(step("a:lnTo", *point) for point in points[1:]), element("a:close")]
    if shape.kind in ("ellipse", "circle"):
        return [step("a:moveTo", 0, high / 2), arc(wide / 2, high / 2, 180, 360), element("a:close")]
    if shape.kind == "cylinder":
        cap = CYLINDER_CAP * high / 2
        upper = [step("a:moveTo", 0, cap), arc(wide / 2, cap, 180, 180)]
        lower = [step("a:lnTo", wide, high - cap), arc(wide / 2, cap, 0, 180)]
        return [*upper, *lower, element("a:close"), step("a:moveTo", 0, cap), arc(wide / 2, cap, 180, -180)]
    r = max(0.0, shape.radius - shape.width / 2) * scale
    sides = [step("a:lnTo", wide - r, 0), step("a:lnTo", wide, high - r), step("a:lnTo", r, high)]
    if not r:
        return [step("a:moveTo", 0, 0), *sides, element("a:close")]
    turns = [arc(r, r, start, 90) for start in (270, 0, 90)]
    rest = [part for pair in zip(sides, turns, strict=True) for part in pair]
    return [step("a:moveTo", 0, r), arc(r, r, 180, 90), *rest, element("a:close")]
