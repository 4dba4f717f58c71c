"""The edit metric: the truth scores 1, the unedited source is not done, a wrong picture keeps nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from OpenSciDraw.config import EvaluateConfig
from OpenSciDraw.evaluation.base import Scores
from OpenSciDraw.evaluation.edit import Edit
from OpenSciDraw.evaluation.examples import Example, load_examples
from OpenSciDraw.figures.buckets import fitted

COUNT = 80


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return load_examples(f"drawn:{COUNT}:seed=11:edit")


@pytest.fixture
def metric(tmp_path: Path) -> Edit:
    return Edit(EvaluateConfig(), tmp_path)


def sums(scores: list[Scores]) -> dict[str, float]:
    names = {name for score in scores for name in score}
    return {name: sum(s[name][0] for s in scores if name in s) / sum(s[name][1] for s in scores if name in s) for name in names}


def test_the_edited_figure_itself_is_done_and_keeps_the_rest(examples: list[Example], metric: Edit) -> None:
    found = sums([metric.score(example.reference_image(), example) for example in examples])
    assert found["done"] >= 0.97 and found["kept"] >= 0.99 and found["kept_pixels"] == 1


def test_a_blurred_one_as_a_vae_leaves_it_is_as_good(examples: list[Example], metric: Edit) -> None:
    def through(picture: Image.Image) -> Image.Image:
        noise = np.random.default_rng(0).integers(-6, 7, (128, 128, 3))
        noisy = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.4)), np.int16) + noise
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))

    pictures = [example.reference_image() for example in examples]
    found = sums([metric.score(through(p), e) for p, e in zip(pictures, examples, strict=True) if p is not None])
    assert found["done"] >= 0.9 and found["kept"] >= 0.97 and found["kept_pixels"] >= 0.93


def test_the_source_itself_keeps_all_and_does_nothing(examples: list[Example], metric: Edit) -> None:
    found = sums([metric.score(example.source_images()[0], example) for example in examples])
    assert found["done"] <= 0.02 and found["kept_pixels"] == 1 and found["kept"] >= 0.97


def test_another_figure_does_and_keeps_little(examples: list[Example], metric: Edit) -> None:
    others = [*examples[1:], examples[0]]
    found = sums([metric.score(other.reference_image(), example) for other, example in zip(others, examples, strict=True)])
    assert found["done"] <= 0.05 and found["kept"] <= 0.15 and found["kept_pixels"] <= 0.9


def test_a_missing_picture_is_nothing_of_the_full_totals(examples: list[Example], metric: Edit) -> None:
    for example in examples[:10]:
        there, missing = metric.score(example.reference_image(), example), metric.score(None, example)
        assert missing.keys() == there.keys() and all(hits == 0 for hits, _ in missing.values())
        assert {name: total for name, (_, total) in missing.items()} == {name: total for name, (_, total) in there.items()}


def test_figures_without_a_source_are_not_measured(metric: Edit) -> None:
    (example,) = load_examples("drawn:1:style=small")
    assert metric.score(example.reference_image(), example) == {}


def test_edits_of_files_are_measured_by_their_boxes_at_the_size_that_training_sees(metric: Edit, tmp_path: Path) -> None:
    before = Image.new("RGB", (300, 150), "white")
    after = before.copy()
    after.paste("red", (30, 30, 90, 90))
    before.save(tmp_path / "x.source.png")
    after.save(tmp_path / "x.png")
    (tmp_path / "x.json").write_text(json.dumps({"caption": "Add a red square.", "edit_bboxes": [[30, 30, 90, 90]]}))
    (example,) = load_examples(str(tmp_path), resolution=128)
    size = (example.width, example.height)
    assert size != (300, 150) and example.source_images()[0].size == size
    drawn = fitted(after, 128)
    assert metric.score(drawn, example) == {"kept_pixels": (1.0, 1.0)}
    spoiled = drawn.copy()
    spoiled.paste("blue", (size[0] // 2, 0, size[0], size[1]))
    assert metric.score(spoiled, example)["kept_pixels"][0] < 0.6


def test_a_list_of_prompts_names_what_is_edited(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    line = {"prompt": "Make it red.", "width": 64, "height": 64, "source_image": "a.png", "edit_bboxes": [[0, 0, 9, 9]]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line))
    (example,) = load_examples(str(tmp_path / "prompts.jsonl"))
    assert example.source_images()[0].size == (64, 64) and example.edit_boxes == ((0.0, 0.0, 9.0, 9.0),)
