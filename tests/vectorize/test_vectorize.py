"""Editable figures: what was read is kept, texts are texts, arrows are tied, and the command says how much it read."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2", reason="the extra 'vectorize' is not installed")
pytest.importorskip("resvg_py", reason="the extra 'vectorize' is not installed")
pytest.importorskip("pptx", reason="the extra 'vectorize' is not installed")

import pptx

from OpenSciDraw import cli
from OpenSciDraw.drawn.figure import DrawnFigure, draw_figure
from OpenSciDraw.evaluation.structure import pair_parts, score_structure
from OpenSciDraw.reading.figure import ReadComponent
from OpenSciDraw.vectorize.figure import Connector, Point, Shape, TextLine, VectorFigure
from OpenSciDraw.vectorize.labels import has_ocr, placed
from OpenSciDraw.vectorize.powerpoint import write_pptx
from OpenSciDraw.vectorize.render import draw, share_of
from OpenSciDraw.vectorize.routes import line_width, route, simplified
from OpenSciDraw.vectorize.svg import write_svg
from OpenSciDraw.vectorize.tikz import escape_tex, write_tikz
from OpenSciDraw.vectorize.trace import trace

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</text><script>&\"' \\input{/etc/passwd} $x_1^2$ 50% #~[]"


@pytest.fixture(scope="module")
def traced() -> list[tuple[DrawnFigure, VectorFigure]]:
    figures = [draw_figure(41, index, 128, "diagram", style="small") for index in range(7)]
    figures += [draw_figure(41, 0, 128, style="house"), draw_figure(41, 3, 256, "tree")]
    return [(figure, trace(figure.image, ocr=False)) for figure in figures]


def by_hand(points: tuple[Point, ...], source: str = "rectangle", text: str = "A") -> VectorFigure:
    """Two shapes, the second with a text, and a connector along `points`."""
    label = (TextLine(text, 150.0, 155.0, 14.0, (10, 20, 30), (140.0, 145.0, 160.0, 155.0), "glyphs"),)
    shapes = [
        Shape("box1", source, (20, 20, 80, 60), (208, 226, 248), (52, 104, 172), 2.0, 8.0),
        Shape("box2-a", "rectangle", (120, 130, 180, 170), (250, 206, 202), None, 0.0, 0.0, label),
    ]
    way = Connector("arrow-1", "box1", "box2-a", points, (32, 32, 32), 2.0, (8.0, 6.0), True, False)
    return VectorFigure(200, 200, (255, 255, 255), shapes, [way])


def slide_of(figure: VectorFigure) -> tuple[dict[str, object], float]:
    """Shapes of the written slide by name, and EMU per pixel."""
    deck = pptx.Presentation(BytesIO(write_pptx(figure)))
    return {shape.name: shape for shape in deck.slides[0].shapes}, deck.slide_width / figure.width


def test_redrawn_figures_read_as_their_originals_do(traced: list[tuple[DrawnFigure, VectorFigure]]) -> None:
    hits, totals = dict[str, float](), dict[str, float]()
    for drawn, figure in traced:
        again = draw(figure)
        assert share_of(drawn.image, again, figure).explained > 0.85
        about = SimpleNamespace(truth=drawn.truth, width=drawn.image.width, height=drawn.image.height)
        for name, (hit, total) in score_structure(again, about).items():
            hits[name] = hits.get(name, 0) + hit
            totals[name] = totals.get(name, 0) + total
    scores = {name: hits[name] / totals[name] for name in totals}
    assert scores["components"] >= 0.97 and scores["arrows"] >= 0.94 and scores["one_letter_labels"] >= 0.9, scores


def test_places_colours_kinds_and_widths_are_those_of_the_figure(traced: list[tuple[DrawnFigure, VectorFigure]]) -> None:
    for drawn, figure in traced[:7]:
        parts = drawn.truth["components"]
        found = [ReadComponent(s.kind, "", "".join(line.text for line in s.label), s.box) for s in figure.shapes]
        pairs = pair_parts(parts, found, 128)
        assert len(pairs) == len(parts) == len(found)
        for i, k in pairs.items():
            shape = figure.shapes[k]
            assert np.abs(np.array(shape.box) - parts[i]["box"]).max() <= 2, (shape, parts[i])
            assert np.abs(np.array(shape.fill) - parts[i]["fill"]).max() <= 4
            assert shape.kind == parts[i]["shape"] and shape.outline is not None and 1.4 <= shape.width <= 2.6
        for way in figure.connectors:
            assert 1.4 <= way.width <= 2.6 and 6 <= way.head[0] <= 11 and max(way.color) < 60


def test_arrows_keep_their_bends_and_end_on_their_shapes(traced: list[tuple[DrawnFigure, VectorFigure]]) -> None:
    bends = 0
    for drawn, figure in traced[:7]:
        true = sorted(len(arrow["points"]) for arrow in drawn.truth["arrows"])
        assert sorted(len(way.points) for way in figure.connectors) == true
        bends += sum(count > 2 for count in true)
        ends = [np.array(arrow["points"], float)[[0, -1]] for arrow in drawn.truth["arrows"]]
        for way in figure.connectors:
            own = np.array(way.points)[[0, -1]]
            assert min(np.abs(own - other).max() for other in ends) < 2.5
    assert bends >= 2


def test_svg_says_what_arrows_join_and_keeps_text_as_text(traced: list[tuple[DrawnFigure, VectorFigure]]) -> None:
    for drawn, figure in traced[:3]:
        root = ET.fromstring(write_svg(figure))
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids))
        arrows = root.findall(f".//{SVG}polyline")
        assert len(arrows) == len(figure.connectors)
        for arrow in arrows:
            assert arrow.get("data-source") in ids and arrow.get("data-target") in ids
            assert re.fullmatch(r"url\(#(.+)\)", arrow.get("marker-end", ""))[1] in ids  # type: ignore[index]
        assert {text.text for text in root.iter(f"{SVG}text")} == {part["label"] for part in drawn.truth["components"]}


def test_texts_of_strangers_stay_texts() -> None:
    figure = by_hand(((80, 40), (150, 40), (150, 130)), text=HOSTILE)
    root = ET.fromstring(write_svg(figure))
    assert [text.text for text in root.iter(f"{SVG}text")] == [HOSTILE] and not list(root.iter(f"{SVG}script"))
    shapes, _ = slide_of(figure)
    assert shapes["box2-a"].text_frame.text == HOSTILE  # type: ignore[attr-defined]
    latex = pytest.importorskip("pylatexenc.latexwalker", reason="the extra 'prepare' is not installed")
    nodes = latex.LatexWalker(escape_tex(HOSTILE)).get_latex_nodes()[0]
    macros = {node.macroname for node in nodes if node.isNodeType(latex.LatexMacroNode)}
    assert "input" not in macros and {"$", "%", "textbackslash"} <= macros
    assert not [node for node in nodes if node.isNodeType(latex.LatexMathNode) or node.isNodeType(latex.LatexCommentNode)]


def test_tikz_draws_edges_between_names_of_nodes(traced: list[tuple[DrawnFigure, VectorFigure]]) -> None:
    for _, figure in traced:
        text = write_tikz(figure)
        nodes = set(re.findall(r"\\node\[.*\] \(([\w-]+)\) at", text))
        assert nodes == {shape.id for shape in figure.shapes}
        edges = [line for line in text.splitlines() if "Triangle" in line or re.search(r"\\draw\[.*, -, ", line)]
        assert len(edges) == len(figure.connectors)
        for line, way in zip(edges, figure.connectors, strict=True):
            named = re.findall(r"[(\]]([\w-]+)\.[\w.-]+\)", line)
            assert named[0] == way.source and named[-1] == way.target
        for opening, closing in ("{}", "[]"):
            assert text.count(opening) == text.count(closing)


def path_of(connector: object) -> list[Point]:
    """The points of a connector's preset (ECMA-376) in EMU, with its frame's mirroring and quarter turns."""
    shape = connector.element.spPr  # type: ignore[attr-defined]
    frame, kind = shape.xfrm, shape.prstGeom.get("prst")
    wide, high = int(frame.ext.cx), int(frame.ext.cy)
    guides = shape.prstGeom.avLst.findall(f"{{{shape.nsmap['a']}}}gd") if shape.prstGeom.avLst is not None else []
    x1 = int(guides[0].get("fmla").split()[1]) / 100000 * wide if guides else wide / 2
    points: list[Point] = {
        "straightConnector1": [(0, 0), (wide, high)],
        "bentConnector2": [(0, 0), (wide, 0), (wide, high)],
        "bentConnector3": [(0, 0), (x1, 0), (x1, high), (wide, high)],
    }[kind]
    turn = math.radians(int(frame.get("rot", "0")) / 60000)
    out = []
    for x, y in points:
        u = (wide - x if frame.get("flipH") == "1" else x) - wide / 2
        v = (high - y if frame.get("flipV") == "1" else y) - high / 2
        across, down = u * math.cos(turn) - v * math.sin(turn), u * math.sin(turn) + v * math.cos(turn)
        out.append((int(frame.off.x) + wide / 2 + across, int(frame.off.y) + high / 2 + down))
    return out


def test_a_stroke_too_short_to_be_measured_is_still_a_line() -> None:
    dot = np.zeros((20, 20), np.uint8)
    dot[8:10, 8:10] = 1
    start, end = np.array([8.0, 8.0]), np.array([8.2, 8.1])
    path = route(dot, start, end)
    assert path.shape == (2, 2) and simplified(path, 4.0).shape == (2, 2)
    assert line_width(np.full((20, 20, 3), 255.0), path, np.zeros(3)) > 0


BENDS: dict[str, tuple[Point, ...]] = {
    "straight": ((80, 40), (120, 150)), "one bend, level first": ((80, 40), (150, 40), (150, 130)),
    "one bend, upright first": ((50, 60), (50, 150), (120, 150)),
    "two bends, level first": ((80, 40), (100, 40), (100, 150), (120, 150)),
    "two bends, upright first": ((50, 60), (50, 90), (150, 90), (150, 130)),
    "there and back": ((80, 40), (195, 40), (195, 150), (180, 150)),
}  # fmt: skip


@pytest.mark.parametrize("name", BENDS)
@pytest.mark.parametrize("mirrored", [(False, False), (True, False), (False, True), (True, True)])
def test_a_slides_connectors_hang_on_sites_and_bend_as_drawn(name: str, mirrored: tuple[bool, bool]) -> None:
    figure = by_hand(BENDS[name])

    def mirror(point: Point) -> Point:
        return (200 - point[0] if mirrored[0] else point[0]), (200 - point[1] if mirrored[1] else point[1])

    for k, shape in enumerate(figure.shapes):
        (ax, ay), (bx, by) = mirror((shape.box[0], shape.box[1])), mirror((shape.box[2], shape.box[3]))
        box = (min(ax, bx), min(ay, by), max(ax, bx), max(ay, by))
        figure.shapes[k] = Shape(shape.id, shape.kind, box, shape.fill, shape.outline, shape.width, shape.radius)
    points = tuple(mirror(point) for point in BENDS[name])
    way = figure.connectors[0]
    figure.connectors[0] = Connector(way.id, way.source, way.target, points, way.color, 2.0, way.head, True, False)
    shapes, scale = slide_of(figure)
    made = shapes["arrow-1"]
    ties = made.element.nvCxnSpPr.cNvCxnSpPr  # type: ignore[attr-defined]
    assert ties.stCxn.id == shapes["box1"].shape_id and ties.endCxn.id == shapes["box2-a"].shape_id  # type: ignore[attr-defined]
    drawn = np.array(path_of(made)) / scale
    assert drawn.shape == (len(points), 2) and np.abs(drawn - points).max() < 1.6, (drawn, points)
    heads = {child.tag.rpartition("}")[2] for child in made.line._ln}  # type: ignore[attr-defined]
    assert "tailEnd" in heads and "headEnd" not in heads


def test_an_arrow_off_all_sites_gets_a_site_of_its_own() -> None:
    figure = by_hand(((80, 27), (150, 130)))
    shapes, scale = slide_of(figure)
    box = shapes["box1"].element.spPr  # type: ignore[attr-defined]
    space = {"a": box.nsmap["a"]}
    sites = [(int(at.get("x")) / scale + 21, int(at.get("y")) / scale + 21) for at in box.findall(".//a:cxn/a:pos", space)]
    tie = shapes["arrow-1"].element.nvCxnSpPr.cNvCxnSpPr.stCxn  # type: ignore[attr-defined]
    assert math.dist(sites[tie.idx], (80, 27)) < 1.1 and box.prstGeom is None
    ellipse, _ = slide_of(by_hand(((80, 40), (150, 130)), "ellipse"))
    assert ellipse["box1"].element.spPr.find(".//a:arcTo", space) is not None  # type: ignore[attr-defined]


def test_the_command_writes_files_that_open_and_says_how_much_it_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_figure(41, 1, 128, "diagram", style="small").image.save(tmp_path / "a.png")
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    out = tmp_path / "out"
    given = ["vectorize", str(tmp_path / "a.png"), str(tmp_path / "photo.png"), "--out", str(out), "--compare"]
    assert cli.main(given) == 0
    said = capsys.readouterr().out
    assert ("No OCR is installed" in said) == (not has_ocr())
    assert re.search(r"a\.png: \d shapes, .*; explains (9\d|100)% of the ink", said)
    assert re.search(r"photo\.png: .*explains \d+% of the ink: this is no diagram", said)
    assert {file.name for file in out.iterdir()} == {
        f"{name}.{kind}" for name in ("a", "photo") for kind in ("svg", "tex", "pptx", "compare.png")
    }
    assert cli.main(["vectorize", str(tmp_path / "a.png"), "--format", "svg", "--json"]) == 0
    line = json.loads([line for line in capsys.readouterr().out.splitlines() if line.startswith("{")][-1])
    assert line["explained"] > 0.9 and line["files"] == [str(tmp_path / "a.svg")]


def test_text_that_reads_upwards_is_turned_in_every_format() -> None:
    line = placed("Energy", (20.0, 40.0, 32.0, 100.0), (0, 0, 0), "ocr")
    assert line.upward and line.x == 70 and 20 < line.y < 33 and 8 < line.size < 20
    figure = VectorFigure(200, 200, (255, 255, 255), texts=[line])
    ink = np.nonzero(np.asarray(draw(figure).convert("L")) < 128)
    box = (ink[1].min(), ink[0].min(), ink[1].max(), ink[0].max())
    assert abs(box[0] - 20) < 2 and abs(box[2] - 32) < 2 and abs((box[1] + box[3]) / 2 - 70) < 2, box
    assert "rotate=90" in write_tikz(figure)
    shapes, _ = slide_of(figure)
    assert shapes["text1"].rotation % 360 == 270  # type: ignore[attr-defined]


def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_text("no picture")
    Image.new("RGB", (8, 40)).save(tmp_path / "small.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:6000])
    Image.new("RGB", (40, 40)).save(tmp_path / "b.png")
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "sub" / "b.png")
    for words, reason in (
        ([str(tmp_path / "none.png")], "no such file"), ([str(tmp_path / "a.png")], "not a picture"),
        ([str(tmp_path / "small.png")], "8 x 40 px"), ([str(tmp_path / "b.png"), "--format", "svg,dxf"], "no format 'dxf'"),
        ([str(tmp_path / "b.png"), str(tmp_path / "sub" / "b.png"), "--out", str(tmp_path)], "one name"),
        ([str(tmp_path / "cut.png")], "not a picture"),
    ):  # fmt: skip
        assert cli.main(["vectorize", *words]) == 2
        assert reason in capsys.readouterr().err
