"""Data on the page: indices of sources, filters, pictures of strangers, captions as revisions."""

from __future__ import annotations

import json
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.listing import list_figures
from OpenSciDraw.figures.revisions import revise_captions
from OpenSciDraw.studio.figures_index import Filter, Index
from OpenSciDraw.studio.listing import write_index

EVIL = "<img src=x onerror=alert(1)>"


def figures(folder: Path) -> Path:
    """Eight figures in a list with tiers and kinds, one of which is an edit, and two that are left out."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(8):
        Image.new("RGB", (64, 48), (number * 30, 0, 0)).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"{EVIL} {'word ' * number}", "quality": "high" if number % 2 else "low",
                     "kind": "plot" if number < 3 else "diagram"})  # fmt: skip
    rows[7] |= {"source_image": "0.png", "edit_bboxes": [[1, 2, 3, 4]]}
    rows += [{"image": "none.png", "caption": "c"}, {"image": "1.png", "caption": ""}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def index_of(source: Path, tmp_path: Path) -> Index:
    write_index(lambda said: None, str(tmp_path), str(source), str(tmp_path / "index.arrow"))
    return Index(tmp_path / "index.arrow")


def test_filters_let_through_what_they_say(tmp_path: Path) -> None:
    index = index_of(figures(tmp_path / "f"), tmp_path)

    def ids(**wanted: Any) -> list[str]:
        return [row["id"] for row in index.take(index.rows(Filter(**wanted)), ["id"])]

    assert len(ids()) == 8 and ids(kind="plot", tier="high") == ["1.png"] and ids(shortest=len(EVIL) + 31) == ["7.png"]
    assert ids(longest=len(EVIL) + 2) == ["0.png"] and ids(text="3.p") == ["3.png"]
    assert ids(text="WORD word word word word word word") == ["7.png"]
    assert len(ids(out=True)) == 2 and ids(out=True, reason="file not found") == ["none.png"]
    said = index.statistics()
    assert (said["used"], said["left_out"], said["tier"]) == (8, 2, [["low", 4], ["high", 4]])
    assert said["kind"] == [["diagram", 5], ["plot", 3]]
    assert index.row_of("5.png") == 5 and index.row_of("no") is None


def test_an_index_is_stale_when_a_figure_came_or_a_list_changed(tmp_path: Path) -> None:
    source = figures(tmp_path / "f")
    index = index_of(source, tmp_path)
    assert index.is_fresh()
    (source / "metadata.jsonl").write_text("")
    assert not index.is_fresh()


def test_edited_captions_are_a_new_list_and_what_was_there_stays(tmp_path: Path) -> None:
    source = figures(tmp_path / "f")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    first = revise_captions(source, {"2.png": "a new caption"})
    second = revise_captions(first.path, {"3.png": "another"})
    assert (first.path.name, second.path.name) == ("captions.revision-0001.jsonl", "captions.revision-0002.jsonl")
    assert (first.changed, first.keys) == (1, {"encode.figures": str(first.path)})
    assert {name: data for name, data in before.items() if (source / name).read_bytes() != data} == {}
    was, now = (list_figures(place)[0] for place in (source, second.path))
    assert [ref.id for ref in was] == [ref.id for ref in now]
    changed = {ref.id: new.caption for ref, new in zip(was, now, strict=True) if ref.caption != new.caption}
    assert changed == {"2.png": "a new caption", "3.png": "another"}
    assert now[7].references[0].id == "0.png" and now[7].edit_boxes == was[7].edit_boxes
    row = {"image": "1.png", "caption": f"{EVIL} word", "quality": "high", "kind": "plot"}
    assert json.loads(second.path.read_text().splitlines()[1]) == row
    for wrong, words in (({"9.png": "x"}, "no figure with the id"), ({"1.png": "  "}, "empty caption")):
        with pytest.raises(UserError, match=words):
            revise_captions(source, wrong)
    assert len(list(source.glob("*.revision-*"))) == 2


def test_several_captions_masks_and_weights_go_into_the_new_list(tmp_path: Path) -> None:
    for name in ("a.png", "a.mask.png"):
        Image.new("RGB", (64, 48), "white").save(tmp_path / name)
    (tmp_path / "a.json").write_text(json.dumps({"caption": ["one", "two"], "caption_weights": [1, 3]}))
    made = revise_captions(tmp_path, {"a.png": "first"})
    assert made.keys["encode.mask_column"] == "mask"
    ref = list_figures(made.path, mask_column="mask")[0][0]
    assert (ref.captions, ref.caption_weights) == (("first", "two"), (0.25, 0.75)) and ref.mask is not None


def test_the_grid_is_asked_for_by_pieces_and_pictures_are_made_small(studio: Any, client: Any) -> None:
    source = figures(studio.places.root / "f")
    Image.new("RGB", (3000, 2000), "white").save(source / "1.png")
    assert client.get("/api/data/sources").json() == [{"name": "f", "kind": "figures"}]
    end = time.monotonic() + 60
    while not (said := client.get("/api/data/open", params={"source": "f"}).json())["ready"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert said["used"] == 8
    found = client.get("/api/data/rows", params={"source": "f", "first": 2, "count": 3}).json()
    assert found["total"] == 8 and [row["id"] for row in found["rows"]] == ["2.png", "3.png", "4.png"]
    assert EVIL in found["rows"][0]["caption"]
    picture = client.get("/api/data/picture", params={"source": "f", "row": 1})
    assert picture.headers["content-type"] == "image/webp" and max(Image.open(BytesIO(picture.content)).size) == 256
    (source / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 100)
    broken = client.get("/api/data/picture", params={"source": "f", "row": 2})
    assert broken.status_code == 400 and "2.png" in broken.json()["error"]
    assert client.get("/api/data/picture", params={"source": "f", "row": 99}).status_code == 400
    made = client.post("/api/data/revise", json={"source": "f", "captions": {"3.png": "new"}}).json()
    assert made["source"] == "f/captions.revision-0001.jsonl"
    assert {"name": made["source"], "kind": "list"} in client.get("/api/data/sources").json()


def test_an_uploaded_file_that_is_no_picture_is_refused_and_a_picture_is_written_anew(studio: Any, client: Any) -> None:
    headers = {"Content-Type": "image/png"}
    assert client.post("/api/upload", content=b"<svg onload=alert(1)>", headers=headers).status_code == 400
    png = BytesIO()
    Image.new("RGB", (64, 48), "red").save(png, "PNG")
    found = client.post("/api/upload", content=png.getvalue() + b"<script>", headers=headers).json()
    shown = client.get("/api/playground/preview", params={"image": found["image"]})
    assert Image.open(BytesIO(shown.content)).size == (64, 48) and b"<script>" not in shown.content
    for name in ("upload:../../x", "drawn:../..:0", "../x.png", "upload:", "drawn:x:1"):
        assert client.get("/api/playground/preview", params={"image": name}).status_code == 400, name
