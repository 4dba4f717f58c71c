"""`scienceflow prepare` from e-prints to splits: hostile papers cost only themselves, a killed run goes on, splits are by paper."""

from __future__ import annotations

import ctypes
import errno
import gzip
import io
import json
import os
import random
import signal
import string
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO, SHARED
from PIL import Image, ImageDraw

from OpenSciDraw.cli import main as scienceflow
from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.listing import list_figures, load_figure
from OpenSciDraw.prepare.archives import unpack
from OpenSciDraw.prepare.filters.duplicates import representatives
from OpenSciDraw.prepare.filters.language import language_of
from OpenSciDraw.prepare.filters.measure import perceptual_hash
from OpenSciDraw.prepare.isolation import Crashed, TooMuch, run_isolated
from OpenSciDraw.prepare.papers import PaperSource, RejectedPaper, find_papers
from OpenSciDraw.prepare.pictures.picture import RejectedPicture
from OpenSciDraw.prepare.pictures.render import render
from OpenSciDraw.prepare.pipeline import parse_settings, plan, prepare
from OpenSciDraw.prepare.select import select
from OpenSciDraw.prepare.settings import Limits, PrepareSettings

LIMITS = Limits.model_validate({})
KINDS = ["diagram", "plot", "photo", "table"]  # what a drawn figure of 256 px is taken for is not what is tested here
CELERITE = SHARED / "corpora" / "latex" / "celerite"


def settings(**changes: object) -> PrepareSettings:
    return PrepareSettings.model_validate({"num_workers": 2, "papers_per_shard": 2, "kinds": KINDS, **changes})


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    draw_figure(3, seed, 256).image.save(buffer, "PNG")
    return buffer.getvalue()


def tex(*captions: str) -> str:
    figures = "".join(rf"\begin{{figure}}\includegraphics{{f{n}}}\caption{{{c}}}\end{{figure}}" for n, c in enumerate(captions))
    return rf"\documentclass{{article}}\begin{{document}}{figures}\end{{document}}"


