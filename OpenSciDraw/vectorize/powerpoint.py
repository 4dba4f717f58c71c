"""The figure as a slide of PowerPoint: shapes with their text, and connectors that hang on the shapes' connection sites.

Sites are those of ECMA-376's preset shapes (presetShapeDefinitions.xml). A shape is a free form with the same outline and with
sites of its own where an arrow ends far from all of them, where PowerPoint does not have it, and where arrows end on an
ellipse or a cylinder, whose sites LibreOffice numbers otherwise than the standard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from OpenSciDraw.vectorize.figure import CYLINDER_CAP, Connector, Point, Rgb, Shape, TextLine, VectorFigure
from OpenSciDraw.vectorize.freeform import element, free_form, middles
from OpenSciDraw.vectorize.tikz import directions

_LONGER_SIDE = 10 * 914400  # EMU; there are 914400 in an inch, 12700 in a point
_POINT = 12700
_NEAR_SITE = 0.16  # of a shape's shorter side: an end may move so far to reach a site
_LEVEL = 1.5  # px: the ends of a level or upright arrow may be so far from their sites, and the arrow is straight
_FOUR = ((0.5, 0.0), (0.0, 0.5), (0.5, 1.0), (1.0, 0.5))  # top, left, bottom, right: of rectangles and diamonds
_PRESET = {"rectangle": "rect", "rounded rectangle": "roundRect", "ellipse": "ellipse", "circle": "ellipse",
           "diamond": "diamond", "cylinder": "can"}  # fmt: skip
_HEAD_SIZES = ((2.0, "sm"), (3.0, "med"), (5.0, "lg"))  # in line widths, as PowerPoint draws them
_FONT = "Arial"


def write_pptx(figure: VectorFigure) -> bytes:
    """The bytes of a .pptx with one slide of the figure's proportions, ten inches at its longer side."""
    from pptx import Presentation
    from pptx.util import Emu

    deck = Presentation()
    slide_writer = _Slide(figure)
    deck.slide_width, deck.slide_height = Emu(slide_writer.emu(figure.width)), Emu(slide_writer.emu(figure.height))
    slide_writer.fill(deck.slides.add_slide(deck.slide_layouts[6]))
    out = BytesIO()
    deck.save(out)
    return out.getvalue()


