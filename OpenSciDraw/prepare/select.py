"""Which pictures are kept, in which tier and which split: pure functions of small columns, vectorised.

Steps in order; a picture counts at the first that it fails:
    caption, language, size, aspect, blank, kind, exact duplicate, near duplicate

Tiers, for training on the best or on all:
    high    a figure of one picture, with a caption of its own of at least 15 words, its longer side at least 512 px,
            drawn from a vector file or stored without loss (PNG)
    low     a panel that shares its caption with others, or has one of under 8 words, or a longer side under 320 px, or
            edges as soft as of a picture that was scaled up (sharpness under 0.55)
    medium  the rest
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from OpenSciDraw.figures.row_filter import QUALITIES
from OpenSciDraw.prepare.filters.duplicates import HASH_BYTES, representatives
from OpenSciDraw.prepare.settings import PrepareSettings

SPLITS = ("train", "validation", "test")
_HIGH_WORDS, _LOW_WORDS, _HIGH_SIDE, _LOW_SIDE = 15, 8, 512, 320
_SOFT = 0.55  # sharpness: 1 picture of 100 is softer at its own size; most that were doubled, all that were tripled

COLUMNS = [
    "paper_id", "width", "height", "panels", "parent_caption", "sha256", "phash", "ink", "kind", "sharpness", "lossless",
    "language", "caption_words", "caption_chars",
]  # fmt: skip


@dataclass(frozen=True)
class Step:
    """How many pictures came to a step, and how many it took away."""

    name: str
    came: int
    dropped: int


@dataclass
class Selection:
    """`reason` (n,) index into `reasons`, 0 where the picture is kept; `quality` and `split` (n,) indices into QUALITIES
    and SPLITS; `same_as` (n,) the row that stands for a duplicate, its own number otherwise."""

    reason: np.ndarray
    quality: np.ndarray
    split: np.ndarray
    same_as: np.ndarray
    reasons: list[str] = field(default_factory=lambda: [""])
    steps: list[Step] = field(default_factory=list)

    @property
    def keep(self) -> np.ndarray:
        return self.reason == 0


def select(rows: pa.Table, settings: PrepareSettings) -> Selection:
    """Decide on all pictures at once. `rows` has COLUMNS, as in extract.py's schema; of duplicates the earliest row is kept."""
    count = rows.num_rows
    rows = rows.select(COLUMNS).combine_chunks()  # of many small files; taking from many chunks is slow
    selection = Selection(np.zeros(count, dtype=np.int8), _quality(rows), _split(rows, settings), np.arange(count))

    def number(name: str) -> np.ndarray:
        return rows.column(name).to_numpy()

    width, height = number("width"), number("height")
    short, long = np.minimum(width, height), np.maximum(width, height)
    rules: list[tuple[str, Callable[[], np.ndarray]]] = [
        ("caption: too short", lambda: number("caption_words") < settings.min_caption_words),
        ("caption: too long", lambda: number("caption_chars") > settings.max_caption_chars),
        (
            "language: not one of those kept",
            lambda: _not_in(rows, "language", [*settings.languages, "und"] if settings.languages else []),
        ),
        ("size: shorter side under the limit", lambda: short < settings.min_side),
        ("aspect: too long and thin", lambda: long > settings.max_aspect_ratio * short),
        ("blank: next to nothing drawn", lambda: number("ink") < settings.blank),
        ("kind: not one of those kept", lambda: _not_in(rows, "kind", list(settings.kinds))),
    ]
    for name, rule in rules:
        _drop(selection, name, rule())
    _drop_duplicates(selection, rows, settings.near_duplicate_bits)
    return selection


def _drop(selection: Selection, name: str, wrong: np.ndarray) -> None:
    came = selection.keep
    selection.reasons.append(name)
    selection.reason[came & wrong] = len(selection.reasons) - 1
    selection.steps.append(Step(name, int(came.sum()), int((came & wrong).sum())))


def _drop_duplicates(selection: Selection, rows: pa.Table, bits: int) -> None:
    """Among those that are left: a picture that fails elsewhere stands for none."""
    left = np.flatnonzero(selection.keep)
    sha = rows.column("sha256").take(pa.array(left)).combine_chunks().dictionary_encode()
    identity = sha.indices.to_numpy() if len(left) else np.zeros(0, dtype=np.int32)
    hashes = _hashes(rows, left)
    same = left[representatives(identity, hashes, bits)] if len(left) else left
    selection.same_as[left] = same
    exact, near = np.zeros(rows.num_rows, dtype=bool), np.zeros(rows.num_rows, dtype=bool)
    position = np.full(rows.num_rows, -1)
    position[left] = np.arange(len(left))
    equal = identity == identity[position[same]]
    exact[left] = (same != left) & equal
    near[left] = (same != left) & ~equal
    _drop(selection, "duplicate: the same file", exact)
    _drop(selection, "duplicate: the same picture by its perceptual hash", near)


def _hashes(rows: pa.Table, wanted: np.ndarray) -> np.ndarray:
    """(n, 32) uint8 of the column phash."""
    column = rows.column("phash").take(pa.array(wanted)).combine_chunks().cast(pa.binary(HASH_BYTES))
    if not len(wanted):
        return np.zeros((0, HASH_BYTES), dtype=np.uint8)
    values = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    return np.frombuffer(values.buffers()[1], dtype=np.uint8).reshape(-1, HASH_BYTES)[values.offset : values.offset + len(values)]


def _not_in(rows: pa.Table, column: str, allowed: list[str]) -> np.ndarray:
    """Rows whose value is none of `allowed`; none of them when everything is."""
    if not allowed:
        return np.zeros(rows.num_rows, dtype=bool)
    return pc.invert(pc.is_in(rows.column(column), value_set=pa.array(allowed))).to_numpy()


def _quality(rows: pa.Table) -> np.ndarray:
    words, panels = rows.column("caption_words").to_numpy(), rows.column("panels").to_numpy()
    long = np.maximum(rows.column("width").to_numpy(), rows.column("height").to_numpy())
    own = pc.not_equal(rows.column("parent_caption"), "").to_numpy() | (panels == 1)
    lossless = rows.column("lossless").to_numpy(zero_copy_only=False)
    high = (panels == 1) & (words >= _HIGH_WORDS) & (long >= _HIGH_SIDE) & lossless
    low = ~own | (words < _LOW_WORDS) | (long < _LOW_SIDE) | (rows.column("sharpness").to_numpy() < _SOFT)
    tiers = [QUALITIES.index(name) for name in ("low", "high", "medium")]
    return np.select([low, high], tiers[:2], tiers[2]).astype(np.int8)


def _split(rows: pa.Table, settings: PrepareSettings) -> np.ndarray:
    """By a hash of the paper's id alone: a paper is never in two splits, and stays where it is when others come."""
    papers = rows.column("paper_id").combine_chunks().dictionary_encode()
    names = papers.dictionary.to_pylist()
    place = np.array([split_place(name, settings.seed) for name in names])
    share = np.select([place < settings.test_share, place < settings.test_share + settings.validation_share], [2, 1], 0)
    return share.astype(np.int8)[papers.indices.to_numpy()] if names else np.zeros(0, dtype=np.int8)


def split_place(paper_id: str, seed: int) -> float:
    """Where a paper falls in [0, 1): the first test_share of it is the test split, the next validation_share validation."""
    digest = hashlib.blake2b(f"{seed}:{paper_id}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