def tar(files: dict[str, bytes], *, compress: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if compress else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def paper(number: int, count: int = 1) -> bytes:
    captions = [
        f"An overview of the proposed method number {number} with figure {n} of several in the paper." for n in range(count)
    ]
    return tar({"main.tex": tex(*captions).encode(), **{f"f{n}.png": png(10 * number + n) for n in range(count)}})


@pytest.fixture
def pile(tmp_path: Path) -> Path:
    """Six good papers of two figures each, and bad ones between them."""
    folder = tmp_path / "pile"
    folder.mkdir()
    for number in range(6):
        (folder / f"2101.0000{number}").write_bytes(paper(number, 2))
    (folder / "2102.00001.pdf").write_bytes(b"%PDF-1.4 no source")
    (folder / "2102.00002.gz").write_bytes(gzip.compress(tex("A paper of one file without its picture").encode()))
    (folder / "2102.00003.tar.gz").write_bytes(paper(9)[:2000])
    (folder / "2102.00004.gz").write_bytes(gzip.compress(rb"\documentclass{x}\def\a{\a\a}\a"))
    return folder


# -- sources -------------------------------------------------------------------------------------
def test_sources_of_every_form_are_found_once_under_their_ids(tmp_path: Path) -> None:
    (tmp_path / "1501").mkdir()
    for name in (
        "1501.00001.gz",
        "1501.00002v1.tar.gz",
        "1501.00002v3.tar.gz",
        "1501.00003.pdf",
        "1501.00004",
        "hep-th9901001.gz",
        "1501.00001.pdf",
    ):
        (tmp_path / "1501" / name).write_bytes(paper(1))
    (tmp_path / "project" / "sections").mkdir(parents=True)
    (tmp_path / "project" / "main.tex").write_text(tex("x"))
    (tmp_path / "project" / "sections" / "one.tex").write_text("x")
    (tmp_path / "checkout" / ".git").mkdir(parents=True)
    (tmp_path / "checkout" / "paper").mkdir()
    (tmp_path / "checkout" / "paper" / "p.tex").write_text(tex("x"))
    bulk = tar({f"1502/1502.0000{n}.gz": paper(n) for n in range(3)}, compress=False)
    (tmp_path / "arXiv_src_1502_001.tar").write_bytes(bulk)
    papers, dropped = find_papers([tmp_path])
    assert [p.paper_id for p in papers] == [
        "1501.00001", "1501.00002", "1501.00003", "1501.00004", "1502.00000", "1502.00001", "1502.00002", "checkout",
        "hep-th9901001", "project",
    ]  # fmt: skip
    assert papers[1].path.name == "1501.00002v3.tar.gz" and papers[0].path.suffix == ".gz"
    assert sorted(Path(d.source).name for d in dropped) == ["1501.00001.pdf", "1501.00002v1.tar.gz"]
    root, _ = unpack(papers[5], tmp_path / "out", LIMITS)
    assert (root / "f0.png").read_bytes() == png(10)
    with pytest.raises(UserError, match="No paper"):
        (tmp_path / "empty").mkdir()
        find_papers([tmp_path / "empty"])


def test_no_member_of_an_archive_is_written_outside_or_as_a_link(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("../up.tex", "/abs.tex", "a/../../up2.tex", "main.tex", "x" * 300 + ".tex", "main.tex/under.tex"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
        for name, kind in (
            ("link.tex", tarfile.SYMTYPE),
            ("hard.tex", tarfile.LNKTYPE),
            ("dev", tarfile.CHRTYPE),
            ("fifo", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "p.tar.gz").write_bytes(buffer.getvalue())
    root, notes = unpack(PaperSource("p", tmp_path / "in" / "deep" / "p.tar.gz"), tmp_path / "in" / "deep" / "out", LIMITS)
    assert [p.name for p in root.rglob("*")] == ["main.tex"]
    assert not list(tmp_path.glob("up*")) and not list((tmp_path / "in").glob("up*")) and len(notes) == 9


@pytest.mark.parametrize("name, data, limit, reason", [
    ("a gzip bomb", gzip.compress(b"x" * 30_000_000), {"unpacked_bytes": 10_000_000}, "too large"),
    ("a tar of a large file", tar({"main.tex": b"x" * 3_000_000}), {"file_bytes": 1_000_000}, "too large: 'main.tex'"),
    ("100,000 files", None, {"files": 20_000}, "too many files: more than 20000"),
    ("a PDF", b"%PDF-1.5\n", {}, "no source: the paper is a PDF only"),
    ("a gzipped PDF", gzip.compress(b"%PDF-1.5\n"), {}, "no source"),
    ("a truncated archive", paper(1)[:3000], {}, "damaged archive"),
    ("noise", bytes(range(256)) * 40, {}, "unknown format"),
    ("gzips in a gzip", gzip.compress(gzip.compress(gzip.compress(b"x"))), {}, "nested archive"),
    ("nothing", b"", {}, "empty file"),
], ids=lambda value: value if isinstance(value, str) and " " in value else "")  # fmt: skip
def test_archives_that_cannot_be_used_are_rejected_with_a_reason(
    name: str, data: bytes | None, limit: dict[str, int], reason: str, tmp_path: Path
) -> None:
    data = data if data is not None else tar({f"{n}.tex": b"" for n in range(100_000)})
    (tmp_path / "paper.gz").write_bytes(data)
    with pytest.raises(RejectedPaper, match=reason):
        unpack(PaperSource("paper", tmp_path / "paper.gz"), tmp_path / "out", LIMITS.model_copy(update=limit))


def test_zip_archives_of_projects_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("main.tex", tex("x"))
        archive.writestr("../out.tex", "x")
    root, notes = unpack(PaperSource("p", tmp_path / "p.zip"), tmp_path / "o", LIMITS)
    assert [p.name for p in root.rglob("*")] == ["main.tex"] and len(notes) == 1


# -- isolation -----------------------------------------------------------------------------------
def double(value: int) -> int:
    return 2 * value


def sleep_with_child(path: str) -> None:
    child = subprocess.Popen(["sleep", "600"])
    Path(path).write_text(str(child.pid))
    time.sleep(600)


def hog(_: int) -> int:
    return sum(len(bytearray(1 << 24)) for _ in iter(lambda: _STORE.append(bytearray(1 << 26)) or 1, 0))


_STORE: list[bytearray] = []


def segfault(_: int) -> None:
    ctypes.string_at(0)


def fail(_: int) -> None:
    raise ValueError("a hostile\nmessage")


def fill_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")


def large(size: int) -> bytes:
    return b"x" * size


def test_what_happens_in_an_isolated_process_stays_there(tmp_path: Path) -> None:
    assert run_isolated(double, 21, seconds=30, memory_bytes=2**30) == 42
    assert len(run_isolated(large, 50_000_000, seconds=30, memory_bytes=2**30)) == 50_000_000
    with pytest.raises(TooMuch, match="memory limit"):
        run_isolated(hog, 0, seconds=30, memory_bytes=2**29)
    with pytest.raises(Crashed, match="SIGSEGV"):
        run_isolated(segfault, 0, seconds=30, memory_bytes=2**30)
    with pytest.raises(Crashed, match=r"ValueError: a hostile( |$)"):
        run_isolated(fail, 0, seconds=30, memory_bytes=2**30)
    with pytest.raises(OSError) as full:  # not Crashed: that would cost the paper, not the run
        run_isolated(fill_disk, 0, seconds=30, memory_bytes=2**30)
    assert full.value.errno == errno.ENOSPC
    start = time.monotonic()
    with pytest.raises(TooMuch, match="time limit: not done after 10 s"):  # most of it goes into importing this file
        run_isolated(sleep_with_child, str(tmp_path / "pid"), seconds=10, memory_bytes=2**30)
    assert time.monotonic() - start < 40
    child = int((tmp_path / "pid").read_text())
    time.sleep(0.3)
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_threads_isolate_side_by_side_and_a_process_costs_milliseconds() -> None:
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(run_isolated(abs, -n, seconds=60, memory_bytes=2**30)))
        for n in range(20)
    ]
    run_isolated(abs, 0, seconds=60, memory_bytes=2**30)
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(20))
    assert time.monotonic() - start < 8


# -- pictures ------------------------------------------------------------------------------------
def drawn(path: Path, tmp_path: Path, **options: object) -> Image.Image:
    picture = render(path, dpi=100, max_side=1000, limits=LIMITS, scratch=tmp_path / "scratch", **options)  # type: ignore[arg-type]
    assert Image.open(io.BytesIO(picture.data)).size == (picture.width, picture.height)
    return picture.image


def pdf(path: Path, width: float, height: float, pages: int = 1) -> Path:
    """Pages with a black square of 36 points, 72 points from the left and the bottom; page n is moved right by n points."""
    import pypdfium2
    import pypdfium2.raw as raw

    document = pypdfium2.PdfDocument.new()
    for number in range(pages):
        page = document.new_page(width, height)
        square = raw.FPDFPageObj_CreateNewRect(72 + number, 72, 36, 36)
        raw.FPDFPageObj_SetFillColor(square, 0, 0, 0, 255)
        raw.FPDFPath_SetDrawMode(square, raw.FPDF_FILLMODE_ALTERNATE, False)
        raw.FPDFPage_InsertObject(page, square)
        raw.FPDFPage_GenerateContent(page)
    document.save(path)
    return path


def test_a_pdf_is_drawn_at_its_dpi_and_cut_to_what_is_on_it(tmp_path: Path) -> None:
    image = drawn(pdf(tmp_path / "a.pdf", 400, 300, pages=2), tmp_path, page=2)
    assert 50 <= image.width <= 60 and 50 <= image.height <= 60  # 36 points at 100 dpi are 50 px, and a margin
    with pytest.raises(RejectedPicture, match="page 3 of 2"):
        drawn(tmp_path / "a.pdf", tmp_path, page=3)
    cut = drawn(tmp_path / "a.pdf", tmp_path, options="trim=90 0 0 0, clip")
    assert cut.width < 36  # half of the square is cut off


@pytest.mark.parametrize("data, reason", [
    (b"%PDF-1.5 rubbish", "damaged or encrypted PDF"), (b"\x89PNG\r\n\x1a\n rubbish", "damaged|truncated"), (b"rubbish", ""),
    (b"", "empty"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>", "refers to other files"),
    (b"<!DOCTYPE svg [<!ENTITY a 'x'>]><svg>&a;</svg>", "entities"), (b"<svg", "SVG"),
])  # fmt: skip
def test_broken_and_hostile_pictures_are_rejected(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(RejectedPicture, match=reason):
        drawn(tmp_path / "x", tmp_path)


def test_a_huge_page_is_drawn_within_the_largest_side(tmp_path: Path) -> None:
    assert max(drawn(pdf(tmp_path / "a.pdf", 14_000, 14_000), tmp_path).size) <= 1000


def test_bitmaps_stay_as_they_are_and_svg_lies_on_white(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(png(1))  # the name lies
    picture = render(tmp_path / "a.jpg", dpi=100, max_side=1000, limits=LIMITS, scratch=tmp_path)
    assert picture.data == png(1) and not picture.vector
    shrunk = render(tmp_path / "a.jpg", dpi=100, max_side=100, limits=LIMITS, scratch=tmp_path)
    assert max(shrunk.width, shrunk.height) == 100
    (tmp_path / "a.svg").write_text(
        "<svg xmlns='http://www.w3.org/2000/svg' width='96' height='96'><circle cx='48' cy='48' r='40' fill='red'/></svg>"
    )
    image = drawn(tmp_path / "a.svg", tmp_path)
    assert image.getpixel((0, 0)) == (255, 255, 255) and 80 <= image.width <= 100


# -- decisions -----------------------------------------------------------------------------------
def test_near_duplicates_are_those_that_brute_force_finds() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (1500, 32), dtype=np.uint8)
    for _ in range(400):
        source, copy = rng.integers(0, len(hashes), 2)
        hashes[copy] = hashes[source]
        for bit in rng.integers(0, 256, rng.integers(0, 16)):
            hashes[copy, bit // 8] ^= 1 << (bit % 8)
    identity = np.arange(len(hashes))
    identity[100:120] = identity[50:70]
    bits = np.unpackbits(hashes, axis=1)
    expected, kept, seen = np.zeros(len(hashes), dtype=int), [], {}
    for row in range(len(hashes)):
        near = (
            seen.get(identity[row])
            if identity[row] in seen
            else next((k for k in kept if (bits[row] != bits[k]).sum() <= 10), None)
        )
        expected[row] = seen[identity[row]] = row if near is None else near
        kept += [row] if near is None else []
    assert (representatives(identity, hashes, 10) == expected).all()


def test_the_perceptual_hash_survives_scaling_and_margins_and_tells_figures_apart() -> None:
    def bits(image: Image.Image) -> np.ndarray:
        return np.unpackbits(np.frombuffer(perceptual_hash(image), dtype=np.uint8))

    figures = [draw_figure(0, index, 512).image for index in range(30)]
    hashes = [bits(figure) for figure in figures]
    for figure, own in zip(figures, hashes, strict=True):
        scaled = figure.resize((figure.width * 4 // 3, figure.height * 4 // 3), Image.Resampling.BICUBIC)
        assert (bits(scaled) != own).sum() <= 24
    distances = [(a != b).sum() for n, a in enumerate(hashes) for b in hashes[:n]]
    assert min(distances) > 24


def rows(**columns: list[object]) -> pa.Table:
    count = len(next(iter(columns.values())))
    rng = np.random.default_rng(1)
    defaults: dict[str, list[object]] = {
        "paper_id": [f"p{n}" for n in range(count)], "width": [800] * count, "height": [600] * count, "panels": [1] * count,
        "parent_caption": [""] * count, "sha256": [f"{n:064x}" for n in range(count)],
        "phash": [rng.bytes(32) for _ in range(count)],
        "ink": [0.1] * count,
        "sharpness": [1.0] * count, "kind": ["diagram"] * count, "lossless": [True] * count, "language": ["en"] * count,
        "caption_words": [20] * count, "caption_chars": [120] * count,
    }  # fmt: skip
    table = pa.table({**defaults, **columns})
    return table.set_column(
        table.schema.get_field_index("phash"), "phash", pa.array(table.column("phash").to_pylist(), pa.binary(32))
    )


def test_each_filter_drops_what_it_should_and_counts_it() -> None:
    table = rows(
        caption_words=[1, *[20] * 8], caption_chars=[9, 9999, *[99] * 7], language=["en", "en", "fr", "und", *["en"] * 5],
        width=[800, 800, 800, 800, 60, 800, 800, 800, 800], height=[600, 600, 600, 600, 60, 90, 600, 600, 600],
        ink=[*[0.1] * 6, 0.0, 0.1, 0.1], kind=[*["diagram"] * 7, "photo", "plot"],
    )  # fmt: skip
    chosen = select(table, settings(min_side=64, kinds=["diagram", "plot"]))
    assert [chosen.reasons[reason].split(":")[0] for reason in chosen.reason] == [
        "caption", "caption", "language", "", "size", "aspect", "blank", "kind", "",
    ]  # fmt: skip
    assert sum(step.dropped for step in chosen.steps) == 7 and chosen.steps[0].came == 9


def test_duplicates_keep_the_first_and_a_dropped_row_stands_for_none() -> None:
    same = b"\x55" * 32
    table = rows(
        sha256=["a", "b", "a", "c", "b"],
        phash=[same, b"\x0f" * 32, same, b"\x54" + same[1:], b"\x0f" * 32],
        kind=["photo", *["plot"] * 4],
    )
    chosen = select(table, settings(kinds=["plot"]))
    assert [chosen.reasons[r].split(":")[0] for r in chosen.reason] == ["kind", "", "", "duplicate", "duplicate"]
    assert chosen.same_as.tolist() == [0, 1, 2, 2, 1]


def test_tiers_follow_caption_size_and_source() -> None:
    table = rows(
        caption_words=[20, 20, 5, 20, 10],
        panels=[1, 3, 1, 3, 1],
        parent_caption=["", "", "", "Parent", ""],
        lossless=[True, True, True, True, False],
    )
    chosen = select(table, settings())
    assert ["low medium high".split()[q] for q in chosen.quality] == ["high", "low", "low", "medium", "medium"]


def test_a_paper_is_in_one_split_and_stays_there_when_others_come() -> None:
    papers = [f"{n // 3}" for n in range(3000)]
    few, many = (select(rows(paper_id=papers[:count]), settings(test_share=0.1, validation_share=0.1)) for count in (600, 3000))
    assert (few.split == many.split[:600]).all()
    assert all(len(set(many.split[n : n + 3])) == 1 for n in range(0, 3000, 3))
    assert 0.07 < (many.split == 2).mean() < 0.13 and 0.07 < (many.split == 1).mean() < 0.13


@pytest.mark.parametrize("language, caption", [
    ("de", "Abbildung des vorgeschlagenen Verfahrens mit drei Stufen und einer Rückkopplung."),
    ("fr", "Schéma de la méthode proposée, avec trois étapes et une boucle de rétroaction."),
    ("ru", "Схема предложенного метода с тремя этапами и обратной связью."),
    ("en", "Overview of the proposed method, with three stages and a feedback loop."),
    ("und", "$x_i = \\sum_j y_{ij}$"),
])  # fmt: skip
def test_the_language_of_captions(language: str, caption: str) -> None:
    assert language_of(caption) == language


# -- the whole way -------------------------------------------------------------------------------
def test_a_pile_of_papers_becomes_figures_and_bad_papers_cost_only_themselves(pile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen = prepare([pile], out, settings(limits={"seconds": 20, "expansions": 10_000}, test_share=0.2))
    assert int(chosen.keep.sum()) == 12
    reasons = {line["id"]: line["reason"] for line in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}
    assert reasons["2102.00001"].startswith("no source") and reasons["2102.00003"].startswith("damaged archive")
    assert reasons["2102.00002/fig1"].startswith("file not found") and reasons["2102.00004"].startswith("no figure")
    tables = [pq.read_table(path) for path in sorted((out / "figures").rglob("*.parquet"))]
    table = pa.concat_tables(tables)
    assert table.num_rows == 12 and len(set(table.column("id").to_pylist())) == 12
    first = table.filter(pa.compute.equal(table.column("id"), "2101.00000/fig2")).to_pylist()[0]
    assert first["image"] == png(1) and first["caption"].startswith("An overview of the proposed method number 0 with figure 1")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["kept"] == 12 and sum(summary["splits"].values()) == 12 and summary["papers"]["read"] == 10
    card, sheet = (out / "README.md").read_text(), (out / "contact_sheet.html").read_text()
    assert "12 figures with captions from 6 papers" in card and sheet.count("<figure>") == 12 and "http" not in sheet
    assert not (out / ".work").exists()


def test_encode_reads_prepared_figures_by_their_ids(pile: Path, tmp_path: Path) -> None:
    prepare([pile], tmp_path / "out", settings(limits={"seconds": 20, "expansions": 10_000}))
    refs, rejected = list_figures(tmp_path / "out" / "figures")
    assert len(refs) == 12 and not rejected and refs[0].id == "2101.00000/fig1"
    table = pa.concat_tables([pq.read_table(path) for path in (tmp_path / "out" / "figures").rglob("*.parquet")])
    medium = {row["id"] for row in table.select(["id", "quality"]).to_pylist() if row["quality"] != "low"}
    assert {ref.id for ref in list_figures(tmp_path / "out" / "figures", min_quality="medium")[0]} == medium
    assert 0 < len(medium) < 12
    with pytest.raises(UserError, match="12 x quality"):  # they are small
        list_figures(tmp_path / "out" / "figures", min_quality="high")
    assert load_figure(refs[1]).size == Image.open(io.BytesIO(png(1))).size


def test_the_same_command_writes_nothing_anew_and_other_limits_extract_nothing_anew(pile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen = settings(limits={"seconds": 20, "expansions": 10_000})
    prepare([pile], out, chosen)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    prepare([pile], out, chosen)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")} == stamps
    again = prepare([pile], out, chosen.model_copy(update={"min_side": 200}))
    extracted = [path for path in stamps if path.parent.name == "extracted"]
    assert all(path.stat().st_mtime_ns == stamps[path] for path in extracted) and again.keep.sum() <= 12


def test_a_changed_paper_is_extracted_anew_and_only_its_shard(pile: Path, tmp_path: Path) -> None:
    chosen = settings(limits={"seconds": 20, "expansions": 10_000})
    papers, _ = find_papers([pile])
    before = plan(papers, tmp_path / "out", chosen)
    (pile / "2101.00003").write_bytes(paper(8, 2))
    after = plan(papers, tmp_path / "out", chosen)
    assert [a.digest == b.digest for a, b in zip(before, after, strict=True)] == [True, False, True, True, True]
    assert plan(papers, tmp_path / "out", settings(dpi=72))[0].digest != before[0].digest


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(pile: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "OpenSciDraw.cli", "prepare", str(pile), "--cfg_options", "papers_per_shard=2",
               "num_workers=1", f"kinds={KINDS}", "limits.seconds=20", "limits.expansions=10000", "--out"]  # fmt: skip
    subprocess.run([*command, str(tmp_path / "whole")], check=True, cwd=REPO, capture_output=True)
    running = subprocess.Popen([*command, str(tmp_path / "killed")], cwd=REPO, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "killed").glob("extracted/[0-9]*.parquet")) and running.poll() is None:
        time.sleep(random.uniform(0.01, 0.05))
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    subprocess.run([*command, str(tmp_path / "killed")], check=True, cwd=REPO, capture_output=True)

    def content(out: Path) -> dict[str, bytes]:
        return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.parquet"))}

    assert content(tmp_path / "whole") == content(tmp_path / "killed")


def test_a_caption_that_changed_beside_the_same_picture_reaches_the_figures(tmp_path: Path) -> None:
    source = tmp_path / "2101.00000"
    for caption in ("A caption of five words here.", "Another caption of six words here."):
        source.write_bytes(tar({"main.tex": tex(caption).encode(), "f0.png": png(1)}))
        prepare([source], tmp_path / "out", settings())
        table = pq.read_table(next((tmp_path / "out" / "figures").rglob("*.parquet")))
        assert table.column("caption").to_pylist() == [caption]


def test_a_program_that_was_missing_has_its_pictures_drawn_once_it_is_there(pile: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    papers, _ = find_papers([pile])
    digests = []
    for path in ("", os.environ["PATH"], str(program(tmp_path, "gs")), str(program(tmp_path, "pdflatex"))):
        monkeypatch.setenv("PATH", path)
        digests.append(plan(papers, tmp_path / "out", settings())[0].digest)
    assert digests[0] not in digests[2:] and digests[2] != digests[3]


def program(folder: Path, name: str) -> Path:
    path = folder / f"with_{name}" / name
    path.parent.mkdir()
    path.touch(mode=0o755)
    return path.parent


def test_what_is_wrong_with_a_source_that_was_read_is_named(tmp_path: Path) -> None:
    body = tex("A caption of five words here.").replace(r"\begin{document}", r"\begin{document}\input{gone}")
    (tmp_path / "2101.00000").write_bytes(tar({"main.tex": body.encode(), "f0.png": png(1), "../x": b""}))
    prepare([tmp_path / "2101.00000"], tmp_path / "out", settings())
    problems = [json.loads(line) for line in (tmp_path / "out" / "problems.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in problems] == ["2101.00000"] * 2
    assert "leads out of the archive" in problems[0]["problem"] and "input not found: 'gone'" in problems[1]["problem"]


def test_an_interrupted_run_ends_at_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    names = string.ascii_lowercase  # each macro twice the next: 2^25 expansions, which take minutes
    doubling = "".join(rf"\def\{name}{{\{after}\{after}}}" for name, after in zip(names, names[1:], strict=False))
    endless = rf"\documentclass{{x}}{doubling}\def\z{{}}\begin{{document}}\a"
    (tmp_path / "2101.00000").write_bytes(gzip.compress(endless.encode()))
    command = [sys.executable, "-m", "OpenSciDraw.cli", "prepare", str(tmp_path / "2101.00000"), "--out", str(tmp_path / "out"),
               "--cfg_options", "limits.expansions=1000000000", "limits.seconds=100"]  # fmt: skip
    running = subprocess.Popen(command, cwd=REPO, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "out").glob(".work/*/source/*")):
        assert running.poll() is None
        time.sleep(0.05)
    start = time.monotonic()
    running.send_signal(signal.SIGINT)
    running.wait(60)
    assert time.monotonic() - start < 15 and not (tmp_path / "out" / ".work").exists()


def test_licences_come_from_metadata_or_a_file_beside_the_source(pile: Path, tmp_path: Path) -> None:
    (tmp_path / "meta.jsonl").write_text('{"id": "2101.00001", "license": "http://creativecommons.org/licenses/by/4.0/"}\n')
    project = tmp_path / "pile" / "project"
    project.mkdir()
    (project / "main.tex").write_text(tex("A caption of a project with its own licence file here."))
    (project / "f0.png").write_bytes(png(77))
    (project / "LICENSE").write_text("The MIT License (MIT)\n\nMIT License\n")
    prepare(
        [pile], tmp_path / "out", settings(metadata=str(tmp_path / "meta.jsonl"), limits={"seconds": 20, "expansions": 10_000})
    )
    table = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "out" / "figures").rglob("*.parquet"))])
    licences = dict(zip(table.column("paper_id").to_pylist(), table.column("licence").to_pylist(), strict=True))
    assert (
        licences["2101.00001"].startswith("http://creativecommons")
        and licences["project"] == "MIT"
        and licences["2101.00000"] == ""
    )


def test_wrong_settings_and_places_are_refused_before_any_work(
    pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="there is no setting 'min_sid' of prepare. Did you mean min_side"):
        parse_settings(["min_sid=3"])
    with pytest.raises(UserError, match="dpi = 7"):
        parse_settings(["dpi=7"])
    assert parse_settings(["limits.seconds=5", "languages=[]"]).limits.seconds == 5
    assert scienceflow(["prepare", str(pile), "--out", str(pile / "out")]) == 2
    assert scienceflow(["prepare", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
    assert scienceflow(["prepare", str(pile), "--out", __file__]) == 2
    errors = capsys.readouterr().err
    assert "lies inside a source" in errors and "There is no source" in errors and "is a file" in errors


@pytest.mark.skipif(not CELERITE.exists(), reason="the corpus of LaTeX sources is not beside the repository")
def test_a_published_paper_gives_its_thirteen_figures(tmp_path: Path) -> None:
    chosen = prepare([CELERITE], tmp_path / "out", settings())
    table = pa.concat_tables([pq.read_table(path) for path in (tmp_path / "out" / "figures").rglob("*.parquet")])
    assert chosen.keep.sum() == table.num_rows == 13 and set(table.column("licence").to_pylist()) == {"MIT"}
    assert min(table.column("width").to_pylist()) > 500 and all(
        ImageDraw.Draw(Image.open(io.BytesIO(i))) for i in table.column("image").to_pylist()
    )
