"""What `scienceflow encode` has to do: which figures and captions make which shard, what is there already, whose part it is."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.listing import FigureRef, content_of
from OpenSciDraw.store.contract import Contract
from OpenSciDraw.store.encoded import EMPTY_PROMPT
from OpenSciDraw.store.shard import (
    content_of_rows,
    index_path,
    instruction_key,
    mended_shard_info,
    pictures_seen,
    text_key,
)
from OpenSciDraw.store.staging import Staging

_LOG = logging.getLogger("OpenSciDraw")
_READERS = 8
_WHILE_ENCODED_NS = 3600 * 10**9  # a picture may have been replaced while its shard was being encoded


@dataclass(frozen=True)
class Place:
    """This process among those that encode."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def here(cls) -> Place:
        """From the environment that `accelerate launch` and `torchrun` set."""
        return cls(*(int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))

    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class Instruction:
    """A caption that the text encoder reads together with the pictures that it edits."""

    caption: str
    references: tuple[FigureRef, ...]

    @property
    def key(self) -> bytes:
        return instruction_key(self.caption, keys_of(self.references))


def keys_of(references: Sequence[FigureRef]) -> bytes:
    """Keys of pictures that an edit starts from, one behind the other."""
    return b"".join(text_key(reference.id) for reference in references)


def captions_of(ref: FigureRef) -> tuple[str, ...]:
    """All captions of a figure, the main one first."""
    return ref.captions or (ref.caption,)


def texts_to_encode(refs: Sequence[FigureRef], sees_pictures: bool) -> tuple[list[str], list[Instruction]]:
    """The captions of `refs`, each once, behind the empty prompt; and of a text encoder that `sees_pictures` those of edits.

    Such an edit has two texts: its instruction, and the empty prompt with the same pictures, for caption dropout and guidance.
    """
    edits = [ref for ref in refs if sees_pictures and ref.references]
    alone = [caption for ref in refs if not (sees_pictures and ref.references) for caption in captions_of(ref)]
    both = [Instruction(caption, ref.references) for ref in edits for caption in (EMPTY_PROMPT, *captions_of(ref))]
    return list(dict.fromkeys([EMPTY_PROMPT, *alone])), list({text.key: text for text in both}.values())


@dataclass(frozen=True)
class Work:
    """One shard's content: its number and path, and a hash of what belongs into it."""

    number: int
    path: Path
    items: Sequence[Any]
    digest: str
    earlier: str = ""  # the digest of an earlier version, which is taken as well


def store_folder(config: Config) -> Path:
    """The store's folder on this machine. Raises UserError when it lies in cloud storage."""
    if config.dataset.is_remote:
        raise UserError(
            f"dataset.base_dir = {config.dataset.base_dir!r} is in cloud storage: this command reads a store on this machine. "
            "Copy or mount it, and set base_dir to that folder."
        )
    return Path(config.dataset.base_dir).expanduser() / config.dataset.parquet_base_path


class Target:
    """Where shards go: the store's folder, or one that stands for a store in cloud storage (staging.py)."""

    def __init__(self, config: Config):
        self.staging: Staging | None = None
        if config.dataset.is_remote:
            self.staging = Staging(config.dataset.location, config.dataset.cache_dir)
        self.folder = self.staging.folder if self.staging is not None else store_folder(config)

    def has(self, shard: Path) -> bool:
        return shard.exists() if self.staging is None else self.staging.has(shard)

    def shards(self, kind: str) -> list[Path]:
        return sorted((self.folder / kind).glob("[0-9]*.parquet")) if self.staging is None else self.staging.shards(kind)

    def finished(self, file: Path) -> None:
        """A shard, or another file, is written: move or copy it where it belongs."""
        if self.staging is not None:
            (self.staging.publish if file.suffix == ".parquet" else self.staging.publish_file)(file)


def plan_of(
    config: Config, folder: Path, refs: Sequence[FigureRef], started_from: Sequence[FigureRef], captions: Sequence[str],
    instructions: Sequence[Instruction],
) -> dict[str, list[Work]]:
    """Which figures, pictures that edits start from, and captions make which shard, by the kind of shard."""
    encode = config.encode
    limits = [encode.max_image_pixels, encode.min_side, encode.max_aspect_ratio]  # other limits reject other figures

    def made_of(ref: FigureRef) -> list[Any]:
        found: list[Any] = [[[r.id, r.size_bytes] for r in ref.references], ref.edit_boxes] if ref.references else []
        if ref.captions or ref.mask is not None or ref.weight != 1:
            mask = None if ref.mask is None else [ref.mask.id, ref.mask.size_bytes]
            found.append({"captions": ref.captions, "weights": ref.caption_weights, "mask": mask, "weight": ref.weight})
        return found

    def as_before_0_5(ref: FigureRef) -> list[Any]:
        return [ref.id, ref.caption, ref.size_bytes, *limits, *made_of(ref)]

    def identity(ref: FigureRef) -> list[Any]:
        return [ref.id, ref.caption, ref.size_bytes, *limits, encode.max_upscale, *(ref.bucket or ()), *made_of(ref)]

    def with_pictures(text: Instruction) -> list[Any]:
        return [text.caption, [[r.id, r.size_bytes] for r in text.references], *limits, encode.max_upscale, encode.resolution]

    size = encode.samples_per_shard
    text = plan_shards(folder / "text", captions, size, lambda caption: caption)
    return {
        "figures": plan_shards(folder / "figures", refs, size, identity, as_before_0_5),
        "references": plan_shards(folder / "references", started_from, size, identity),
        "text": text + plan_shards(folder / "text", instructions, size, with_pictures, first=len(text)),
    }


