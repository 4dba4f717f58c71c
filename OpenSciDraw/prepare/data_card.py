"""What `prepare` says of its outcome: rejected.jsonl, problems.jsonl, summary.json, README.md (a data card), contact_sheet.html."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from OpenSciDraw import __version__
from OpenSciDraw.prepare.contact_sheet import Tile, contact_sheet
from OpenSciDraw.prepare.extract import Extracted, ShardFacts
from OpenSciDraw.prepare.papers import Dropped
from OpenSciDraw.prepare.select import QUALITIES, SPLITS, Selection
from OpenSciDraw.prepare.settings import PrepareSettings

_KEPT_TILES, _REJECTED_TILES = 60, 8
Table = tuple[str, list[list[str]]]


@dataclass(frozen=True)
class Results:
    """All that is known at the end. `rows` are the small columns of all extracted pictures, in the order of `extracted`."""

    facts: Sequence[ShardFacts]
    set_aside: Sequence[Dropped]  # papers that were not read, for others of their ids
    rows: pa.Table
    selection: Selection
    extracted: Extracted
    settings: PrepareSettings

    @property
    def dropped(self) -> list[Dropped]:
        return [*self.set_aside, *(drop for facts in self.facts for drop in facts.dropped)]

    def identity(self, row: int) -> str:
        paper, figure, panel = (self.rows.column(name)[row].as_py() for name in ("paper_id", "figure_id", "panel"))
        return f"{paper}/{figure}{panel}"


def write_results(out: Path, results: Results) -> None:
    """Write the files, each whole or not at all."""
    summary = _summary(results)
    tables = _tables(summary)
    problems = ({"id": paper, "problem": problem} for facts in results.facts for paper, problem in facts.problems)
    _write(out / "rejected.jsonl", map(_json_line, _rejected(results)))
    _write(out / "problems.jsonl", map(_json_line, problems))
    _write(out / "summary.json", [json.dumps(summary, indent=1) + "\n"])
    _write(out / "README.md", [_card(summary, tables)])
    _write(out / "contact_sheet.html", contact_sheet(f"{out.name}: prepared figures", tables, _groups(results)))


def _json_line(entry: dict[str, str]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _write(path: Path, parts: Iterable[str]) -> None:
    building = path.with_name(f".{path.name}.tmp")
    with building.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(parts)
    os.replace(building, path)


def _rejected(results: Results) -> Iterator[dict[str, str]]:
    """One line for each paper and picture that is not used."""
    for drop in results.dropped:
        yield {"id": f"{drop.paper_id}/{drop.figure_id}".rstrip("/"), "source": drop.source, "reason": drop.reason}
    selection = results.selection
    for row in np.flatnonzero(~selection.keep).tolist():
        other = int(selection.same_as[row])
        more = f" as {results.identity(other)}" if other != row else ""
        source = results.rows.column("source_file")[row].as_py()
        yield {"id": results.identity(row), "source": source, "reason": selection.reasons[selection.reason[row]] + more}


def _summary(results: Results) -> dict[str, Any]:
    selection, rows, facts = results.selection, results.rows, results.facts
    kept = selection.keep
    used = rows.filter(pa.array(kept))

    def of(name: str) -> dict[str, int]:
        found = pc.value_counts(used.column(name)).to_pylist()
        return {entry["values"] or "unknown": entry["counts"] for entry in sorted(found, key=lambda e: -e["counts"])}

    return {
        "scienceflow": __version__,
        "settings": results.settings.model_dump(),
        "papers": {
            "read": sum(shard.papers for shard in facts),
            "with pictures": sum(shard.papers_with_figures for shard in facts),
            "with kept pictures": pc.count_distinct(used.column("paper_id")).as_py(),
            "with problems (problems.jsonl)": len({paper for shard in facts for paper, _ in shard.problems}),
        },
        "not extracted": dict(Counter(drop.reason.split(":")[0] for drop in results.dropped).most_common()),
        "extracted": rows.num_rows,
        "steps": [vars(step) for step in selection.steps],
        "kept": int(kept.sum()),
        "splits": {name: int((kept & (selection.split == n)).sum()) for n, name in enumerate(SPLITS)},
        "quality": {name: int((kept & (selection.quality == n)).sum()) for n, name in enumerate(QUALITIES)},
        "kind": of("kind"),
        "licence": of("licence"),
        "language": of("language"),
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
its reason, what is wrong with the sources of papers that were read in `problems.jsonl`; all counts are in `summary.json`.

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
def _groups(results: Results) -> Iterator[tuple[str, list[Tile]]]:
    """Some of what was kept, and some of what each filter took away, chosen by the seed."""
    selection = results.selection
    chance = random.Random(results.settings.seed)
    for number, reason in enumerate(selection.reasons):  # the first is that of kept pictures
        found = np.flatnonzero(selection.reason == number).tolist()
        chosen = sorted(chance.sample(found, min(_REJECTED_TILES if number else _KEPT_TILES, len(found))))
        if chosen:
            heading = f"Left out, {reason}" if number else "Kept"
            yield f"{heading}: {len(chosen)} of {len(found)}", [_tile(results, row) for row in chosen]


def _tile(results: Results, row: int) -> Tile:
    whole, selection = results.extracted.take([row]).to_pylist()[0], results.selection
    size = f"{whole['width']}×{whole['height']}"
    note = "left out" if selection.reason[row] else QUALITIES[selection.quality[row]]
    return Tile(whole["image"], f"{results.identity(row)} · {size} · {whole['kind']} · {note}", whole["caption"])
