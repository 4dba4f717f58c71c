"""WebDataset tars: figures by their names up to the first dot, read by their place, and nothing else believed."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.listing import RejectedFigure, list_figures, load_figure
from OpenSciDraw.figures.refs import SpanRef


def png(color: str = "red", size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def make_tar(path: Path, files: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_files_of_one_name_are_one_figure_in_any_order(format: int, tmp_path: Path) -> None:
    long = "d/" + "n" * 95 if format == tarfile.USTAR_FORMAT else "d/" + "n" * 150  # names of several headers
    make_tar(tmp_path / "s-0.tar", [
        ("a.txt", b" a red box\r\n"), ("a.png", png()), ("b.json", json.dumps({"text": "blue"}).encode()), ("b.JPG", png("blue")),
        ("sub/a.png", png("green")), ("sub/a.txt", b"green"), ("a.cls", b"7"), (f"{long}.png", png("black")),
        (f"{long}.txt", b"far"),
    ], format)  # fmt: skip
    make_tar(tmp_path / "s-1.tar", [("a.png", png("white", (40, 80))), ("a.txt", b"white")], format)
    refs, rejected = list_figures(tmp_path)
    assert not rejected
    assert {ref.id: ref.caption for ref in refs} == {
        "s-0.tar#a.png": "a red box", "s-0.tar#b.JPG": "blue", "s-0.tar#sub/a.png": "green", f"s-0.tar#{long}.png": "far",
        "s-1.tar#a.png": "white",
    }  # fmt: skip
    assert {ref.id: load_figure(ref).getpixel((0, 0)) for ref in refs}["s-0.tar#sub/a.png"] == (0, 128, 0)
    assert load_figure(refs[-1]).size == (40, 80)
    (alone,) = list_figures(tmp_path / "s-1.tar")[0]
    assert alone.id == "s-1.tar#a.png" and isinstance(alone, SpanRef)


def test_sources_and_masks_belong_to_their_figure(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar", [
        ("x.mask.png", png("white")), ("x.source2.png", png("blue")), ("x.source.png", png("green")), ("x.png", png()),
        ("x.txt", b"Make it red."), ("lost.mask.png", png()), ("plain.png", png()), ("plain.txt", b"plain"),
    ])  # fmt: skip
    refs, rejected = list_figures(tar)
    assert [ref.id for ref in refs] == ["x.tar#plain.png", "x.tar#x.png"]
    assert [r.id for r in refs[1].references] == ["x.tar#x.source.png", "x.tar#x.source2.png"]
    assert refs[1].mask is not None and load_figure(refs[1].mask).getpixel((0, 0)) == (255, 255, 255)
    assert refs[0].mask is None and not refs[0].references
    assert [(r.id, r.reason.split(":")[0]) for r in rejected] == [("x.tar#lost.mask.png", "no caption")]


def test_what_is_no_figure_is_named_with_the_reason(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        def put(name: str, data: bytes = b"", **kind: object) -> None:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            for key, value in kind.items():
                setattr(entry, key, value)
            tar.addfile(entry, io.BytesIO(data))

        put("ok.png", png())
        put("ok.txt", b"fine")
        put("../../etc/up.png", png())
        put("../../etc/up.txt", b"up")
        put("/etc/root.png", png())
        put("/etc/root.txt", b"root")
        put("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        put("hard.png", type=tarfile.LNKTYPE, linkname="ok.png")
        put("fifo.png", type=tarfile.FIFOTYPE)
        put("empty.png")
        put("empty.txt", b"x")
        put("mute.png", png())
        put("._ok.png", b"macOS")
        put("v.svg", b"<svg/>")
        put("v.txt", b"x")
        put("ok.png", png("blue"))
        put("bytes.png", png())
        put("bytes.txt", b"\xff\xfe")
    before = sorted(os.listdir(tmp_path))
    refs, rejected = list_figures(tmp_path / "x.tar")
    assert {ref.caption for ref in refs} == {"fine", "up", "root"}  # names are names: nothing is written anywhere
    assert all(load_figure(ref).getpixel((0, 0)) == (255, 0, 0) for ref in refs)
    assert sorted(os.listdir(tmp_path)) == before
    reasons = {r.id.removeprefix("x.tar#"): r.reason.split(":")[0] for r in rejected}
    assert reasons == {
        "link.png": "not a file", "hard.png": "not a file", "fifo.png": "not a file", "empty.png": "empty file",
        "mute.png": "no caption", "v.svg": "unsupported format", "ok.png": "listed twice", "bytes.png": "caption not UTF-8",
    }  # fmt: skip


def test_a_damaged_tar_keeps_the_figures_before_the_damage(tmp_path: Path) -> None:
    files = [(f"{at}.{end}", data) for at in range(3) for end, data in (("png", png()), ("txt", b"c"))]
    whole = make_tar(tmp_path / "whole.tar", files)
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        third = tar.getmember("2.png")
    whole.unlink()
    (tmp_path / "cut.tar").write_bytes(data[: third.offset_data + 10])
    refs, rejected = list_figures(tmp_path)
    assert [ref.id for ref in refs] == ["cut.tar#0.png", "cut.tar#1.png"]
    assert [r.reason.split(":")[0] for r in rejected] == ["damaged tar"]
    for junk in (b"", b"junk" * 1000):
        (tmp_path / "cut.tar").write_bytes(junk)
        with pytest.raises(UserError, match="none of 1 figures is usable|holds no figures"):
            list_figures(tmp_path)


def test_a_header_that_asks_for_all_memory_is_refused(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.XHDTYPE, 1 << 32
    with (tmp_path / "bomb.tar").open("wb") as file:
        file.write(entry.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(1 << 32)  # sparse: it takes no room
    with pytest.raises(UserError, match="damaged tar: a header of"):
        list_figures(tmp_path / "bomb.tar")


def test_a_compressed_tar_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b")
    make_tar(tmp_path / "y.tar", [("a.png", png()), ("a.txt", b"a")])
    assert [(r.id, r.reason.split(":")[0]) for r in list_figures(tmp_path)[1]] == [("x.tar.gz", "compressed tar")]


def test_a_tar_that_shrank_since_it_was_listed_gives_no_wrong_picture(tmp_path: Path) -> None:
    (ref,) = list_figures(make_tar(tmp_path / "x.tar", [("a.txt", b"a"), ("a.png", png())]))[0]
    os.truncate(tmp_path / "x.tar", 1600)
    with pytest.raises(RejectedFigure, match="truncated"):
        load_figure(ref)
