"""The structure metric: it reads drawn figures almost without a miss, and each spoiled figure loses what was spoiled."""

from __future__ import annotations

import copy
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

pytest.importorskip("cv2", reason="the extra 'evaluate' is not installed")

from OpenSciDraw.drawn.canvas import Canvas
from OpenSciDraw.drawn.figure import DrawnFigure, draw_figure
from OpenSciDraw.evaluation.structure import draw_reading, read_structure, score_structure
from OpenSciDraw.reading.glyphs import read_text, same_text
from OpenSciDraw.reading.shapes import color_of


def example(figure: DrawnFigure, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"truth": figure.truth, "width": 128, "height": 128, **changes})


def total(pairs: list[tuple[Image.Image | None, SimpleNamespace]]) -> dict[str, float]:
    """Scores of a set: hits over totals."""
    hits: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    for picture, about in pairs:
        for name, (hit, of) in score_structure(picture, about).items():
            hits[name] += hit
            totals[name] += of
    return {name: hits[name] / totals[name] for name in totals}


@pytest.fixture(scope="module")
def figures() -> list[DrawnFigure]:
    return [draw_figure(21, index, 128, style="small") for index in range(40)]


@pytest.fixture(scope="module")
def diagrams() -> list[DrawnFigure]:
    return [draw_figure(22, index, 128, "diagram", style="small") for index in range(30)]


@pytest.mark.parametrize("style", ["small", "house"])
def test_faultless_figures_score_nearly_one(style: str) -> None:
    drawn = [draw_figure(23, index, 128, style=style) for index in range(40)]
    scores = total([(figure.image, example(figure)) for figure in drawn])
    assert scores["components"] >= 0.99 and scores["colour"] >= 0.99 and scores["arrows"] >= 0.97, scores
    assert scores["shape"] >= 0.95 and scores["labels"] >= 0.93 and scores["one_letter_labels"] >= 0.97, scores
    assert scores["plot_kind"] == 1.0


def test_thin_and_slanted_arrows_of_rich_diagrams_are_read() -> None:
    drawn = [draw_figure(24, index, 256, kind) for kind in ("pipeline", "flowchart", "graph", "tree") for index in range(12)]
    scores = total([(f.image, example(f, width=f.image.width, height=f.image.height)) for f in drawn])
    assert scores["components"] >= 0.99 and scores["arrows"] >= 0.96, scores


def test_a_label_of_two_lines_is_read_line_by_line() -> None:
    canvas = Canvas(random.Random(0), 128, 128, 28.0)
    canvas.text(64, 44, "Net", "node")
    canvas.text(64, 84, "Mix", "node")  # the dot of its i is no line of its own
    ink = 1 - np.asarray(canvas.finish().convert("L"), np.float32) / 255
    assert read_text(ink) == "Net Mix"


def test_a_missing_picture_and_a_white_one_fail_in_everything(figures: list[DrawnFigure]) -> None:
    white = Image.new("RGB", (128, 128), "white")
    nothing, blank = total([(None, example(f)) for f in figures]), total([(white, example(f)) for f in figures])
    assert set(nothing) == set(blank) and set(nothing.values()) == set(blank.values()) == {0.0}


def test_another_figure_scores_far_less(figures: list[DrawnFigure]) -> None:
    own = total([(f.image, example(f)) for f in figures])
    other = total([(f.image, example(g)) for f, g in zip(figures, figures[1:] + figures[:1], strict=True)])
    for name in ("arrows", "labels", "colour", "shape"):
        assert other[name] < 0.5 * own[name], (name, other)


def edited(figure: DrawnFigure, edit: Any) -> SimpleNamespace:
    """The example with a truth that was changed, so that the picture has one thing other than asked for."""
    truth = copy.deepcopy(figure.truth)
    edit(truth)
    return example(figure, truth=truth)


def test_a_reversed_arrow_costs_arrows_alone(diagrams: list[DrawnFigure]) -> None:
    def reverse(truth: dict[str, Any]) -> None:
        arrow = truth["arrows"][0]
        arrow["source"], arrow["target"] = arrow["target"], arrow["source"]

    own = total([(f.image, example(f)) for f in diagrams])
    spoiled = total([(f.image, edited(f, reverse)) for f in diagrams])
    arrows = sum(len(f.truth["arrows"]) for f in diagrams)
    assert own["arrows"] - spoiled["arrows"] == pytest.approx(len(diagrams) / arrows, abs=0.08)
    assert {name: spoiled[name] for name in ("components", "colour", "labels")} == {
        name: own[name] for name in ("components", "colour", "labels")
    }


