"""The program's own figures: a pure function of their arguments, with true boxes, labels, arrows and captions."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from OpenSciDraw.drawn import house as drawn_house
from OpenSciDraw.drawn import small as drawn_small
from OpenSciDraw.drawn.figure import KINDS, DrawnFigure, draw_figure, iter_figures
from OpenSciDraw.drawn.folders import write_drawn_figures
from OpenSciDraw.errors import UserError

DIAGRAMS = ("pipeline", "flowchart", "method", "network", "graph", "tree")
Box = list[int]


@pytest.fixture(scope="module")
def figures() -> list[DrawnFigure]:
    """300 rich figures of three sizes and all kinds, and 80 of each small style."""
    rich = [draw_figure(5, i, (128, 256, 400)[i % 3], KINDS[i % len(KINDS)]) for i in range(300)]
    return rich + [draw_figure(5, i, 128, style=style) for style in ("small", "house") for i in range(80)]


def fingerprint(figure: DrawnFigure) -> str:
    digest = hashlib.sha256(figure.image.tobytes())
    digest.update(json.dumps([figure.id, figure.caption, figure.truth]).encode())
    return digest.hexdigest()


def overlap(a: Box, b: Box) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def encloses(outer: Box, inner: Box) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and outer[2] >= inner[2] and outer[3] >= inner[3]


def ink(figure: DrawnFigure, x: float, y: float, radius: int) -> int:
    """How many pixels about a point are dark, as arrows are (outlines and text may be dark as well)."""
    x0, y0 = max(0, round(x) - radius), max(0, round(y) - radius)
    box = (x0, y0, min(figure.image.width, round(x) + radius + 1), min(figure.image.height, round(y) + radius + 1))
    return sum(figure.image.crop(box).convert("L").histogram()[:110])


def test_every_kind_is_drawn_at_every_size() -> None:
    for kind in KINDS:
        for size in (96, 128, 256, 512, 1024):
            figure = draw_figure(1, 3, size, kind)
            width, height = figure.image.size
            assert figure.image.mode == "RGB" and figure.truth["kind"] == kind
            assert (figure.truth["width"], figure.truth["height"]) == (width, height)
            assert 0.85 < width * height / size**2 < 1.15, (kind, size, width, height)


def test_asked_for_width_and_height_are_given() -> None:
    for kind in KINDS:
        assert draw_figure(0, 0, kind=kind, width=320, height=192).image.size == (320, 192)


def test_the_sequence_mixes_kinds_and_aspect_ratios() -> None:
    drawn = list(iter_figures(120, seed=2, size=128))
    assert {f.truth["kind"] for f in drawn} == set(KINDS)
    assert len({f.image.size for f in drawn}) >= 5
    assert [f.id for f in drawn[:2]] == ["drawn-2-0000000", "drawn-2-0000001"]
    assert len({f.caption for f in drawn}) == len(drawn)


def test_a_figure_is_a_pure_function_of_its_arguments() -> None:
    here = [fingerprint(draw_figure(4, i)) for i in range(20)]
    assert here[::-1] == [fingerprint(draw_figure(4, i)) for i in reversed(range(20))]
    assert fingerprint(draw_figure(5, 0)) != here[0]


def test_a_second_process_draws_the_same_figures() -> None:
    code = (
        "from tests.drawn.test_drawn import fingerprint\nfrom OpenSciDraw.drawn.figure import draw_figure\n"
        "print(*(fingerprint(draw_figure(4, i)) for i in range(20)))"
    )
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [fingerprint(draw_figure(4, i)) for i in range(20)]


def test_boxes_lie_inside_the_picture(figures: list[DrawnFigure]) -> None:
    for figure in figures:
        canvas = [0, 0, *figure.image.size]
        for part in [*figure.truth["components"], *figure.truth["labels"]]:
            box = part["box"]
            assert box[0] < box[2] and box[1] < box[3] and encloses(canvas, box), (figure.id, part)


def test_labels_do_not_overlap_and_keep_to_their_component(figures: list[DrawnFigure]) -> None:
    for figure in figures:
        labels, parts = figure.truth["labels"], figure.truth["components"]
        for i, label in enumerate(labels):
            for other in labels[:i]:
                assert not overlap(label["box"], other["box"]), (figure.id, figure.truth["kind"], label, other)
            if label["role"] in ("component", "container"):
                assert any(p["label"] == label["text"] and encloses(p["box"], label["box"]) for p in parts), label


def test_nodes_do_not_overlap(figures: list[DrawnFigure]) -> None:
    for figure in figures:
        nodes = [p for p in figure.truth["components"] if p["shape"] != "container"]
        for i, node in enumerate(nodes):
            # neighbouring bars share an edge
            assert figure.truth["kind"] == "bar" or not any(overlap(node["box"], n["box"]) for n in nodes[:i]), (
                figure.id
            )


def test_boxes_of_text_hold_ink_to_their_edges(figures: list[DrawnFigure]) -> None:
    """A label's box is the text's own: dark pixels within a pixel of its left and right edge."""
    for figure in figures[:100]:
        for label in figure.truth["labels"]:
            x0, y0, x1, y1 = label["box"]
            grey = figure.image.convert("L")
            for strip in ((x0, y0, min(x0 + 2, x1), y1), (max(x1 - 2, x0), y0, x1, y1)):
                low, high = grey.crop(strip).getextrema()
                assert low < high or low < 150, (figure.id, label)  # type: ignore[operator]


def test_components_show_their_fill_and_white_surrounds_them(figures: list[DrawnFigure]) -> None:
    for figure in figures:
        pixels = np.asarray(figure.image)
        for part in figure.truth["components"]:
            x0, y0, x1, y1 = part["box"]
            share = (pixels[y0:y1, x0:x1] == part["fill"]).all(axis=-1).mean()
            assert share > 0.12, (figure.id, part)
        white = (pixels == 255).all(axis=-1)
        assert white[0, 0] and white[0, -1] and white[-1, 0] and white[-1, -1] and white.mean() > 0.1, figure.id


def test_captions_of_diagrams_quote_every_label(figures: list[DrawnFigure]) -> None:
    for figure in figures:
        for label in figure.truth["labels"]:
            if label["role"] not in ("tick", "legend"):
                assert f"'{label['text']}'" in figure.caption, (figure.id, label, figure.caption)


def test_captions_of_plots_quote_axes_and_series(figures: list[DrawnFigure]) -> None:
    for figure in figures:
        plot: dict[str, Any] | None = figure.truth.get("plot")
        if plot:
            words = [plot["x_label"], plot["y_label"], plot["title"], *(s["name"] for s in plot["series"])]
            assert all(f"'{w}'" in figure.caption for w in words if w), figure.caption
            shown = {label["text"] for label in figure.truth["labels"]}
            assert all(w in shown for w in words if w), figure.id


def test_captions_name_every_arrow(figures: list[DrawnFigure]) -> None:
    for figure in figures:
        if figure.truth["kind"] == "network":
            continue  # its circles have no names; the caption tells the rule
        names = {p["id"]: p["label"] for p in figure.truth["components"]}
        for arrow in figure.truth["arrows"]:
            joint = "to" if arrow["directed"] else "with"
            assert f"'{names[arrow['source']]}' {joint} '{names[arrow['target']]}'" in figure.caption, figure.caption


def test_arrows_end_at_their_components_with_the_head_at_the_target(figures: list[DrawnFigure]) -> None:
    heads = 0
    for figure in figures:
        boxes = {p["id"]: p["box"] for p in figure.truth["components"]}
        for arrow in figure.truth["arrows"]:
            for end, (x, y) in (("source", arrow["points"][0]), ("target", arrow["points"][-1])):
                box = boxes[arrow[end]]
                assert encloses([box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1], [x, y, x, y]), (figure.id, arrow)
            ends = [tuple(p) for a in figure.truth["arrows"] for p in (a["points"][0], a["points"][-1])]
            shared = any(ends.count(tuple(arrow["points"][k])) > 1 for k in (0, -1))
            if not arrow["directed"] or figure.truth["kind"] in ("network", "graph") or shared:
                continue  # where lines meet, the ink is not of one arrow
            (ax, ay), (bx, by) = arrow["points"][-2:]
            (cx, cy), (dx, dy) = arrow["points"][:2]
            length, first = math.hypot(bx - ax, by - ay), math.hypot(dx - cx, dy - cy)
            step = min(4.0, length / 2)
            tip = ink(figure, bx - (bx - ax) / length * step, by - (by - ay) / length * step, 2)
            tail = ink(figure, cx + (dx - cx) / first * step, cy + (dy - cy) / first * step, 2)
            heads += 1
            assert tip > tail, (figure.id, arrow, tip, tail)
    assert heads > 300


def test_arrows_run_around_other_nodes(figures: list[DrawnFigure]) -> None:
    for figure in figures:
        parts = [p for p in figure.truth["components"] if p["shape"] != "container"]
        for arrow in figure.truth["arrows"]:
            others = [p for p in parts if p["id"] not in (arrow["source"], arrow["target"])]
            for (ax, ay), (bx, by) in zip(arrow["points"], arrow["points"][1:], strict=False):
                for k in range(31):
                    x, y = ax + (bx - ax) * k / 30, ay + (by - ay) * k / 30
                    assert not any(_inside(p, x, y) for p in others), (figure.id, figure.truth["kind"], arrow)


def _inside(part: dict[str, Any], x: float, y: float) -> bool:
    x0, y0, x1, y1 = part["box"]
    if part["shape"] in ("circle", "ellipse"):
        u, v = (2 * x - x0 - x1) / (x1 - x0), (2 * y - y0 - y1) / (y1 - y0)
        return bool(u * u + v * v < 1)
    return bool(x0 < x < x1 and y0 < y < y1)


def test_a_container_holds_the_nodes_that_its_caption_names() -> None:
    for i in range(30):
        figure = draw_figure(6, i, 256, "method")
        box, *nodes = figure.truth["components"]
        named = figure.caption.split(f"'{box['label']}' encloses ")[1].split(".")[0]
        held = [f"'{n['label']}'" for n in nodes if encloses(box["box"], n["box"])]
        assert len(held) >= 2 and all(h in named for h in held) and named.count("'") == 2 * len(held), figure.caption


def test_tables_tell_their_best_rows() -> None:
    for i in range(20):
        figure = draw_figure(6, i, 256, "table")
        table = figure.truth["table"]
        for m, best in table["best"].items():
            column = table["columns"].index(m) - 1
            values = {row["name"]: float(row["values"][column]) for row in table["rows"]}
            assert values[best] in (max(values.values()), min(values.values()))
            assert f"'{best}' has the best value of '{m}'" in figure.caption


def test_a_folder_holds_pictures_captions_and_one_truth_file(tmp_path: Path) -> None:
    write_drawn_figures(tmp_path / "figures", 4, seed=9, size=128)
    names = sorted(p.name for p in (tmp_path / "figures").iterdir())
    ids = [f"drawn-9-{i:07d}" for i in range(4)]
    assert names == sorted([*(f"{i}.png" for i in ids), *(f"{i}.txt" for i in ids), "truth.jsonl"])
    lines = [json.loads(line) for line in (tmp_path / "figures" / "truth.jsonl").read_text().splitlines()]
    expected = [draw_figure(9, i, 128) for i in range(4)]
    assert lines == [{"id": f.id, **json.loads(json.dumps(f.truth))} for f in expected]
    assert (tmp_path / "figures" / f"{ids[2]}.txt").read_text() == expected[2].caption + "\n"


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="pie.*pipeline"):
        draw_figure(0, 0, kind="pie")
    with pytest.raises(UserError, match="size 32 px.*96 to 4096"):
        draw_figure(0, 0, 32)


def test_drawing_is_fast_enough_to_feed_training() -> None:
    """Measured 400 a second on one core; a loaded test machine is given a wide margin."""
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        for i in range(60):
            draw_figure(8, i, 256)
        rates.append(60 / (time.perf_counter() - start))
    assert max(rates) >= 50, rates


def test_the_small_styles_say_all_that_they_show() -> None:
    for style, shapes in (("small", drawn_small.SHAPES), ("house", drawn_house.SHAPES)):
        for index in range(60):
            figure = draw_figure(3, index, 128, style=style)
            assert figure.image.size == (128, 128)
            for part in figure.truth["components"]:
                if figure.truth["kind"] == "diagram":
                    assert part["shape"] in shapes
                    assert f"{part['color']} {part['shape']} labelled '{part['label']}'" in figure.caption
            for arrow in figure.truth["arrows"]:
                names = {part["id"]: part["label"] for part in figure.truth["components"]}
                assert f"'{names[arrow['source']]}' to '{names[arrow['target']]}'" in figure.caption


def test_the_house_style_has_colours_and_a_shape_that_the_small_style_lacks() -> None:
    assert not set(drawn_house.COLORS) & set(drawn_small.COLORS)
    assert set(drawn_house.SHAPES) - set(drawn_small.SHAPES) == {"hexagon"}


def test_mixed_figures_are_of_all_three_styles_and_one_size() -> None:
    figures = [draw_figure(0, index, 128, style="mixed") for index in range(60)]
    assert {f.image.size for f in figures} == {(128, 128)}
    ids = [f.id for f in figures]
    assert sum("small" in i for i in ids) > sum("house" in i for i in ids) > 0 and any(i.startswith("drawn-0") for i in ids)


def test_a_wrong_style_or_size_is_an_error_that_says_what_is_allowed() -> None:
    with pytest.raises(UserError, match="Known: rich, small, house, mixed"):
        draw_figure(0, 0, 128, style="smal")
    with pytest.raises(UserError, match="128 x 128 px, not 256 x 256"):
        draw_figure(0, 0, 256, style="house")
    with pytest.raises(UserError, match="Known: diagram, bars, lines"):
        draw_figure(0, 0, 128, "pie", style="small")
