"""Distances between sets of figures: what they tell apart, from how many pictures on, and how sure the interval is.

Command:  python benchmarks/run_distribution.py [--figures DIR]

References are drawn plots. They are compared with other plots of the same program, and these changed in one respect; with
diagrams; with plots of one kind. Every pair of sets is of different figures. The ratio beside a value is its distance from 0
in standard deviations of what two halves of one set give (over 20 splits of 1,000 plots): how clearly the features see it.
With `--figures` (a folder with `captions.jsonl` whose lines have `kind`) two halves of real plots, and plots against diagrams.

The last lines are of a simulation: features of known distributions, 500 pairs of sets each; how often the 95 % interval
covers the true distance (the mean of all values, which are unbiased; 0 where both are of one distribution).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from report import Result

from OpenSciDraw.config.sections import PACKAGED_FEATURES
from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.evaluation.distribution import cubic_kernel, kernel_distance
from OpenSciDraw.evaluation.features import Features, features_named
from OpenSciDraw.figures.decode import decode_picture

Array = NDArray[np.float64]
PLOTS, DIAGRAMS = ("line", "bar", "scatter"), ("pipeline", "flowchart", "method", "graph", "tree")
SIZES = (50, 200, 500)
SIZE = 160  # px
SPLITS = 20
SIMULATED = 500


@dataclass
class Drawn(Sequence):  # type: ignore[type-arg]
    """The first figures of a sequence, drawn when they are asked for, changed by `change`."""

    length: int
    kinds: Sequence[str]
    seed: int
    change: Callable[[Image.Image], Image.Image] = lambda image: image

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.change(draw_figure(self.seed, index, SIZE, self.kinds[index % len(self.kinds)]).image)


def blurred(radius: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.filter(ImageFilter.GaussianBlur(radius))


def swapped_colours(image: Image.Image) -> Image.Image:
    return Image.merge("RGB", image.split()[::-1])


def noisy(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    return Image.fromarray(np.clip(pixels + np.random.default_rng(0).normal(0, 8, pixels.shape), 0, 255).astype(np.uint8))


def blank(image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size, "white")


def compared_sets() -> dict[str, Sequence[Image.Image]]:
    most = max(SIZES)
    return {
        "other plots": Drawn(most, PLOTS, 2),
        "blur 1": Drawn(most, PLOTS, 2, blurred(1)),
        "blur 2": Drawn(most, PLOTS, 2, blurred(2)),
        "noise of 8": Drawn(most, PLOTS, 2, noisy),
        "red and blue swapped": Drawn(most, PLOTS, 2, swapped_colours),
        "line plots only": Drawn(most, ("line",), 3),
        "diagrams": Drawn(most, DIAGRAMS, 4),
    }


def spread(features: Array, size: int) -> tuple[float, float]:
    """Mean and standard deviation of the distance of two halves of `size` each, over random splits."""
    chance = np.random.default_rng(0)
    values = []
    for _ in range(SPLITS):
        rows = chance.permutation(len(features))[: 2 * size]
        values.append(kernel_distance(features[rows[:size]], features[rows[size:]], cubic_kernel, resamples=2)[0])
    return float(np.mean(values)), float(np.std(values, ddof=1))


def measure(result: Result, features: Features) -> None:
    references = features.of(Drawn(max(SIZES), PLOTS, 1))
    others = {name: features.of(pictures) for name, pictures in compared_sets().items()}
    none = features.of([blank(Image.new("RGB", (SIZE, SIZE)))])
    share = others["other plots"].copy()
    share[::20] = none
    others["5 % blank"] = share
    both = np.concatenate([references, others["other plots"]])
    steps = {size: spread(both, size) for size in SIZES}
    for size, (mean, step) in steps.items():
        result.numbers[f"{features.name} halves {size}"] = [mean, step]
    row = [features.name, "two halves, mean ± sd of 20 splits"]
    result.rows.append([*row, *(f"{steps[size][0]:.4f} ± {steps[size][1]:.4f}" for size in SIZES)])
    for name, rows in others.items():
        cells = []
        for size in SIZES:
            value, low, high = kernel_distance(rows[:size], references[:size], cubic_kernel)
            cells.append(f"{value:.4f} ({low:.4f} to {high:.4f}), {value / steps[size][1]:.0f} sd")
            result.numbers[f"{features.name} {name} {size}"] = [value, low, high]
        result.rows.append([features.name, name, *cells])
        print("|", " | ".join(result.rows[-1]), "|", flush=True)


def measure_real(result: Result, features: Features, folder: Path) -> None:
    entries = list(map(json.loads, (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()))
    by_kind = {}
    for kind in ("plot", "diagram"):
        pictures = [decode_picture((folder / each["file_name"]).read_bytes()) for each in entries if each["kind"] == kind]
        by_kind[kind] = np.random.default_rng(0).permutation(features.of(pictures))
    plots, diagrams = by_kind["plot"], by_kind["diagram"]
    half = len(plots) // 2
    for name, x, y in (("real plots, two halves", plots[:half], plots[half:]), ("real plots, real diagrams", plots, diagrams)):
        value, low, high = kernel_distance(x, y, cubic_kernel)
        cell = f"{value:.4f} ({low:.4f} to {high:.4f})"
        result.rows.append([features.name, f"{name} ({len(x)}, {len(y)})", cell, "", ""])
        result.numbers[f"{features.name} {name}"] = [value, low, high]


# -- coverage ----------------------------------------------------------------------------------------
def simulated(kind: str, count: int, chance: np.random.Generator) -> tuple[Array, Array]:
    """Two sets of features (count, 128): normal, or sparse and skewed as those of networks are."""
    if kind.startswith("normal"):
        x, y = chance.normal(size=(2, count, 128))
        return x, y + (0.15 if "shift" in kind else 0.0)
    mix = np.random.default_rng(5).normal(size=(20, 128)) / 4

    def sparse(hidden: Array) -> Array:
        return 2 * np.maximum(hidden @ mix - 0.5, 0)

    if "pairs" in kind:
        hidden = chance.normal(size=(count, 20))
        return sparse(hidden), sparse(hidden + 0.3 * chance.normal(size=(count, 20)) + 0.1)
    x, y = chance.normal(size=(2, count, 20))
    return sparse(x), sparse(1.2 * y + 0.1 if "other" in kind else y)


def measure_coverage(result: Result) -> None:
    for kind in ("normal, the same", "normal, shifted", "sparse, the same", "sparse, other spread", "sparse, pairs"):
        for count in (50, 200):
            found = []
            for seed in range(SIMULATED):
                x, y = simulated(kind, count, np.random.default_rng(seed))
                found.append(kernel_distance(x, y, cubic_kernel, seed, resamples=200))
            values, lows, highs = np.array(found).T
            true = 0.0 if "same" in kind else float(values.mean())
            covered, width = float(((lows <= true) & (true <= highs)).mean()), float((highs - lows).mean())
            result.notes.append(
                f"Simulated, {kind}, n = {count}: the interval covers {true:.4f} in {covered:.1%} of the pairs of sets; the "
                f"values have a standard deviation of {values.std():.4f}, the intervals a mean width of {width:.4f}."
            )
            result.numbers[f"simulated {kind} {count}"] = [true, float(values.std()), covered]
            print(result.notes[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--figures", type=Path)
    given = parser.parse_args()
    columns = ["features", "plots against", *(f"n = {size}" for size in SIZES)]
    result = Result("distribution", "python benchmarks/run_distribution.py --figures DIR", columns)
    for name in PACKAGED_FEATURES:
        features = features_named(name)
        measure(result, features)
        if given.figures:
            measure_real(result, features, given.figures)
    measure_coverage(result)
    result.save()


if __name__ == "__main__":
    main()
