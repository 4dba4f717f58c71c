"""The structure metric: what it misses in faultless figures, and what spoiled ones cost.

Command:  python benchmarks/run_structure.py [--count N] [--rich]

Faultless figures of both small styles first: whatever is below 1 is a mistake of the reading. Then the small style, each figure
spoiled in one respect: the score that the change is about must fall, by about the share of what was changed, and the others
little. "Another figure" is what a model that does not read its prompt would get. `--rich` adds the diagrams of the rich
style at 256 px, whose words the metric reads less well; tables, networks and plots with numbers are not among them.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from report import Result
from tqdm import tqdm

from OpenSciDraw.drawn.figure import DrawnFigure, draw_figure
from OpenSciDraw.evaluation.structure import score_structure

NAMES = ("components", "colour", "shape", "arrows", "labels", "one_letter_labels", "plot_kind", "trend")
SEED = 900
RICH = ("pipeline", "flowchart", "graph", "tree")
Spoiled = tuple[Image.Image | None, dict[str, Any]]  # the picture and the truth that it is held against


def blur(radius: float) -> Callable[[DrawnFigure, np.random.Generator], Spoiled]:
    return lambda figure, chance: (figure.image.filter(ImageFilter.GaussianBlur(radius)), figure.truth)


def jpeg(quality: int) -> Callable[[DrawnFigure, np.random.Generator], Spoiled]:
    def spoil(figure: DrawnFigure, chance: np.random.Generator) -> Spoiled:
        out = BytesIO()
        figure.image.save(out, "JPEG", quality=quality)
        return Image.open(out).convert("RGB"), figure.truth

    return spoil


def noise(figure: DrawnFigure, chance: np.random.Generator) -> Spoiled:
    pixels = np.asarray(figure.image, np.float32) + chance.normal(0, 8, (*figure.image.size[::-1], 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), figure.truth


def half(figure: DrawnFigure, chance: np.random.Generator) -> Spoiled:
    small = figure.image.resize((figure.image.width // 2, figure.image.height // 2), Image.Resampling.LANCZOS)
    return small, figure.truth


def erased(figure: DrawnFigure, chance: np.random.Generator) -> Spoiled:
    picture = figure.image.copy()
    parts = figure.truth["components"]
    if parts:
        picture.paste("white", tuple(parts[int(chance.integers(len(parts)))]["box"]))
    return picture, figure.truth


def changed(edit: Callable[[dict[str, Any]], None]) -> Callable[[DrawnFigure, np.random.Generator], Spoiled]:
    """The same picture, held against a truth with one thing changed: as if the model had drawn that one thing wrong."""

    def spoil(figure: DrawnFigure, chance: np.random.Generator) -> Spoiled:
        truth = copy.deepcopy(figure.truth)
        edit(truth)
        return figure.image, truth

    return spoil


def swap_colours(truth: dict[str, Any]) -> None:
    parts = truth["components"]
    if truth["kind"] == "diagram" and len(parts) > 1:
        parts[0]["color"], parts[1]["color"] = parts[1]["color"], parts[0]["color"]


def reverse_arrow(truth: dict[str, Any]) -> None:
    for arrow in truth["arrows"][:1]:
        arrow["source"], arrow["target"] = arrow["target"], arrow["source"]


def add_arrow(truth: dict[str, Any]) -> None:
    """One that the picture lacks."""
    if truth["kind"] == "diagram":
        ids = [part["id"] for part in truth["components"]]
        known = {frozenset((arrow["source"], arrow["target"])) for arrow in truth["arrows"]}
        free = [(a, b) for a in ids for b in ids if a < b and frozenset((a, b)) not in known]
        if free:
            truth["arrows"].append({"source": free[0][0], "target": free[0][1], "directed": True})


def change_letter(truth: dict[str, Any]) -> None:
    if truth["kind"] == "diagram":
        part = truth["components"][0]
        part["label"] = "X" + part["label"][1:] if part["label"][0] != "X" else "A" + part["label"][1:]


CASES: dict[str, Callable[[DrawnFigure, np.random.Generator], Spoiled]] = {
    "faultless": lambda figure, chance: (figure.image, figure.truth),
    "blur 0.5 px": blur(0.5), "blur 1 px": blur(1.0), "blur 2 px": blur(2.0), "JPEG 50": jpeg(50), "JPEG 20": jpeg(20),
    "noise of 8 levels": noise, "half size": half, "one component erased": erased,
    "colours of two components swapped": changed(swap_colours), "one arrow reversed": changed(reverse_arrow),
    "one arrow missing": changed(add_arrow), "one letter changed": changed(change_letter),
    "white paper": lambda figure, chance: (Image.new("RGB", figure.image.size, "white"), figure.truth),
    "no picture": lambda figure, chance: (None, figure.truth),
}  # fmt: skip


def measure(pairs: Iterable[tuple[Spoiled, tuple[int, int]]]) -> dict[str, float]:
    hits: defaultdict[str, float] = defaultdict(float)
    totals: defaultdict[str, float] = defaultdict(float)
    for (picture, truth), (width, height) in pairs:
        for name, (hit, total) in score_structure(picture, SimpleNamespace(truth=truth, width=width, height=height)).items():
            hits[name] += hit
            totals[name] += total
    return {name: hits[name] / totals[name] for name in NAMES if totals[name]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--rich", action="store_true")
    given = parser.parse_args()
    result = Result("structure", "python benchmarks/run_structure.py --rich", ["figures", *NAMES])

    def add(name: str, scores: dict[str, float]) -> None:
        result.rows.append([name, *(f"{scores[key]:.3f}" if key in scores else "" for key in NAMES)])
        result.numbers[name] = scores

    start = time.perf_counter()
    house = [draw_figure(SEED, index, 128, style="house") for index in range(given.count)]
    add(f"house style, faultless ({given.count})", measure([((f.image, f.truth), f.image.size) for f in house]))
    seconds = (time.perf_counter() - start) / given.count
    if given.rich:
        rich = [draw_figure(SEED, index, 256, kind) for kind in RICH for index in range(given.count // len(RICH))]
        add(f"rich diagrams at 256 px, faultless ({len(rich)})", measure([((f.image, f.truth), f.image.size) for f in rich]))
    small = [draw_figure(SEED, index, 128, style="small") for index in range(given.count)]
    chance = np.random.default_rng(0)
    for name, spoil in tqdm(CASES.items(), unit="case"):
        add(f"small style, {name}", measure([(spoil(figure, chance), figure.image.size) for figure in small]))
    others = [((f.image, g.truth), g.image.size) for f, g in zip(small, small[1:] + small[:1], strict=True)]
    add("small style, another figure", measure(others))
    result.notes.append(f"{1000 * seconds:.0f} ms a picture of 128 px, drawing included, on one core.")
    result.save()


if __name__ == "__main__":
    main()
