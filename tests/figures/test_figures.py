"""Every figure of a source is listed once under a lasting id, or left out with a reason; it is read when needed."""

from __future__ import annotations

import csv
import json
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures import rows as figure_rows
from OpenSciDraw.figures.listing import (
    DrawnRef,
    FigureRef,
    RejectedFigure,
    Rejection,
    list_figures,
    load_figure,
    write_rejected,
)

CORPUS = Path(__file__).resolve().parents[3] / "shared" / "corpora" / "figures"


def picture_bytes(shade: int = 0, kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.new("RGB", (40, 40), (shade % 256, shade // 256, 7)).save(file, kind)
    return file.getvalue()


def put(folder: Path, name: str, shade: int = 0, caption: str | None = None) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_bytes(shade, "JPEG" if path.suffix == ".jpg" else "PNG"))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def listed(source: Path | str, **options: Any) -> tuple[dict[str, str], dict[str, str]]:
    """{id: caption} and {id: reason}."""
    refs, rejections = list_figures(source, **options)
    assert [ref.id for ref in refs] == sorted(ref.id for ref in refs)
    assert len({ref.id for ref in refs}) == len(refs)
    return {ref.id: ref.caption for ref in refs}, {each.id: each.reason for each in rejections}


def shade_of(ref: FigureRef) -> int:
    red, green, _ = load_figure(ref).getpixel((5, 5))  # type: ignore[misc]
    return red + 256 * green


# -- folders ---------------------------------------------------------------------------------------
def test_a_folder_with_captions_beside_pictures(tmp_path: Path) -> None:
    put(tmp_path, "b.png", 2, "  A plot.\n")
    put(tmp_path, "a/deep/x.PNG", 3, "Ein Diagramm: α → β\n\nzweite Zeile")
    for name, record in (("j1", {"caption": "one"}), ("j2", {"text": "two"}), ("j3", {"prompt": "three"})):
        put(tmp_path, f"{name}.png").with_suffix(".json").write_text(json.dumps(record))
    captions, rejected = listed(tmp_path)
    assert captions == {
        "a/deep/x.PNG": "Ein Diagramm: α → β\n\nzweite Zeile", "b.png": "A plot.",
        "j1.png": "one", "j2.png": "two", "j3.png": "three",
    }  # fmt: skip
    assert not rejected
    refs, _ = list_figures(tmp_path)
    assert [shade_of(ref) for ref in refs][:2] == [3, 2]
    assert refs[1].size_bytes == (tmp_path / "b.png").stat().st_size
    assert Path(refs[1].source) == tmp_path / "b.png"


def test_pictures_with_the_same_stem_stay_apart(tmp_path: Path) -> None:
    put(tmp_path, "x.png", 1, "both")
    put(tmp_path, "x.jpg", 2)
    put(tmp_path, "y/x.png", 3, "another")
    assert listed(tmp_path)[0] == {"x.jpg": "both", "x.png": "both", "y/x.png": "another"}


def test_ids_do_not_move_when_figures_come_and_go(tmp_path: Path) -> None:
    for name in "bcd":
        put(tmp_path, f"{name}.png", 1, name)
    before = listed(tmp_path)[0]
    put(tmp_path, "a.png", 1, "a")
    (tmp_path / "c.png").unlink()
    after = listed(tmp_path)[0]
    assert {key: after[key] for key in ("b.png", "d.png")} == {key: before[key] for key in ("b.png", "d.png")}
    assert listed(tmp_path)[0] == after == listed(f"{tmp_path}/../{tmp_path.name}")[0]


def test_every_reason_to_leave_a_figure_out_is_told(tmp_path: Path) -> None:
    put(tmp_path, "good.png", 1, "fine")
    put(tmp_path, "alone.png")
    put(tmp_path, "blank.png", caption=" \n\t")
    put(tmp_path, "latin.png").with_suffix(".txt").write_bytes("Größe".encode("latin-1"))
    put(tmp_path, "latinjson.png").with_suffix(".json").write_bytes('{"caption": "Größe"}'.encode("latin-1"))
    put(tmp_path, "key.png").with_suffix(".json").write_text('{"title": "no"}')
    put(tmp_path, "list.png").with_suffix(".json").write_text('["no"]')
    put(tmp_path, "number.png").with_suffix(".json").write_text('{"caption": 5}')
    put(tmp_path, "broken.png").with_suffix(".json").write_text('{"caption": ')
    put(tmp_path, "deep.png").with_suffix(".json").write_text("[" * 100_000)
    put(tmp_path, "half.png").with_suffix(".json").write_text('{"caption": "\\ud800"}')
    put(tmp_path, "zero.png", caption="x").write_bytes(b"")
    put(tmp_path, "vector.png", caption="x").rename(tmp_path / "vector.pdf")
    put(tmp_path, "photo.png", caption="x").rename(tmp_path / "photo.heic")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    put(tmp_path, ".hidden/x.png", caption="not looked at")
    put(tmp_path, "._good.png")
    captions, rejected = listed(tmp_path)
    assert captions == {"good.png": "fine"}
    kinds = {name: reason.split(":")[0] for name, reason in rejected.items()}
    assert kinds == {
        "alone.png": "no caption", "blank.png": "empty caption", "latin.png": "caption not UTF-8",
        "latinjson.png": "caption not UTF-8", "key.png": "no caption", "list.png": "no caption",
        "number.png": "no caption", "broken.png": "caption unreadable", "deep.png": "caption unreadable",
        "half.png": "caption not UTF-8", "zero.png": "empty file", "vector.pdf": "vector format",
        "photo.heic": "unsupported format", "lost.png": "file not found",
    }  # fmt: skip
    assert rejected["alone.png"] == "no caption: expected alone.txt, .caption or .json beside it"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    put(tmp_path, "good.png", 1, "fine")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "pipe.txt").write_text("x")
    assert listed(tmp_path)[1] == {"pipe.png": "not a file"}


def test_a_file_name_that_is_not_unicode_is_told(tmp_path: Path) -> None:
    put(tmp_path, "good.png", 1, "fine")
    bad = os.fsencode(tmp_path) + b"/gr\xfc.png"
    with open(bad, "wb") as file:
        file.write(picture_bytes())
    captions, rejected = listed(tmp_path)
    assert list(captions) == ["good.png"] and list(rejected.values()) == ["file name not UTF-8: rename it"]
    write_rejected(tmp_path / "out.jsonl", [Rejection(key, "", value) for key, value in rejected.items()])


def test_links_that_lead_in_a_circle_end(tmp_path: Path) -> None:
    put(tmp_path, "a/x.png", 1, "x")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    put(tmp_path.parent / f"{tmp_path.name}-elsewhere", "y.png", 2, "y")
    (tmp_path / "linked").symlink_to(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    assert listed(tmp_path)[0] == {"a/x.png": "x", "linked/y.png": "y"}


def test_lists_in_a_folder_and_captions_beside_pictures_add_up(tmp_path: Path) -> None:
    put(tmp_path, "train/a.png", 1)
    put(tmp_path, "train/b.png", 2, "beside")
    put(tmp_path, "train/c.png", 3)
    (tmp_path / "train/metadata.jsonl").write_text('{"file_name": "a.png", "text": "from the list"}\n')
    put(tmp_path, "test/d.png", 4)
    (tmp_path / "test/metadata.csv").write_text("file_name,text\nd.png,in the table\n")
    captions, rejected = listed(tmp_path)
    assert captions == {"test/d.png": "in the table", "train/a.png": "from the list", "train/b.png": "beside"}
    assert rejected == {"train/c.png": "no caption: expected c.txt, .caption or .json beside it"}


# -- lists -----------------------------------------------------------------------------------------
def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("image", "caption"), [("image", "caption"), ("file_name", "text"), ("path", "prompt")])
def test_jsonl_and_csv_lists_say_the_same(tmp_path: Path, image: str, caption: str) -> None:
    put(tmp_path, "pictures/a.png", 1)
    put(tmp_path, "pictures/b.png", 2)
    rows = [{image: "pictures/b.png", caption: 'Text, "quoted"\nand longer'}, {image: "./pictures/a.png", caption: "α"}]
    jsonl(tmp_path / "list.jsonl", *rows)
    with (tmp_path / "list.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, [image, caption])
        writer.writeheader()
        writer.writerows(rows)
    expected = {"pictures/a.png": "α", "pictures/b.png": 'Text, "quoted"\nand longer'}
    assert listed(tmp_path / "list.jsonl") == listed(tmp_path / "list.csv") == (expected, {})
    assert [shade_of(ref) for ref in list_figures(tmp_path / "list.jsonl")[0]] == [1, 2]


def test_columns_can_be_named(tmp_path: Path) -> None:
    put(tmp_path, "a.png", 1)
    file = jsonl(tmp_path / "list.jsonl", {"image": "no.png", "png": "a.png", "caption": "no", "long": "yes"})
    assert listed(file, image_column="png", caption_column="long")[0] == {"a.png": "yes"}
    with pytest.raises(UserError, match="no column 'size'.*image, png, caption, long.*encode.caption_column"):
        list_figures(file, caption_column="size")


def test_a_list_without_such_columns_is_refused_with_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column for the image .*image, file_name, path.*It has: img, caption"):
        list_figures(jsonl(tmp_path / "a.jsonl", {"img": "a.png", "caption": "x"}))
    with pytest.raises(UserError, match="no column for the caption"):
        list_figures(jsonl(tmp_path / "b.jsonl", {"image": "a.png", "title": "x"}))
    (tmp_path / "c.csv").write_text("a;b\n1;2\n")
    with pytest.raises(UserError, match="c.csv: no column for the image .*It has: a;b"):
        list_figures(tmp_path / "c.csv")


def test_bad_rows_of_a_list_are_left_out_by_line(tmp_path: Path) -> None:
    put(tmp_path, "a.png", 1)
    put(tmp_path, "b.png", 1)
    put(tmp_path, "c.png", 1)
    file = jsonl(
        tmp_path / "list.jsonl", {"image": "a.png", "caption": "good"}, "{broken\n", "\n", "[1, 2]\n",
        {"image": "none.png", "caption": "x"}, {"caption": "x"}, {"image": 7, "caption": "x"},
        {"image": "b.png"}, {"image": "c.png", "caption": {"x": 1}}, {"image": "a.png", "caption": "good"},
        {"image": "a\0.png", "caption": "x"}, {"image": "x" * 300 + ".png", "caption": "x"},
    )  # fmt: skip
    file.write_bytes(file.read_bytes() + b'{"image": "a.png", "caption": "gr\xfc\xdf"}\n')
    captions, rejected = listed(file)
    assert captions == {"a.png": "good"}
    kinds = sorted((name[:20], reason.split(":")[0]) for name, reason in rejected.items() if name != "a.png")
    assert kinds == [
        ("b.png", "no caption"), ("c.png", "no caption"), ("list.jsonl#11", "no image path"),
        ("list.jsonl#2", "not JSON"), ("list.jsonl#4", "not JSON"), ("list.jsonl#6", "no image path"),
        ("list.jsonl#7", "no image path"), ("none.png", "file not found"), ("x" * 20, "unreadable"),
    ]  # fmt: skip
    reasons = [each.reason for each in list_figures(file)[1] if each.id == "a.png"]
    assert sorted(reason.split(":")[0] for reason in reasons) == ["caption not UTF-8", "listed twice"]


def test_a_second_caption_of_a_picture_has_an_id_of_its_own(tmp_path: Path) -> None:
    put(tmp_path, "a.png", 1)
    rows = [{"image": "a.png", "caption": text} for text in ("first", "second", "second")]
    captions, rejected = listed(jsonl(tmp_path / "list.jsonl", *rows))
    assert captions["a.png"] == "first" and sorted(captions.values()) == ["first", "second"]
    assert list(rejected.values()) == ["listed twice: with the same caption"]


def test_a_list_may_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    outside = put(tmp_path, "secret.png", 1)
    put(tmp_path, "set/a.png", 2)
    put(tmp_path, "set-2/b.png", 2)
    names = ["../secret.png", "a/../../secret.png", "../set-2/b.png", "sub/../a.png", str(outside)]
    captions, rejected = listed(jsonl(tmp_path / "set/list.jsonl", *({"image": n, "caption": "x"} for n in names)))
    assert set(captions) == {"a.png", outside.as_posix()}  # an absolute path is the user's own decision
    assert {reason.split(":")[0] for reason in rejected.values()} == {"outside the folder"} and len(rejected) == 3


def test_csv_that_is_none_is_refused_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('image,caption\na.png,x\nb.png,"open\n')
    with pytest.raises(UserError, match=r"a.csv, line \d: not CSV"):
        list_figures(tmp_path / "a.csv")
    put(tmp_path, "a.png", 1)
    (tmp_path / "long.csv").write_text("image,caption\na.png," + "x" * 200_000 + "\n")
    assert len(listed(tmp_path / "long.csv")[0]["a.png"]) == 200_000


# -- Parquet and Arrow -----------------------------------------------------------------------------
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(count: int, kind: str = "struct", start: int = 0) -> pa.Table:
    cells: list[Any] = [picture_bytes(start + row) for row in range(count)]
    if kind == "struct":
        cells = [{"bytes": cell, "path": "x.png"} for cell in cells]
    types = {"struct": HF_IMAGE, "binary": pa.binary(), "large": pa.large_binary()}
    captions = [f"caption {start + row}" for row in range(count)]
    return pa.table({"image": pa.array(cells, types[kind]), "text": captions})


@pytest.mark.parametrize("kind", ["struct", "binary", "large"])
@pytest.mark.parametrize("group_rows", [1, 7, 1000])
def test_parquet_rows_are_read_in_any_order(tmp_path: Path, kind: str, group_rows: int) -> None:
    pq.write_table(table(100, kind), tmp_path / "a.parquet", row_group_size=group_rows)
    refs, rejected = list_figures(tmp_path / "a.parquet")
    assert [ref.id for ref in refs] == [f"a.parquet#{row:08d}" for row in range(100)] and not rejected
    assert refs[12].caption == "caption 12" and refs[12].source == f"{tmp_path / 'a.parquet'}#12"
    order = [0, 99, 50, 49, 51, 3, 3, 98, 0, *range(100)]
    assert [shade_of(refs[row]) for row in order] == order
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shade_of, refs)) == list(range(100))
    assert shade_of(pickle.loads(pickle.dumps(refs[5]))) == 5