class _Slide:
    def __init__(self, figure: VectorFigure) -> None:
        self.figure = figure
        self.scale = _LONGER_SIDE / max(figure.width, figure.height)
        self.made: dict[str, Any] = {}  # id: the shape on the slide
        self.sites: dict[str, Sequence[Point]] = {}  # id: its sites as shares of its box

    def emu(self, pixels: float) -> int:
        return round(pixels * self.scale)

    def fill(self, slide: Any) -> None:
        if self.figure.paper != (255, 255, 255):
            slide.background.fill.solid()
            slide.background.fill.fore_color.rgb = _rgb(self.figure.paper)
        for shape in self.figure.shapes:
            self.shape(slide, shape)
        for line in self.figure.lines:
            builder = slide.shapes.build_freeform(*(self.emu(v) for v in line.points[0]))
            builder.add_line_segments([(self.emu(x), self.emu(y)) for x, y in line.points[1:]], close=False)
            made = builder.convert_to_shape()
            made.name, made.line.color.rgb, made.line.width = line.id, _rgb(line.color), self.emu(line.width)
            made.fill.background()
            _without_theme(made)
        for connector in self.figure.connectors:
            self.connector(slide, connector)
        for k, text in enumerate(self.figure.texts):
            self.text_box(slide, [text], f"text{k + 1}")

    # -- shapes
    def shape(self, slide: Any, shape: Shape) -> None:
        from pptx.enum.shapes import MSO_SHAPE

        x0, y0, x1, y1 = shape.path
        box = [self.emu(v) for v in (x0, y0, x1 - x0, y1 - y0)]
        preset = _PRESET.get(shape.kind)
        ends = self.ends_at(shape)
        kinds = {"rect": MSO_SHAPE.RECTANGLE, "roundRect": MSO_SHAPE.ROUNDED_RECTANGLE, "ellipse": MSO_SHAPE.OVAL,
                 "diamond": MSO_SHAPE.DIAMOND, "can": MSO_SHAPE.CAN}  # fmt: skip
        short = min(x1 - x0, y1 - y0)
        numbered_alike = preset not in ("ellipse", "can") or not ends
        if preset and numbered_alike and all(self.nearest(shape, _FOUR, end)[1] <= _NEAR_SITE * short for end in ends):
            made = slide.shapes.add_shape(kinds[preset], *box)
            self.sites[shape.id] = _FOUR
            if preset == "roundRect":
                made.adjustments[0] = min(0.5, max(0.0, shape.radius - shape.width / 2) / short)
            elif preset == "can":
                made.adjustments[0] = min(0.5, CYLINDER_CAP * (y1 - y0) / short)
        else:
            made = slide.shapes.add_shape(MSO_SHAPE.RECTANGLE, *box)
            sides = middles(shape)  # first, as in a rectangle: some programs know no more than four sites
            sites = [*sides, *(end for end in ends if min(math.dist(end, at) for at in sides) > _NEAR_SITE * short)]
            self.sites[shape.id] = [((x - x0) / (x1 - x0), (y - y0) / (y1 - y0)) for x, y in sites]
            free_form(made, shape, self.sites[shape.id], (box[2], box[3]))
        made.name = shape.id
        _without_theme(made)
        made.fill.solid()
        made.fill.fore_color.rgb = _rgb(shape.fill)
        if shape.outline:
            made.line.color.rgb, made.line.width = _rgb(shape.outline), self.emu(shape.width)
        else:
            made.line.fill.background()
        self.made[shape.id] = made
        self.label(slide, made, shape)

    def label(self, slide: Any, made: Any, shape: Shape) -> None:
        """Text in the shape where it stands in its middle, otherwise a text box of its own."""
        if not shape.label:
            return
        x0, y0, x1, y1 = (f(line.box[i] for line in shape.label) for i, f in enumerate((min, min, max, max)))
        x, y = shape.middle
        away = max(abs((x0 + x1) / 2 - x) / (shape.box[2] - shape.box[0]), abs((y0 + y1) / 2 - y) / (shape.box[3] - shape.box[1]))
        if away > 0.2 or any(line.upward for line in shape.label):
            for k, line in enumerate(shape.label):
                self.text_box(slide, [line], f"{shape.id}-text{k + 1}")
        else:
            self.write(made.text_frame, shape.label)

    def text_box(self, slide: Any, lines: Sequence[TextLine], name: str) -> None:
        line = lines[0]
        x0, y0, x1, y1 = line.box
        x, y, wide, high = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
        if line.upward:
            wide, high = high, wide
        wide, high = 1.1 * wide + line.size, max(high, 1.25 * line.size)
        made = slide.shapes.add_textbox(*(self.emu(v) for v in (x - wide / 2, y - high / 2, wide, high)))
        made.name, made.rotation = name, -90.0 if line.upward else 0.0
        self.write(made.text_frame, lines)

    def write(self, frame: Any, lines: Sequence[TextLine]) -> None:
        from pptx.enum.text import MSO_ANCHOR, PP_ALIGN
        from pptx.util import Emu

        frame.margin_left = frame.margin_right = frame.margin_top = frame.margin_bottom = 0
        frame.word_wrap, frame.vertical_anchor = False, MSO_ANCHOR.MIDDLE
        for k, line in enumerate(lines):
            paragraph = frame.paragraphs[0] if k == 0 else frame.add_paragraph()
            paragraph.alignment = PP_ALIGN.CENTER
            run = paragraph.add_run()
            run.text = line.text
            run.font.size = Emu(max(_POINT, round(self.emu(line.size) / (_POINT / 2)) * (_POINT // 2)))  # half points
            run.font.name, run.font.color.rgb = _FONT, _rgb(line.color)

    def ends_at(self, shape: Shape) -> list[Point]:
        """Where connectors end on a shape."""
        ways = self.figure.connectors
        return [w.points[0] for w in ways if w.source == shape.id] + [w.points[-1] for w in ways if w.target == shape.id]

    def nearest(self, shape: Shape, sites: Sequence[Point], point: Point) -> tuple[int, float]:
        """The number of the nearest site, and how far it is in px."""
        away = [math.dist(point, _at(shape, site)) for site in sites]
        best = min(range(len(sites)), key=lambda k: away[k])
        return best, away[best]

    # -- connectors
    def connector(self, slide: Any, way: Connector) -> None:
        from pptx.enum.dml import MSO_LINE
        from pptx.enum.shapes import MSO_CONNECTOR

        source, target = self.figure.shape(way.source), self.figure.shape(way.target)
        first, last = (
            self.nearest(shape, self.sites[shape.id], end)[0]
            for shape, end in ((source, way.points[0]), (target, way.points[-1]))
        )
        start, end = _at(source, self.sites[source.id][first]), _at(target, self.sites[target.id][last])
        for axis, turn in ((1, "h"), (0, "v")):  # boxes are a pixel off each other, the arrow between them is not slanted
            if directions(way.points) == turn and abs(start[axis] - end[axis]) <= _LEVEL:
                start, end = (_moved(at, axis, way.points[0][axis]) for at in (start, end))
        made = slide.shapes.add_connector(MSO_CONNECTOR.STRAIGHT, *(self.emu(v) for v in (*start, *end)))
        # python-pptx knows a rectangle's four sites; the number and the place of others are set after it
        made.begin_connect(self.made[source.id], 0)
        made.end_connect(self.made[target.id], 0)
        ties = made.element.nvCxnSpPr.cNvCxnSpPr
        ties.stCxn.idx, ties.endCxn.idx = first, last
        self.lay(made, way, start, end)
        made.name = way.id
        _without_theme(made)
        made.line.color.rgb, made.line.width = _rgb(way.color), self.emu(way.width)
        if way.dashed:
            made.line.dash_style = MSO_LINE.DASH
        _heads(made, way)

    def lay(self, made: Any, way: Connector, start: Point, end: Point) -> None:
        """The connector's geometry: straight, or bent at right angles, turned and mirrored as its bends ask for."""
        turns = directions(way.points)
        bent = {"hv": "bentConnector2", "vh": "bentConnector2", "hvh": "bentConnector3", "vhv": "bentConnector3"}.get(turns)
        dx, dy = end[0] - start[0], end[1] - start[1]
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        wide, high, upright = abs(dx), abs(dy), bent is not None and turns[0] == "v"
        if upright:  # a quarter turn of one that begins level
            wide, high = high, wide
        frame = made.element.spPr.get_or_add_xfrm()
        mirrored = (dy < 0, dx > 0) if upright else (dx < 0, dy < 0)
        for key, value in zip(("flipH", "flipV"), mirrored, strict=True):
            frame.attrib.pop(key, None)
            if value:
                frame.set(key, "1")
        frame.set("rot", "5400000") if upright else frame.attrib.pop("rot", None)
        frame.off.x, frame.off.y = self.emu(x - wide / 2), self.emu(y - high / 2)
        frame.ext.cx, frame.ext.cy = self.emu(wide), self.emu(high)
        geometry = made.element.spPr.prstGeom
        geometry.set("prst", bent or "straightConnector1")
        if bent == "bentConnector3":
            axis = int(upright)
            span = self.emu(end[axis]) - self.emu(start[axis])
            if abs(span) < _POINT:  # there and back: the share of nothing is none
                span = _POINT * (-1 if mirrored[0] else 1)
                frame.ext.cx = _POINT
            share = round(100000 * (self.emu(way.points[1][axis]) - self.emu(start[axis])) / span)
            made.element.spPr.prstGeom.get_or_add_avLst().append(element("a:gd", name="adj1", fmla=f"val {share}"))


def _at(shape: Shape, site: Point) -> Point:
    x0, y0, x1, y1 = shape.path
    return x0 + site[0] * (x1 - x0), y0 + site[1] * (y1 - y0)


def _moved(point: Point, axis: int, to: float) -> Point:
    return (to, point[1]) if axis == 0 else (point[0], to)


def _rgb(color: Rgb) -> Any:
    from pptx.dml.color import RGBColor

    return RGBColor(*color)


def _without_theme(made: Any) -> None:
    """Take off the theme's style: its shadows and colours are not in the picture."""
    for style in made.element.findall(f"{{{made.element.nsmap['p']}}}style"):
        made.element.remove(style)


def _heads(made: Any, way: Connector) -> None:
    """Filled triangles; of PowerPoint's three sizes the nearest."""
    line = made.line._get_or_add_ln()
    for tag, there in (("a:headEnd", way.to_source), ("a:tailEnd", way.to_target)):
        if there:
            long, wide = (min(_HEAD_SIZES, key=lambda size: abs(size[0] - v / way.width))[1] for v in way.head)
            line.append(element(tag, type="triangle", w=wide, len=long))
