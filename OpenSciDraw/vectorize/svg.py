"""The figure as SVG: a group for each shape with its text, and arrows that say in data attributes what they join."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

from OpenSciDraw.vectorize.figure import CYLINDER_CAP, Connector, Point, Rgb, Shape, TextLine, VectorFigure

FONTS = "Aileron, Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
_INTO = 0.2  # share of a head's length by which the line reaches into it


def write_svg(figure: VectorFigure) -> str:
    """The file's text."""
    size = {"width": f"{figure.width}", "height": f"{figure.height}", "viewBox": f"0 0 {figure.width} {figure.height}"}
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size, "font-family": FONTS})
    defs = ET.SubElement(root, "defs")
    ET.SubElement(root, "rect", {"id": "paper", "width": "100%", "height": "100%", "fill": color(figure.paper)})
    shapes = ET.SubElement(root, "g", {"id": "shapes"})
    for shape in figure.shapes:
        _shape(shapes, shape)
    if figure.lines:
        lines = ET.SubElement(root, "g", {"id": "lines", "fill": "none", "stroke-linejoin": "round"})
        for line in figure.lines:
            look = {"stroke": color(line.color), "stroke-width": num(line.width)}
            ET.SubElement(lines, "polyline", {"id": line.id, "points": _points(line.points), **look})
    if figure.connectors:
        arrows = ET.SubElement(root, "g", {"id": "arrows", "fill": "none", "stroke-linejoin": "round"})
        for connector in figure.connectors:
            _connector(arrows, defs, connector)
    if figure.texts:
        texts = ET.SubElement(root, "g", {"id": "texts"})
        for k, text in enumerate(figure.texts):
            _text(texts, text, f"text{k + 1}")
    if not len(defs):
        root.remove(defs)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def color(value: Rgb) -> str:
    return "#{:02x}{:02x}{:02x}".format(*value)


def num(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _points(points: list[Point] | tuple[Point, ...]) -> str:
    return " ".join(f"{num(x)},{num(y)}" for x, y in points)


def _shape(parent: ET.Element, shape: Shape) -> None:
    group = ET.SubElement(parent, "g", {"id": shape.id, "data-shape": shape.kind})
    x0, y0, x1, y1 = shape.path
    look = {"fill": color(shape.fill)}
    if shape.outline:
        look |= {"stroke": color(shape.outline), "stroke-width": num(shape.width), "stroke-linejoin": "round"}
    rect = {"x": num(x0), "y": num(y0), "width": num(x1 - x0), "height": num(y1 - y0)}
    if shape.kind in ("ellipse", "circle"):
        x, y = shape.middle
        ET.SubElement(group, "ellipse", {"cx": num(x), "cy": num(y), "rx": num((x1 - x0) / 2), "ry": num((y1 - y0) / 2), **look})
    elif shape.kind == "cylinder":
        cap = CYLINDER_CAP * (y1 - y0) / 2
        arc = f"{num((x1 - x0) / 2)} {num(cap)} 0 0"
        top, bottom = num(y0 + cap), num(y1 - cap)
        body = f"M{num(x0)} {top} A{arc} 1 {num(x1)} {top} V{bottom} A{arc} 1 {num(x0)} {bottom} Z"
        ET.SubElement(group, "path", {"d": f"{body} M{num(x0)} {top} A{arc} 0 {num(x1)} {top}", **look})
    elif corners := shape.corners():
        ET.SubElement(group, "polygon", {"points": _points(corners), **look})
    else:
        radius = {"rx": num(max(0.0, shape.radius - shape.width / 2))} if shape.radius else {}
        ET.SubElement(group, "rect", {**rect, **radius, **look})
    for line in shape.label:
        _text(group, line)


def _text(parent: ET.Element, line: TextLine, ident: str = "") -> None:
    place = {"x": num(line.x), "y": num(line.y)}
    if line.upward:
        place = {"transform": f"translate({num(line.y)} {num(line.x)}) rotate(-90)"}
    look = {"font-size": num(line.size), "text-anchor": "middle", "fill": color(line.color)}
    text = ET.SubElement(parent, "text", {**({"id": ident} if ident else {}), **place, **look})
    text.text = line.text


def _connector(parent: ET.Element, defs: ET.Element, connector: Connector) -> None:
    points = list(connector.points)
    marks = {}
    for at, tied, name in ((-1, connector.to_target, "marker-end"), (0, connector.to_source, "marker-start")):
        if tied:
            points[at] = _shortened(points[1 if at == 0 else -2], points[at], (1 - _INTO) * connector.head[0])
            marks[name] = f"url(#{_head(defs, connector)})"
    tie = {"data-source": connector.source, "data-target": connector.target}
    look = {"stroke": color(connector.color), "stroke-width": num(connector.width)}
    if connector.dashed:
        look["stroke-dasharray"] = f"{num(3 * connector.width)} {num(2 * connector.width)}"
    ET.SubElement(parent, "polyline", {"id": connector.id, **tie, "points": _points(points), **look, **marks})


def _head(defs: ET.Element, connector: Connector) -> str:
    """The id of a head of this size and colour, made when it is the first."""
    long, wide = (max(1.0, round(value * 2) / 2) for value in connector.head)
    ident = f"head-{num(long)}-{num(wide)}-{color(connector.color)[1:]}".replace(".", "_")
    if all(marker.get("id") != ident for marker in defs):
        frame = {"markerWidth": num(long), "markerHeight": num(wide), "refX": num(_INTO * long), "refY": num(wide / 2)}
        turn = {"orient": "auto-start-reverse", "markerUnits": "userSpaceOnUse", "viewBox": f"0 0 {num(long)} {num(wide)}"}
        marker = ET.SubElement(defs, "marker", {"id": ident, **frame, **turn})
        ET.SubElement(marker, "path", {"d": f"M0 0 L{num(long)} {num(wide / 2)} L0 {num(wide)} Z", "fill": color(connector.color)})
    return ident


def _shortened(before: Point, end: Point, by: float) -> Point:
    length = math.dist(before, end)
    share = min(by, 0.8 * length) / max(length, 1e-6)
    return end[0] + (before[0] - end[0]) * share, end[1] + (before[1] - end[1]) * share
