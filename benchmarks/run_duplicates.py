"""Duplicates: time and memory at a million pictures, and how well the perceptual hash tells pictures apart.

Command:  python benchmarks/run_duplicates.py --figures DIR [--rows 1000000]

A million hashes with the means and correlations of real figures' hashes (evenly random ones would be easier), and among them
planted copies: 5 % equal, 5 % with up to the allowed number of bits changed, and 100,000 rows of one blank-like hash. Before
it, 5,000 rows are compared with deciding row by row, which must agree in every row.

The hash: distances between a figure and itself rescaled, compressed, with another margin, on other paper; between different
figures; and between plots that share axes, labels and style but not data, as the panels of a paper do.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from report import Result

from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.figures.decode import decode_picture
from OpenSciDraw.prepare.filters.duplicates import representatives
from OpenSciDraw.prepare.filters.measure import perceptual_hash
from OpenSciDraw.reading.kinds import background_colour

BITS = (8, 10, 12, 16, 20, 24)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    given = parser.parse_args()
    result = Result("duplicates", "python benchmarks/run_duplicates.py --figures DIR", ["pictures", *(f"≤ {b} bits" for b in BITS)])
    images = list(figures(given.figures))
    hashes = np.stack([hash_bits(image) for image in images])
    quality(result, images, hashes)
    scale(result, hashes, given.rows)
    result.save()


def figures(folder: Path) -> Iterator[Image.Image]:
    for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines():
        yield decode_picture((folder / json.loads(line)["file_name"]).read_bytes())
    for index in range(200):
        yield draw_figure(31, index, 512).image


def hash_bits(image: Image.Image) -> np.ndarray:
    """(256,) bool"""
    return np.unpackbits(np.frombuffer(perceptual_hash(image), dtype=np.uint8)).astype(bool)


# -- the hash --------------------------------------------------------------------------------------
def resized(factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), 1)


def jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def change(image: Image.Image) -> Image.Image:
        data = BytesIO()
        image.save(data, "JPEG", quality=quality)
        return Image.open(data).convert("RGB")

    return change


def wider(image: Image.Image) -> Image.Image:
    background = tuple(background_colour(np.asarray(image)).tolist())
    return ImageOps.expand(image, max(image.size) // 16, background)


def ivory(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image) * (np.array([245, 245, 220]) / 255)).astype(np.uint8))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the size": resized(0.5), "0.37 of the size": resized(0.37), "1.7 times the size": resized(1.7),
    "JPEG quality 75": jpeg(75), "JPEG quality 30": jpeg(30), "half the size, JPEG quality 50": lambda i: jpeg(50)(resized(0.5)(i)),
    "a margin of 6 %": wider, "on ivory": ivory, "in grey": lambda image: image.convert("L").convert("RGB"),
}  # fmt: skip


def families() -> Iterator[tuple[str, list[Image.Image]]]:
    """Different data in equal axes, twelve of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    x = np.linspace(0, 10, 400)
    for name in ("random walks", "near-equal smooth curves", "scatter", "bars", "heat maps"):
        pictures = []
        for seed in range(12):
            chance = np.random.default_rng(seed)
            figure, axes = pyplot.subplots(figsize=(6, 4))
            if name == "random walks":
                axes.plot(x, np.cumsum(chance.normal(size=400)) / 20)
                axes.set_ylim(-3, 3)
            elif name == "near-equal smooth curves":
                for rate in (0.3, 0.4, 0.5):
                    axes.plot(x, 1 - np.exp(-x * (rate + 0.1 * chance.random())))
            elif name == "scatter":
                axes.scatter(chance.normal(size=60), chance.normal(size=60), s=9)
                axes.set(xlim=(-3, 3), ylim=(-3, 3))
            elif name == "bars":
                axes.bar(range(5), 0.6 + 0.2 * chance.random(5))
                axes.set_ylim(0, 1)
            else:
                axes.imshow(chance.random((12, 12)))
            axes.set(xlabel="time", ylabel="value", title="abc"[seed % 3])
            data = BytesIO()
            figure.savefig(data, format="png")
            pyplot.close(figure)
            pictures.append(decode_picture(data.getvalue()))
        yield name, pictures


def distances(hashes: np.ndarray) -> np.ndarray:
    """Of all pairs."""
    signs = hashes.astype(np.float32) * 2 - 1
    matrix = (256 - signs @ signs.T) / 2
    return np.asarray(matrix[np.triu_indices(len(hashes), 1)])


