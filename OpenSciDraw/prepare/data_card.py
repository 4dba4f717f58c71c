"""What `prepare` says of its outcome: rejected.jsonl, summary.json, README.md (a data card), contact_sheet.html."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from OpenSciDraw import __version__
from OpenSciDraw.prepare.archives import Dropped
from OpenSciDraw.prepare.contact_sheet import Tile, write_contact_sheet
from OpenSciDraw.prepare.extract import ShardJob, read_facts
from OpenSciDraw.prepare.select import QUALITIES, SPLITS, Selection
from OpenSciDraw.prepare.settings import PrepareSettings

_KEPT_TILES, _REJECTED_TILES = 60, 8
Table = tuple[str, list[list[str]]]


def write_results(
    out: Path,
    jobs: Sequence[ShardJob],
    rows: pa.Table,
    selection: Selection,
    dropped: Sequence[Dropped],
    settings: PrepareSettings,
) -> None:
    """Write the four files, each whole or not at all."""
    summary = _summary(jobs, rows, selection, dropped, settings)
    tables = _tables(summary)
    _write(
        out / "rejected.jsonl",
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _rejected(rows, selection, dropped)),
    )
    _write(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    _write(out / "README.md", _card(summary, tables))
    building = out / ".contact_sheet.html.tmp"
    write_contact_sheet(building, f"{out.name}: prepared figures", tables, _groups(jobs, rows, selection, settings.seed))
    os.replace(building, out / "contact_sheet.html")


def _write(path: Path, text: str) -> None:
    building = path.with_name(f".{path.name}.tmp")
    building.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(building, path)


def _rejected(rows: pa.Table, selection: Selection, dropped: Sequence[Dropped]) -> Iterator[dict[str, str]]:
    """One line for each paper and picture that is not used."""
    for drop in dropped:
        yield {"id": f"{drop.paper_id}/{drop.figure_id}".rstrip("/"), "source": drop.source, "reason": drop.reason}
    out = np.flatnonzero(~selection.keep)
    names = [rows.column(name) for name in ("paper_id", "figure_id", "panel", "source_file")]

    def identity(row: int) -> str:
        return f"{names[0][row]}/{names[1][row]}{names[2][row]}"

    for row in out.tolist():
        reason = selection.reasons[selection.reason[row]]
        other = int(selection.same_as[row])
        more = f" as {identity(other)}" if other != row else ""
        yield {"id": identity(row), "source": str(names[3][row]), "reason": reason + more}


def _summary(
    jobs: Sequence[ShardJob], rows: pa.Table, selection: Selection, dropped: Sequence[Dropped], settings: PrepareSettings
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for job in jobs:
        counts.update((read_facts(job.path) or {"counts": {}})["counts"])
    kept = selection.keep
    papers = pc.count_distinct(rows.column("paper_id").filter(pa.array(kept))).as_py()

    def of(name: str) -> dict[str, int]:
        found = pc.value_counts(rows.column(name).filter(pa.array(kept))).to_pylist()
        return {entry["values"] or "unknown": entry["counts"] for entry in sorted(found, key=lambda e: -e["counts"])}

    return {
        "scienceflow": __version__,
        "settings": settings.model_dump(),
        "papers": {"read": counts["papers"], "with pictures": counts["papers_with_figures"], "with kept pictures": papers},
        "not extracted": dict(Counter(drop.reason.split(":")[0] for drop in dropped).most_common()),
        "extracted": rows.num_rows,
        "steps": [vars(step) for step in selection.steps],
        "kept": int(kept.sum()),
        "splits": {name: int((kept & (selection.split == n)).sum()) for n, name in enumerate(SPLITS)},
        "quality": {name: int((kept & (selection.quality == n)).sum()) for n, name in enumerate(QUALITIES)},
        "kind": of("kind"),
        "licence": of("licence"),
        "language": of("language"),
        "with context": int(pc.sum(pc.greater(pc.binary_length(rows.column("label").filter(pa.array(kept))), 0)).as_py() or 0),
    }


def _tables(summary: dict[str, Any]) -> list[Table]:
    def counts(title: str, first: str, values: dict[str, int]) -> Table:
        return title, [[first, "count"], *([name, f"{count:,}"] for name, count in values.items())]

    steps = [["step", "came", "dropped", "left"]]
    steps += [[s["name"], f"{s['came']:,}", f"{s['dropped']:,}", f"{s['came'] - s['dropped']:,}"] for s in summary["steps"]]
    tables = [counts("Papers", "papers", summary["papers"])]
    if summary["not extracted"]:
        tables.append(counts("Papers and pictures without a result", "reason", summary["not extracted"]))
    tables.append((f"From {summary['extracted']:,} extracted pictures to {summary['kept']:,} kept", steps))
    for name in ("splits", "quality", "kind", "licence", "language"):
        tables.append(counts(name.capitalize(), name, summary[name]))
    return tables


_CARD = """---
configs:
- config_name: default
  data_files:
{files}---

