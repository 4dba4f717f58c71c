"""The metric `described`: what a description says plainly, read in the picture, without ground truth."""

from __future__ import annotations

import pytest

from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.evaluation.described import differences, parse_description, rubric_of_description, score_described


def test_components_and_arrows_are_read_in_the_ways_that_people_write_them() -> None:
    found = parse_description(
        "A red rounded rectangle labelled 'Enc' and two blue ellipses labelled \"B 1\", 'B 2' and 'C'. The box named “Out” is "
        "last. Arrows point from 'Enc' to 'B 1' and 'B 2' → 'Out'; 'C' points to 'Enc'. A line connects 'C' with 'Out'. From "
        "'Enc' to 'C' is far."
    )
    assert [(part["label"], part["shape"], part["color"]) for part in found.parts] == [
        ("Enc", "rounded rectangle", "red"), ("B 1", "ellipse", "blue"), ("B 2", "ellipse", "blue"), ("C", "ellipse", "blue"),
        ("Out", "", ""),
    ]  # fmt: skip
    assert [(a["source"], a["target"], a["directed"]) for a in found.arrows] == [
        ("Enc", "B 1", True), ("B 2", "Out", True), ("C", "Enc", True), ("C", "Out", False),
    ]  # fmt: skip
    assert parse_description("The loss falls with the data, as the authors' 'Net' shows.").parts == []


@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_faultless_figure_has_all_that_its_caption_says(index: int) -> None:
    figure = draw_figure(3, index, 128, style="small")
    scores = score_described(figure.image, figure.caption)
    assert scores["components"][0] == len(figure.truth["components"]) and scores["arrows"][0] == len(figure.truth["arrows"])
    assert all(hits == total for hits, total in scores.values()) and differences(figure.image, figure.caption) == []


def test_what_differs_is_counted_and_said_with_its_mending() -> None:
    figure = draw_figure(3, 3, 128, style="small")
    assert figure.caption == (
        "From left to right: a purple ellipse labelled 'Q' and a blue trapezoid labelled 'P'. An arrow points from 'Q' to 'P'."
    )
    other = "A red ellipse labelled 'Q', a blue trapezoid labelled 'P' and a red diamond labelled 'R'. Arrow: 'P' to 'Q'."
    scores = score_described(figure.image, other)
    assert scores["components"] == (2.0, 3.0) and scores["colour"] == (1.0, 3.0) and scores["labels"] == (2.0, 3.0)
    assert scores["arrows"] == (0.0, 1.0)
    assert dict(differences(figure.image, other)) == {
        "'Q' is purple, not red": "Make 'Q' red.", "'R' is missing": "Add a red diamond labelled 'R'.",
        "the arrow from 'P' to 'Q' is missing": "Add an arrow from 'P' to 'Q'.",
        "the arrow from 'Q' to 'P' does not belong there": "Remove the arrow from 'Q' to 'P'.",
    }  # fmt: skip
    assert score_described(None, other)["components"] == (0.0, 3.0) and score_described(figure.image, "A loss.") == {}


def test_a_checklist_says_what_the_description_says() -> None:
    assert rubric_of_description("A red box labelled 'A' and an ellipse labelled 'B'. A line connects 'A' with 'B'.") == {
        "components": ["a red shape labelled 'A'", "an ellipse labelled 'B'"], "arrows": ["a line between 'A' and 'B'"],
        "text": ["the text 'A'", "the text 'B'"],
    }  # fmt: skip
