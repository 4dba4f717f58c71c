"""Text fidelity: what the readers miss in faultless pictures, and how the scores fall in worse ones.

Command:  python benchmarks/run_text_fidelity.py [--figures DIR]

The caption's own picture, drawn by the program, must score near 1: what is missing is the reader's fault, the ceiling of
what a model can reach. Then the same pictures blurred, at half their size and back, and with the caption of another. With
`--figures` (a folder with `captions.jsonl` whose lines have `figure_texts`, the texts that are in a picture) real plots are
read as well: all their texts are asked for there, ticks too.

The last rows read the same pictures enlarged by other factors, and without what is done for single letters.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageFilter
from report import Result

from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.evaluation.base import Scores
from OpenSciDraw.evaluation.statistics import interval
from OpenSciDraw.evaluation.text_fidelity import compared, quoted_phrases
from OpenSciDraw.figures.decode import decode_picture
from OpenSciDraw.reading import ocr

SEED = 31
NAMES = ("word_recall", "word_precision", "edit_similarity")
Reading = Callable[[Image.Image], list[str]]


@dataclass(frozen=True)
class Figure:
    image: Image.Image
    phrases: list[str]


def drawn(style: str, size: int, count: int) -> list[Figure]:
    figures = (draw_figure(SEED, index, size, style=style) for index in range(count))
    return [Figure(figure.image, phrases) for figure in figures if (phrases := quoted_phrases(figure.caption))]


def real(folder: Path, count: int) -> list[Figure]:
    entries = map(json.loads, (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines())
    known = [entry for entry in entries if entry.get("figure_texts")]
    chosen = known[:: max(1, len(known) // count)]
    return [Figure(decode_picture((folder / each["file_name"]).read_bytes()), each["figure_texts"]) for each in chosen]


def half(image: Image.Image) -> Image.Image:
    small = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    return small.resize(image.size, Image.Resampling.BICUBIC)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as drawn": lambda image: image,
    "blur 1": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "blur 2": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "half size and back": half,
}


def by(reader: str) -> Reading:
    return lambda image: [line.text for line in ocr.read_lines(image, reader)]


def enlarged(factor: int) -> Reading:
    def read(image: Image.Image) -> list[str]:
        large = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
        return [line.text for line in ocr._by_rapidocr(large, factor)]

    return read


def lines_only(image: Image.Image) -> list[str]:
    marks, ocr._MARKS = ocr._MARKS, -1
    try:
        return enlarged(2)(image)
    finally:
        ocr._MARKS = marks


def add(result: Result, title: str, reader: str, phrases: Sequence[list[str]], read: Sequence[list[str]], seconds: float) -> None:
    scores: list[Scores] = [compared(asked, lines) for asked, lines in zip(phrases, read, strict=True)]
    row = [title, reader, str(len(scores)), f"{sum(score[NAMES[0]][1] for score in scores):.0f}"]
    for name in NAMES:
        found = interval([score[name][0] for score in scores], [score[name][1] for score in scores])
        row.append(f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})")
        result.numbers[f"{title} {reader} {name}"] = [found.value, found.low, found.high]
    result.rows.append([*row, f"{seconds / len(scores):.2f}" if seconds else ""])
    print("|", " | ".join(result.rows[-1]), "|", flush=True)


def read_all(read: Reading, figures: Sequence[Figure]) -> tuple[list[list[str]], float]:
    start = time.perf_counter()
    return [read(figure.image) for figure in figures], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--count", type=int, default=50, help="figures of each set")
    given = parser.parse_args()
    columns = ["pictures", "reader", "number", "words", "word recall (95 %)", "precision", "edit similarity", "s a picture"]
    result = Result("text_fidelity", "python benchmarks/run_text_fidelity.py --figures DIR", columns)
    sets = {
        "small 128": drawn("small", 128, 2 * given.count),
        "rich 256": drawn("rich", 256, given.count),
        "rich 512": drawn("rich", 512, given.count // 2),
    }
    for name, figures in sets.items():
        phrases = [figure.phrases for figure in figures]
        for change, apply in CHANGES.items():
            read, seconds = read_all(by("rapidocr"), [Figure(apply(figure.image), figure.phrases) for figure in figures])
            add(result, f"{name}, {change}", "rapidocr", phrases, read, seconds)
            if change == "as drawn":
                add(result, f"{name}, another's caption", "rapidocr", phrases, [*read[1:], read[0]], 0)
                add(result, f"{name}, {change}", "tesseract", phrases, *read_all(by("tesseract"), figures))
    if given.figures:
        figures = real(given.figures, given.count)
        for reader in ocr.READERS:
            add(result, "real plots", reader, [figure.phrases for figure in figures], *read_all(by(reader), figures))
    for name, figures in sets.items():
        figures = figures[: given.count // 2]
        ways = {f"enlarged {factor} x": enlarged(factor) for factor in (1, 2, 3)} | {"lines only, 2 x": lines_only}
        for title, way in ways.items():
            add(result, f"{name}, {title}", "rapidocr", [figure.phrases for figure in figures], *read_all(way, figures))
    result.save()


if __name__ == "__main__":
    main()
