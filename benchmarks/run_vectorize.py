"""Editable figures: drawn figures written as SVG, drawn again from it, and read again.

Command:  python benchmarks/run_vectorize.py [--count N] [--pictures DIR]

Each figure is read by `scienceflow vectorize`'s code, its SVG is drawn by resvg at the figure's own size, and the structure metric
reads that picture against the figure's ground truth: what is below the original's own score was lost on the way. "Labels written" are
the texts in the file, compared with the truth directly: by OCR and glyphs where the extra `ocr` is installed, else by glyphs alone.
"Explained" is the share of the original's ink that the redrawn figure has in its place, "added" the ink that the original lacks.
`--pictures DIR` then reads a folder of real figures, of which no truth is known, and writes what share of each it explains.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
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
    hits, totals, shares = (Counter[tuple[str, str]]() for _ in range(3))
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500, help="figures of the small style; of the others half as many")
    parser.add_argument("--pictures", help="a folder of real figures")
    given = parser.parse_args()
    columns = ("labels written", "explained", "added")
    result = Result("vectorize", "python benchmarks/run_vectorize.py", ["figures", *NAMES, *columns])
    half = given.count // 2
    sets = {
        "small style": [draw_figure(SEED, index, 128, style="small") for index in range(given.count)],
        "house style": [draw_figure(SEED, index, 128, style="house") for index in range(half)],
        "rich diagrams at 256 px": [draw_figure(SEED, index, 256, kind) for kind in RICH for index in range(half // len(RICH))],
    }
    for name, figures in sets.items():
        ocr = has_ocr() and name.startswith("rich")
        numbers = measure(figures, ocr)
        result.numbers[name] = {"count": len(figures), "ocr": ocr, **numbers}
        for kind, values in numbers.items():
            cells = [f"{values[key]:.3f}" if key in values else "" for key in (*NAMES, *columns)]
            result.rows.append([f"{name}, {kind} ({len(figures)})", *cells])
    if given.pictures:
        real = {}
        for path in sorted(p for p in Path(given.pictures).iterdir() if p.suffix in (".png", ".jpg")):
            picture = Image.open(path).convert("RGB")
            figure = trace(picture, has_ocr())
            share = share_of(picture, draw(figure), figure)
            real[path.stem] = {"shapes": len(figure.shapes), "arrows": len(figure.connectors), "texts": len(figure.all_texts()),
                               "explained": share.explained, "added": share.added}  # fmt: skip
        result.numbers["real figures"] = real
        ordered = sorted(value["explained"] for value in real.values())
        result.notes.append(f"{len(real)} real figures: median share explained {ordered[len(ordered) // 2]:.2f}, from {ordered[0]:.2f} "
                            f"to {ordered[-1]:.2f}.")  # fmt: skip
    slow = [f"{name} {1000 * values['redrawn']['seconds']:.0f} ms" for name, values in result.numbers.items() if "redrawn" in values]
    result.notes.append(f"Reading one figure, on one core of a busy machine: {', '.join(slow)}.")
    if not has_ocr():
        result.notes.append("Without the extra `ocr`: words of the rich style are read by glyphs, which do not know letters of 6 px.")
    result.save()


if __name__ == "__main__":
    main()