def test_parquet_is_read_once_and_in_little_memory(tmp_path: Path) -> None:
    """One row group of 100 MB: rows in order cost one pass and a few pages."""
    noise = os.urandom(200_000)
    rows = pa.table({"image": pa.array([noise] * 500, pa.binary()), "text": ["x"] * 500})
    how = {"use_dictionary": False, "compression": "none", "write_batch_size": 8}
    pq.write_table(rows, tmp_path / "big.parquet", row_group_size=500, **how)
    del rows
    refs, _ = list_figures(tmp_path)
    before, peak = pa.total_allocated_bytes(), 0
    start = time.process_time()
    for ref in refs:
        assert len(ref.read()) == 200_000
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 50e6 and time.process_time() - start < 5
    figure_rows._open_column.cache_clear()


def test_parquet_with_paths_and_a_folder_of_parquet(tmp_path: Path) -> None:
    put(tmp_path, "data/pictures/a.png", 9)
    names = ["pictures/a.png", "../secret.png", None]
    captions = ["one", "two", "three"]
    pq.write_table(pa.table({"file_name": names, "caption": captions}), tmp_path / "data/paths.parquet")
    pq.write_table(table(2, start=5), tmp_path / "data/bytes.parquet")
    captions_of, rejected = listed(tmp_path)
    assert captions_of == {
        "data/bytes.parquet#00000000": "caption 5", "data/bytes.parquet#00000001": "caption 6",
        "data/pictures/a.png": "one",
    }  # fmt: skip
    assert {key: reason.split(":")[0] for key, reason in rejected.items()} == {
        "data/paths.parquet#00000001": "outside the folder", "data/paths.parquet#00000002": "no image path",
    }  # fmt: skip
    assert [shade_of(ref) for ref in list_figures(tmp_path)[0]] == [5, 6, 9]


