"""Every figure reaches its bucket whole: least padding, never a crop, and the way back is known."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from PIL import Image

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.buckets import (
    GRID,
    UNITS,
    Bucket,
    background_colour,
    best_bucket,
    buckets,
    fit,
    padded_share,
)

BUCKETS_128 = buckets(128)
SIZES = [(1, 1), (100, 100), (640, 480), (479, 641), (2000, 33), (33, 2000), (97, 101), (1024, 256), (5, 7)]


def test_the_grid_is_that_of_existing_data() -> None:
    assert len(GRID) == len(set(GRID)) == 40
    assert (8, 32) in GRID and (16, 16) in GRID and (32, 8) in GRID
    assert [pair for pair in GRID if pair[::-1] not in GRID] == [(11, 21)]  # as it is in those data
    assert all(225 <= height * width <= 261 for height, width in GRID)  # about resolution² pixels everywhere


@pytest.mark.parametrize(("resolution", "unit"), [(1024, 64), (768, 48), (512, 32), (256, 16), (128, 8)])
def test_buckets_are_whole_units(resolution: int, unit: int) -> None:
    assert UNITS[resolution] == unit == resolution // 16
    made = buckets(resolution)
    of_tokens = [size for size in GRID if unit % 16 == 0 or (size[0] % 2 == 0 and size[1] % 2 == 0)]
    assert [(bucket.height // unit, bucket.width // unit) for bucket in made] == of_tokens
    assert all(bucket.height % 16 == 0 and bucket.width % 16 == 0 for bucket in made)
    assert all(bucket.height % unit == bucket.width % unit == 0 for bucket in made)


def test_another_resolution_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(UserError, match="640.*1024, 768, 512, 256, 128"):
        buckets(640)
    with pytest.raises(UserError, match="no bucket grid"):
        best_bucket(10, 10, 0)


@pytest.mark.parametrize("resolution", sorted(UNITS))
def test_a_figure_of_a_buckets_size_stays_what_it_is(resolution: int) -> None:
    for bucket in buckets(resolution):
        assert best_bucket(bucket.width, bucket.height, resolution) == bucket
        assert best_bucket(bucket.width * 3, bucket.height * 3, resolution) == bucket
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8))
    picture, box = fit(noise, Bucket(128, 128))
    assert box == (0, 0, 128, 128) and picture.tobytes() == noise.tobytes()


def test_the_best_bucket_has_the_least_padding() -> None:
    chance = random.Random(0)
    for _ in range(3000):
        width, height = (round(2 ** chance.uniform(0, 12)) for _ in range(2))
        chosen = padded_share(width, height, best_bucket(width, height, 768))
        assert chosen <= min(padded_share(width, height, bucket) for bucket in buckets(768)) + 1e-12


def test_padding_is_small_for_common_figures() -> None:
    shares = [padded_share(w, 1000, best_bucket(w, 1000, 768)) for w in range(250, 4001)]
    assert max(shares) < 0.075


def test_a_figure_without_area_has_no_bucket() -> None:
    with pytest.raises(ValueError, match="0 x 10"):
        best_bucket(0, 10, 256)


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_cropped(size: tuple[int, int]) -> None:
    """A frame on the outermost pixels, and the padding around it, are both there afterwards."""
    figure = Image.new("RGB", size, (0, 0, 200))
    figure.paste((200, 230, 200), (1, 1, max(1, size[0] - 1), max(1, size[1] - 1)))
    for bucket in BUCKETS_128:
        picture, box = fit(figure, bucket)
        assert picture.size == (bucket.width, bucket.height) and picture.mode == "RGB"
        x0, y0, x1, y1 = box
        assert (x0 == 0 and x1 == bucket.width) or (y0 == 0 and y1 == bucket.height)  # as large as can be
        assert abs(x0 - (bucket.width - x1)) <= 1 and abs(y0 - (bucket.height - y1)) <= 1  # centred
        scale = min(bucket.width / size[0], bucket.height / size[1])
        assert abs((x1 - x0) - size[0] * scale) <= 1 and abs((y1 - y0) - size[1] * scale) <= 1
        whole = figure.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS)
        assert picture.crop(box).tobytes() == whole.tobytes()
        outside = np.ones((bucket.height, bucket.width), bool)
        outside[y0:y1, x0:x1] = False
        assert (np.asarray(picture)[outside] == (0, 0, 200)).all()


def test_padding_has_the_figures_own_background() -> None:
    black = Image.new("RGB", (60, 40), (17, 18, 19))
    black.paste((255, 0, 0), (20, 0, 40, 40))  # a bar that touches the edge: a part of the border only
    assert background_colour(black) == (17, 18, 19)
    picture, (x0, y0, _, _) = fit(black, Bucket(128, 128))
    assert y0 > 0 and picture.getpixel((0, 0)) == (17, 18, 19) == picture.getpixel((127, 127))


def test_jpeg_noise_does_not_hide_the_background() -> None:
    noise = np.random.default_rng(0).integers(-3, 4, (50, 80, 3))
    dark = Image.fromarray((np.full((50, 80, 3), 30) + noise).astype(np.uint8))
    assert all(abs(level - 30) <= 3 for level in background_colour(dark))


def test_the_background_is_white_when_in_doubt() -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8))
    assert background_colour(photo) == (255, 255, 255)


def test_fit_takes_rgb_alone() -> None:
    with pytest.raises(ValueError, match="RGBA"):
        fit(Image.new("RGBA", (10, 10)), BUCKETS_128[0])


def test_a_million_figures_find_their_bucket_in_seconds() -> None:
    chance = random.Random(1)
    sizes = [(chance.randint(32, 8000), chance.randint(32, 8000)) for _ in range(100_000)]
    start = time.process_time()
    for width, height in sizes:
        best_bucket(width, height, 768)
    assert time.process_time() - start < 1  # 0.02 s where this was written
