"""Words that a caption has in quotes, against those that OCR reads in the picture."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from OpenSciDraw.config import EvaluateConfig
from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.examples import Example
from OpenSciDraw.evaluation.text_fidelity import compared, quoted_phrases, similarity, text_fidelity, words_of
from OpenSciDraw.reading import ocr
from OpenSciDraw.registry import METRICS

needs_rapidocr = pytest.mark.skipif(importlib.util.find_spec("rapidocr") is None, reason="needs the extra 'ocr'")
needs_tesseract = pytest.mark.skipif(shutil.which("tesseract") is None, reason="needs the program tesseract")


@pytest.mark.parametrize(("caption", "phrases"), [
    ("A box 'Lens' and a box \"Beam splitter\".", ["Lens", "Beam splitter"]),
    ("\u2018Lens\u2019, \u201cBeam path\u201d, \u201eFilter\u201c, \u00abPump\u00bb", ["Lens", "Beam path", "Filter", "Pump"]),
    ("a box ``Lens'' and one `Mirror' behind it", ["Lens", "Mirror"]),
    ("'A' to 'B' and 'B' to 'A'", ["A", "B"]),
    ("('x')/'y' \u2014 'z', label='w'", ["x", "y", "z", "w"]),
    ("'don't panic' and \u2018don\u2019t panic\u2019", ["don't panic", "don\u2019t panic"]),
    ("'AUC's best' is 'x'.", ["AUC's best", "x"]),
    ("The users' plots don't show the model's loss; it's f' and g''.", []),
    ("In the '90s a box 'Lens'", ["Lens"]),
    ("A 5\" disk and a 6' wall beside \"Lens\"", ["Lens"]),
    ("An open ' quote, an open \" quote, \u201c and nothing else", []),
    ("'two\nlines'", ["two\nlines"]),
    ("", []),
])  # fmt: skip
def test_phrases_in_quotes_are_found_and_apostrophes_are_none(caption: str, phrases: list[str]) -> None:
    assert quoted_phrases(caption) == phrases


def test_every_label_that_a_drawn_caption_quotes_is_one_of_its_truth() -> None:
    for index in range(40):
        figure = draw_figure(5, index, 256)
        labels = {label["text"] for label in figure.truth["labels"]}
        assert set(quoted_phrases(figure.caption)) <= labels, figure.caption


def test_words_are_compared_without_case_punctuation_and_typographic_forms() -> None:
    assert words_of("Pixel-wise \ufb01t (dB): U-Net\u2019s R2, 0.48 or 1,024.") == (
        ["pixel", "wise", "fit", "db", "u", "net", "s", "r2", "0.48", "or", "1,024"]
    )
    assert words_of("\u635f\u5931 loss") == ["\u635f", "\u5931", "loss"]
    assert words_of("\u2192 + _ ?") == []


def test_recall_counts_words_as_often_as_phrases_hold_them() -> None:
    scores = compared(["Encoder", "Text encoder"], ["ENCODER", "text"])
    assert scores["word_recall"] == (2, 3) and scores["word_precision"] == (2, 2)
    assert compared(["Lens"], ["Lens", "Lens"])["word_precision"] == (1, 2)


def test_precision_leaves_out_numbers_that_the_caption_does_not_quote() -> None:
    assert compared(["Time", "48"], ["Time", "0", "0.5", "48", "noise"])["word_precision"] == (2, 3)
    assert compared(["Time"], ["0", "10"])["word_precision"] == (0, 1)


def test_letters_that_look_alike_are_one_and_signs_of_other_scripts_are_not_read_into_figures() -> None:
    assert compared(["RoI", "IoU", "O"], ["Rol", "1oU", "0"])["word_recall"] == (3, 3)
    assert compared(["Lens"], ["Lens", "\u53e3"])["word_precision"] == (1, 1)
    assert compared(["\u53e3"], ["Lens", "\u53e3"])["word_precision"] == (1, 2)


def test_similarity_is_one_minus_the_edit_distance_over_the_longer_length() -> None:
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert similarity("", "abc") == 0 and similarity("abc", "abc") == 1 and similarity("", "") == 1


def test_a_word_with_a_wrong_letter_earns_the_rest_and_a_reading_serves_one_word() -> None:
    hits, total = compared(["mirror", "filter"], ["mirrar"])["edit_similarity"]
    assert (hits, total) == (pytest.approx(5 / 6), 2)
    both = [compared(["abcd", "abcx"], read)["edit_similarity"] for read in (["abcy", "zbcd"], ["zbcd", "abcy"])]
    assert both[0] == both[1] and both[0][1] == 2  # in whichever order they are read


def test_a_missing_picture_has_none_of_all_words_and_a_caption_without_quotes_is_not_scored() -> None:
    assert text_fidelity(None, "A box 'Text encoder'.") == {
        "word_recall": (0, 2), "word_precision": (0, 2), "edit_similarity": (0, 2),
    }  # fmt: skip
    assert text_fidelity(None, "The users' boxes, and '?'.") == {}


def test_a_picture_without_words_is_no_better_than_one_with_wrong_words() -> None:
    assert compared(["a b c"], []) == {"word_recall": (0, 3), "word_precision": (0, 3), "edit_similarity": (0, 3)}


def test_a_reader_that_is_not_there_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="apt install tesseract-ocr"):
        METRICS.get("text")(EvaluateConfig(reader="tesseract"), tmp_path)
    monkeypatch.setattr(ocr, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'OpenSciDraw\[ocr\]'"):
        METRICS.get("text")(EvaluateConfig(reader="rapidocr"), tmp_path)
    with pytest.raises(UserError, match="Known: rapidocr, tesseract"):
        ocr.read_lines(Image.new("RGB", (8, 8)), "eyes")


@needs_rapidocr
def test_the_metric_reads_its_own_references_and_not_another_figure(tmp_path: Path) -> None:
    metric = METRICS.get("text")(EvaluateConfig(reader="rapidocr"), tmp_path)
    assert metric.identity()["reader"].startswith("rapidocr ")
    right, wrong = [0.0, 0.0], [0.0, 0.0]
    other = draw_figure(11, 99, 256, "pipeline").image
    for index, kind in enumerate(("flowchart", "table", "bar", "method")):
        figure = draw_figure(11, index, 256, kind)
        example = Example(figure.id, figure.caption, *figure.image.size, truth=None, rubric=None, reference=None)
        for sums, picture in ((right, figure.image), (wrong, other)):
            hits, total = metric.score(picture, example)["word_recall"]
            sums[0], sums[1] = sums[0] + hits, sums[1] + total
    assert right[0] >= 0.95 * right[1] and wrong[0] <= 0.2 * wrong[1], (right, wrong)


@needs_rapidocr
def test_single_letters_of_small_figures_are_read() -> None:
    sums = [0.0, 0.0]
    for index in range(12):
        figure = draw_figure(79, index, 128, style="small")
        hits, total = text_fidelity(figure.image, figure.caption)["word_recall"]
        sums[0], sums[1] = sums[0] + hits, sums[1] + total
    assert sums[0] >= 0.85 * sums[1], sums  # 0.73 where only lines are read


@needs_rapidocr
def test_text_that_runs_upwards_is_read_and_stands_where_it_is() -> None:
    line = Image.new("RGB", (220, 40), "white")
    ImageDraw.Draw(line).text((10, 8), "Accuracy (dB)", fill="black", font=ImageFont.load_default(24))
    picture = Image.new("RGB", (300, 300), "white")
    picture.paste(line.rotate(90, expand=True), (20, 40))
    (found,) = ocr.read_lines(picture)
    assert words_of(found.text) == ["accuracy", "db"]
    assert 20 <= found.box[0] < found.box[2] <= 65 and 40 <= found.box[1] < found.box[3] <= 265


@needs_tesseract
def test_tesseract_reads_lines_with_their_places() -> None:
    picture = Image.new("RGB", (600, 400), "white")
    ImageDraw.Draw(picture).text((200, 150), "Beam splitter", fill="black", font=ImageFont.load_default(32))
    (found,) = ocr.read_lines(picture, "tesseract")
    assert words_of(found.text) == ["beam", "splitter"] and 0.5 < found.confidence <= 1
    assert 195 <= found.box[0] < found.box[2] <= 430 and 145 <= found.box[1] < found.box[3] <= 195
    assert ocr.version_of("tesseract").startswith("tesseract ")


@needs_tesseract
def test_a_failing_tesseract_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TESSDATA_PREFIX", str(tmp_path))  # no language data there
    with pytest.raises(UserError, match="tesseract failed"):
        ocr.read_lines(Image.new("RGB", (64, 64), "white"), "tesseract")


@needs_rapidocr
def test_a_picture_is_read_once_for_all_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = draw_figure(11, 3, 128, style="small").image
    first = ocr.read_lines(picture)
    monkeypatch.setattr(ocr, "_by_rapidocr", lambda *_: pytest.fail("read again"))
    assert ocr.read_lines(picture.copy()) == first


def test_importing_the_metrics_needs_neither_reader_nor_torch() -> None:
    code = (
        "import sys; import OpenSciDraw.evaluation.text_fidelity, OpenSciDraw.evaluation.distribution; "
        "heavy = {'torch', 'cv2', 'rapidocr', 'onnxruntime', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
