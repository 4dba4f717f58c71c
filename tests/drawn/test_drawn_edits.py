"""Edits of drawn figures: what the instruction says is what changes, and nothing else does."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from OpenSciDraw.cli import main
from OpenSciDraw.drawn.canvas import PALETTE
from OpenSciDraw.drawn.edits import KINDS, DrawnEdit, draw_edit
from OpenSciDraw.drawn.small import COLORS
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.listing import list_figures, load_figure

COUNT = 120


@pytest.fixture(scope="module", params=("small", "house"))
def edits(request: pytest.FixtureRequest) -> list[DrawnEdit]:
    return [draw_edit(5, index, request.param) for index in range(COUNT)]


def looks(truth: dict) -> Counter:
    return Counter((part["shape"], part["color"], part["label"]) for part in truth["components"])


def arrows(truth: dict) -> Counter:
    label = {part["id"]: part["label"] for part in truth["components"]}
    return Counter((label[arrow["source"]], label[arrow["target"]]) for arrow in truth["arrows"])


def test_an_edit_is_a_function_of_its_arguments(edits: list[DrawnEdit]) -> None:
    style = edits[0].id.split("-")[2]
    again = draw_edit(5, 3, style)
    assert again.after.image.tobytes() == edits[3].after.image.tobytes() and again.instruction == edits[3].instruction
    assert draw_edit(6, 3, style).instruction != edits[3].instruction or draw_edit(6, 3, style).boxes != edits[3].boxes


def test_pixels_outside_the_boxes_stay_and_some_inside_change(edits: list[DrawnEdit]) -> None:
    for edit in edits:
        before, after = (np.asarray(figure.image).astype(int) for figure in (edit.before, edit.after))
        outside = np.ones(before.shape[:2], dtype=bool)
        for x0, y0, x1, y1 in edit.boxes:
            outside[max(0, y0) : y1, max(0, x0) : x1] = False
        changed = np.abs(before - after).max(axis=2) > 0
        assert changed.any() and not (changed & outside).any(), edit.instruction


def test_every_kind_does_what_it_says(edits: list[DrawnEdit]) -> None:
    seen = set()
    for edit in edits:
        before, after = edit.before.truth, edit.after.truth
        gone, new = looks(before) - looks(after), looks(after) - looks(before)
        lost, found = arrows(before) - arrows(after), arrows(after) - arrows(before)
        seen.add(edit.kind)
        if edit.kind == "recolour":
            ((shape, _, label),), ((shape_now, color, label_now),) = gone, new
            assert (shape, label) == (shape_now, label_now) and f"'{label}'" in edit.instruction and color in edit.instruction
        elif edit.kind == "relabel":
            ((shape, color, label),), ((shape_now, color_now, label_now),) = gone, new
            assert (shape, color) == (shape_now, color_now)
            assert f"'{label}'" in edit.instruction and f"'{label_now}'" in edit.instruction
        elif edit.kind == "reshape":
            ((_, color, label),), ((shape, color_now, label_now),) = gone, new
            assert (color, label) == (color_now, label_now) and shape in edit.instruction
        elif edit.kind == "remove":
            ((_, _, label),) = gone
            assert not new and not found and all(label in pair for pair in lost) and f"'{label}'" in edit.instruction
        elif edit.kind == "add":
            ((shape, color, label),) = new
            assert not gone and not lost and all(label in pair for pair in found) and f"{color} {shape}" in edit.instruction
        elif edit.kind in ("move", "swap"):
            assert not gone and not new
            places = [{part["label"]: part["box"][:2] for part in truth["components"]} for truth in (before, after)]
            moved = [label for label in places[0] if places[0][label] != places[1][label]]
            assert len(moved) == (1 if edit.kind == "move" else 2) and all(f"'{label}'" in edit.instruction for label in moved)
        elif edit.kind in ("reverse", "redirect"):
            assert not gone and not new and len(lost) == len(found) == 1
            (was,), (now,) = lost, found
            assert now == was[::-1] if edit.kind == "reverse" else now[0] == was[0] and now[1] != was[1]
        elif edit.kind == "bar":
            heights = [truth["plot"]["series"][0]["values"] for truth in (before, after)]
            (at,) = [at for at, (was, now) in enumerate(zip(*heights, strict=True)) if was != now]
            assert f"'{before['plot']['categories'][at]}' to {heights[1][at]:.0%}" in edit.instruction
    assert seen == set(KINDS) - (set() if "small" in edits[0].id else {"bar"})


def test_what_is_kept_is_named_and_stays_as_it_is(edits: list[DrawnEdit]) -> None:
    for edit in edits:
        kept = {part["id"]: part for part in edit.after.truth["components"] if part["id"] in edit.after.truth["edit"]["kept"]}
        before = [(p["shape"], p["color"], p["label"], p["box"]) for p in edit.before.truth["components"]]
        assert all((p["shape"], p["color"], p["label"], p["box"]) in before for p in kept.values())
        assert len(kept) >= len(edit.after.truth["components"]) - 2


def test_a_mosaic_stays_as_it_is_and_has_ink_in_every_square() -> None:
    edit, other = draw_edit(5, 3, "mosaic"), draw_edit(5, 4, "mosaic")
    assert edit.before.image.tobytes() == edit.after.image.tobytes() != other.after.image.tobytes()
    assert draw_edit(5, 3, "mosaic").after.image.tobytes() == edit.after.image.tobytes() and not edit.boxes
    squares = np.asarray(edit.after.image).reshape(8, 16, 8, 16, 3).swapaxes(1, 2)
    assert min(square.std() for row in squares for square in row) > 20
    (ref,), _ = list_figures("drawn:1:seed=5:style=mosaic:edit")
    assert ref.caption in {"Keep the picture as it is.", "Change nothing.", "Leave everything as it is.", "Copy the picture."}


def test_repainting_gives_two_or_more_shapes_other_colours_and_leaves_all_else() -> None:
    for index in range(12):
        edit = draw_edit(5, index, "repaint")
        asked = dict(re.findall(r"'(\w+)' (\w+)", edit.instruction))
        before, after = edit.before.truth, edit.after.truth
        assert len(asked) >= 2 and asked.keys() <= {part["label"] for part in before["components"]}
        for was, part in zip(before["components"], after["components"], strict=True):
            assert all(part[key] == was[key] for key in ("shape", "label", "box"))
            assert part["color"] == asked.get(was["label"], was["color"])
            assert (was["color"] != part["color"]) == (was["label"] in asked)
        assert after["arrows"] == before["arrows"] and len(edit.boxes) == len(asked)


def test_letters_get_the_colours_that_are_named_and_all_other_cells_stay() -> None:
    """Cells that the instruction names have the named colour; the boxes are those cells, and no other pixel changes."""
    few = 0
    for index in range(24):
        edit = draw_edit(5, index, "letters")
        asked = dict(re.findall(r"'(\w+)' (\w+)", edit.instruction))
        assert 1 <= len(asked) <= 2 and set(asked.values()) <= set(COLORS)
        before, after = (np.asarray(figure.image).astype(int) for figure in (edit.before, edit.after))
        inside = np.zeros(before.shape[:2], dtype=bool)
        edges: set[tuple[int, ...]] = set()
        for x0, y0, x1, y1 in edit.boxes:
            inside[y0:y1, x0:x1] = True
            edges |= {tuple(after[y0, x0].tolist()), tuple(after[y1 - 1, x1 - 1].tolist())}
        assert (before == after).all(2)[~inside].all() and edges == {PALETTE[color][1] for color in asked.values()}
        assert 0 < len(edit.boxes) <= 64 and draw_edit(5, index, "letters").after.image.tobytes() == edit.after.image.tobytes()
        few += asked.keys() <= set("AB")
    assert few >= 2, "most pictures are of few letters"


def test_a_source_of_edits_lists_pairs() -> None:
    refs, _ = list_figures("drawn:12:seed=5:edit")
    edit = draw_edit(5, 7)
    ref = next(ref for ref in refs if ref.id == edit.id)
    (made_of,) = ref.references
    assert ref.caption == edit.instruction and ref.edit_boxes == edit.boxes
    assert load_figure(ref).tobytes() == edit.after.image.tobytes()
    assert load_figure(made_of).tobytes() == edit.before.image.tobytes()
    assert list_figures("drawn:3:style=house:edit:seed=2")[0][0].id == "drawn-edit-house-2-0000000"


@pytest.mark.parametrize(("source", "said"), [
    ("drawn:3:edit:size=256", "edits have 128 x 128 px"), ("drawn:3:edits", "Cannot read 'edits'"),
    ("drawn:3:edit:style=rich", "cannot be edited. Styles of edits: small, house, mosaic, letters, repaint"),
])  # fmt: skip
def test_a_source_of_edits_that_cannot_be_is_refused(source: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        list_figures(source)


def test_draw_writes_a_folder_that_lists_the_same_edits(tmp_path: Path) -> None:
    assert main(["draw", str(tmp_path / "edits"), "--count", "6", "--edits"]) == 0
    drawn, written = list_figures("drawn:6:edit")[0], list_figures(tmp_path / "edits")[0]
    assert [ref.caption for ref in drawn] == [ref.caption for ref in written]
    assert [ref.edit_boxes for ref in drawn] == [ref.edit_boxes for ref in written]
    for one, other in zip(drawn, written, strict=True):
        assert load_figure(one.references[0]).tobytes() == load_figure(other.references[0]).tobytes()
    truths = [json.loads(line) for line in (tmp_path / "edits" / "truth.jsonl").read_text().splitlines()]
    assert [truth["edit"]["instruction"] for truth in truths] == [ref.caption for ref in drawn]
    assert Image.open(tmp_path / "edits" / f"{truths[0]['id']}.source.png").size == (128, 128)
