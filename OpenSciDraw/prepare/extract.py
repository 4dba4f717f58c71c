"""One paper's source -> rows of figures with captions, in a process that a hostile paper cannot leave."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from OpenSciDraw.prepare.archives import unpack
from OpenSciDraw.prepare.filters.measure import MEASUREMENT_FIELDS, measure
from OpenSciDraw.prepare.isolation import IsolationError, run_isolated
from OpenSciDraw.prepare.latex.figures import LatexFigure, read_figures
from OpenSciDraw.prepare.papers import Dropped, PaperSource, RejectedPaper
from OpenSciDraw.prepare.pictures.picture import Picture, RejectedPicture
from OpenSciDraw.prepare.pictures.render import render
from OpenSciDraw.prepare.pictures.tikz import compile_tikz
from OpenSciDraw.prepare.settings import PrepareSettings
from OpenSciDraw.utils.files import parse_json, sync_to_disk

VERSION = 1  # of what is extracted: another one extracts again
EXTRACTED = pa.schema(
    [
        pa.field("paper_id", pa.string(), nullable=False),
        pa.field("figure_id", pa.string(), nullable=False),  # in the paper, by order of appearance: fig1, fig2, …
        pa.field("panel", pa.string(), nullable=False),  # a, b, … in a figure of several pictures; '' in one of a single
        pa.field("image", pa.large_binary(), nullable=False),  # a PNG or JPEG file
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),  # the panel's own where it has one, else the figure's
        pa.field("parent_caption", pa.string(), nullable=False),  # the figure's, of panels with a caption of their own
        pa.field("panels", pa.int32(), nullable=False),  # pictures in the same figure
        pa.field("context", pa.string(), nullable=False),  # paragraphs that refer to the figure
        pa.field("label", pa.string(), nullable=False),
        pa.field("source_file", pa.string(), nullable=False),  # of the picture, inside the paper's source
        pa.field("tex_file", pa.string(), nullable=False),
        pa.field("licence", pa.string(), nullable=False),  # '' where it is not known
        pa.field("sha256", pa.string(), nullable=False),  # of `image`
        *MEASUREMENT_FIELDS,
    ]
)
_LARGE = ("image", "caption", "context")
SMALL = tuple(f.name for f in EXTRACTED if f.name not in _LARGE)  # what decisions are made from
_LICENCE_FILES = re.compile(r"(licen[cs]e|copying)(\.(md|txt|rst))?", re.IGNORECASE)
_LICENCES = {  # words of a licence file's first lines: its SPDX name
    "mit license": "MIT",
    "attribution 4.0 international": "CC-BY-4.0",
    "attribution-sharealike 4.0": "CC-BY-SA-4.0",
    "attribution-noncommercial 4.0": "CC-BY-NC-4.0",
    "cc0 1.0 universal": "CC0-1.0",
    "apache license": "Apache-2.0",
    "gnu general public license": "GPL",
}  # fmt: skip


@dataclass
class PaperResult:
    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # e.g. inputs that are missing: not a figure's loss by themselves


@dataclass(frozen=True)
class ShardJob:
    """The papers whose rows make one file of extracted/, and a hash of all that decides what is in it."""

    path: Path
    papers: Sequence[PaperSource]
    licences: dict[str, str]
    digest: str


# -- one paper, in a process of its own ----------------------------------------------------------
@dataclass(frozen=True)
class _Task:
    source: PaperSource
    licence: str
    settings: PrepareSettings
    scratch: Path


def extract_paper(source: PaperSource, licence: str, settings: PrepareSettings, scratch: Path) -> PaperResult:
    """Rows of a paper, within `settings.limits`. A paper that breaks or exceeds them is one Dropped with the reason."""
    limits = settings.limits
    folder = Path(tempfile.mkdtemp(prefix="paper-", dir=scratch))
    try:
        task = _Task(source, licence, settings, folder)
        return run_isolated(_extract, task, seconds=limits.seconds, memory_bytes=limits.memory_bytes)
    except IsolationError as error:
        return PaperResult(dropped=[Dropped(source.paper_id, "", source.name, str(error))])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _extract(task: _Task) -> PaperResult:
    source, settings = task.source, task.settings
    result = PaperResult()
    try:
        root, notes = unpack(source, task.scratch / "source", settings.limits)
    except RejectedPaper as error:
        result.dropped.append(Dropped(source.paper_id, "", source.name, str(error)))
        return result
    paper = read_figures(root, settings.limits)
    result.problems += notes + paper.problems
    licence = task.licence or _licence_in(root)
    for figure in paper.figures:
        where = _source_of(figure, root)
        try:
            picture = _picture(figure, root, task)
        except RejectedPicture as error:
            result.dropped.append(Dropped(source.paper_id, figure.figure_id + figure.panel, where, str(error)))
            continue
        result.rows.append(_row(figure, picture, where, licence, source.paper_id, settings))
    if not paper.figures:
        reason = "no figure: " + ("; ".join(paper.problems[:3]) or "no figure environment with a picture in its source")
        result.dropped.append(Dropped(source.paper_id, "", source.name, reason))
    return result


def _picture(figure: LatexFigure, root: Path, task: _Task) -> Picture:
    settings = task.settings
    path = figure.graphic
    if path is None and figure.tikz is not None:
        path = compile_tikz(figure.tikz, figure.preamble, root, task.scratch / "tikz", settings.limits.seconds / 4)
    if path is None:
        raise RejectedPicture(figure.reason or "no picture")
    return render(
        path, dpi=settings.dpi, max_side=settings.max_side, limits=settings.limits, scratch=task.scratch / "eps",
        page=figure.page, options=figure.options,
    )  # fmt: skip


def _row(
    figure: LatexFigure, picture: Picture, where: str, licence: str, paper_id: str, settings: PrepareSettings
) -> dict[str, Any]:
    return {
        "paper_id": paper_id, "figure_id": figure.figure_id, "panel": figure.panel, "image": picture.data,
        "width": picture.width, "height": picture.height, "caption": figure.caption,
        "parent_caption": figure.parent_caption, "panels": figure.panels, "context": figure.context,
        "label": figure.label, "source_file": where, "tex_file": figure.tex_file, "licence": licence,
        "sha256": hashlib.sha256(picture.data).hexdigest(),
        **measure(picture, figure.caption, ocr=settings.ocr).columns(),
    }  # fmt: skip


def _source_of(figure: LatexFigure, root: Path) -> str:
    if figure.graphic is None:
        return f"{figure.tex_file} (TikZ)" if figure.tikz is not None else figure.tex_file
    return os.path.relpath(figure.graphic, os.path.realpath(root)).encode("utf-8", "backslashreplace").decode()


def _licence_in(root: Path) -> str:
    """SPDX name of a licence file beside the source, '' where there is none that is known."""
    for path in sorted(root.iterdir()):
        if _LICENCE_FILES.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                text = " ".join(file.read(2000).decode("utf-8", "replace").lower().split())
            return next((name for words, name in _LICENCES.items() if words in text), "")
    return ""


# -- one shard -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class ShardFacts:
    """What a file of extracted/ says of itself. `problems` are (paper_id, what is wrong with its source)."""

    digest: str
    dropped: list[Dropped]
    problems: list[tuple[str, str]]
    papers: int
    papers_with_figures: int


def write_extracted(job: ShardJob, results: Iterable[PaperResult]) -> None:
    """Write a file of extracted/ whole, a row group a paper; `results` are those of the job's papers in their order."""
    building = job.path.with_name(f".{job.path.name}.tmp")
    building.parent.mkdir(parents=True, exist_ok=True)
    dropped: list[dict[str, str]] = []
    problems: list[tuple[str, str]] = []
    with_figures = 0
    with pq.ParquetWriter(building, EXTRACTED, compression="zstd", use_dictionary=False, write_statistics=False) as writer:
        for paper, result in zip(job.papers, results, strict=True):
            with_figures += bool(result.rows)
            dropped += [vars(drop) for drop in result.dropped]
            problems += [(paper.paper_id, problem) for problem in result.problems]
            if result.rows:
                writer.write_table(pa.Table.from_pylist(result.rows, schema=EXTRACTED))
        facts = ShardFacts(job.digest, [], problems, len(job.papers), with_figures)
        writer.add_key_value_metadata({"extracted": json.dumps({**vars(facts), "dropped": dropped})})
    sync_to_disk(building)
    os.replace(building, job.path)
    sync_to_disk(job.path.parent)


