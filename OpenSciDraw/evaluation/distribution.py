"""How far two sets of pictures are apart, by a kernel distance between their features; 0 for the same distribution.

    kid_<features>    MMD squared with the kernel (x.y / d + 1)^3 on features of width d (Binkowski et al. 2018,
                      "Demystifying MMD GANs")
    cmmd_<features>   MMD squared with the kernel exp(-|x - y|^2 / (2 * 10^2)) on embeddings of length 1, times 1,000
                      (Jayasumana et al. 2024, "Rethinking FID"); only for features of a model's folder, which it was
                      made for. The paper's own program keeps each picture's distance to itself in the mean; here it is
                      left out, so that small sets are not farther apart than large ones.

Both are U-statistics: unbiased for any number of pictures, so below 0 by chance as often as above it where nothing differs.
Picture i and reference i belong to one prompt and are alike for that reason; pairs (i, i) are left out of the mean across the
sets as well (Gretton et al. 2012, "A Kernel Two-Sample Test", equation 4), which holds whether or not they belong together.

The interval is the percentile bootstrap over pictures, a picture with its reference. Copies of one picture that a resample
holds are no pair: counted, they would move every resample upwards. `benchmarks/run_distribution.py` measures how often the
interval covers the truth.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from OpenSciDraw.evaluation.base import SetMetric
from OpenSciDraw.evaluation.features import features_named
from OpenSciDraw.registry import METRICS

if TYPE_CHECKING:
    from OpenSciDraw.config import EvaluateConfig

_LOG = logging.getLogger("OpenSciDraw")
MIN_PICTURES = 20  # fewer say nothing: the interval is wider than what there is to see
MAX_BLANK = 0.05  # share of blank pictures, which stand for missing ones, up to which a set is compared
RESAMPLES = 1000
_CONFIDENCE = 0.95
_ROWS = 512  # of the kernel's matrix at a time
_SIGMA, _SCALE = 10.0, 1000.0  # of CMMD

Array = NDArray[np.float64]
Kernel = Callable[[Array, Array], Array]


def cubic_kernel(x: Array, y: Array) -> Array:
    """(n, m) for features (n, d) and (m, d): the kernel of KID."""
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def gaussian_kernel(x: Array, y: Array) -> Array:
    """(n, m) for embeddings of length 1, (n, d) and (m, d): the kernel of CMMD, times its factor."""
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1) - 2 * x @ y.T
    return np.asarray(_SCALE * np.exp(-squares / (2 * _SIGMA**2)))


def unit_length(features: Array) -> Array:
    """Every row divided by its length."""
    return np.asarray(features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12))


def kernel_distance(
    x: Array, y: Array, kernel: Kernel, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """MMD squared between features (n, d) and (m, d), and the ends of its 95 % interval.

    With n = m, row i of one is taken to belong to row i of the other.

    Raises:
        ValueError: fewer than two rows, or features of different widths.
    """
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"cannot compare features of shapes {x.shape} and {y.shape}")
    chance = np.random.default_rng(seed)
    in_x = _counts(len(x), resamples, chance)
    in_y = in_x if len(x) == len(y) else _counts(len(y), resamples, chance)
    values = (
        _mean(x, x, in_x, in_x, kernel) + _mean(y, y, in_y, in_y, kernel) - 2 * _mean(x, y, in_x, in_y, kernel)
    )  # fmt: skip
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(values[1:], [tail, 1 - tail])
    return float(values[0]), float(low), float(high)


def _counts(size: int, resamples: int, chance: np.random.Generator) -> Array:
    """(1 + resamples, size): how often each is there; once in row 0, which is the set itself."""
    drawn = chance.multinomial(size, np.full(size, 1 / size), resamples)
    return np.concatenate([np.ones((1, size)), drawn])


def _mean(a: Array, b: Array, in_a: Array, in_b: Array, kernel: Kernel) -> Array:
    """(1 + resamples,) mean of k(a_i, b_j) in each resample; without i = j where both have as many rows."""
    paired = len(a) == len(b)
    total = np.zeros(len(in_a))
    for first in range(0, len(a), _ROWS):
        part = slice(first, first + _ROWS)
        values = kernel(a[part], b)
        if paired:
            rows = np.arange(len(values))
            values[rows, first + rows] = 0
        total += ((in_a[:, part] @ values) * in_b).sum(axis=1)
    pairs = in_a.sum(axis=1) * in_b.sum(axis=1) - ((in_a * in_b).sum(axis=1) if paired else 0)
    return np.asarray(total / pairs)


@METRICS.register("distribution")
class Distribution(SetMetric):
    """kid_<features>, and cmmd_<features> for a model's folder, of `settings.features`."""

    def __init__(self, settings: EvaluateConfig, folder: Path):
        super().__init__(settings, folder)
        self.features = features_named(settings.features)

    def identity(self) -> dict[str, Any]:
        return {"version": 1, "features": self.features.name, "weights": self.features.version, "seed": self.settings.seed}

    def score_set(
        self, pictures: Sequence[Image.Image], references: Sequence[Image.Image]
    ) -> Mapping[str, tuple[float, float, float]]:
        """{} with a warning for fewer than MIN_PICTURES, or where more than MAX_BLANK of the pictures are blank: features
        hardly see some blank pictures among many, so a model that fails often would look as good as one that never does."""
        if (count := min(len(pictures), len(references))) < MIN_PICTURES:
            _LOG.warning("distribution: %d pictures are too few to compare; it takes %d or more.", count, MIN_PICTURES)
            return {}
        blank = sum(_is_blank(pictures[index]) for index in range(len(pictures)))
        if blank > MAX_BLANK * len(pictures):
            _LOG.warning(
                "distribution: %d of %d pictures are blank or missing, more than %g %%: not compared.",
                blank, len(pictures), 100 * MAX_BLANK,
            )  # fmt: skip
            return {}
        ours, theirs = self.features.of(pictures), self.features.of(references)
        name, seed = self.features.name, self.settings.seed
        distances = {f"kid_{name}": kernel_distance(ours, theirs, cubic_kernel, seed)}
        if self.features.is_embedding:
            distances[f"cmmd_{name}"] = kernel_distance(unit_length(ours), unit_length(theirs), gaussian_kernel, seed)
        return distances


def _is_blank(picture: Image.Image) -> bool:
    """One colour from edge to edge."""
    return all(low == high for low, high in picture.convert("RGB").getextrema())  # type: ignore[misc]
