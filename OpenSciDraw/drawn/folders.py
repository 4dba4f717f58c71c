"""Drawn figures and edits as folders of files: what `scienceflow draw` writes."""

from __future__ import annotations

import json
from pathlib import Path

from tqdm import tqdm

from OpenSciDraw.drawn.edits import draw_edit
from OpenSciDraw.drawn.figure import iter_figures
from OpenSciDraw.utils.files import make_folder


def write_drawn_figures(out: str | Path, count: int, seed: int, size: int, style: str = "rich") -> None:
    """Write `<id>.png` with its sidecar caption `<id>.txt` for each figure, and one `truth.jsonl` for all.

    A line of `truth.jsonl` is the ground truth with the figure's `id` added.
    """
    folder = make_folder(Path(out))
    with (folder / "truth.jsonl").open("w", encoding="utf-8") as truths:
        for figure in tqdm(iter_figures(count, seed, size, style), total=count, desc="drawing figures", unit="fig"):
            figure.image.save(folder / f"{figure.id}.png", compress_level=1)
            (folder / f"{figure.id}.txt").write_text(figure.caption + "\n", encoding="utf-8")
            truths.write(json.dumps({"id": figure.id, **figure.truth}) + "\n")


def write_drawn_edits(out: str | Path, count: int, seed: int, style: str = "small") -> None:
    """Write `<id>.png`, `<id>.source.png` and `<id>.json` (caption, edit_bboxes) for each edit, and one `truth.jsonl` for all."""
    folder = make_folder(Path(out))
    with (folder / "truth.jsonl").open("w", encoding="utf-8") as truths:
        for index in tqdm(range(count), desc="drawing edits", unit="edit"):
            edit = draw_edit(seed, index, style)
            edit.after.image.save(folder / f"{edit.id}.png", compress_level=1)
            edit.before.image.save(folder / f"{edit.id}.source.png", compress_level=1)
            record = {"caption": edit.instruction, "edit_bboxes": edit.boxes}
            (folder / f"{edit.id}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
            truths.write(json.dumps({"id": edit.id, **edit.after.truth}) + "\n")
