"""`scienceflow prepare`: papers' sources -> figures with captions, filtered, deduplicated and split by paper.

    OUT/extracted/00000.parquet        every picture of a fixed set of papers; resumed by shard, like encode
    OUT/figures/train/00000.parquet    what is kept; also validation/ and test/
    OUT/rejected.jsonl                 what is not, each with its reason
    OUT/summary.json, README.md (data card), contact_sheet.html

What goes into a shard of extracted/ is a function of the list of papers and the settings alone, so a killed run
goes on where it stopped, and any engine writes the same bytes. The decisions after it are made over all pictures
at once, from the small columns, and are cheap: other limits are another run of the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError
from tqdm import tqdm

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.tables import ID_COLUMN
from OpenSciDraw.prepare.data_card import Results, write_results
from OpenSciDraw.prepare.extract import (
    SMALL,
    VERSION,
    Extracted,
    PaperResult,
    ShardJob,
    extract_paper,
    read_facts,
    write_extracted,
)  # fmt: skip
from OpenSciDraw.prepare.isolation import end_all
from OpenSciDraw.prepare.papers import PaperSource, find_papers
from OpenSciDraw.prepare.pictures.tikz import find_tex_engine
from OpenSciDraw.prepare.select import QUALITIES, SPLITS, Selection, select
from OpenSciDraw.prepare.settings import Limits, PrepareSettings
from OpenSciDraw.utils.files import parse_json, real, sync_to_disk
from OpenSciDraw.utils.sole_user import sole_user

_LOG = logging.getLogger("OpenSciDraw")
_EXTRACTING = ("dpi", "max_side", "ocr", "limits")  # settings that decide what is in extracted/
ROW_GROUP = 16  # pictures: about what a reader of one picture reads beside it


def main(arguments: argparse.Namespace) -> int:
    """The command. Returns the exit code."""
    settings = parse_settings(arguments.cfg_options)
    _require_packages(settings)
    prepare(arguments.sources, Path(arguments.out), settings, arguments.engine)
    return 0


def _require_packages(settings: PrepareSettings) -> None:
    """Raises UserError naming what the extras 'prepare' and 'ocr' would install."""
    needed = {"prepare": ("pylatexenc", "pypdfium2", "resvg_py", "py3langid"), "ocr": ("rapidocr", "onnxruntime")}
    for extra, names in needed.items():
        missing = [name for name in names if find_spec(name) is None]
        if missing and (extra == "prepare" or settings.ocr):
            raise UserError(
                f"scienceflow prepare needs {', '.join(missing)}: pip install 'OpenSciDraw[{extra}]' (or '.[{extra}]')."
            )


def parse_settings(options: Sequence[str]) -> PrepareSettings:
    """KEY=VALUE options, as Python literals or text; `limits.seconds=60` reaches into limits.

    Raises:
        UserError: an unknown key or a value that is not allowed.
    """
    from OpenSciDraw.config.files import parse_value
    from OpenSciDraw.config.messages import nearest

    known = {*PrepareSettings.model_fields, *(f"limits.{name}" for name in Limits.model_fields)} - {"limits"}
    given: dict[str, Any] = {}
    for option in options:
        key, equals, raw = option.partition("=")
        if not equals or key not in known:
            hint = nearest(key, sorted(known))
            raise UserError(
                f"--cfg_options {option!r}: " + ("write KEY=VALUE." if not equals else f"there is no setting {key!r} of prepare.")
                + (f" Did you mean {' or '.join(hint)}?" if hint else "") + f" Known: {', '.join(sorted(known))}."
            )  # fmt: skip
        section = given.setdefault("limits", {}) if key.startswith("limits.") else given
        section[key.removeprefix("limits.")] = parse_value(raw)
    try:
        return PrepareSettings(**given)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise UserError("Settings of prepare that cannot be:\n" + "\n".join(lines)) from error


def prepare(sources: Sequence[str | Path], out: Path, settings: PrepareSettings, engine: str = "local") -> Selection:
    """Extract, select, write. The same call goes on where it stopped.

    Raises:
        UserError: no papers, nothing kept, an output folder among the sources or with other papers in it.
    """
    if any(real(out).is_relative_to(real(Path(source).expanduser())) for source in sources):
        raise UserError(f"--out {out} lies inside a source: its pictures would be taken for a paper's. Choose a folder outside.")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Choose a folder.")
    papers, set_aside = find_papers(sources)
    _LOG.info("%d papers in %s", len(papers), ", ".join(map(str, sources)))
    jobs = plan(papers, out, settings)
    _refuse_strangers(out, jobs)
    with sole_user(out, "prepare"):  # two of this command would clear away each other's unpacked papers
        _extract(jobs, settings, out / ".work", engine)
        facts = [found for job in jobs if (found := read_facts(job.path)) is not None]
        rows = pa.concat_tables([pq.read_table(job.path, columns=list(SMALL)) for job in jobs]).combine_chunks()
        selection, extracted = select(rows, settings), Extracted(jobs)
        if selection.keep.any():
            made_of = hashlib.sha256(" ".join(job.digest for job in jobs).encode()).hexdigest()
            _write_figures(out / "figures", extracted, made_of, selection, settings)
        write_results(out, Results(facts, set_aside, rows, selection, extracted, settings))
    if not selection.keep.any():
        raise UserError(f"No picture was kept: see {out / 'rejected.jsonl'} and {out / 'contact_sheet.html'} for the reasons.")
    _LOG.info("look at %s; train on it with encode = dict(figures='%s')", out / "contact_sheet.html", out / "figures" / "train")
    return selection


# -- extracting --------------------------------------------------------------------------------------
def plan(papers: Sequence[PaperSource], out: Path, settings: PrepareSettings) -> list[ShardJob]:
    """Shards of extracted/, each with a hash of its papers and of the settings that decide what is in it."""
    licences = _licences(settings.metadata, papers)
    # a picture that was left out for want of a program is drawn once it is there
    chosen = [VERSION, settings.model_dump(include=set(_EXTRACTING)), find_tex_engine(), shutil.which("gs") is not None]
    jobs = []
    for number, start in enumerate(range(0, len(papers), settings.papers_per_shard)):
        part = papers[start : start + settings.papers_per_shard]
        own = {paper.paper_id: licences[paper.paper_id] for paper in part if paper.paper_id in licences}
        content = [chosen, [[p.paper_id, *_stamp(p), own.get(p.paper_id, "")] for p in part]]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        jobs.append(ShardJob(out / "extracted" / f"{number:05d}.parquet", part, own, digest))
    return jobs


def _stamp(paper: PaperSource) -> list[int]:
    """What tells a changed source: size and time of its file; of a folder, of the newest file in it."""
    status = paper.path.stat()
    if not paper.path.is_dir():
        return [status.st_size, status.st_mtime_ns, paper.offset]
    newest, total = 0, 0
    for folder, folders, files in os.walk(paper.path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            found = os.lstat(os.path.join(folder, name))
            newest, total = max(newest, found.st_mtime_ns), total + found.st_size
    return [total, newest, 0]


def _licences(metadata: str | None, papers: Sequence[PaperSource]) -> dict[str, str]:
    """Licences of the papers that JSON lines with `id` and `license` name (arXiv's metadata snapshot)."""
    if metadata is None:
        return {}
    path = Path(metadata).expanduser()
    if not path.is_file():
        raise UserError(f"metadata = {metadata!r}: there is no such file.")
    names = {paper.paper_id.replace("/", ""): paper.paper_id for paper in papers}
    found: dict[str, str] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(tqdm(lines, desc="metadata", unit="paper"), 1):
            try:
                entry = parse_json(line)
                identity, licence = str(entry["id"]).replace("/", ""), entry.get("license")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}, line {number}: not an object with `id` and `license` ({error!r}).") from error
            if identity in names and licence:
                found[names[identity]] = str(licence)
    return found