def quality(result: Result, images: list[Image.Image], hashes: np.ndarray) -> None:
    def row(name: str, values: np.ndarray) -> None:
        result.rows.append([name, *(f"{(values <= bits).mean():.2%}" for bits in BITS)])
        result.numbers[name] = {f"p{p}": float(np.percentile(values, p)) for p in (0, 1, 5, 50, 95, 99, 100)}

    for name, change in CHANGES.items():
        row(f"same, {name}", np.array([(hash_bits(change(i)) != own).sum() for i, own in zip(images, hashes, strict=True)]))
    different = distances(hashes)
    row("different figures", different)
    for name, pictures in families():
        row(f"equal axes, {name}", distances(np.stack([hash_bits(picture) for picture in pictures])))
    counts = ", ".join(f"{int((different <= bits).sum())} within {bits}" for bits in BITS)
    result.notes.append(f"{len(images)} figures, {len(different):,} pairs of different ones: {counts} bits.")


# -- at scale --------------------------------------------------------------------------------------
def lifelike(hashes: np.ndarray, count: int, chance: np.random.Generator) -> np.ndarray:
    """(count, 32) uint8 hashes with the bits' means and correlations of real ones: signs of correlated normals."""
    signs = hashes * 2.0 - 1
    correlation = np.sin(np.pi / 2 * np.corrcoef(signs.T))  # of the normals whose signs correlate so
    values, vectors = np.linalg.eigh(correlation)
    root = (vectors * np.sqrt(np.maximum(values, 0.02))).astype(np.float32)
    quantiles = np.sort(chance.standard_normal((4096, 256)) @ root.T, axis=0)
    threshold = quantiles[np.clip(((1 - hashes.mean(axis=0)) * 4096).astype(int), 0, 4095), np.arange(256)]
    made = []
    for start in range(0, count, 50_000):
        normal = chance.standard_normal((min(50_000, count - start), 256), dtype=np.float32)
        made.append(np.packbits(normal @ root.T > threshold, axis=1))
    return np.concatenate(made)


def changed(hashes: np.ndarray, bits: int, chance: np.random.Generator) -> np.ndarray:
    """Each with 1 to `bits` of its bits turned."""
    order = np.argsort(chance.random((len(hashes), 256), dtype=np.float32), axis=1)
    turned = order < chance.integers(1, bits + 1, (len(hashes), 1))
    return hashes ^ np.packbits(turned, axis=1)


def row_by_row(identity: np.ndarray, hashes: np.ndarray, bits: int) -> np.ndarray:
    """What `representatives` says, by comparing every row with every earlier one."""
    words = np.ascontiguousarray(hashes).view(np.uint64)
    stands_for = np.arange(len(words))
    for row in range(1, len(words)):
        equal = np.flatnonzero(identity[:row] == identity[row])
        if len(equal):
            stands_for[row] = stands_for[equal[0]]
            continue
        near = np.bitwise_count(words[:row] ^ words[row]).sum(axis=1, dtype=np.int64) <= bits
        found = np.flatnonzero(near & (stands_for[:row] == np.arange(row)))
        if len(found):
            stands_for[row] = found[0]
    return stands_for


def scale(result: Result, real: np.ndarray, count: int) -> None:
    chance = np.random.default_rng(0)
    for bits in (12, 16, 24):
        few = lifelike(real, 2500, chance)
        few = np.concatenate([few, changed(few, 2 * bits, chance)])[chance.permutation(5000)]
        identity = chance.integers(0, 25_000, 5000)
        assert (representatives(identity, few, bits) == row_by_row(identity, few, bits)).all()
    for bits in (12, 16, 24):
        blank, equal = count // 10, count // 20
        own = lifelike(real, count - blank - 2 * equal, chance)
        originals = chance.choice(len(own), 2 * equal, replace=False)
        planted = np.concatenate([own[originals[:equal]], changed(own[originals[equal:]], bits, chance)])
        hashes = np.concatenate([own, planted, np.repeat(own[:1], blank, axis=0)])
        begin = time.perf_counter()
        kept_of = representatives(np.arange(count), hashes, bits)
        seconds = time.perf_counter() - begin
        copies = kept_of[len(own) :] < len(own)
        own_dropped = int((kept_of[: len(own)] != np.arange(len(own))).sum())
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        result.notes.append(
            f"{count:,} rows within {bits} bits: {seconds:.0f} s on one core, {memory:.1f} GiB at most (the benchmark's own data "
            f"included); {int(copies.sum()):,} of {len(copies):,} planted copies found; {own_dropped:,} of {len(own):,} others "
            "dropped as near to one another."
        )
        result.numbers[f"scale {bits}"] = {"seconds": seconds, "memory_gib": memory, "found": int(copies.sum()), "own": own_dropped}


if __name__ == "__main__":
    main()
