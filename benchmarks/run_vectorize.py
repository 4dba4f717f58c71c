"""Editable figures: drawn figures written as SVG, drawn again from it, and read again.

Command:  python benchmarks/run_vectorize.py [--count N] [--pictures DIR]

Each figure is read as `scienceflow vectorize` reads it, its SVG is drawn by resvg at the figure's own size, and the structure
metric reads that picture against the figure's ground truth: what is below the original's own score was lost on the way.
"Labels written" are the texts in the file, held against the truth directly: in the rich style those of OCR where the extra `ocr`
is installed, else of glyphs. "Explained" is the share of the original's ink that the redrawn figure has in its place, "added" the
share of the redrawn ink that the original lacks. `--pictures DIR` reads a folder of real figures as well, of which no truth is
known: how much of each is explained.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

from PIL import Image
from report import Result
from tqdm import tqdm

from OpenSciDraw.drawn.figure import DrawnFigure, draw_figure
from OpenSciDraw.evaluation.structure import pair_parts, score_structure
from OpenSciDraw.reading.figure import ReadComponent
from OpenSciDraw.reading.glyphs import same_text
from OpenSciDraw.vectorize.figure import VectorFigure
from OpenSciDraw.vectorize.labels import has_ocr
from OpenSciDraw.vectorize.render import draw, share_of
from OpenSciDraw.vectorize.trace import trace

NAMES = ("components", "colour", "shape", "arrows", "labels", "one_letter_labels")
SEED = 1800
RICH = ("pipeline", "flowchart", "graph", "tree")


def written_labels(figure: VectorFigure, drawn: DrawnFigure) -> tuple[int, int]:
    """(right, all) labels of the components that were found."""
    parts = [part for part in drawn.truth["components"] if part["shape"] != "container"]
    found = [ReadComponent(s.kind, "", " ".join(line.text for line in s.label), s.box) for s in figure.shapes]
    pairs = pair_parts(parts, found, max(drawn.image.size))
    named = [i for i, part in enumerate(parts) if part["label"]]
    return sum(i in pairs and same_text(found[pairs[i]].label, parts[i]["label"]) for i in named), len(named)


def measure(figures: list[DrawnFigure], ocr: bool) -> dict[str, dict[str, float]]:
    hits, totals, shares = (defaultdict[tuple[str, str], float](float) for _ in range(3))
    seconds = 0.0
    for drawn in tqdm(figures, unit="figure"):
        start = time.perf_counter()
        figure = trace(drawn.image, ocr)
        seconds += time.perf_counter() - start
        again = draw(figure)
        about = SimpleNamespace(truth=drawn.truth, width=drawn.image.width, height=drawn.image.height)
        for name, picture in (("original", drawn.image), ("redrawn", again)):
            for key, (hit, total) in score_structure(picture, about).items():
                hits[name, key] += hit
                totals[name, key] += total
        right, all_of_them = written_labels(figure, drawn)
        hits["redrawn", "labels written"] += right
        totals["redrawn", "labels written"] += all_of_them
        share = share_of(drawn.image, again, figure)
        shares["redrawn", "explained"] += share.explained / len(figures)
        shares["redrawn", "added"] += share.added / len(figures)
    numbers: dict[str, dict[str, float]] = {"original": {}, "redrawn": {}}
    for (name, key), total in totals.items():
        if total:
            numbers[name][key] = hits[name, key] / total
    numbers["redrawn"] |= {key: value for (_, key), value in shares.items()}
    numbers["redrawn"]["seconds"] = seconds / len(figures)
    return numbers


def add_real(result: Result, folder: Path) -> None:
    real = {}
    for path in tqdm(sorted(p for p in folder.iterdir() if p.suffix in (".png", ".jpg")), unit="picture"):
        picture = Image.open(path).convert("RGB")
        figure = trace(picture, has_ocr())
        share = share_of(picture, draw(figure), figure)
        counts = {"shapes": len(figure.shapes), "arrows": len(figure.connectors), "texts": len(figure.all_texts())}
        real[path.stem] = {**counts, "explained": round(share.explained, 3), "added": round(share.added, 3)}
        print(path.stem, real[path.stem], flush=True)
    result.numbers["real figures"] = real
    shares = sorted(value["explained"] for value in real.values())
    middle = shares[len(shares) // 2]
    result.notes.append(f"{len(real)} real figures: share explained {shares[0]:.2f} to {shares[-1]:.2f}, median {middle:.2f}.")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500, help="figures of the small style; of the others a tenth as many")
    parser.add_argument("--pictures", help="a folder of real figures")
    given = parser.parse_args()
    columns = ("labels written", "explained", "added")
    result = Result("vectorize", "python benchmarks/run_vectorize.py", ["figures", *NAMES, *columns])
    tenth = given.count // 5
    sets = {
        "small style": [draw_figure(SEED, index, 128, style="small") for index in range(given.count)],
        "house style": [draw_figure(SEED, index, 128, style="house") for index in range(tenth)],
        "rich diagrams at 256 px": [draw_figure(SEED, index, 256, kind) for kind in RICH for index in range(tenth // len(RICH))],
    }
    for name, figures in sets.items():
        ocr = has_ocr() and name.startswith("rich")
        numbers = measure(figures, ocr)
        print(name, numbers, flush=True)
        result.numbers[name] = {"count": len(figures), "ocr": ocr, **numbers}
        for kind, values in numbers.items():
            cells = [f"{values[key]:.3f}" if key in values else "" for key in (*NAMES, *columns)]
            result.rows.append([f"{name}, {kind} ({len(figures)})", *cells])
    if given.pictures:
        add_real(result, Path(given.pictures))
    taken = {name: values["redrawn"]["seconds"] for name, values in result.numbers.items() if name in sets}
    slow = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in taken.items())
    result.notes.append(f"Reading one figure on one core, with other work beside it: {slow}.")
    if not has_ocr():
        result.notes.append("Without the extra `ocr`: words of the rich style are read by glyphs, which miss many of 6 px.")
    result.save()


if __name__ == "__main__":
    main()