# {kept:,} figures with captions from {papers:,} papers

Made by ScienceFlow {version}, `scienceflow prepare`. Look at `contact_sheet.html`; what is missing is in `rejected.jsonl` with
its reason; all counts are in `summary.json`.

## Columns of figures/<split>/*.parquet

| column | meaning |
|---|---|
| id | paper_id/figure_id and panel; unique |
| image, width, height | a PNG or JPEG file, and its size in pixels |
| caption | the panel's own caption where it has one, else the figure's; math is LaTeX, citations and references are removed |
| parent_caption | the figure's caption, of panels that have their own |
| panel, panels | letter of the panel, and how many pictures the figure has |
| context | paragraphs of the paper that refer to the figure |
| label, source_file, tex_file | where it stands in the source |
| licence | of the paper, where it is known; respect it |
| sha256, phash | of the file's bytes; perceptual, 256 bits |
| kind, kind_score, ink, text, sharpness, lossless | measured on the picture, see docs/prepare.md |
| language, caption_words, caption_chars, ocr_words | of the caption; words read in the picture, -1 where it was not read |
| quality | high, medium or low |
| duplicates | other pictures that were dropped in favour of this one |

Splits are by paper: no paper is in two. One figure that appears in two papers is kept once.
"""


def _card(summary: dict[str, Any], tables: Sequence[Table]) -> str:
    files = "".join(
        f"  - split: {name}\n    path: figures/{name}/*.parquet\n" for name, count in summary["splits"].items() if count
    )
    parts = [
        _CARD.format(
            files=files, kept=summary["kept"], papers=summary["papers"]["with kept pictures"], version=summary["scienceflow"]
        )
    ]
    for title, rows in tables:
        lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    settings = json.dumps(summary["settings"], indent=1)
    parts.append(f"## Settings\n\n```json\n{settings}\n```\n")
    return "\n".join(parts)


# -- the contact sheet -------------------------------------------------------------------------
def _groups(jobs: Sequence[ShardJob], rows: pa.Table, selection: Selection, seed: int) -> Iterator[tuple[str, list[Tile]]]:
    """Some of what was kept, and some of what each filter took away, chosen by `seed`."""
    tiles = _tiles_of(jobs, rows)
    chance = random.Random(seed)
    kept = np.flatnonzero(selection.keep).tolist()
    chosen = sorted(chance.sample(kept, min(_KEPT_TILES, len(kept))))
    yield f"Kept: {len(chosen)} of {len(kept)}", [tiles(row, QUALITIES[selection.quality[row]]) for row in chosen]
    for number, reason in enumerate(selection.reasons):
        out = np.flatnonzero(selection.reason == number).tolist() if number else []
        chosen = sorted(chance.sample(out, min(_REJECTED_TILES, len(out))))
        if chosen:
            yield f"Left out, {reason}: {len(chosen)} of {len(out)}", [tiles(row, "left out") for row in chosen]


def _tiles_of(jobs: Sequence[ShardJob], rows: pa.Table) -> Callable[[int, str], Tile]:
    """The tile of a row: its picture is read from extracted/."""
    counts = [pq.read_metadata(job.path).num_rows for job in jobs]
    starts = np.concatenate([[0], np.cumsum(counts)])

    def value(name: str, row: int) -> Any:
        return rows.column(name)[row].as_py()

    def tile(row: int, note: str) -> Tile:
        shard = int(np.searchsorted(starts, row, side="right")) - 1
        image = _image(jobs[shard].path, row - int(starts[shard]))
        panel = f" {value('panel', row)}" if value("panel", row) else ""
        size = f"{value('width', row)}×{value('height', row)}"
        line = f"{value('paper_id', row)} {value('figure_id', row)}{panel} · {size} · {value('kind', row)} · {note}"
        return Tile(image, line, value("caption", row))

    return tile


def _image(path: Path, row: int) -> bytes:
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if row < count:
            data: bytes = file.read_row_group(group, columns=["image"]).column(0)[row].as_py()
            return data
        row -= count
    raise IndexError(row)