def read_facts(path: Path) -> ShardFacts | None:
    """What a file of extracted/ says of itself; None where it is not there."""
    if not path.exists():
        return None
    facts = parse_json(pq.read_metadata(path).metadata[b"extracted"])
    dropped = [Dropped(**entry) for entry in facts.pop("dropped")]
    return ShardFacts(dropped=dropped, **facts)


def run_job(job: ShardJob, settings: PrepareSettings, scratch: Path) -> None:
    """A whole shard, its papers one after the other: the unit of work of an engine that spreads shards."""
    licences = (job.licences.get(source.paper_id, "") for source in job.papers)
    pairs = zip(job.papers, licences, strict=True)
    write_extracted(job, (extract_paper(source, licence, settings, scratch) for source, licence in pairs))


class Extracted:
    """Whole rows of extracted/ by their number over all shards; a paper's rows are the least that is read."""

    def __init__(self, jobs: Sequence[ShardJob]):
        self._groups: list[tuple[Path, int]] = []
        starts = [0]
        for job in jobs:
            metadata = pq.read_metadata(job.path)
            for group in range(metadata.num_row_groups):
                self._groups.append((job.path, group))
                starts.append(starts[-1] + metadata.row_group(group).num_rows)
        self._starts = np.array(starts)
        self._file: tuple[Path, pq.ParquetFile] | None = None  # the last one: rows are mostly asked for in order

    def take(self, rows: Sequence[int] | np.ndarray) -> pa.Table:
        """Rows in ascending order, all columns."""
        wanted = np.asarray(rows)
        groups = np.searchsorted(self._starts, wanted, side="right") - 1
        tables = [
            self._read(group).take(wanted[groups == group] - self._starts[group]) for group in np.unique(groups).tolist()
        ]
        return pa.concat_tables(tables).combine_chunks()

    def _read(self, group: int) -> pa.Table:
        path, number = self._groups[group]
        if self._file is None or self._file[0] != path:
            self._file = (path, pq.ParquetFile(path))
        return self._file[1].read_row_group(number)
