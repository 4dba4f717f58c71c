"""Edits in figure sources: which pictures a figure was made from, and where they differ, in every kind of source."""

from __future__ import annotations

import csv
import json
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from OpenSciDraw.config import EncodeConfig
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.fitting import prepare
from OpenSciDraw.figures.listing import FigureRef, RejectedFigure, list_figures, load_figure

BOX = [[10.0, 20.0, 30.0, 40.0]]


def put(path: Path, color: str = "red", size: tuple[int, int] = (64, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def edits(source: Path, **options: object) -> dict[str, tuple[list[str], tuple]]:
    return {ref.id: ([made_of.id for made_of in ref.references], ref.edit_boxes) for ref in list_figures(source, **options)[0]}  # type: ignore[arg-type]


def pair(folder: Path) -> Path:
    for name in ("a.png", "b.png", "before/a.png", "before/b.png"):
        put(folder / name)
    return folder


def test_in_a_folder_sources_lie_beside_the_figure(tmp_path: Path) -> None:
    for name in ("x.png", "x.source.png", "x.source2.jpg", "plain.png", "own.source.png"):
        put(tmp_path / name)
    for name in ("x", "plain", "own.source"):
        (tmp_path / f"{name}.txt").write_text(f"caption of {name}")
    assert edits(tmp_path) == {  # a name with .source that belongs to no figure is a figure as any other
        "x.png": (["x.source.png", "x.source2.jpg"], ()), "plain.png": ([], ()), "own.source.png": ([], ()),
    }  # fmt: skip
    (tmp_path / "x.txt").unlink()
    (tmp_path / "x.json").write_text(json.dumps({"caption": "Make it red.", "edit_bboxes": BOX}))
    assert edits(tmp_path)["x.png"] == (["x.source.png", "x.source2.jpg"], tuple(map(tuple, BOX)))


@pytest.mark.parametrize("column", ["source_image", "source_image_path", "reference_images", "mine"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_lists_and_tables_name_sources_in_a_column(kind: str, column: str, tmp_path: Path) -> None:
    folder = pair(tmp_path)
    rows = [{"image": "a.png", "caption": "Make it red.", column: "before/a.png", "edit_bboxes": json.dumps(BOX)},
            {"image": "b.png", "caption": "A box.", column: None, "edit_bboxes": ""}]  # fmt: skip
    if kind == "jsonl":
        (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        with (folder / "list.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "list.parquet")
    options = {"reference_column": "mine"} if column == "mine" else {}
    expected = {"a.png": (["before/a.png"], tuple(map(tuple, BOX))), "b.png": ([], ())}
    assert edits(folder / f"list.{kind}", **options) == expected
    if column == "mine":
        assert edits(folder / f"list.{kind}") == {"a.png": ([], tuple(map(tuple, BOX))), "b.png": ([], ())}
        with pytest.raises(UserError, match="no column 'other'.*encode.reference_column"):
            list_figures(folder / f"list.{kind}", reference_column="other")


def test_a_list_names_several_sources(tmp_path: Path) -> None:
    row = {"image": "a.png", "caption": "Put both together.", "source_images": ["before/a.png", "before/b.png"], "edit_bboxes": BOX}
    (pair(tmp_path) / "list.jsonl").write_text(json.dumps(row))
    assert edits(tmp_path / "list.jsonl") == {"a.png": (["before/a.png", "before/b.png"], tuple(map(tuple, BOX)))}
    table = pa.Table.from_pylist([{**row, "edit_bboxes": json.dumps(BOX)}])
    pq.write_table(table, tmp_path / "list.parquet")
    assert edits(tmp_path / "list.parquet") == {"a.png": (["before/a.png", "before/b.png"], tuple(map(tuple, BOX)))}


def test_a_table_holds_both_pictures_as_bytes(tmp_path: Path) -> None:
    def png(color: str) -> bytes:
        data = BytesIO()
        Image.new("RGB", (48, 48), color).save(data, "PNG")
        return data.getvalue()

    cells = {name: {"bytes": png(color), "path": None} for name, color in (("image", "red"), ("source_image", "blue"))}
    pq.write_table(pa.Table.from_pylist([{**cells, "text": "Make it red."}]), tmp_path / "train.parquet")
    (ref,) = list_figures(tmp_path)[0]
    (made_of,) = ref.references
    assert made_of.id == f"{ref.id}.source_image"
    assert load_figure(ref).getpixel((0, 0)) == (255, 0, 0) and load_figure(made_of).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(("value", "reason"), [
    ("[[1, 2, 3]]", "is no box"), ("[[3, 0, 1, 2]]", "is no box"), ("{", "edit_bboxes: not"), ("5", "edit_bboxes: not"),
    ('[[1, 2, 3, "x"]]', "edit_bboxes: not"), ("[[1, 2, 1e999, 4]]", "edit_bboxes"),
])  # fmt: skip
def test_boxes_that_are_none_are_a_reason_to_leave_the_edit_out(value: str, reason: str, tmp_path: Path) -> None:
    rows = [{"image": "a.png", "caption": "x", "source_image": "before/a.png", "edit_bboxes": value},
            {"image": "b.png", "caption": "y", "source_image": "before/b.png", "edit_bboxes": None}]  # fmt: skip
    (pair(tmp_path) / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refs, rejected = list_figures(tmp_path / "list.jsonl")
    assert [ref.id for ref in refs] == ["b.png"] and reason in rejected[0].reason


@pytest.mark.parametrize(("source", "reason"), [
    ("gone.png", "reference: gone.png: file not found"), ("../out.png", "outside the folder"),
    ("x.pdf", "reference: x.pdf: vector format"), (["before/a.png"] * 9, "references: 9 of them, at most 8"),
])  # fmt: skip
def test_a_source_that_cannot_be_used_is_a_reason_to_leave_the_edit_out(source: object, reason: str, tmp_path: Path) -> None:
    rows = [{"image": "a.png", "caption": "x", "source_images": source}, {"image": "b.png", "caption": "y", "source_images": None}]
    (pair(tmp_path) / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refs, rejected = list_figures(tmp_path / "list.jsonl")
    assert [ref.id for ref in refs] == ["b.png"] and reason in rejected[0].reason


def test_sources_of_rows_that_do_not_count_are_no_figures_either(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": "x", "source_image": "before/a.png", "split": "one"},
            {"file_name": "b.png", "text": "y", "source_image": "before/b.png", "split": "two"}]  # fmt: skip
    (pair(tmp_path) / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refs, rejected = list_figures(tmp_path, where={"split": "one"})
    assert [ref.id for ref in refs] == ["a.png"] and [r.id for r in rejected] == ["metadata.jsonl#2"]


def test_boxes_follow_the_picture_into_its_bucket(tmp_path: Path) -> None:
    put(tmp_path / "a.png", size=(100, 50))
    put(tmp_path / "a.source.png", size=(60, 60))
    (tmp_path / "a.json").write_text(json.dumps({"caption": "x", "edit_bboxes": [[50, 0, 100, 25], [-9, 40, 300, 50]]}))
    (ref,) = list_figures(tmp_path)[0]
    item = prepare(ref, EncodeConfig(resolution=128))
    height, width = item.pixels.shape[1:]
    x0, y0, x1, y1 = item.placement
    across, down = (x1 - x0) / 100, (y1 - y0) / 50
    expected = [[x0 + 50 * across, y0, x1, y0 + 25 * down], [x0, y0 + 40 * down, x1, y1]]
    found = torch.tensor(item.edit_boxes) * torch.tensor([width, height, width, height])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype))
    assert [reference.pixels.shape[1:] for reference in item.references] == [(128, 128)]


def test_a_source_that_cannot_be_decoded_is_named_with_its_figure(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "a.source.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_text("x")
    ref: FigureRef = list_figures(tmp_path)[0][0]
    with pytest.raises(RejectedFigure, match="reference: a.source.png: "):
        prepare(ref, EncodeConfig(resolution=128))


def test_edits_without_a_tier_are_kept_by_a_least_quality_that_figures_must_have(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "caption": "x", "source_image_path": "before/a.png", "quality_tier": None},
            {"image": "b.png", "caption": "y", "source_image_path": None, "quality_tier": None}]  # fmt: skip
    (pair(tmp_path) / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refs, rejected = list_figures(tmp_path / "list.jsonl", min_quality="high")
    assert [ref.id for ref in refs] == ["a.png"] and rejected[0].reason.startswith("quality: None")