def test_bad_rows_of_parquet_are_left_out_or_rejected_when_read(tmp_path: Path) -> None:
    put(tmp_path, "beside.png", 8)
    captions = pa.array([b"good", b"gr\xfc", None, b"  ", b"null", b"by path", b"lost", b"leads out"], pa.binary())
    cell = {"bytes": picture_bytes(3), "path": None}
    paths = [{"bytes": None, "path": name} for name in ("beside.png", "lost.png", "../x.png")]
    cells = pa.array([cell] * 4 + [None] + paths, HF_IMAGE)
    text = pa.Array.from_buffers(pa.string(), len(captions), captions.buffers())  # invalid UTF-8, as files have it
    pq.write_table(pa.table({"image": cells, "caption": text}), tmp_path / "a.parquet")
    refs, rejected = list_figures(tmp_path / "a.parquet")
    assert [each.reason.split(":")[0] for each in rejected] == ["caption not UTF-8", "no caption", "empty caption"]
    reasons = []
    for ref in refs:
        try:
            reasons.append(shade_of(ref))
        except RejectedFigure as error:
            reasons.append(str(error).split(":")[0])  # type: ignore[arg-type]
    assert reasons == [3, "empty file", 8, "unreadable", "outside the folder"]


def test_damaged_parquet_is_left_out_as_a_whole(tmp_path: Path) -> None:
    pq.write_table(table(3), tmp_path / "good.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing PAR1")
    (tmp_path / "empty.parquet").write_bytes(b"")
    captions, rejected = listed(tmp_path)
    assert len(captions) == 3
    assert {key: reason.split(":")[0] for key, reason in rejected.items()} == {
        "bad.parquet": "unreadable", "empty.parquet": "unreadable",
    }  # fmt: skip


