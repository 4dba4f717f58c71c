"""`scienceflow repack`: encoded rows of any layout that loads (V1, V2, V3, a store) -> our store, resumable by shard.

Tensors become bf16, as `scienceflow encode` writes them. Where training computes in bf16 that changes no number of the text,
which is cast to bf16 before the transformer reads it; latents are rounded once, as every latent of a store is. Rows that cannot
be read, do not fit the declared model or are not finite are named in rejected.jsonl; nothing takes their place.

What belongs into which shard is a function of the source alone, and shard i of text/ holds the captions that occur first in
shard i of figures/: each row of the source is read once, and any number of processes share the work (shard i: process i mod n).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from OpenSciDraw.config import Config, load_config
from OpenSciDraw.datasets.batch import Sample
from OpenSciDraw.encode.repack_source import PROBED_ROWS, Source, empty_prompt, open_legacy, open_store
from OpenSciDraw.encode.work import Place
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.listing import Rejection, write_rejected
from OpenSciDraw.store.contract import Contract, bytes_of_shape
from OpenSciDraw.store.encoded import EMPTY_PROMPT, EncodedStore
from OpenSciDraw.store.shard import (
    FIGURE_PARTS,
    FIGURE_SCHEMA,
    TEXT_PARTS,
    TEXT_SCHEMA,
    Row,
    index_path,
    mended_shard_info,
    read_shard_info,
    require_space,
    text_key,
    write_shard,
)
from OpenSciDraw.utils.files import parse_json, real
from OpenSciDraw.utils.sole_user import sole_user

_LOG = logging.getLogger("OpenSciDraw")
_ROW_BYTES = 1_000  # beside tensors and captions, as in encode.py


def main(arguments: argparse.Namespace) -> int:
    """`source`, `out`, `config` (or None), `cfg_options`, `samples_per_shard`."""
    config = load_config(arguments.config, arguments.cfg_options) if arguments.config is not None else None
    return repack(Path(arguments.source), Path(arguments.out), config, arguments.samples_per_shard)


def repack(folder: Path, out: Path, config: Config | None = None, samples_per_shard: int = 1024) -> int:
    """Write the encoded rows of `folder` as a store into `out`; run again, it goes on. Returns the exit code.

    `config` declares the model of data that carry no contract; with its text = "online" latents alone are written.

    Raises:
        UserError: no rows, no contract, rows of another model, `out` that overlaps `folder` or holds something else, no room,
            no embedding of the empty prompt and no text encoder to make it.
    """
    _require_apart(folder, out)
    source = open_store(folder, config) if EncodedStore.is_store(folder) else open_legacy(folder, config)
    works, place = _plan(source, samples_per_shard), Place.here()
    with sole_user(out, "repack", place.rank, place.world_size):
        _repack(source, out, works, place)
    return 0


def _repack(source: Source, out: Path, works: list[_Work], place: Place) -> None:
    _refuse_strangers(out, works)
    missing = [work for work in works if not _is_done(out, work, source)]
    mine = [work for work in missing if work.number % place.world_size == place.rank]
    _probe(source, out, missing)
    empty = empty_prompt(source) if source.with_text and any(work.number == 0 for work in mine) else None
    with tqdm(total=sum(work.stop - work.start for work in mine), desc="repack", unit="figure") as bar:
        for work in mine:
            _Shard(source, work, bar).write(out, empty if work.number == 0 else None)
    _summarise(source, out, works)


# -- what is to do -------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Work:
    """One shard: rows `start` to `stop` of the source, and a hash of what belongs into it."""

    number: int
    start: int
    stop: int
    digest: str

    def path(self, out: Path, kind: str) -> Path:
        return out / kind / f"{self.number:05d}.parquet"


def _require_apart(folder: Path, out: Path) -> None:
    a, b = real(folder), real(out)
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise UserError(f"{out} and {folder} overlap: nothing may be written among what is read. Choose a folder outside.")


def _plan(source: Source, size: int) -> list[_Work]:
    buckets, captions = source.rows.buckets(), source.captions()
    works = []
    for number, start in enumerate(range(0, len(buckets), size)):
        stop = min(len(buckets), start + size)
        texts = captions.slice(start, stop - start).to_pylist()
        ids = [source.rows.sample_id(row) for row in range(start, stop)]
        content = [ids, texts, buckets[start:stop].tolist(), source.first[start:stop].tolist(), source.stamp(start, stop)]
        works.append(_Work(number, start, stop, hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]))
    if not works:
        raise UserError(f"{source.folder}: no rows to repack.")
    return works


def _refuse_strangers(out: Path, works: list[_Work]) -> None:
    planned = {work.path(out, kind) for work in works for kind in ("figures", "text")}
    strangers = [path for path in sorted(out.glob("*/[0-9]*.parquet")) if path not in planned]
    if strangers:
        raise UserError(
            f"{out} holds {len(strangers)} shard(s) that are not of this source (first: {strangers[0]}): another source, or "
            "another --samples_per_shard. Repack into another folder, or delete them."
        )


def _is_done(out: Path, work: _Work, source: Source) -> bool:
    """Whether a shard's figures and text are there. Raises UserError when they were made in another way."""
    infos = []
    for kind, parts, contract in zip(source.kinds, (FIGURE_PARTS, TEXT_PARTS), _contracts(source), strict=False):
        path = work.path(out, kind)
        infos.append(mended_shard_info(path) if path.exists() else None)
        if infos[-1] is not None:
            contract.require(infos[-1].contract, parts, path)
    return all(info is not None and info.facts["work"] == work.digest for info in infos)


