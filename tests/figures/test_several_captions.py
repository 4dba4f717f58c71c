"""Several captions of a figure, its mask and its weight, in every kind of source."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.listing import FigureRef, list_figures
from OpenSciDraw.figures.rows import read_cell


def put(path: Path, color: object = "red", mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (64, 64), color).save(path)  # type: ignore[arg-type]
    return path


def said(source: Path, **options: object) -> dict[str, dict[str, float]]:
    """Captions with their weights by the figure's id."""
    def of(ref: FigureRef) -> dict[str, float]:
        assert not ref.captions or ref.captions[0] == ref.caption
        return dict(zip(ref.captions, ref.caption_weights, strict=True)) if ref.captions else {ref.caption: 1.0}

    return {ref.id: of(ref) for ref in list_figures(source, **options)[0]}  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "json"])
def test_a_list_in_the_caption_column_is_several_captions(kind: str, tmp_path: Path) -> None:
    for name in "abc":
        put(tmp_path / f"{name}.png")
    rows = [
        {"image": "a.png", "caption": [" one", "two", "one"], "caption_weights": None},
        {"image": "b.png", "caption": ["größer", "two"], "caption_weights": [3.0, 1.0]},
        {"image": "c.png", "caption": ["", "alone"], "caption_weights": None},
    ]  # fmt: skip
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    elif kind == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        for row in rows:
            (tmp_path / row["image"]).with_suffix(".json").write_text(json.dumps(row))  # type: ignore[arg-type]
    assert said(tmp_path) == {
        "a.png": {"one": pytest.approx(2 / 3), "two": pytest.approx(1 / 3)}, "b.png": {"größer": 0.75, "two": 0.25},
        "c.png": {"alone": 1.0},
    }  # fmt: skip


def test_several_columns_are_captions_with_the_weights_of_the_config(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / f"{name}.png")
    rows = [{"image": "a.png", "caption_short": "s", "caption_long": ["l", "ll"]},
            {"image": "b.png", "caption_short": None, "caption_long": ["l"]}]  # fmt: skip
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = ["caption_short", "caption_long"]
    found = said(tmp_path / "list.jsonl", caption_column=columns, caption_weights=[1.0, 3.0])
    assert found == {"a.png": {"s": 0.25, "l": 0.375, "ll": 0.375}, "b.png": {"l": 1.0}}
    with pytest.raises(UserError, match="no column 'caption_tiny'.*It has: image, caption_short, caption_long"):
        list_figures(tmp_path / "list.jsonl", caption_column=["caption_short", "caption_tiny"])


def test_lines_of_a_text_are_captions_only_when_asked(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("first\n\nsecond\n")
    assert said(tmp_path) == {"a.png": {"first\n\nsecond": 1.0}}
    assert said(tmp_path, caption_lines=True) == {"a.png": {"first": 0.5, "second": 0.5}}


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], "x", [1.0, float("inf")]])
def test_weights_that_mean_nothing_reject_the_row(weights: object, tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "ok.png")
    rows = [{"image": "a.png", "captions": ["x", "y"], "caption_weights": weights}, {"image": "ok.png", "captions": ["x"]}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refs, rejected = list_figures(tmp_path / "list.jsonl")
    assert [ref.id for ref in refs] == ["ok.png"] and "caption_weights" in rejected[0].reason or "not JSON" in rejected[0].reason


def test_masks_lie_beside_a_figure_or_in_a_column(tmp_path: Path) -> None:
    for name in ("x.png", "x.mask.png", "y.png", "own.mask.png"):
        put(tmp_path / "folder" / name)
    for name in ("x", "y", "own.mask"):
        (tmp_path / "folder" / f"{name}.txt").write_text("c")
    masks = {ref.id: ref.mask and ref.mask.id for ref in list_figures(tmp_path / "folder")[0]}
    assert masks == {"x.png": "x.mask.png", "y.png": None, "own.mask.png": None}
    rows = [{"image": "x.png", "caption": "c", "m": "x.mask.png"}, {"image": "y.png", "caption": "c", "m": ""},
            {"image": "own.mask.png", "caption": "c", "m": "none.png"},
            {"image": "y.png", "caption": "d", "m": "../x.png"}]  # fmt: skip
    (tmp_path / "folder" / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refs, rejected = list_figures(tmp_path / "folder" / "list.jsonl", mask_column="m")
    assert {ref.id: ref.mask and ref.mask.id for ref in refs} == {"x.png": "x.mask.png", "y.png": None}
    assert sorted(r.reason.split(": ")[0] for r in rejected) == ["mask", "outside the folder"]
    picture, mask = ((tmp_path / "folder" / name).read_bytes() for name in ("x.png", "x.mask.png"))
    pq.write_table(pa.table({"image": [picture], "caption": ["c"], "m": [mask]}), tmp_path / "t.parquet")
    (ref,) = list_figures(tmp_path / "t.parquet", mask_column="m")[0]
    assert ref.mask is not None and ref.mask.read() == read_cell(str(tmp_path / "t.parquet"), "m", 0)
    with pytest.raises(UserError, match="encode.mask_column"):
        list_figures(tmp_path / "t.parquet", mask_column="other")


def test_weights_are_numbers_of_at_least_zero(tmp_path: Path) -> None:
    rows = [{"image": f"{at}.png", "caption": "c", "w": w} for at, w in enumerate([2.5, None, "0.5", "much", -1.0, 0])]
    for at in range(len(rows)):
        put(tmp_path / f"{at}.png")
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refs, rejected = list_figures(tmp_path / "list.jsonl", weight_column="w")
    assert {ref.id: ref.weight for ref in refs} == {"0.png": 2.5, "1.png": 1.0, "2.png": 0.5, "5.png": 0.0}
    assert [r.id for r in rejected] == ["3.png", "4.png"] and all(r.reason.startswith("weight: w") for r in rejected)
    assert all(ref.weight == 1 for ref in list_figures(tmp_path / "list.jsonl")[0])  # a column counts when the config names it
