"""Pictures of papers become PNG or JPEG without losing what is drawn; hostile and broken ones are rejected with a reason."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import struct
import subprocess
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image, ImageDraw

from OpenSciDraw.prepare.pictures.picture import Picture, RejectedPicture
from OpenSciDraw.prepare.pictures.render import crop_of, render
from OpenSciDraw.prepare.pictures.tikz import compile_tikz, find_tex_engine
from OpenSciDraw.prepare.settings import Limits

pytest.importorskip("pypdfium2", reason="needs the extra 'prepare'")
pytest.importorskip("resvg_py", reason="needs the extra 'prepare'")
LIMITS = Limits.model_validate({})
CELERITE = SHARED / "corpora" / "latex" / "celerite"
ghostscript = pytest.mark.skipif(shutil.which("gs") is None, reason="needs ghostscript (gs)")
tex = pytest.mark.skipif(find_tex_engine() is None, reason="needs a TeX engine (pdflatex)")
SVG = "<svg xmlns='http://www.w3.org/2000/svg' width='96' height='48' {}>{}</svg>"
SQUARE = "<rect x='24' y='12' width='48' height='24' fill='red'/>"


def drawn(tmp_path: Path, data: bytes | str | Path, *, dpi: int = 100, max_side: int = 1000, **options: object) -> Picture:
    path = data if isinstance(data, Path) else tmp_path / "picture"
    if not isinstance(data, Path):
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    limits = LIMITS.model_copy(update=options.pop("limits", {}))
    picture = render(path, dpi=dpi, max_side=max_side, limits=limits, scratch=tmp_path / "scratch", **options)  # type: ignore[arg-type]
    with Image.open(io.BytesIO(picture.data)) as image:
        assert image.format in ("PNG", "JPEG") and image.size == (picture.width, picture.height) and not image.has_transparency_data
    assert picture.image.mode == "RGB" and max(picture.image.size) <= max_side
    return picture


def pdf(content: str, box: str = "0 0 400 300", extra: str = "", trailer: str = "") -> bytes:
    """A PDF of one page; `content` is its drawing, `extra` more keys of the page."""
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        f"<< /Type /Page /Parent 2 0 R /MediaBox [{box}] /Contents 4 0 R {extra} >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
    ]  # fmt: skip
    parts, places = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        places.append(len(parts))
        parts += f"{number} 0 obj\n{text}\nendobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"trailer << /Size 5 /Root 1 0 R {trailer} >>\nstartxref\n{len(parts)}\n%%EOF"
    return parts + f"xref\n0 5\n0000000000 65535 f \n{table}{end}".encode()


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def plot(mode: str = "RGB") -> Image.Image:
    image = Image.new("RGB", (120, 80), "white")
    ImageDraw.Draw(image).polygon([(10, 70), (60, 10), (110, 70)], fill="navy")
    return image.convert(mode)


def size_of(picture: Picture) -> tuple[int, int]:
    return picture.width, picture.height


# -- bitmaps -----------------------------------------------------------------------------------
@pytest.mark.parametrize("mode, kind", [("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("1", "PNG"), ("RGB", "JPEG"), ("L", "JPEG")])
def test_plain_png_and_jpeg_stay_byte_for_byte(mode: str, kind: str, tmp_path: Path) -> None:
    data = encoded(plot(mode), kind)
    assert drawn(tmp_path, data).data == data


@pytest.mark.parametrize("data, kind", [
    (encoded(plot(), "GIF"), "PNG"), (encoded(plot(), "BMP"), "PNG"), (encoded(plot(), "TIFF"), "PNG"),
    (encoded(plot(), "WEBP", lossless=True), "PNG"), (encoded(plot("CMYK"), "JPEG"), "JPEG"), (encoded(plot("RGBA")), "PNG"),
    (encoded(Image.fromarray(np.asarray(plot("L")).astype(np.uint16) * 257)), "PNG"),
])  # fmt: skip
def test_other_bitmaps_become_png_and_show_the_same(data: bytes, kind: str, tmp_path: Path) -> None:
    picture = drawn(tmp_path, data)
    shown = Image.open(io.BytesIO(picture.data))
    assert shown.format == kind and picture.data != data and not picture.vector
    difference = np.abs(np.asarray(picture.image.convert("L")).astype(int) - np.asarray(plot("L")))
    assert difference.mean() < 12


def test_the_first_bytes_tell_the_format_not_the_name_or_what_is_quoted_inside(tmp_path: Path) -> None:
    (tmp_path / "figure.pdf").write_bytes(encoded(plot(), "JPEG", comment=b"%PDF-1.4 %!PS <svg"))
    assert size_of(drawn(tmp_path, tmp_path / "figure.pdf")) == (120, 80)
    (tmp_path / "figure.png").write_bytes(pdf("0 0 72 72 re f"))
    assert drawn(tmp_path, tmp_path / "figure.png").vector


def test_transparency_lies_on_white_and_orientation_is_applied(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (40, 30), (255, 0, 0, 0))
    assert drawn(tmp_path, encoded(clear)).image.getextrema() == ((255, 255),) * 3
    exif = Image.Exif()
    exif[0x0112] = 6
    assert size_of(drawn(tmp_path, encoded(plot(), "JPEG", exif=exif))) == (80, 120)


def test_a_large_bitmap_is_scaled_down_in_its_own_format(tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG"):
        picture = drawn(tmp_path, encoded(plot().resize((3000, 2000)), kind))
        assert size_of(picture) == (1000, 667) and Image.open(io.BytesIO(picture.data)).format == kind


def test_the_options_of_includegraphics_turn_and_clip_bitmaps(tmp_path: Path) -> None:
    data = encoded(plot(), dpi=(144, 144))  # 60 x 40 points
    assert size_of(drawn(tmp_path, data, options="width=3cm,angle=-90")) == (80, 120)
    assert size_of(drawn(tmp_path, data, options="trim=10 5 0 0,clip")) == (100, 70)
    assert drawn(tmp_path, data, options="trim=10 5 0 0,width=2cm").data == data  # without clip LaTeX shows all


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds little."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("data, reason", [
    (b"", "empty file"), (b"neither", "not an image"), (encoded(plot())[:-30], "truncated|damaged"),
    (encoded(plot(), "JPEG")[:400], "truncated|damaged"), (png_of_size(60_000, 60_000), "too large: .*pixels"),
    (png_of_size(2**31 - 1, 2**31 - 1), "too large|damaged"), (gzip.compress(b"neither"), "not an image"),
    (gzip.compress(encoded(plot()))[:-9], "damaged"),
])  # fmt: skip
def test_a_bitmap_that_cannot_be_shown_whole_is_rejected(data: bytes, reason: str, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RejectedPicture, match=reason):
        drawn(tmp_path, data)
    assert time.monotonic() - start < 3


def test_what_is_no_regular_file_of_bearable_size_is_rejected_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reasons = {tmp_path / "fifo": "not a regular file", tmp_path: "not a regular file", tmp_path / "nothing": "unreadable"}
    for path, reason in reasons.items():
        with pytest.raises(RejectedPicture, match=reason):
            drawn(tmp_path, path)
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(RejectedPicture, match="too large: a file of 2147483648 bytes"):
        drawn(tmp_path, tmp_path / "large.png")
    with pytest.raises(RejectedPicture, match="too large: more than 2000 bytes when decompressed"):
        drawn(tmp_path, gzip.compress(bytes(10**6)), limits={"file_bytes": 2000})


# -- PDF -----------------------------------------------------------------------------------------
def test_a_pdf_is_drawn_at_its_dpi_and_cut_to_what_is_drawn(tmp_path: Path) -> None:
    picture = drawn(tmp_path, pdf("0 0 1 rg 100 100 144 72 re f"))
    assert picture.vector and 200 <= picture.width <= 206 and 100 <= picture.height <= 106  # 144 x 72 points and a margin
    pixels = np.asarray(picture.image)
    assert (pixels[[0, -1]] == 255).all() and (pixels[:, [0, -1]] == 255).all()
    assert (pixels[10:-10, 10:-10] == (0, 0, 255)).all()
    assert size_of(drawn(tmp_path, gzip.compress(pdf("0 0 1 rg 100 100 144 72 re f")))) == size_of(picture)


def test_only_the_crop_box_is_seen_turned_as_the_page_says(tmp_path: Path) -> None:
    content = "0 0 400 300 re f"
    assert size_of(drawn(tmp_path, pdf(content, extra="/CropBox [100 100 172 136]"))) == (100, 50)
    assert size_of(drawn(tmp_path, pdf(content, extra="/CropBox [100 100 172 136] /Rotate 90"))) == (50, 100)
    assert size_of(drawn(tmp_path, pdf("100 100 72 36 re f", box="100 100 172 136"))) == (100, 50)  # an origin of its own


def test_a_hair_line_and_pale_colours_at_the_border_are_not_cut_off(tmp_path: Path) -> None:
    far = drawn(tmp_path, pdf("0.1 w 10 10 m 390 10 l S 1 1 0.9 rg 10 280 5 5 re f"))
    assert 528 <= far.width <= 542 and 382 <= far.height <= 396  # 380 x 275 points and a margin, of a page of 556 x 417 px
    blank = drawn(tmp_path, pdf(""))
    assert size_of(blank) == (556, 417) and blank.image.getextrema() == ((255, 255),) * 3


def test_a_page_is_drawn_without_its_annotations_on_white(tmp_path: Path) -> None:
    link = "/Annots [<< /Type /Annot /Subtype /Square /Rect [200 200 300 290] /C [1 0 0] /BS << /W 9 >> >>]"
    assert size_of(drawn(tmp_path, pdf("10 10 36 36 re f", extra=link))) == size_of(drawn(tmp_path, pdf("10 10 36 36 re f")))


def test_trim_viewport_and_angle_are_those_of_includegraphics(tmp_path: Path) -> None:
    half = pdf("1 0 0 rg 0 0 200 300 re f 0 1 0 rg 200 0 200 300 re f")
    left = drawn(tmp_path, half, options="trim={0 0 200bp 0},clip=true,width=\\linewidth").image
    assert left.size == (278, 417) and left.getpixel((270, 5)) == (255, 0, 0)
    part = drawn(tmp_path, half, options="viewport=200 0 300 100, clip").image
    assert part.size == (139, 139) and part.getpixel((5, 5)) == (0, 255, 0)
    turned = drawn(tmp_path, half, options="angle=90").image
    assert turned.size == (417, 556) and turned.getpixel((9, 9)) == (0, 255, 0)
    assert drawn(tmp_path, half, options="trim=0 0 200 0").image.size == (556, 417)


@pytest.mark.parametrize("options, crop", [
    ("trim=1in 2in 3in 0.5in, clip", (72, 144, 216, 36)), ("clip,trim=72.27pt 0cm 0 25.4mm", (72, 0, 0, 72)),
    ("trim=-5 0 +2.5 .5,clip=true", (0, 0, 2.5, 0.5)), ("viewport=10 20 110 220,clip", (10, 20, 890, 780)),
    ("trim=0 0 0 0.5\\textwidth,clip", (0, 0, 0, 0)), ("trim=600 0 600 0,clip", (0, 0, 0, 0)), ("trim=1 2 3,clip", (0, 0, 0, 0)),
    ("trim=1 2 3 4,clip=false", (0, 0, 0, 0)), ("xtrim=1 2 3 4,clip", (0, 0, 0, 0)), ("", (0, 0, 0, 0)),
])  # fmt: skip
def test_lengths_of_trim_are_read_as_tex_reads_them(options: str, crop: tuple[float, ...], tmp_path: Path) -> None:
    assert crop_of(options, 1000, 1000) == pytest.approx(crop)


def test_a_page_bomb_is_drawn_within_the_largest_side(tmp_path: Path) -> None:
    full = drawn(tmp_path, pdf("0 0 14400 14400 re f", box="0 0 14400 14400"), dpi=1200)
    assert size_of(full) == (1000, 1000)
    small = drawn(tmp_path, pdf("7000 7000 72 36 re f", box="0 0 14400 14400"))
    assert abs(small.width - 104) <= 3 and abs(small.height - 54) <= 3  # a small drawing on it gets its dpi
    for box in ("0 0 1000000 1000000", "0 0 50000 1"):
        with pytest.raises(RejectedPicture, match="PDF: a page of"):
            drawn(tmp_path, pdf("0 0 10 10 re f", box=box))


@pytest.mark.parametrize("data", [
    b"%PDF-1.5 rubbish", pdf("0 0 9 9 re f")[:200], b"%PDF-1.4\n" + bytes(1000), b"junk before %PDF-1.4",
    pdf("", trailer="/Encrypt << /Filter /Standard /V 1 /R 2 /O (" + "x" * 32 + ") /U (" + "y" * 32 + ") /P -4 >> /ID [(a) (b)]"),
])  # fmt: skip
def test_a_broken_or_locked_pdf_is_rejected(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(RejectedPicture, match="damaged or encrypted PDF"):
        drawn(tmp_path, data)


def test_bytes_changed_anywhere_in_a_pdf_never_raise_anything_else(tmp_path: Path) -> None:
    whole, generator = pdf("0 0 1 rg 100 100 144 72 re f BT /F1 12 Tf (text) Tj ET"), np.random.default_rng(7)
    for _ in range(60):
        data = bytearray(whole)
        for place in generator.integers(9, len(data), 4):
            data[place] = generator.integers(0, 256)
        try:
            drawn(tmp_path, bytes(data))
        except RejectedPicture as error:
            assert str(error)


def test_a_page_that_is_not_there_and_one_too_slow_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(RejectedPicture, match="PDF: page 2 of 1"):
        drawn(tmp_path, pdf("0 0 9 9 re f"), page=2)
    lines = "".join(f"{n % 400} 0 m {n * 7 % 400} 300 l S\n" for n in range(100_000))
    start = time.monotonic()
    with pytest.raises(RejectedPicture, match="PDF: not drawn in time"):
        drawn(tmp_path, pdf(lines), limits={"seconds": 1.0})
    assert time.monotonic() - start < 5


@pytest.mark.skipif(not CELERITE.is_dir(), reason="needs the published paper celerite beside the checkout")
def test_the_figures_of_a_published_paper_are_drawn(tmp_path: Path) -> None:
    path = CELERITE / "figures" / "matrix.pdf"
    picture = drawn(tmp_path, path, dpi=200, max_side=2048)
    assert 1400 < picture.width < 1500 and len(picture.image.getcolors(2**24) or ()) > 8


# -- SVG -----------------------------------------------------------------------------------------
def test_an_svg_is_drawn_on_white_and_cut_to_what_is_drawn(tmp_path: Path) -> None:
    picture = drawn(tmp_path, SVG.format("", SQUARE), dpi=192)
    assert picture.vector and abs(picture.width - 100) <= 2 and abs(picture.height - 52) <= 2
    assert picture.image.getpixel((50, 26)) == (255, 0, 0) and picture.image.getpixel((0, 0)) == (255, 255, 255)
    box = "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9000 4500'><rect width='9000' height='4500'/></svg>"
    assert size_of(drawn(tmp_path, "<?xml version='1.0'?><!-- drawn by hand -->" + box)) == (1000, 500)


@pytest.mark.parametrize("body, reason", [
    ("<image href='/etc/passwd' width='9' height='9'/>", "refers to other files"),
    ("<image xmlns:x='http://www.w3.org/1999/xlink' x:href='red.png' width='9' height='9'/>", "refers to other files"),
    ("<image href='&#114;ed.png' width='9' height='9'/>", "refers to other files"),
    ("<image href='data:image/svg+xml;base64,PHN2Zy8+' width='9' height='9'/>", "refers to other files"),
    ("<use href='other.svg#a'/>", "refers to other files"), ("<style>@import 'a.css';</style>", "refers to other files"),
    ("<rect fill='url(other.svg#a)' width='9' height='9'/>", "refers to other files"),
    ("<g>" * 10_000 + "</g>" * 10_000, "nested deeper"), ("<rect", "SVG: "), ("\xff", "SVG|not"),
])  # fmt: skip
def test_an_svg_that_reads_files_or_nests_endlessly_is_refused(body: str, reason: str, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    with pytest.raises(RejectedPicture, match=reason):
        drawn(tmp_path, SVG.format("", body).encode("latin-1"))


def test_an_svg_of_entities_or_without_end_in_size_is_refused(tmp_path: Path) -> None:
    laughs = "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 12))
    for head in (f"<!DOCTYPE svg [<!ENTITY a0 'ha'>{laughs}]>", "<!DOCTYPE svg [<!ENTITY a0 SYSTEM 'file:///etc/passwd'>]>"):
        with pytest.raises(RejectedPicture, match="entities"):
            drawn(tmp_path, head + SVG.format("", "<text>&a0;</text>"))
    with pytest.raises(RejectedPicture, match="a size of"):
        drawn(tmp_path, SVG.format("", SQUARE).replace("96", "1e9"))


# -- EPS -------------------------------------------------------------------------------------------
EPS = (
    "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 100 100 244 172\n0 0 1 setrgbcolor 100 100 144 72 rectfill 300 300 9 9 rectfill\n"
    "showpage\n"
)
EPS_AT_END = EPS.replace("100 100 244 172", "(atend)") + "%%Trailer\n%%BoundingBox: 100 100 244 172\n"
DOS_EPS = b"\xc5\xd0\xd3\xc6" + struct.pack("<6IH", 30, len(EPS), 0, 0, 0, 0, 0xFFFF) + EPS.encode()


@ghostscript
@pytest.mark.parametrize("data", [
    EPS.encode(), gzip.compress(EPS.encode()), DOS_EPS, b"\x04" + EPS.encode(), EPS_AT_END.encode(),
    b"\x1b%-12345X@PJL ENTER LANGUAGE = POSTSCRIPT\n" + EPS.encode(),
], ids=["EPS", "gzipped", "DOS header", "control-D", "box at the end", "PJL"])  # fmt: skip
def test_an_eps_is_drawn_within_its_box(data: bytes, tmp_path: Path) -> None:
    picture = drawn(tmp_path, data)
    assert picture.vector and abs(picture.width - 200) <= 2 and abs(picture.height - 100) <= 2
    assert picture.image.getpixel((100, 50)) == (0, 0, 255)


@ghostscript
@pytest.mark.parametrize("program, reason", [
    ("(/etc/passwd) (r) file pop", "EPS: ghostscript: "), ("(%pipe%id) (w) file pop", "EPS: ghostscript: "),
    ("(out.txt) (w) file pop", "EPS: ghostscript: "), ("nonsense", "EPS: ghostscript: .*nonsense"),
    ("{} loop", "not done after 2 s"),
    ("{(words words words words) print} loop", "ghostscript"),
])  # fmt: skip
def test_an_eps_that_reaches_out_fails_or_never_ends_is_rejected(program: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(RejectedPicture, match=reason):
        drawn(tmp_path, f"%!PS-Adobe-3.0 EPSF-3.0\n{program}\nshowpage\n", limits={"seconds": 8.0, "file_bytes": 2**24})
    assert not list(tmp_path.rglob("out.txt"))


def test_without_ghostscript_an_eps_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RejectedPicture, match="EPS: ghostscript .* is not here"):
        drawn(tmp_path, EPS)


# -- TikZ ------------------------------------------------------------------------------------------
def tikz(tmp_path: Path, body: str, preamble: str = "", seconds: float = 30) -> Picture:
    (tmp_path / "source" / "data").mkdir(parents=True, exist_ok=True)
    (tmp_path / "source" / "data" / "curve.dat").write_text("0 0\n1 1\n")
    source = rf"\begin{{tikzpicture}}{body}\end{{tikzpicture}}"
    return drawn(tmp_path, compile_tikz(source, preamble, tmp_path / "source", tmp_path / "tikz", seconds))


@tex
def test_a_tikz_picture_is_drawn_with_all_that_sticks_out(tmp_path: Path) -> None:
    picture = tikz(tmp_path, r"\path[use as bounding box] (0,0); \fill[red] (-1.27,-1.27) rectangle (1.27,0);")
    assert abs(picture.width - 104) <= 3 and abs(picture.height - 54) <= 3 and picture.image.getpixel((50, 25)) == (255, 0, 0)
    wide = tikz(tmp_path, r"\draw (0,0) rectangle (40,20);")
    assert wide.width >= 990 and abs(wide.width / wide.height - 2) < 0.1


@tex
@pytest.mark.skipif("pgfplots" not in subprocess.getoutput("kpsewhich pgfplots.sty"), reason="needs pgfplots")
def test_a_picture_finds_its_packages_options_and_data_and_does_without_what_is_missing(tmp_path: Path) -> None:
    preamble = (
        r"\usepackage[utf8]{inputenc}\usepackage[dvipsnames]{xcolor}\usepackage{no-such-package,pgfplots}\usepackage[a5paper]{geometry}"
        r"\usetikzlibrary{external}\tikzexternalize[prefix=x/]\pgfplotsset{compat=1.9}"
    )
    plot = tikz(tmp_path, r"\begin{axis}\addplot[ForestGreen] table {data/curve.dat};\end{axis}", preamble)
    assert plot.width > 250
    assert size_of(tikz(tmp_path, r"\begin{axis}\addplot[green] table {curve.dat};\end{axis}"))[0] > 250


@tex
@pytest.mark.parametrize("body, reason", [
    (r"\undefined", "Undefined control sequence"), (r"\node{\input{/etc/passwd}};", "not found"),
    (r"\node{\input{../secret}};", "not found"),
    (r"\immediate\openout9=../out.txt ", "can't write"),
    (r"\loop\iftrue\repeat", "not done after 2 s"),
    (r"\loop\iftrue\message{" + "words " * 30 + r"}\repeat", "TikZ: "), (r"\def\a{\a\a}\a", "capacity exceeded"),
])  # fmt: skip
def test_a_tikz_picture_that_fails_reaches_out_or_never_ends_is_rejected(body: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "secret.tex").write_text("secret")
    with pytest.raises(RejectedPicture, match=f"TikZ: .*{reason}" if reason != "TikZ: " else reason):
        tikz(tmp_path, body, seconds=2)
    assert not (tmp_path / "out.txt").exists()


@tex
def test_a_tikz_picture_starts_no_program_and_reads_no_file_elsewhere(tmp_path: Path) -> None:
    written = tmp_path / "written"
    tikz(tmp_path, rf"\immediate\write18{{touch {written}}}\node{{A}};")
    assert not written.exists()
    there = tikz(tmp_path, r"\newread\f \openin\f=curve.dat \ifeof\f\node{A};\else\fill(0,0) rectangle(9,9);\fi")
    absent = tikz(tmp_path, r"\newread\f \openin\f=/etc/passwd \ifeof\f\node{A};\else\fill(0,0) rectangle(9,9);\fi")
    assert there.width > 300 > absent.width


def test_without_a_tex_engine_tikz_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RejectedPicture, match="TikZ: no TeX engine here"):
        tikz(tmp_path, r"\node{A};")