def _refuse_strangers(out: Path, jobs: Sequence[ShardJob]) -> None:
    planned = {job.path for job in jobs}
    strangers = [path for path in sorted((out / "extracted").glob("[0-9]*.parquet")) if path not in planned]
    if strangers:
        raise UserError(
            f"{out} holds {len(strangers)} shard(s) of papers that are not among these sources (first: {strangers[0]}): there are "
            "fewer papers than there were, or papers_per_shard changed. Choose another --out, or delete them."
        )


def _extract(jobs: Sequence[ShardJob], settings: PrepareSettings, scratch: Path, engine: str) -> None:
    """Write the files of extracted/ that are not there, or hold something else."""
    missing = [job for job in jobs if (facts := read_facts(job.path)) is None or facts.digest != job.digest]
    if len(missing) < len(jobs):
        _LOG.info("%d of %d shards of papers are there already", len(jobs) - len(missing), len(jobs))
    scratch.mkdir(exist_ok=True)
    try:
        if missing and engine == "ray":
            from OpenSciDraw.prepare.on_ray import run_prepare

            run_prepare(missing, settings, scratch)
        elif missing:
            _extract_here(missing, settings, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _extract_here(jobs: Sequence[ShardJob], settings: PrepareSettings, scratch: Path) -> None:
    workers = settings.num_workers or os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    try:
        with tqdm(total=sum(len(job.papers) for job in jobs), desc="papers", unit="paper") as bar:
            results = _in_order(jobs, settings, scratch, pool, 4 * workers + 16, bar)
            for job in jobs:
                write_extracted(job, itertools.islice(results, len(job.papers)))
    except BaseException:  # Ctrl-C or a full disk: do not wait for the papers that are under way
        pool.shutdown(wait=False, cancel_futures=True)
        end_all()
        raise
    pool.shutdown()


def _in_order(
    jobs: Sequence[ShardJob], settings: PrepareSettings, scratch: Path, pool: ThreadPoolExecutor, ahead: int, bar: tqdm
) -> Iterator[PaperResult]:
    """Results in the order of the papers; threads wait for the papers' own processes, at most `ahead` of them."""
    waiting: deque[Future[PaperResult]] = deque()

    def first() -> PaperResult:
        result = waiting.popleft().result()
        bar.update()
        return result

    for job in jobs:
        for paper in job.papers:
            if len(waiting) >= ahead:
                yield first()
            waiting.append(pool.submit(extract_paper, paper, job.licences.get(paper.paper_id, ""), settings, scratch))
    while waiting:
        yield first()


# -- writing -----------------------------------------------------------------------------------------
def _write_figures(
    folder: Path, extracted: Extracted, made_of: str, selection: Selection, settings: PrepareSettings
) -> None:
    """figures/<split>/NNNNN.parquet: kept rows in their order, with their tier. Files that are there and right stay."""
    copies = np.bincount(selection.same_as, minlength=len(selection.same_as)) - 1  # each stands for itself as well
    for number, split in enumerate(SPLITS):
        chosen = np.flatnonzero(selection.keep & (selection.split == number))
        parts = [chosen[start : start + settings.figures_per_shard] for start in range(0, len(chosen), settings.figures_per_shard)]
        paths = [folder / split / f"{index:05d}.parquet" for index in range(len(parts))]
        for path in {*(folder / split).glob("[0-9]*.parquet")} - {*paths}:
            path.unlink()  # of a run with other settings: its rows are in other files now
        for path, part in zip(paths, tqdm(parts, desc=f"writing {split}", unit="file", disable=not parts), strict=True):
            _write_part(path, extracted, made_of, part, selection.quality[part], copies[part])


def _write_part(path: Path, extracted: Extracted, made_of: str, part: np.ndarray, quality: np.ndarray, copies: np.ndarray) -> None:
    """`made_of` is a hash of everything in extracted/: with it and these numbers a file's content is told."""
    content = hashlib.sha256(made_of.encode())
    for numbers in (part, quality, copies):
        content.update(numbers.tobytes())
    digest = content.hexdigest()
    if path.exists() and (pq.read_metadata(path).metadata or {}).get(b"prepared") == digest.encode():
        return
    table = extracted.take(part)
    names = (table.column(name).to_pylist() for name in ("paper_id", "figure_id", "panel"))
    identity = [f"{paper}/{figure}{panel}" for paper, figure, panel in zip(*names, strict=True)]
    table = table.add_column(0, pa.field("id", pa.string(), nullable=False), [identity])
    table = table.append_column(pa.field("quality", pa.string(), nullable=False), [[QUALITIES[tier] for tier in quality]])
    table = table.append_column(pa.field("duplicates", pa.int32(), nullable=False), [pa.array(copies, pa.int32())])
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.tmp")
    metadata = {**(table.schema.metadata or {}), b"prepared": digest.encode(), ID_COLUMN: b"id"}
    table = table.replace_schema_metadata(metadata)
    pq.write_table(
        table, building, row_group_size=ROW_GROUP, compression="zstd", use_dictionary=False, write_statistics=False
    )
    sync_to_disk(building)
    os.replace(building, path)
    sync_to_disk(path.parent)

