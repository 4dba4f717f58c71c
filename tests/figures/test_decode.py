"""Any picture file becomes the RGB picture that a viewer shows, or is rejected with a reason; nothing else."""

from __future__ import annotations

import random
import struct
import warnings
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from OpenSciDraw.figures.decode import RejectedFigure, decode_picture

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def corners(width: int = 60, height: int = 40) -> Image.Image:
    """Red, green, blue and black corners on white: shows how a picture was turned."""
    image = Image.new("RGB", (width, height), WHITE)
    right, bottom = width - 16, height - 16
    places = {(0, 0): RED, (right, 0): (0, 255, 0), (0, bottom): (0, 0, 255), (right, bottom): (0, 0, 0)}
    for place, colour in places.items():
        image.paste(colour, (*place, place[0] + 16, place[1] + 16))
    return image


def corner_colours(image: Image.Image) -> list[Any]:
    right, bottom = image.width - 8, image.height - 8
    return [tuple(round(level / 64) * 64 for level in image.getpixel(place))  # type: ignore[union-attr]
            for place in ((8, 8), (right, 8), (8, bottom), (right, bottom))]  # fmt: skip


def png(width: int, height: int, bits: int, colour: int, raw: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file by hand. `raw` holds the rows, each with its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def linear_profile(space: bytes) -> bytes:
    """A small ICC profile (version 2) with sRGB's primaries and a linear tone curve, for b'RGB ' or b'GRAY'."""
    xyz = [(0.9642, 1.0, 0.8249), (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]
    points = [b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in p)) for p in xyz]
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    text = b"desc\0\0\0\0" + struct.pack(">I", 7) + b"linear\0" + bytes(78)
    tags = [(b"desc", text), (b"cprt", b"text\0\0\0\0none\0"), (b"wtpt", points[0])]
    if space == b"RGB ":
        tags += [(b"rXYZ", points[1]), (b"gXYZ", points[2]), (b"bXYZ", points[3])]
        tags += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    else:
        tags += [(b"kTRC", curve)]
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags:
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    header = struct.pack(
        ">I4sI4s4s4s12s4s4sIIIQI12sI", start + len(body), b"test", 0x02100000, b"mntr", space, b"XYZ ",
        struct.pack(">6H", 2020, 1, 1, 0, 0, 0), b"acsp", b"\0\0\0\0", 0, 0, 0, 0, 0,
        struct.pack(">3i", 63190, 65536, 54061), 0,
    )  # fmt: skip
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


# -- what is shown ---------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_lossless_formats_come_through_exactly(kind: str) -> None:
    image = corners()
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = decode_picture(encoded(image, kind, **options))
    assert picture.mode == "RGB" and picture.tobytes() == image.tobytes() and picture.info == {}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_lies_on_white(kind: str) -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 128))
    image.paste((1, 2, 3, 0), (0, 0, 32, 32))
    image.paste((0, 0, 255, 255), (32, 32, 64, 64))
    picture = decode_picture(encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    assert picture.getpixel((40, 8)) == (255, 127, 127)
    assert picture.getpixel((8, 8)) == WHITE and picture.getpixel((40, 40)) == (0, 0, 255)


def test_grey_with_alpha_lies_on_white() -> None:
    assert decode_picture(encoded(Image.new("LA", (40, 40), (0, 128)))).getpixel((5, 5)) == (127, 127, 127)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_with_transparency_lies_on_white(kind: str) -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(1, (20, 0, 40, 40))
    picture = decode_picture(encoded(image, kind, transparency=0))
    assert picture.getpixel((5, 5)) == WHITE and picture.getpixel((30, 5)) == (200, 0, 0)
    assert decode_picture(encoded(image, kind)).getpixel((5, 5)) == (10, 20, 30)


def test_a_palette_of_partly_transparent_colours_lies_on_white() -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([0, 0, 0, 200, 0, 0])
    assert decode_picture(encoded(image, transparency=b"\x80\xff")).getpixel((0, 0)) == (127, 127, 127)


def test_a_colour_key_is_transparent() -> None:
    rgb = Image.new("RGB", (40, 40), (9, 9, 9))
    assert decode_picture(encoded(rgb, transparency=(9, 9, 9))).getpixel((0, 0)) == WHITE
    assert decode_picture(encoded(rgb.convert("L"), transparency=9)).getpixel((0, 0)) == WHITE
    assert decode_picture(encoded(Image.new("1", (40, 40), 0), transparency=0)).getpixel((0, 0)) == WHITE
    sixteen = png(40, 40, 16, 0, (b"\0" + struct.pack(">40H", *[9] * 20, *[514] * 20)) * 40, (b"tRNS", b"\0\x09"))
    picture = decode_picture(sixteen)
    assert picture.getpixel((0, 0)) == WHITE and picture.getpixel((39, 0)) == (2, 2, 2)


def test_one_bit_pictures_are_black_and_white() -> None:
    image = Image.new("1", (40, 40), 1)
    image.paste(0, (0, 0, 20, 40))
    for kind in ("PNG", "TIFF", "BMP"):
        picture = decode_picture(encoded(image, kind))
        assert picture.getpixel((5, 5)) == (0, 0, 0) and picture.getpixel((30, 5)) == WHITE


GRADIENT = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(40, 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind: str) -> None:
    picture = decode_picture(encoded(Image.fromarray(GRADIENT), kind))
    assert np.asarray(picture)[0].tolist() == [[level] * 3 for level in range(256)]


def test_big_endian_sixteen_bits_are_scaled() -> None:
    image = Image.frombytes("I;16B", (256, 40), GRADIENT.astype(">u2").tobytes())
    assert np.asarray(decode_picture(encoded(image, "TIFF")))[0, :, 0].tolist() == list(range(256))


@pytest.mark.parametrize("bits", [8, 16])
def test_white_may_be_zero_in_a_tiff(bits: int) -> None:
    pixels = bytes(40 * 40 * bits // 8)
    tags = {256: 40, 257: 40, 258: bits, 259: 1, 262: 0, 273: 8, 277: 1, 278: 40, 279: len(pixels)}
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in tags)
    data = struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + directory + bytes(4)
    assert decode_picture(data).getpixel((5, 5)) == WHITE


def test_sixteen_bit_colour_keeps_its_gradient() -> None:
    row = b"\0" + b"".join(struct.pack(">3H", value, 0, 65535) for value in GRADIENT[0].tolist())
    assert np.asarray(decode_picture(png(256, 40, 16, 2, row * 40)))[0].tolist() == [[v, 0, 255] for v in range(256)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 32768, 65535], np.int32), [0, 128, 255]),
        (np.array([-1000, 0, 1000], np.int32), [0, 128, 255]),
        (np.array([0, 500_000, 1_000_000], np.int32), [0, 128, 255]),
        (np.array([0, 0.2, 0.4], np.float32), [0, 51, 102]),
        (np.array([0, 51, 102], np.float32), [0, 51, 102]),
        (np.array([-4, 0, 4], np.float32), [0, 128, 255]),
        (np.array([-7, -7, -7], np.float32), [0, 0, 0]),
    ],
)
def test_integers_and_floats_are_scaled(values: np.ndarray, expected: list[int]) -> None:
    image = Image.fromarray(values[None].repeat(40, 0).repeat(20, 1))
    grey = np.asarray(decode_picture(encoded(image, "TIFF")))[0, ::20, 0]
    assert grey.tolist() == expected