def test_a_damaged_page_rejects_its_own_rows_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(table(30, "binary"), file, row_group_size=10, compression="zstd", use_dictionary=False)
    refs, _ = list_figures(file)
    column = pq.ParquetFile(file).metadata.row_group(1).column(0)
    data = bytearray(file.read_bytes())
    start = column.data_page_offset + 60
    data[start : start + 200] = bytes(200)
    file.write_bytes(data)
    outcomes = []
    for ref in refs:
        try:
            outcomes.append(shade_of(ref))
        except RejectedFigure as error:
            assert str(error)
            outcomes.append(-1)
    assert outcomes == [*range(10), *[-1] * 10, *range(20, 30)]


def test_parquet_columns_of_no_use_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [[1, 2]], "caption": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column 'image' is list<.*struct<bytes, path>"):
        list_figures(tmp_path / "a.parquet")
    pq.write_table(pa.table({"pixels": [b"x"], "caption": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column for the image.*pixels, caption"):
        list_figures(tmp_path)


def test_what_datasets_saved_to_disk_is_read(tmp_path: Path) -> None:
    """Arrow streams named by state.json; left-over and cache files beside them do not count."""
    for split, first in (("train", 0), ("test", 40)):
        folder = tmp_path / split
        folder.mkdir()
        names = [f"data-{shard:05d}-of-00002.arrow" for shard in range(2)]
        for shard, name in enumerate(names):
            part = table(20, start=first + 20 * shard)
            with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as writer:
                writer.write_table(part, max_chunksize=8)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        (folder / "dataset_info.json").write_text("{}")
        (folder / "data-00000-of-00001.arrow").write_bytes(b"from an earlier save")
        (folder / "cache-0123.arrow").write_bytes(b"")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    refs, rejected = list_figures(tmp_path)
    assert len(refs) == 80 and not rejected
    assert refs[0].id == "test/data-00000-of-00002.arrow#00000000" and refs[0].caption == "caption 40"
    assert [shade_of(ref) for ref in refs] == [*range(40, 80), *range(40)]
    assert shade_of(list_figures(tmp_path / "train" / "data-00001-of-00002.arrow")[0][3]) == 23


# -- drawn -----------------------------------------------------------------------------------------
def test_drawn_figures_are_those_of_the_drawing_program() -> None:
    refs, rejected = list_figures("drawn:3:seed=4:size=128")
    assert not rejected and len(refs) == len({ref.id for ref in refs}) == 3
    for index, ref in enumerate(refs):
        figure = draw_figure(4, index, 128)
        assert isinstance(ref, DrawnRef) and ref.caption == figure.caption
        assert load_figure(ref).tobytes() == figure.image.tobytes() == load_figure(ref.read()).tobytes()
    assert refs != list_figures("drawn:3:size=128")[0] != list_figures("drawn:3")[0]
    assert list_figures("drawn:1000000", max_figures=2)[0] == list_figures("drawn:2")[0]


@pytest.mark.parametrize("source", ["drawn:", "drawn:0", "drawn:x", "drawn:5:sed=1", "drawn:5:seed=-1", "drawn:5:seed"])
def test_a_misspelt_drawn_source_is_refused(source: str) -> None:
    with pytest.raises(UserError, match=r"drawn:COUNT\[:seed=S\]\[:size=PIXELS\]"):
        list_figures(source)


# -- all sources -----------------------------------------------------------------------------------
def test_sources_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no figure source .*nowhere.*Allowed: a folder"):
        list_figures(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no figures"):
        list_figures(tmp_path)
    (tmp_path / "notes.xlsx").write_text("x")
    with pytest.raises(UserError, match="not a list of figures. Allowed"):
        list_figures(tmp_path / "notes.xlsx")
    put(tmp_path, "a.png")
    put(tmp_path, "b.png", caption="")
    with pytest.raises(UserError, match="none of 2 figures is usable .1 x no caption, 1 x empty caption.*a.png"):
        list_figures(tmp_path)


def test_max_figures_keeps_the_first(tmp_path: Path) -> None:
    for name in "cab":
        put(tmp_path, f"{name}.png", 1, name)
    assert list(listed(tmp_path, max_figures=2)[0]) == ["a.png", "b.png"]


def test_a_figure_that_went_away_is_rejected(tmp_path: Path) -> None:
    path = put(tmp_path, "a.png", 1, "x")
    refs, _ = list_figures(tmp_path)
    path.unlink()
    with pytest.raises(RejectedFigure, match="^unreadable: No such file"):
        load_figure(refs[0])


def test_rejections_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    rejections = [Rejection("α.png", "set/α.png", "too small: 1 x 9 px"), Rejection("b\ud800", "b", "truncated: x")]
    write_rejected(tmp_path / "deep" / "rejected.jsonl", rejections)
    lines = (tmp_path / "deep" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[1])["reason"] == "truncated: x"
    assert list(json.loads(lines[0]).values()) == ["α.png", "set/α.png", "too small: 1 x 9 px"]

    def failing() -> Any:
        yield rejections[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rejected(tmp_path / "deep" / "rejected.jsonl", failing())
    assert (tmp_path / "deep" / "rejected.jsonl").read_text(encoding="utf-8").splitlines() == lines


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of real figures is not here")
def test_real_figures_are_all_listed_and_read() -> None:
    refs, rejected = list_figures(CORPUS)
    rows = [json.loads(line) for line in (CORPUS / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {ref.id: ref.caption for ref in refs} == {row["file_name"]: row["caption"].strip() for row in rows}
    assert len(refs) == 432 and not rejected
    assert list_figures(CORPUS / "captions.jsonl")[0] == refs
    for ref in refs:
        picture = load_figure(ref)
        assert picture.mode == "RGB" and min(picture.size) >= 32


# -- what lists say of their rows ----------------------------------------------------------------------
def published(folder: Path) -> Path:
    """A list as published: splits, tiers, buckets, edits beside figures to draw."""
    rows = []
    for number, (split, tier, source) in enumerate(
        [("gen_768", "high", None), ("gen_768", "low", None), ("gen_1024", "high", None), ("edit_1024", "high", "0.png")]
    ):
        put(folder, f"{number}.png", number)
        rows.append({"split": split, "quality_tier": tier, "bucket_w": 768, "bucket_h": 768, "source_image_path": source,
                     "target_image_path": f"{number}.png", "caption": f"caption {number}", "is_tikz": number == 2})  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    return folder


def test_several_splits_are_refused_until_one_is_chosen_by_name(tmp_path: Path) -> None:
    published(tmp_path)
    with pytest.raises(UserError, match=r"several splits: gen_768 \(2\), gen_1024 \(1\), edit_1024 \(1\). .*split='gen_768'"):
        list_figures(tmp_path)
    refs, rejected = list_figures(tmp_path / "metadata.parquet", where={"split": "gen_768"})
    assert [ref.id for ref in refs] == ["0.png", "1.png"] and refs[0].bucket == (768, 768)
    assert {r.reason.split(":")[0] for r in rejected} == {"split"} and len(rejected) == 2
    refs, rejected = list_figures(tmp_path, where={"split": ["gen_1024", "edit_1024"], "is_tikz": True})
    assert [ref.id for ref in refs] == ["2.png"]
    refs, rejected = list_figures(tmp_path, where={"split": ["gen_1024", "edit_1024"]})
    assert [(ref.id, [made_of.id for made_of in ref.references]) for ref in refs] == [("2.png", []), ("3.png", ["0.png"])]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "folder"])
def test_a_filter_that_finds_no_column_is_an_error(kind: str, tmp_path: Path) -> None:
    put(tmp_path, "a.png", 1, "a caption")
    rows = [{"image_path": "a.png", "caption": "a caption"}]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    elif kind == "jsonl":
        (tmp_path / "list.jsonl").write_text(json.dumps(rows[0]))
    elif kind == "csv":
        (tmp_path / "list.csv").write_text("image_path,caption\na.png,a caption\n")
    source = tmp_path if kind == "folder" else tmp_path / f"list.{kind}"
    with pytest.raises(UserError, match="encode.min_quality = 'high': .* has no column quality or quality_tier"):
        list_figures(source, min_quality="high")
    with pytest.raises(UserError, match="encode.where = {'split': 'x'}: .* has no column split"):
        list_figures(source, where={"split": "x"})


@pytest.mark.parametrize("column", ["quality", "quality_tier"])
def test_a_least_quality_reads_the_column_that_is_there(column: str, tmp_path: Path) -> None:
    for number, tier in enumerate(["low", "medium", "high"]):
        put(tmp_path, f"{number}.png", number)
        with (tmp_path / "list.jsonl").open("a") as file:
            file.write(json.dumps({"path": f"{number}.png", "text": f"t{number}", column: tier}) + "\n")
    refs, rejected = list_figures(tmp_path / "list.jsonl", min_quality="medium")
    assert [ref.id for ref in refs] == ["1.png", "2.png"] and rejected[0].reason == "quality: low, under encode.min_quality"


# -- captions beside pictures --------------------------------------------------------------------------
def test_lines_of_captions_end_as_on_unix(tmp_path: Path) -> None:
    put(tmp_path, "a.png", 1, "")
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\r\n")
    assert listed(tmp_path)[0] == {"a.png": "one\ntwo\nthree"}


@pytest.mark.parametrize("name", ["a.TXT", "a.Txt", "a.caption", "a.CAPTION", "a.JSON"])
def test_caption_files_and_pictures_are_known_by_extensions_in_any_case(name: str, tmp_path: Path) -> None:
    put(tmp_path, "a.PnG", 1)
    (tmp_path / name).write_text('{"caption": "words"}' if name.endswith("JSON") else "words")
    assert listed(tmp_path) == ({"a.PnG": "words"}, {})


def test_pictures_that_share_a_caption_file_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "0.png", 1, "one caption")
    put(tmp_path, "0.jpg", 2)
    put(tmp_path, "1.png", 3, "another")
    assert listed(tmp_path)[0] == {"0.png": "one caption", "0.jpg": "one caption", "1.png": "another"}
    assert "1 caption(s) lie beside several pictures" in caplog.text and "0.txt beside 0.jpg, 0.png" in caplog.text


# -- damaged Arrow files -------------------------------------------------------------------------------
def test_damaged_arrow_files_are_refused_with_a_reason_and_never_end_the_process(tmp_path: Path) -> None:
    """Offsets in them are trusted by readers: of 400 damaged ones, 8 and more ended the process by SIGSEGV."""
    program = """
import random, sys
from pathlib import Path
from OpenSciDraw.figures.listing import list_figures, load_figure, RejectedFigure
from OpenSciDraw.errors import UserError
file, whole, rng = Path(sys.argv[1]), Path(sys.argv[1]).read_bytes(), random.Random(int(sys.argv[2]))
for turn in range(200):
    data = bytearray(whole)
    for _ in range(rng.choice([1, 4, 16])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    damaged = file.with_name(f"{turn}.arrow")
    damaged.write_bytes(data if rng.random() < 0.8 else data[: rng.randrange(len(data))])
    try:
        for ref in list_figures(damaged)[0]:
            try:
                load_figure(ref)
            except RejectedFigure:
                pass
    except UserError:
        pass
    damaged.unlink()
"""
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([{"bytes": picture_bytes(n), "path": f"{n}.png"} for n in range(20)], picture),
                      "caption": pa.array([f"caption {n} " * 5 for n in range(20)])})  # fmt: skip
    for new in (pa.ipc.new_stream, pa.ipc.new_file):
        with pa.OSFile(str(tmp_path / "whole"), "wb") as sink, new(sink, table.schema) as writer:
            for batch in table.to_batches(5):
                writer.write_batch(batch)
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "whole"), "3"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
