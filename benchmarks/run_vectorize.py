"""Editable figures: drawn figures written as SVG, drawn again from it, and read again.

Command:  python benchmarks/run_vectorize.py [--count N] [--pictures DIR] [--minutes M]

Each figure is read as `scienceflow vectorize` reads it, its SVG is drawn by resvg at the figure's own size, and the structure
metric reads that picture against the ground truth. What the metric misses in the same figures as they are stands
in the table of the structure metric. "Labels written" are the texts in the file, held against the truth directly; `--ocr` reads
those of the rich style by OCR. "Explained" is the share of the original's ink that the redrawn figure has in its place, "added"
the share of the redrawn ink that the original lacks. `--pictures DIR` reads a folder of real figures as well.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
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
from OpenSciDraw.vectorize.render import draw, share_of
from OpenSciDraw.vectorize.trace import trace

NAMES = ("components", "colour", "shape", "arrows", "labels", "one_letter_labels")
SEED = 900  # the figures of run_structure.py
RICH = ("pipeline", "flowchart", "graph", "tree")


def written_labels(figure: VectorFigure, drawn: DrawnFigure) -> tuple[int, int]:
    """(right, all) labels of the components that were found."""
    parts = [part for part in drawn.truth["components"] if part["shape"] != "container"]
    found = [ReadComponent(s.kind, "", " ".join(line.text for line in s.label), s.box) for s in figure.shapes]
    pairs = pair_parts(parts, found, max(drawn.image.size))
    named = [i for i, part in enumerate(parts) if part["label"]]
    return sum(i in pairs and same_text(found[pairs[i]].label, parts[i]["label"]) for i in named), len(named)


def measure(figures: Sequence[DrawnFigure], ocr: bool, until: float) -> dict[str, float]:
    """Scores of the redrawn figures, of as many as are done `until` then (time.monotonic)."""
    hits, totals = defaultdict[str, float](float), defaultdict[str, float](float)
    for drawn in tqdm(figures, unit="figure"):
        if time.monotonic() > until:
            break
        start = time.process_time()
        figure = trace(drawn.image, ocr)
        seconds = time.process_time() - start
        again = draw(figure)
        about = SimpleNamespace(truth=drawn.truth, width=drawn.image.width, height=drawn.image.height)
        share = share_of(drawn.image, again, figure)
        own = {"labels written": written_labels(figure, drawn), "explained": (share.explained, 1), "added": (share.added, 1)}
        for key, (hit, total) in {**score_structure(again, about), **own, "seconds": (seconds, 1)}.items():
            hits[key] += hit
            totals[key] += total
    return {"figures": totals["seconds"], **{key: hits[key] / total for key, total in totals.items() if total}}


def add_real(result: Result, folder: Path, ocr: bool, until: float) -> None:
    real = {}
    for path in tqdm(sorted(p for p in folder.iterdir() if p.suffix in (".png", ".jpg")), unit="picture"):
        if time.monotonic() > until:
            break
        picture = Image.open(path).convert("RGB")
        figure = trace(picture, ocr)
        share = share_of(picture, draw(figure), figure)
        counts = {"shapes": len(figure.shapes), "arrows": len(figure.connectors), "texts": len(figure.all_texts())}
        real[path.stem] = {**counts, "explained": round(share.explained, 3), "added": round(share.added, 3)}
        print(path.stem, real[path.stem], flush=True)
    result.numbers["real figures"] = {"ocr": ocr, **real}
    if not real:
        return
    shares = sorted(value["explained"] for value in real.values())
    middle = shares[len(shares) // 2]
    said = f"{len(real)} real figures{', with OCR' if ocr else ''}"
    result.notes.append(f"{said}: share explained {shares[0]:.2f} to {shares[-1]:.2f}, median {middle:.2f}.")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500, help="figures of the small style; of the others a quarter as many")
    parser.add_argument("--pictures", help="a folder of real figures")
    parser.add_argument("--ocr", action="store_true", help="read the rich style and real figures by OCR (the extra ocr)")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after so long, with the figures done so far")
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes
    columns = (*NAMES, "labels written", "explained", "added")
    result = Result("vectorize", f"python benchmarks/run_vectorize.py --count {given.count}", ["figures, redrawn", *columns])
    quarter = given.count // 4
    sets = {
        "house style": [draw_figure(SEED, index, 128, style="house") for index in range(quarter)],
        "rich diagrams at 256 px": [draw_figure(SEED, index, 256, kind) for kind in RICH for index in range(quarter // len(RICH))],
        "small style": [draw_figure(SEED, index, 128, style="small") for index in range(given.count)],
    }
    if given.pictures:
        add_real(result, Path(given.pictures), given.ocr, until)
    for name, figures in sets.items():
        ocr = given.ocr and name.startswith("rich")
        numbers = measure(figures, ocr, until)
        result.numbers[name] = {"ocr": ocr, **numbers}
        cells = [f"{numbers[key]:.3f}" if key in numbers else "" for key in columns]
        result.rows.append([f"{name}{', OCR' if ocr else ''} ({numbers['figures']:.0f})", *cells])
    slow = ", ".join(f"{name} {1000 * result.numbers[name]['seconds']:.0f} ms" for name in sets)
    result.notes.append(f"Reading one figure, time of one core: {slow}.")
    result.save()


if __name__ == "__main__":
    main()