def test_a_swapped_colour_costs_colour_and_a_changed_letter_labels(diagrams: list[DrawnFigure]) -> None:
    def recolour(truth: dict[str, Any]) -> None:
        truth["components"][0]["color"] = "blue" if truth["components"][0]["color"] != "blue" else "red"

    def rename(truth: dict[str, Any]) -> None:
        truth["components"][0]["label"] = "X" if truth["components"][0]["label"] != "X" else "A"

    own = total([(f.image, example(f)) for f in diagrams])
    parts = sum(len(f.truth["components"]) for f in diagrams)
    for edit, name in ((recolour, "colour"), (rename, "labels")):
        spoiled = total([(f.image, edited(f, edit)) for f in diagrams])
        assert own[name] - spoiled[name] == pytest.approx(len(diagrams) / parts, abs=0.08), name
        assert spoiled["components"] == own["components"] and spoiled["arrows"] == own["arrows"]


def test_an_erased_component_costs_components_and_its_label(diagrams: list[DrawnFigure]) -> None:
    pairs = []
    for figure in diagrams:
        picture = figure.image.copy()
        picture.paste("white", tuple(figure.truth["components"][0]["box"]))
        pairs.append((picture, example(figure)))
    own, spoiled = total([(f.image, example(f)) for f in diagrams]), total(pairs)
    share = len(diagrams) / sum(len(f.truth["components"]) for f in diagrams)
    for name in ("components", "colour", "labels"):
        assert own[name] - spoiled[name] == pytest.approx(share, abs=0.06), (name, own, spoiled)
    assert spoiled["arrows"] < own["arrows"]


def test_a_shape_too_many_costs_components(diagrams: list[DrawnFigure]) -> None:
    def forget(truth: dict[str, Any]) -> None:
        gone = truth["components"].pop()["id"]
        truth["arrows"] = [a for a in truth["arrows"] if gone not in (a["source"], a["target"])]

    assert total([(f.image, edited(f, forget)) for f in diagrams])["components"] < 0.8


def test_blur_costs_labels_first(diagrams: list[DrawnFigure]) -> None:
    blurred = [total([(f.image.filter(ImageFilter.GaussianBlur(r)), example(f)) for f in diagrams]) for r in (0.5, 2.5)]
    assert blurred[0]["labels"] > 0.8 and blurred[0]["components"] > 0.97
    assert blurred[1]["labels"] < 0.6 * blurred[0]["labels"]


def test_pictures_of_another_size_and_tint_are_read_alike(diagrams: list[DrawnFigure]) -> None:
    larger = [(f.image.resize((320, 320), Image.Resampling.LANCZOS), example(f)) for f in diagrams]
    tint = np.array([0.97, 0.98, 0.96])
    tinted = [(Image.fromarray((np.asarray(f.image) * tint).astype(np.uint8)), example(f)) for f in diagrams]
    for pairs in (larger, tinted):
        scores = total(pairs)
        assert scores["components"] > 0.97 and scores["colour"] > 0.97 and scores["arrows"] > 0.93, scores


def test_what_has_no_ground_truth_or_is_not_read_gives_no_score() -> None:
    figure = draw_figure(1, 0, 128, "table")
    assert score_structure(figure.image, example(figure)) == {}
    assert score_structure(figure.image, example(figure, truth=None)) == {}


def test_look_alike_letters_count_as_the_same_and_others_do_not() -> None:
    assert same_text("Boxhead", "Box head") and same_text("o", "O") and same_text("0", "O") and same_text("l", "I")
    assert not same_text("E", "F") and not same_text("", "A") and not same_text("AB", "A")


def test_every_fill_of_the_palette_has_its_own_name_and_keeps_it_when_pale() -> None:
    from OpenSciDraw.drawn.canvas import PALETTE

    for name, (fill, _) in PALETTE.items():
        assert color_of(np.array(fill)) == name
        if name != "gray":
            assert color_of(255 - 0.8 * (255 - np.array(fill))) == name


def test_the_reading_can_be_looked_at(figures: list[DrawnFigure]) -> None:
    picture = draw_reading(figures[0].image, read_structure(figures[0].image), scale=2)
    assert picture.size == (256, 256) and picture.tobytes() != figures[0].image.resize((256, 256)).tobytes()
