"""Papers are found under stable ids wherever they lie, and no archive writes outside, without bound, or half."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from OpenSciDraw.errors import UserError
from OpenSciDraw.prepare.archives import unpack
from OpenSciDraw.prepare.papers import PaperSource, RejectedPaper, find_papers
from OpenSciDraw.prepare.settings import Limits

LIMITS = Limits.model_validate({})
TEX = rb"\documentclass{article}\begin{document}Words.\end{document}"


def tar(files: dict[str, bytes], members: Iterator[tarfile.TarInfo] | None = None, mode: str = "w:gz", **options: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in members or ():
            archive.addfile(member)
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def bulk(path: Path, members: dict[str, bytes]) -> Path:
    path.write_bytes(tar(members, iter([]), mode="w"))
    return path


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(TEX)


def ids(*sources: Path) -> list[str]:
    papers, _ = find_papers(sources)
    names = [paper.paper_id for paper in papers]
    assert names == sorted(names) and len(set(names)) == len(names)
    return names


def unpacked(data: bytes, tmp_path: Path, **limits: int) -> tuple[dict[str, bytes], list[str]]:
    (tmp_path / "paper").write_bytes(data)
    root, notes = unpack(PaperSource("paper", tmp_path / "paper"), tmp_path / "work" / "source", LIMITS.model_copy(update=limits))
    assert root == tmp_path / "work" / "source"
    for path in tmp_path.rglob("*"):
        assert path.is_relative_to(root) or path in (tmp_path / "paper", tmp_path / "work"), f"{path} lies outside"
        assert path.is_dir() or stat.S_ISREG(path.lstat().st_mode)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}, notes


# -- finding ---------------------------------------------------------------------------------------
def test_eprints_at_any_depth_have_their_arxiv_ids(tmp_path: Path) -> None:
    put(tmp_path, "1501/1501.01694.gz", "1501/1501.01695.tar.gz", "a/b/c/2301.00001v2", "hep-th/hep-th9901001.gz")
    put(tmp_path, "math.GT0309136.tgz", "2302.00001.pdf", "notes.txt", "pictures/plot.pdf", "mine.tar.gz", ".cache/1501.09999.gz")
    assert ids(tmp_path) == [
        "1501.01694", "1501.01695", "2301.00001", "2302.00001", "hep-th9901001", "math.GT0309136", "mine"
    ]  # fmt: skip


def test_a_folder_with_tex_is_one_paper_and_a_folder_without_is_a_pile(tmp_path: Path) -> None:
    put(tmp_path, "one/main.tex", "one/sections/intro.tex", "one/data.gz", "deep/er/two/paper.TEX", "2301.00001/x.tex")
    put(tmp_path, "1501.01694.gz", "checkout/.git/HEAD", "checkout/text/ms.tex", "checkout/figures/plot.pdf", "empty/readme.txt")
    assert ids(tmp_path) == ["1501.01694", "2301.00001", "checkout", "deep/er/two", "one"]
    assert ids(tmp_path / "one") == ["one"] == ids(tmp_path / "one" / "main.tex")
    papers, _ = find_papers([tmp_path / "checkout"])
    assert papers == [PaperSource("checkout", tmp_path / "checkout")]


def test_a_pile_with_eprints_and_a_stray_tex_file_stays_a_pile(tmp_path: Path) -> None:
    put(tmp_path, "notes.tex", "1501.01694.gz", "1501.01695.gz")
    assert ids(tmp_path) == ["1501.01694", "1501.01695"]


def test_the_newest_version_with_source_counts_and_the_others_are_named(tmp_path: Path) -> None:
    put(tmp_path, "a/2301.00001v1.gz", "b/2301.00001v3.gz", "c/2301.00001v4.pdf")
    papers, dropped = find_papers([tmp_path, tmp_path / "b" / "2301.00001v3.gz"])
    assert [(p.paper_id, p.path.name) for p in papers] == [("2301.00001", "2301.00001v3.gz")]
    assert [Path(drop.source).name for drop in dropped] == ["2301.00001v1.gz", "2301.00001v4.pdf"]
    assert all("2301.00001v3.gz is used" in drop.reason for drop in dropped)


def test_papers_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    put(tmp_path, "x/a/main.tar.gz", "y/a/main.tar.gz", "z/main.tar.gz", "a/main/paper.tex", "a/other.gz")
    places = [tmp_path / name for name in "xyz"]
    assert ids(*places) == [f"{tmp_path.name}/z/main", "x/a/main", "y/a/main"]
    put(tmp_path, "q/b/p/x.tex", "r/b/p/x.tex", "q/b.tar.gz", "q/b/b.gz")
    assert len(ids(tmp_path / "q", tmp_path / "r")) == 4  # `ids` checks that they differ


def test_ids_are_the_same_in_any_order_and_for_any_sub_pile(tmp_path: Path) -> None:
    put(tmp_path, *(f"{n % 3}/2301.{n:05d}.gz" for n in range(30)))
    assert ids(*(tmp_path / str(n) for n in (2, 0, 1))) == ids(tmp_path)
    assert set(ids(tmp_path / "1")) < set(ids(tmp_path))


def test_file_names_that_are_not_utf8_become_text(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.tar.gz"
    with open(path, "wb") as file:
        file.write(tar({"main.tex": TEX}))
    papers, _ = find_papers([tmp_path])
    assert papers[0].paper_id == r"caf\udce9" and papers[0].name.encode()
    assert unpack(papers[0], tmp_path / "source", LIMITS)[0].joinpath("main.tex").read_bytes() == TEX


def test_linked_files_are_papers_and_linked_folders_are_not_followed(tmp_path: Path) -> None:
    put(tmp_path, "blobs/0123", "pile/readme")
    (tmp_path / "pile" / "1501.01694.gz").symlink_to("../blobs/0123")
    (tmp_path / "pile" / "circle").symlink_to(tmp_path)
    (tmp_path / "pile" / "1501.00002.gz").symlink_to("nowhere")
    assert ids(tmp_path / "pile") == ["1501.01694"]


def test_a_source_that_is_not_there_or_holds_no_paper_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no source"):
        find_papers([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="No paper in"):
        find_papers([tmp_path])


def test_twenty_thousand_files_are_listed_in_seconds(tmp_path: Path) -> None:
    for month in range(20):
        (tmp_path / str(month)).mkdir()
        for number in range(1000):
            os.mknod(tmp_path / str(month) / f"{2000 + month}.{number:05d}.gz")
    start = time.monotonic()
    assert len(find_papers([tmp_path])[0]) == 20_000
    assert time.monotonic() - start < 3


# -- bulk archives -----------------------------------------------------------------------------------
def test_members_of_a_bulk_archive_are_papers_read_in_place(tmp_path: Path) -> None:
    members = {f"1501/1501.0000{n}.gz": tar({"main.tex": TEX + b"%d" % n}) for n in range(3)}
    members |= {"1501/1501.00007.gz": gzip.compress(TEX), "1501/1501.00008.pdf": b"%PDF-1.5"}
    papers, dropped = find_papers([bulk(tmp_path / "arXiv_src_1501_001.tar", members)])
    assert [p.paper_id for p in papers] == ["1501.00000", "1501.00001", "1501.00002", "1501.00007", "1501.00008"] and not dropped
    for number in range(3):
        root, _ = unpack(papers[number], tmp_path / str(number), LIMITS)
        assert (root / "main.tex").read_bytes() == TEX + b"%d" % number
    assert (unpack(papers[3], tmp_path / "3", LIMITS)[0] / "main.tex").read_bytes() == TEX
    with pytest.raises(RejectedPaper, match="PDF only"):
        unpack(papers[4], tmp_path / "4", LIMITS)


def test_a_project_in_a_tar_is_no_bulk_archive(tmp_path: Path) -> None:
    bulk(tmp_path / "mine.tar", {"0001/data.gz": b"", "main.tex": TEX})
    assert find_papers([tmp_path])[0] == [PaperSource("mine", tmp_path / "mine.tar")]


def test_of_a_damaged_bulk_archive_the_papers_before_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = bulk(tmp_path / "bulk.tar", {f"1501/1501.0000{n}.gz": tar({"main.tex": TEX}) for n in range(5)})
    whole = path.read_bytes()
    path.write_bytes(whole[:600])  # inside of the first member
    (paper,), _ = find_papers([path])
    with pytest.raises(RejectedPaper, match="damaged archive"):
        unpack(paper, tmp_path / "work", LIMITS)
    path.write_bytes(whole[:1024] + b"rubbish".ljust(512) + whole[1536:])
    assert len(find_papers([path])[0]) == 1
    assert "damaged after byte 1024" in caplog.text


def test_a_hostile_bulk_header_ends_the_search(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("1501/1501.00001.gz").tobuf())
    header[124:136] = b"\xff" + (-1024).to_bytes(11, "big", signed=True)  # back to itself
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    (tmp_path / "bulk.tar").write_bytes(bytes(header) * 3)
    assert ids(tmp_path) == ["bulk"]


# -- unpacking -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("data", [
    tar({"main.tex": TEX}), tar({"main.tex": TEX}, mode="w"), gzip.compress(TEX), TEX, gzip.compress(gzip.compress(TEX)),
    tar({"main.tex": TEX}, format=tarfile.PAX_FORMAT), gzip.compress(tar({"main.tex": TEX})),
], ids=["tar.gz", "tar", "tex.gz", "tex", "tex.gz.gz", "pax", "tar.gz.gz"])  # fmt: skip
def test_an_eprint_of_every_form_is_unpacked(data: bytes, tmp_path: Path) -> None:
    assert unpacked(data, tmp_path) == ({"main.tex": TEX}, [])


def test_names_that_lead_out_links_and_devices_are_left_out_and_noted(tmp_path: Path) -> None:
    names = ("/etc/evil", "../evil", "a/../../evil", "..\\evil", "C:\\evil", "a/../b.tex")
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
    members = (special(f"special{n}", kind, "/etc/passwd") for n, kind in enumerate(kinds))
    files, notes = unpacked(tar({name: b"evil" for name in names} | {"main.tex": TEX}, members), tmp_path)
    assert files == {"main.tex": TEX}
    reasons = [note.partition(": ")[2] for note in notes]
    assert reasons == ["it leads out of the archive"] * len(names) + ["not a regular file"] * len(kinds)


def test_nothing_is_written_through_a_link_or_over_a_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    archive = tar({}, iter([special("a", tarfile.SYMTYPE, str(outside)), special("d", tarfile.DIRTYPE)]))
    with tarfile.open(fileobj=io.BytesIO(archive)) as first:
        members = list(first)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as target:
        for member in members:
            target.addfile(member)
        for name in ("a/b.tex", "d/c.tex", "d", "d/c.tex/e.tex", "main.tex", "x" * 300, "d/c.tex"):
            info = tarfile.TarInfo(name)
            info.size = 3
            target.addfile(info, io.BytesIO(b"abc"))
    files, notes = unpacked(buffer.getvalue(), tmp_path)
    assert files == {"a/b.tex": b"abc", "d/c.tex": b"abc", "main.tex": b"abc"}
    assert not outside.exists() and len(notes) == 4


def test_of_two_files_of_a_name_the_later_counts(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for data in (b"the first, longer text", b"second"):
            info = tarfile.TarInfo("main.tex")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert unpacked(buffer.getvalue(), tmp_path)[0] == {"main.tex": b"second"}


def test_files_that_no_figure_needs_are_not_written(tmp_path: Path) -> None:
    kept = {"main.tex": TEX, "a.bbl": b"x", "a.eps.gz": b"x", "fig/a.PDF": b"x", "data.dat": b"x", "noextension": b"x"}
    others = {"movie.mp4": b"x", "model.pth": b"x", ".git/config": b"x", "code.tar.gz": b"x"}
    assert unpacked(tar(kept | others), tmp_path)[0] == kept


def zeros(size: int) -> bytes:
    """A gzip file of `size` zeros."""
    packer = zlib.compressobj(wbits=31)
    return b"".join(packer.compress(bytes(2**24)) for _ in range(size // 2**24)) + packer.flush()


def sparse(size: int) -> bytes:
    """A tar of one file that claims `size` bytes and ends there."""
    member = tarfile.TarInfo("large.tex")
    member.size = size
    return member.tobuf()


def empty_members(count: int) -> bytes:
    return gzip.compress(b"".join(tarfile.TarInfo(f"{n}.tex").tobuf(tarfile.USTAR_FORMAT) for n in range(count)) + bytes(1024), 1)


@pytest.mark.parametrize("data, limits, reason", [
    (b"%PDF-1.4 ...", {}, "^no source: the paper is a PDF only"),
    (gzip.compress(b"%PDF-1.4"), {}, "PDF only"),
    (gzip.compress(b"%!PS-Adobe-2.0"), {}, "PostScript only"), (b"", {}, "^empty file"), (gzip.compress(b""), {}, "^empty file"),
    (b"\x7fELF\0\0\0", {}, "^unknown format"),
    (gzip.compress(gzip.compress(gzip.compress(TEX))), {}, "^nested archive"),
    (tar({"main.tex": TEX * 100})[:-50], {}, "^damaged archive"),
    (tar({"a.tex": TEX * 100}, mode="w")[:1000], {}, "^damaged archive"),
    (gzip.compress(TEX)[:-8] + b"\0" * 8, {}, "^damaged archive"), (gzip.compress(TEX)[:10] + b"\xff" * 30, {}, "^damaged archive"),
    (gzip.compress(tar({"main.tex": TEX}, mode="w") + bytes(2**20))[:-8] + b"\0" * 8, {}, "^damaged archive"),
    (tar({f"{n}.tex": b"" for n in range(11)}), {"files": 10}, "^too many files: more than 10"),
    (tar({"a.tex": b"x" * 1001}), {"file_bytes": 1000}, "^too large: 'a.tex' has more than 1000 bytes"),
    (tar({"a.tex": b"x" * 600, "b.tex": b"y" * 600}, mode="w"), {"unpacked_bytes": 1000}, "^too large: more than 1000 bytes"),
    (tar({"a.mp4": b"x" * 2**20}), {"unpacked_bytes": 2**19}, "^too large: a compressed file grows beyond"),
])  # fmt: skip
def test_what_cannot_be_used_is_rejected_with_its_reason(data: bytes, limits: dict[str, int], reason: str, tmp_path: Path) -> None:
    with pytest.raises(RejectedPaper, match=reason):
        unpacked(data, tmp_path, **limits)


@pytest.mark.parametrize("make, limits, reason", [
    (lambda: gzip.compress(sparse(2**40)), {}, "damaged archive|too large"),
    (lambda: zeros(2**31), {"unpacked_bytes": 2**26}, "too large|unknown format"),
    (lambda: gzip.compress(sparse(2**31) + bytes(2**10)), {"file_bytes": 2**20}, "damaged archive|too large"),
    (lambda: gzip.compress(b"%" * 2**21) + zeros(2**27), {"file_bytes": 2**22}, "too large: 'main.tex'"),
    (lambda: empty_members(100_000), {}, "too many files: more than 20000"),
], ids=["a tebibyte claimed", "2 GiB of zeros", "2 GiB claimed", "a bomb that starts as TeX", "100000 files"])  # fmt: skip
def test_bombs_end_at_their_limit_and_soon(make, limits: dict[str, int], reason: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = make()
    start = time.monotonic()
    with pytest.raises(RejectedPaper, match=reason):
        unpacked(data, tmp_path, **limits)
    assert time.monotonic() - start < 10
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.tex")) <= limits.get("file_bytes", 0)


def test_a_zip_is_unpacked_like_a_tar_and_its_bombs_links_and_passwords_are_not(tmp_path: Path) -> None:
    def package(write) -> bytes:  # type: ignore[no-untyped-def]
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("main.tex", TEX)
            write(archive)
        return buffer.getvalue()

    link = zipfile.ZipInfo("link.tex")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16

    def hostile(archive: zipfile.ZipFile) -> None:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("../evil.tex", "x")

    files, notes = unpacked(package(hostile), tmp_path)
    assert files == {"main.tex": TEX} and len(notes) == 2
    locked = bytearray(package(lambda _: None))
    locked[6] |= 1
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a").mkdir()
    assert unpacked(bytes(locked), tmp_path / "a") == ({}, ["left out 'main.tex': not a regular file"])
    (tmp_path / "b").mkdir()
    with pytest.raises(RejectedPaper, match="too large: 'zeros.tex'"):
        unpacked(package(lambda archive: archive.writestr("zeros.tex", bytes(2**24))), tmp_path / "b", file_bytes=2**22)
    (tmp_path / "c").mkdir()
    with pytest.raises(RejectedPaper, match="damaged archive"):
        unpacked(package(lambda _: None)[:-30], tmp_path / "c")


def test_a_zip_that_names_a_place_outside_of_itself_is_a_damaged_archive(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("main.tex", TEX)
    for number, (at, offset) in enumerate([(42, 2**31), (42, 2**32 - 2), (-6, 2**31)]):  # of the first file; of the directory
        data = bytearray(buffer.getvalue())
        place = data.index(b"PK\x01\x02") + at if at > 0 else len(data) + at
        data[place : place + 4] = offset.to_bytes(4, "little")
        (tmp_path / str(number)).mkdir()
        with pytest.raises(RejectedPaper, match="damaged archive"):
            unpacked(bytes(data), tmp_path / str(number))


def test_a_folder_is_used_in_place_within_its_number_of_files(tmp_path: Path) -> None:
    put(tmp_path / "p", "main.tex", "a.tex", ".git/objects/1", ".git/objects/2")
    source = PaperSource("p", tmp_path / "p")
    assert unpack(source, tmp_path / "work", LIMITS.model_copy(update={"files": 2})) == (tmp_path / "p", [])
    assert not (tmp_path / "work").exists()
    with pytest.raises(RejectedPaper, match="too many files: more than 1"):
        unpack(source, tmp_path / "work", LIMITS.model_copy(update={"files": 1}))
