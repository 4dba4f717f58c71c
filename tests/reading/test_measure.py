"""What `prepare` measures on a picture and its caption: hash, ink, kind, text, sharpness, words."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from io import BytesIO

import numpy as np
import pyarrow as pa
import pytest
from conftest import SHARED
from PIL import Image, ImageDraw, ImageOps

from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.decode import decode_picture
from OpenSciDraw.prepare.filters.language import language_of
from OpenSciDraw.prepare.filters.measure import (
    MEASUREMENT_FIELDS,
    Measurements,
    count_words,
    measure,
    perceptual_hash,
    sharpness,
)
from OpenSciDraw.prepare.pictures.render import Picture
from OpenSciDraw.reading.text_share import text_share

FIGURES = SHARED / "corpora" / "figures"


def measured(image: Image.Image, caption: str = "A plot of the measured values over time.") -> Measurements:
    data = BytesIO()
    image.save(data, "PNG", compress_level=1)
    return measure(Picture(data.getvalue(), image, vector=False), caption)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    data = BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data).convert("RGB")


def distance(a: Image.Image, b: Image.Image) -> int:
    one, other = (np.unpackbits(np.frombuffer(perceptual_hash(image), dtype=np.uint8)) for image in (a, b))
    return int((one != other).sum())


def test_measurements_fit_their_arrow_fields() -> None:
    columns = measured(draw_figure(0, 1, 256).image).columns()
    assert list(columns) == [field.name for field in MEASUREMENT_FIELDS]
    table = pa.Table.from_pylist([columns], schema=pa.schema(MEASUREMENT_FIELDS))
    assert table.column("ocr_words").to_pylist() == [-1] and table.column("lossless").to_pylist() == [True]


@pytest.mark.parametrize("change", [
    lambda image: jpeg(image, 50),
    lambda image: image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS),
    lambda image: ImageOps.expand(image, 40, image.getpixel((0, 0))),
    lambda image: Image.fromarray((np.asarray(image) * (np.array([245, 245, 220]) / 255)).astype(np.uint8)),
], ids=["jpeg", "scaled", "margin", "paper colour"])  # fmt: skip
def test_the_hash_of_a_changed_figure_stays_near(change) -> None:  # type: ignore[no-untyped-def]
    figures = [draw_figure(0, index, 512).image for index in range(20)]
    distances = [distance(figure, change(figure)) for figure in figures]
    assert sorted(distances)[17] <= 12, distances  # nine of ten within the default of near_duplicate_bits


def test_hashes_of_plots_with_equal_axes_and_other_data_are_far_apart() -> None:
    def plot(seed: int) -> Image.Image:
        image = Image.new("RGB", (600, 400), "white")
        pen = ImageDraw.Draw(image)
        pen.rectangle((60, 30, 570, 350), outline="black", width=2)
        heights = 190 + np.cumsum(np.random.default_rng(seed).normal(size=500)) * 5
        pen.line([(65 + n, float(y)) for n, y in enumerate(heights.clip(40, 340))], fill="blue", width=2)
        return image

    plots = [plot(seed) for seed in range(8)]
    assert min(distance(a, b) for n, a in enumerate(plots) for b in plots[:n]) > 24


def test_a_blank_picture_has_no_ink_even_with_the_noise_of_jpeg() -> None:
    noise = np.random.default_rng(0).integers(236, 245, (300, 400, 3), dtype=np.uint8)
    blank = Image.fromarray(noise)
    assert measured(jpeg(blank, 40)).ink < 0.002
    ImageDraw.Draw(blank).rectangle((100, 100, 200, 150), fill="navy")
    assert measured(blank).ink == pytest.approx(101 * 51 / (300 * 400), abs=0.001)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (5, 5), (17, 17), (2500, 20)])
@pytest.mark.parametrize("noisy", [False, True])
def test_every_size_can_be_measured(size: tuple[int, int], noisy: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256 if noisy else 1, (size[1], size[0], 3), dtype=np.uint8)
    found = measured(Image.fromarray(pixels))
    numbers = [found.ink, found.kind_score, found.text, found.sharpness]
    assert len(found.phash) == 32 and all(0 <= number <= 1 for number in numbers)


def test_drawn_figures_and_noise_get_their_kinds() -> None:
    expected = {"flowchart": "diagram", "method": "diagram", "line": "plot", "bar": "plot", "table": "table"}
    for drawn, kind in expected.items():
        found = Counter(measured(draw_figure(5, index, 512, drawn).image).kind for index in range(8))
        assert found[kind] >= 7, (drawn, found)
    noise = np.random.default_rng(0).normal(0, 12, (300, 400, 3))
    waves = 120 + 60 * np.sin(np.arange(400) / 37)[None, :, None] * np.cos(np.arange(300) / 23)[:, None, None]
    assert measured(Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))).kind == "photo"


@pytest.mark.skipif(not FIGURES.is_dir(), reason="the real figures are not here")
def test_real_photos_are_told_from_drawn_figures() -> None:
    """A guard against bugs, not a measurement: the shipped weights have seen these pictures."""
    entries = [json.loads(line) for line in (FIGURES / "captions.jsonl").read_text().splitlines()]
    photos = [entry for entry in entries if entry["kind"] == "photo" and "ArcLength" not in entry["file_name"]]
    drawn = [entry for entry in entries if entry["source"] == "janosh_diagrams"]
    kinds = [measured(decode_picture((FIGURES / e["file_name"]).read_bytes())).kind for e in [*photos, *drawn]]
    assert kinds[: len(photos)].count("photo") >= 0.8 * len(photos)
    assert kinds[len(photos) :].count("photo") <= 0.05 * len(drawn)


def test_the_text_estimate_grows_with_the_text() -> None:
    shares = []
    for lines in (0, 4, 12):
        image = Image.new("L", (800, 600), 255)
        for line in range(lines):
            ImageDraw.Draw(image).text((20, 10 + 48 * line), "measured values of the sample " * 3, fill=0, font_size=18)
        shares.append(text_share(image))
    assert shares[0] == 0 and 0.02 < shares[1] < shares[2] < 1 and shares[2] == pytest.approx(3 * shares[1], rel=0.2)


def test_sharpness_falls_when_a_picture_is_scaled_up() -> None:
    for index in range(6):
        image = draw_figure(1, index, 384).image.convert("L")
        larger = image.resize((image.width * 3, image.height * 3), Image.Resampling.BICUBIC)
        assert sharpness(np.asarray(image)) > 0.6 > 0.55 > sharpness(np.asarray(larger))


@pytest.mark.parametrize("caption, words", [
    ("Loss $\\mathcal{L}_{train}$ over 100 epochs.", 3), ("", 0), ("$a = b + c$", 0), ("三个样品的温度", 3),
    ("Überblick der Größen", 3),
])  # fmt: skip
def test_words_are_counted_outside_of_math_and_in_scripts_without_spaces(caption: str, words: int) -> None:
    assert count_words(caption) == words


CAPTIONS = {
    "de": ["Abhängigkeit der Leitfähigkeit von der Temperatur für drei Proben.", "Ablaufdiagramm des Algorithmus."],
    "fr": ["Évolution de la température en fonction du temps pour trois échantillons.", "Organigramme de l'algorithme proposé."],
    "es": ["Evolución de la temperatura en función del tiempo.", "Comparación entre los valores medidos y los calculados."],
    "pt": ["Evolução da temperatura em função do tempo.", "À direita: comparação com o modelo $f(x)=ax+b$."],
    "ru": ["Зависимость температуры от времени для трёх образцов.", "Сравнение измеренных и вычисленных значений."],
    "zh": ["实验装置示意图，包括激光器、分束器和探测器，样品位于真空室内。", "本文提出的算法流程图，包含训练阶段和测试阶段。"],
    "ja": ["三つの試料における温度の時間変化。", "レーザーと検出器を含む実験装置の概略図。"],
    "en": ["Architecture of the proposed network.", "Left: distribution of the errors. Right: the model $f(x)=ax+b$."],
}  # fmt: skip
SHORT = ["ROC curves.", "Hubble diagram.", "H-alpha image of NGC 1068.", "Confusion matrix for MNIST.", "Spectrum of SN 1987A."]


@pytest.mark.parametrize("language", CAPTIONS)
def test_languages_of_captions(language: str) -> None:
    pytest.importorskip("py3langid", reason="needs the extra 'prepare'")
    assert [language_of(caption) for caption in CAPTIONS[language]] == [language] * len(CAPTIONS[language])


def test_short_english_captions_are_never_taken_for_another_language() -> None:
    pytest.importorskip("py3langid", reason="needs the extra 'prepare'")
    assert {language_of(caption) for caption in [*SHORT, "$E = mc^2$", ""]} <= {"en", "und"}


@pytest.mark.skipif(importlib.util.find_spec("rapidocr") is not None, reason="rapidocr is installed")
def test_ocr_without_its_extra_says_what_to_install() -> None:
    image = draw_figure(0, 0, 128).image
    with pytest.raises(UserError, match="pip install"):
        measure(Picture(b"", image, vector=True), "caption", ocr=True)