def _contracts(source: Source) -> tuple[Contract, Contract]:
    """Of the shards of figures/ and of text/."""
    return replace(source.contract, text={}), replace(source.contract, latents={}, picture={})


def _probe(source: Source, out: Path, missing: list[_Work]) -> None:
    """Read the first rows: refuse another model's, and print the expected size; refuse when the disk is too small."""
    samples = [source.sample(row) for row in range(min(PROBED_ROWS, len(source.first)))] if missing else []
    readable = [sample for sample in samples if isinstance(sample, Sample)]
    misfits = [reason for reason in samples if isinstance(reason, str) and reason.startswith("not of the declared model")]
    if misfits and not readable:
        raise UserError(f"{source.folder} is {misfits[0]}. Give the config of the model that encoded it.")
    if not readable:
        return

    def mean_bytes(tensors: list[Tensor | None], contract: Contract) -> float:
        return sum(bytes_of_shape(tensor.shape, contract) for tensor in tensors if tensor is not None) / len(tensors)

    figures = sum(work.stop - work.start for work in missing)
    captions = sum(int((source.first[w.start : w.stop] == np.arange(w.start, w.stop)).sum()) for w in missing)
    of_figures, of_text = _contracts(source)
    latents, text = mean_bytes([s.latents for s in readable], of_figures), mean_bytes([s.text for s in readable], of_text)
    beside = figures * (2 * _ROW_BYTES + 4 * source.captions().nbytes // len(source.first))
    total = int(figures * latents + captions * text + beside)
    parts = [
        f"{figures} figures x {latents / 1e6:.3f} MB of latents = {figures * latents / 1e9:.3f} GB",
        f"{captions} captions x {text / 1e6:.3f} MB of text = {captions * text / 1e9:.3f} GB (by the first {len(readable)} rows)",
    ]
    _LOG.info("still to write to %s: %s; together %.4f GB", out, "; ".join(parts), total / 1e9)
    require_space(out, total, parts)


# -- one shard -----------------------------------------------------------------------------------
class _Shard:
    """A shard of figures/ and the one of text/ with the captions that occur first in it."""

    def __init__(self, source: Source, work: _Work, bar: tqdm):
        self.source, self.work, self.bar = source, work, bar
        self.figures: list[Row] = []  # bf16 latents of the whole shard wait here, so that they lie by buckets
        self.rejected: list[dict[str, Any]] = []
        self.repeated: list[list[Any]] = []  # key and checksum of texts whose caption occurs in other rows too

    def write(self, out: Path, empty: Tensor | None) -> None:
        figures, text = _contracts(self.source)
        rows = self._text_rows(empty)
        if self.source.with_text:
            write_shard(self.work.path(out, "text"), TEXT_SCHEMA, rows, text, {"work": self.work.digest})
        for _ in rows:  # without text nothing has read them yet
            pass
        self.figures.sort(key=lambda row: (row.columns["bucket_h"], row.columns["bucket_w"]))
        facts = {"work": self.work.digest, "rejected": self.rejected, "repeated": self.repeated}
        write_shard(self.work.path(out, "figures"), FIGURE_SCHEMA, self.figures, figures, facts)

    def _text_rows(self, empty: Tensor | None) -> Iterator[Row]:
        """Each source row is read once: its latents are kept for figures/, its text goes on where its caption is new."""
        if empty is not None:
            yield Row({"key": text_key(EMPTY_PROMPT), "caption": EMPTY_PROMPT}, empty)
        for row in range(self.work.start, self.work.stop):
            sample = self.source.sample(row)
            if isinstance(sample, Sample):
                assert sample.latents is not None
                self.figures.append(Row(self.source.columns(row), sample.latents))
                self._note_repeated(row, sample)
            else:
                self.rejected.append(vars(Rejection(self.source.rows.sample_id(row), str(self.source.folder), sample)))
            if self.source.with_text and self.source.first[row] == row:
                found = sample if isinstance(sample, Sample) else self._other_with_caption_of(row)
                if found is not None and found.text is not None:
                    yield Row({"key": text_key(found.caption), "caption": found.caption}, found.text)
            self.bar.update(1)

    def _note_repeated(self, row: int, sample: Sample) -> None:
        if sample.text is not None and self.source.is_repeated[row]:
            data = sample.text.contiguous().view(torch.uint8).numpy()
            self.repeated.append([text_key(sample.caption).hex(), zlib.crc32(data.data)])

    def _other_with_caption_of(self, row: int) -> Sample | None:
        """The next readable row with the caption of a row that is not."""
        others = (self.source.sample(other) for other in np.flatnonzero(self.source.first == row)[1:].tolist())
        return next((other for other in others if isinstance(other, Sample)), None)


def _summarise(source: Source, out: Path, works: list[_Work]) -> None:
    """The last process to finish writes rejected.jsonl; it needs no word from the others."""
    unfinished = sum(not index_path(work.path(out, kind)).exists() for work in works for kind in source.kinds)
    if unfinished:
        _LOG.info("this process is done; %d shard(s) are still with other processes", unfinished)
        return
    infos = [info for work in works if (info := read_shard_info(work.path(out, "figures"))) is not None]
    rejected = [Rejection(**r) for info in infos for r in info.facts["rejected"]]
    earlier = source.folder / "rejected.jsonl"  # what was rejected when a store was encoded stays known
    before = earlier.read_text(encoding="utf-8").splitlines() if earlier.exists() else []
    write_rejected(out / "rejected.jsonl", [*(Rejection(**parse_json(line)) for line in before), *rejected])
    first: dict[str, int] = {}
    repeated = [(key, crc) for info in infos for key, crc in info.facts["repeated"]]
    other = sum(first.setdefault(key, crc) != crc for key, crc in repeated)
    if other:
        _LOG.warning("%d row(s) had a text of their own for a caption that occurs before: the first one's is kept", other)
    rows = sum(info.facts["rows"] for info in infos)
    _LOG.info("%s: %d figures in %d shards, %d row(s) rejected", out, rows, len(infos), len(rejected))
    if not rows:
        raise UserError(f"Every row was rejected: see {out / 'rejected.jsonl'}.")