def plan_shards(
    folder: Path, items: Sequence[Any], size: int, identity: Any, earlier: Any = None, first: int = 0
) -> list[Work]:
    """Items by `size` into shards, which are numbered from `first`."""
    works = []
    for number, start in enumerate(range(0, len(items), size), first):
        part = items[start : start + size]
        digests = [_digest([of(item) for item in part]) for of in (identity, earlier) if of is not None]
        works.append(Work(number, folder / f"{number:05d}.parquet", part, *digests))
    return works


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def refuse_strangers(shards: list[Path], plan: list[Work]) -> None:
    """A shard that the list of figures does not explain would be trained on unseen."""
    planned = {work.path for work in plan}
    strangers = [path for path in shards if path not in planned]
    if strangers:
        raise UserError(
            f"{strangers[0].parent} holds {len(strangers)} shard(s) that do not belong to this list of figures (first: "
            f"{strangers[0]}): the list is shorter than it was, or samples_per_shard changed. Encode into another folder, or "
            "delete them."
        )


def missing_shards(plan: list[Work], contract: Contract, parts: Sequence[str], target: Target) -> list[Work]:
    """Shards that are not there, or hold other figures than they should."""
    missing = []
    for work in plan:
        info = mended_shard_info(work.path) if target.has(work.path) else None
        if info is not None:
            contract.require(info.contract, parts, work.path)
            if info.facts["work"] in (work.digest, work.earlier):
                continue
            _LOG.info("%s: its figures, captions or their limits have changed: encoded again", work.path)
        missing.append(work)
    return missing


def with_replaced_pictures(works: Sequence[Work], place: Place) -> list[Work]:
    """Of this process's finished shards those with a picture that is another one now, though its size in bytes is not.

    As `make` does, only files that changed after their shard was written are looked at, and then by content: a copy of the
    figures on another disk is not encoded again.
    """
    found = []
    newer = [(work, refs) for work in share_of(works, place) if (refs := _newer_than_shard(work))]
    if newer:
        _LOG.info("%d figures are newer than their shards: comparing their content", sum(len(refs) for _, refs in newer))
    with ThreadPoolExecutor(_READERS) as pool:
        for work, refs in newer:
            known = content_of_rows(work.path)
            others = [ref.id for ref, now in zip(refs, pool.map(content_of, refs), strict=True) if known.get(ref.id, now) != now]
            if others:
                _LOG.info("%s: %d figures are other pictures now (first: %s): encoded again", work.path, len(others), others[0])
                found.append(work)
    return found


def with_replaced_sources(works: Sequence[Work]) -> list[Work]:
    """Of finished shards of text those with an Instruction that was read with another picture than there is now."""
    found = []
    for work in works:
        since = index_path(work.path).stat().st_mtime_ns - _WHILE_ENCODED_NS
        newer = [
            text for text in work.items
            if isinstance(text, Instruction) and any(reference.changed_ns > since for reference in text.references)
        ]  # fmt: skip
        known = pictures_seen(work.path) if newer else {}
        if any(known.get(text.key) not in (None, seen_by(text.references)) for text in newer):
            _LOG.info("%s: pictures that are edited are other ones now: their instructions are encoded again", work.path)
            found.append(work)
    return found


def seen_by(references: Sequence[FigureRef]) -> bytes:
    """Hashes of the files of pictures, one behind the other; nothing of drawn ones."""
    return b"".join(content_of(reference) or b"" for reference in references)


def _newer_than_shard(work: Work) -> list[FigureRef]:
    since = index_path(work.path).stat().st_mtime_ns - _WHILE_ENCODED_NS
    return [ref for ref in work.items if max(ref.changed_ns, 0 if ref.mask is None else ref.mask.changed_ns) > since]


def share_of(works: Sequence[Work], place: Place) -> list[Work]:
    """This process's part: by the shard's number, so that processes that start late agree with the others."""
    return [work for work in works if work.number % place.world_size == place.rank]
