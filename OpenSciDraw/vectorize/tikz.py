r"""The figure as TikZ: nodes with names, and edges drawn between these names, so that an arrow follows a node that is moved."""

from __future__ import annotations

import math
from statistics import median

from OpenSciDraw.vectorize.figure import CYLINDER_CAP, Connector, Point, Rgb, Shape, TextLine, VectorFigure

_TEXT_PT = 9.0  # the size that a figure's usual text gets
_WIDE_PT, _MOST_PT = 340.0, 1100.0  # the longer side of a figure without text, and of any
_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': r"\textquotedbl{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}", "-": "{-}", "[": "{[}", "]": "{]}",
}  # fmt: skip
_COMPASS = {
    "north": (0.5, 0.0), "south": (0.5, 1.0), "east": (1.0, 0.5), "west": (0.0, 0.5),
}  # fmt: skip
_NODE = {"rectangle": "rectangle", "ellipse": "ellipse", "circle": "ellipse", "diamond": "diamond"}


def escape_tex(text: str) -> str:
    """The text as TeX prints it: no character of it acts as a command."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def write_tikz(figure: VectorFigure) -> str:
    """A document of its own, whose tikzpicture can be copied into another."""
    return _Writer(figure).text()


class _Writer:
    def __init__(self, figure: VectorFigure) -> None:
        self.figure = figure
        self.pt = _scale(figure)
        colors = [figure.paper, *(c for s in figure.shapes for c in (s.fill, s.outline) if c)]
        colors += [line.color for line in figure.lines] + [way.color for way in figure.connectors]
        colors += [line.color for line in figure.all_texts()]
        self.colors = {color: f"color{k + 1}" for k, color in enumerate(dict.fromkeys(colors))}

    def text(self) -> str:
        figure = self.figure
        body = [f"\\definecolor{{{name}}}{{RGB}}{{{c[0]},{c[1]},{c[2]}}}" for c, name in self.colors.items()]
        corner = f"({figure.width},{figure.height})"
        paper = f"\\fill[{self.color(figure.paper)}] (0,0) rectangle {corner};"
        body.append(paper if figure.paper != (255, 255, 255) else f"\\path (0,0) rectangle {corner};")
        body += [line for shape in figure.shapes for line in self.shape(shape)]
        for line in figure.lines:
            points = " -- ".join(map(self.place, line.points))
            body.append(f"\\draw[{self.color(line.color)}, line width={self.pts(line.width)}, line join=round] {points};")
        body += [self.connector(connector) for connector in figure.connectors]
        body += [self.free_text(text) for text in figure.texts]
        fonts = "\\usepackage[T1]{fontenc}\n\\usepackage{textcomp}\n\\IfFileExists{lmodern.sty}{\\usepackage{lmodern}}{}\n"
        if any(ord(letter) > 255 for text in figure.all_texts() for letter in text.text):
            fonts = "\\usepackage{fontspec} % letters beyond Latin: compile with lualatex, in a font that has them\n"
        units = f"x={self.pt:.4f}pt, y=-{self.pt:.4f}pt"
        start = f"\\begin{{tikzpicture}}[{units}, every node/.style={{inner sep=0pt}}, font=\\sffamily]\n"
        return (
            "\\documentclass[tikz,border=2pt]{standalone}\n" + fonts + "\\usetikzlibrary{arrows.meta,calc,shapes.geometric}\n"
            "\\begin{document}\n" + start + "".join(f"  {line}\n" for line in body) + "\\end{tikzpicture}\n\\end{document}\n"
        )

    def color(self, color: Rgb) -> str:
        return self.colors[color]

    def pts(self, pixels: float) -> str:
        return f"{pixels * self.pt:.2f}pt"

    def place(self, point: Point) -> str:
        return f"({point[0]:.2f},{point[1]:.2f})"

    def look(self, shape: Shape) -> str:
        draw = f"draw={self.color(shape.outline)}, line width={self.pts(shape.width)}" if shape.outline else "draw=none"
        return f"fill={self.color(shape.fill)}, {draw}"

    def shape(self, shape: Shape) -> list[str]:
        x0, y0, x1, y1 = shape.path
        size = f"minimum width={self.pts(x1 - x0)}, minimum height={self.pts(y1 - y0)}"
        at = f"({shape.id}) at {self.place(shape.middle)} {{}};"
        label = self.label(shape)
        if shape.kind in _NODE or shape.kind == "rounded rectangle":
            kind = _NODE.get(shape.kind, f"rectangle, rounded corners={self.pts(max(0.0, shape.radius - shape.width / 2))}")
            return [f"\\node[{', '.join(filter(None, (kind, self.look(shape), size, label)))}] {at}"]
        # drawn along an invisible node that has its place, size and name
        node = f"\\node[outer sep=0pt, {size}] {at}"
        words = [f"\\node[{label}] at ({shape.id}.center) {{}};"] if label else []
        return [node, *(self.cylinder(shape) if shape.kind == "cylinder" else [self.polygon(shape)]), *words]

    def polygon(self, shape: Shape) -> str:
        x, y = shape.middle
        corners = " -- ".join(f"([shift={{({self.pts(a - x)},{self.pts(y - b)})}}]{shape.id}.center)" for a, b in shape.corners())
        return f"\\filldraw[{self.look(shape)}, line join=round] {corners} -- cycle;"

    def cylinder(self, shape: Shape) -> list[str]:
        x0, y0, x1, y1 = shape.path
        cap = self.pts(CYLINDER_CAP * (y1 - y0) / 2)
        radii = f"x radius={self.pts((x1 - x0) / 2)}, y radius={cap}"
        left, right = f"([yshift=-{cap}]{shape.id}.north west)", f"([yshift={cap}]{shape.id}.south east)"
        body = f"{left} arc[start angle=180, end angle=0, {radii}] -- {right} arc[start angle=0, end angle=-180, {radii}] -- cycle"
        out = [f"\\filldraw[{self.look(shape)}] {body};"]
        if shape.outline:
            lid = f"{left} arc[start angle=180, end angle=360, {radii}]"
            out.append(f"\\draw[{self.color(shape.outline)}, line width={self.pts(shape.width)}] {lid};")
        return out

    def label(self, shape: Shape) -> str:
        return ", ".join(
            f"label={{[{self.font(line)}, shift={{({self.pts(dx)},{self.pts(-dy)})}}]center:{{{escape_tex(line.text)}}}}}"
            for line in shape.label
            for dx, dy in [_off(line, shape.middle)]
        )

    def font(self, line: TextLine) -> str:
        size = line.size * self.pt
        turn = ", rotate=90" if line.upward else ""
        return f"font=\\sffamily\\fontsize{{{size:.1f}}}{{{1.2 * size:.1f}}}\\selectfont, text={self.color(line.color)}{turn}"

    def free_text(self, line: TextLine) -> str:
        x0, y0, x1, y1 = line.box
        return f"\\node[{self.font(line)}] at {self.place(((x0 + x1) / 2, (y0 + y1) / 2))} {{{escape_tex(line.text)}}};"

    def connector(self, way: Connector) -> str:
        long, wide = (self.pts(value) for value in way.head)
        head = f"{{Triangle[length={long}, width={wide}]}}"
        ends = f"{head if way.to_source else ''}-{head if way.to_target else ''}"
        kind = ", dashed" if way.dashed else ""
        look = f"{self.color(way.color)}, {ends}, line width={self.pts(way.width)}{kind}"
        start = self.end(self.figure.shape(way.source), way.points[0])
        end = self.end(self.figure.shape(way.target), way.points[-1])
        return f"\\draw[{look}] ({start}) {self.bends(way, start)} ({end});"

    def bends(self, way: Connector, start: str) -> str:
        """The way from start to end; right angles are tied to the ends, slanted bends have a place of their own."""
        points, turns = way.points, directions(way.points)
        if turns == "hv":
            return "-|"
        if turns == "vh":
            return "|-"
        if turns in ("hvh", "vhv"):
            axis, joint = ("x", "|-") if turns == "hvh" else ("y", "-|")
            away = points[1][0] - points[0][0] if axis == "x" else points[0][1] - points[1][1]
            shift = f"{axis}shift={self.pts(away)}"
            tied = start.replace("[shift=", f"[{shift}, shift=") if start.startswith("[") else f"[{shift}]{start}"
            return f"-- ({tied}) {joint}"
        return "-- " + "".join(f"{self.place(point)} -- " for point in points[1:-1]).strip() if len(points) > 2 else "--"

    def end(self, shape: Shape, point: Point) -> str:
        """An end on the shape's edge in terms of its node: a side's middle, an angle, or a shift from the node's centre."""
        x0, y0, x1, y1 = shape.box
        if shape.kind in _NODE or shape.kind == "rounded rectangle":
            for name, (u, v) in _COMPASS.items():
                aside = max(abs(point[0] - x0 - u * (x1 - x0)) / (x1 - x0), abs(point[1] - y0 - v * (y1 - y0)) / (y1 - y0))
                if aside < 0.08:
                    return f"{shape.id}.{name}"
            x, y = shape.middle
            return f"{shape.id}.{math.degrees(math.atan2(y - point[1], point[0] - x)):.1f}"
        x, y = shape.middle
        return f"[shift={{({self.pts(point[0] - x)},{self.pts(y - point[1])})}}]{shape.id}.center"


def directions(points: tuple[Point, ...]) -> str:
    """Of each piece: h level, v upright, s slanted."""
    out = ""
    for (ax, ay), (bx, by) in zip(points, points[1:], strict=False):
        across, down = abs(bx - ax), abs(by - ay)
        out += "h" if down <= 0.1 * across else "v" if across <= 0.1 * down else "s"
    return out


def _off(line: TextLine, middle: Point) -> Point:
    return (line.box[0] + line.box[2]) / 2 - middle[0], (line.box[1] + line.box[3]) / 2 - middle[1]


def _scale(figure: VectorFigure) -> float:
    """Points of TeX per pixel."""
    longer = max(figure.width, figure.height)
    texts = figure.all_texts()
    wanted = _TEXT_PT / median(line.size for line in texts) if texts else _WIDE_PT / longer
    return min(wanted, _MOST_PT / longer)