def test_pixels_that_are_no_numbers_are_rejected() -> None:
    with pytest.raises(RejectedFigure, match="^damaged: .*finite"):
        decode_picture(encoded(Image.fromarray(np.full((40, 40), np.nan, np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    stored = {  # how a camera stores the upright picture for each orientation
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    upright = corners()
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = decode_picture(encoded(upright.transpose(stored) if stored is not None else upright, kind, exif=exif))
    assert picture.size == upright.size and corner_colours(picture) == corner_colours(upright)


def test_unreadable_exif_leaves_the_picture_as_it_is() -> None:
    data = encoded(corners(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode_picture(data).size == (60, 40)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    """Pillow writes JPEG as Adobe does, inverted; read back, full cyan is no red."""
    picture = decode_picture(encoded(Image.new("CMYK", (40, 40), (255, 0, 0, 0)), kind))
    red, green, blue = picture.getpixel((5, 5))  # type: ignore[misc]
    assert picture.mode == "RGB" and red < 5 and green > 250 and blue > 250


@pytest.mark.parametrize(("mode", "space"), [("RGB", b"RGB "), ("L", b"GRAY"), ("LA", b"GRAY"), ("P", b"RGB ")])
def test_colour_profiles_are_converted_to_srgb(mode: str, space: bytes) -> None:
    """Half of the light is 188 in sRGB, not 128."""
    image = Image.new("RGB", (40, 40), (128, 128, 128)).convert(mode, palette=Image.Palette.ADAPTIVE)
    plain, tagged = (decode_picture(encoded(image, icc_profile=icc)) for icc in (None, linear_profile(space)))
    assert plain.getpixel((5, 5)) == (128, 128, 128)
    assert all(abs(level - 188) <= 1 for level in tagged.getpixel((5, 5)))  # type: ignore[union-attr]


def test_a_profile_leaves_transparency_alone() -> None:
    image = Image.new("RGBA", (40, 40), (128, 128, 128, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 40))
    picture = decode_picture(encoded(image, icc_profile=linear_profile(b"RGB ")))
    assert picture.getpixel((5, 5)) == WHITE
    assert all(abs(level - 188) <= 1 for level in picture.getpixel((30, 5)))  # type: ignore[union-attr]


@pytest.mark.parametrize("profile", [b"not a profile", linear_profile(b"GRAY"), linear_profile(b"RGB ")[:200]])
def test_a_profile_of_no_use_is_left_aside(profile: bytes) -> None:
    image = Image.new("RGB", (40, 40), (1, 128, 254))
    assert decode_picture(encoded(image, icc_profile=profile)).getpixel((5, 5)) == (1, 128, 254)


def test_an_srgb_profile_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    assert decode_picture(encoded(noise, icc_profile=profile)).tobytes() == noise.tobytes()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode_picture(data).getpixel((5, 5)) == RED


# -- what is rejected ------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_truncated_files_are_rejected_as_such(kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(RejectedFigure, match="^truncated: "):
        decode_picture(data[: int(len(data) * share)])


def test_damaged_pixel_data_of_a_png_are_found_by_their_checksum() -> None:
    data = bytearray(encoded(Image.new("RGB", (40, 40), RED), compress_level=0))
    data[data.index(b"IDAT") + 60] ^= 1  # stored, not compressed: the bit is one of a pixel and decodes
    with pytest.raises(RejectedFigure, match="^damaged: "):
        decode_picture(bytes(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"a text, not a picture" * 10, "not an image: none of PNG"),
        (b"\0" * 500, "not an image"),
        (b"%PDF-1.5\n" + b"x" * 100, "vector format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "vector format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "vector format"),
        (encoded(corners(), "PPM"), "not an image"),
        (encoded(Image.new("LAB", (40, 40)), "TIFF"), "unsupported pixel format"),
        (encoded(Image.new("RGB", (1, 500))), "too small: 1 x 500 px"),
        (encoded(Image.new("RGB", (31, 40))), "too small: 31 x 40 px, a side under min_side = 32"),
        (encoded(Image.new("RGB", (640, 39))), "too long: 640 x 39 px, over max_aspect_ratio = 16"),
    ],
)  # fmt: skip
def test_what_is_no_usable_picture_is_rejected_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(RejectedFigure, match=f"^{reason}"):
        decode_picture(data)


def test_limits_can_be_set() -> None:
    data = encoded(Image.new("RGB", (200, 10)))
    assert decode_picture(data, min_side=10, max_aspect_ratio=20).size == (200, 10)
    with pytest.raises(RejectedFigure, match="too large: 200 x 10 px, over max_image_pixels = 1999"):
        decode_picture(data, max_image_pixels=1999, min_side=1, max_aspect_ratio=99)


@pytest.mark.parametrize("side", [12_000, 20_000, 2**31 - 1])
def test_huge_pictures_are_rejected_by_their_header(side: int) -> None:
    """The pixel data are a few bytes long here: were they decoded, the reason would be another."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(RejectedFigure, match="^too large: "):
            decode_picture(png(side, side, 8, 2, b"\0" * 100))


def test_a_picture_that_is_all_black_is_still_one() -> None:
    assert decode_picture(encoded(Image.new("L", (40, 40), 0), "JPEG")).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_no_damage_raises_anything_but_a_rejection(kind: str) -> None:
    """Random bytes changed, cut out or put in, in files with metadata, palettes, alpha and compression."""
    chance = random.Random(kind)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a figure"
    exif_of = {"exif": exif} if kind not in ("GIF", "BMP") else {}
    plot = corners(64, 48)
    ImageDraw.Draw(plot).line((0, 47, 20, 10, 40, 30, 63, 0), (90, 0, 90), 2)
    modes = {
        "PNG": ["RGBA", "P", "I;16", "LA"], "JPEG": ["RGB", "CMYK", "L"], "WEBP": ["RGBA", "RGB"], "GIF": ["P", "RGB"],
        "TIFF": ["RGB", "I;16", "F", "CMYK", "1", "LA"], "BMP": ["RGB", "P", "1"],
    }[kind]  # fmt: skip
    seeds = []
    for mode in modes:
        image = plot.convert("L").convert(mode) if mode in ("I;16", "F", "LA") else plot.convert(mode)
        options: dict[str, Any] = dict(exif_of)
        if mode in ("RGB", "RGBA") and kind not in ("GIF", "BMP"):
            options["icc_profile"] = linear_profile(b"RGB ")
        if kind == "TIFF" and mode != "F":
            options["compression"] = chance.choice(["tiff_lzw", "tiff_adobe_deflate", "packbits"])
        seeds.append(encoded(image, kind, **options))
    outcomes = {"picture": 0, "rejected": 0}
    for case in range(120):
        data = bytearray(seeds[case % len(seeds)])
        for _ in range(chance.choice((1, 1, 2, 8, 40))):
            place = chance.randrange(min(len(data), chance.choice((64, 300, len(data)))))
            action = chance.random()
            if action < 0.8:
                data[place] = chance.choice((0, 255, 127, 128, chance.randrange(256)))
            elif action < 0.9:
                del data[place : place + chance.randrange(1, 9)]
            else:
                data[place:place] = chance.randbytes(4)
        try:
            assert decode_picture(bytes(data), max_image_pixels=1_000_000).mode == "RGB"
            outcomes["picture"] += 1
        except RejectedFigure as error:
            assert str(error)
            outcomes["rejected"] += 1
    assert outcomes["rejected"] > 10, outcomes
