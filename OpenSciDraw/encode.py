"""`scienceflow encode`: figures -> store, sharded and resumable.

What goes into which shard is a function of the list of figures alone, so any number of processes can
work on it side by side (shard i belongs to process i mod n) without talking to each other, and a run
that was killed goes on where it stopped: only the shard in flight is encoded twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from OpenSciDraw.config import Config, EncodeConfig
from OpenSciDraw.config_checks import FIGURE_DATASET
from OpenSciDraw.datasets.buckets import Bucket, best_bucket, buckets, fit
from OpenSciDraw.datasets.figures import (
    DrawnRef,
    FigureRef,
    RejectedFigure,
    Rejection,
    content_of,
    list_figures,
    load_figure,
    write_rejected,
)
from OpenSciDraw.encode_batches import BatchSizes, by_length
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel, build_model
from OpenSciDraw.models.vae_precision import PICTURES, choose
from OpenSciDraw.staging import Staging
from OpenSciDraw.store import (
    EMPTY_PROMPT,
    FIGURE_PARTS,
    FIGURE_SCHEMA,
    TEXT_PARTS,
    TEXT_SCHEMA,
    Contract,
    Row,
    content_of_rows,
    index_path,
    mended_shard_info,
    name_row,
    not_finite,
    read_shard_info,
    recorded_precision,
    require_space,
    text_key,
    write_shard,
)  # fmt: skip
from OpenSciDraw.utils.background import Background, Handover, HostCopies, stacked
from OpenSciDraw.utils.files import real
from OpenSciDraw.utils.sole_user import sole_user
from OpenSciDraw.utils.text_codec import encoded_bytes

_LOG = logging.getLogger("OpenSciDraw")
_WAITING_BYTES = 500_000_000  # of captions' embeddings between the device and the file
_READERS = 8
_WHILE_ENCODED_NS = 3600 * 10**9  # a picture may have been replaced while its shard was being encoded
_NO_PIXELS = torch.empty(0, dtype=torch.uint8)
_ROW_BYTES, _SHARD_BYTES = 1_000, 5_000  # beside tensors and captions (which lie in shard and index), measured
EncodedCaption = tuple[str, HostCopies, int]  # and its place among the copies


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
class Work:
    """One shard's content: its number and path, and a hash of what belongs into it."""

    number: int
    path: Path
    items: Sequence[Any]
    digest: str
    earlier: str = ""  # the digest of an earlier version, which is taken as well


@dataclass(frozen=True)
class Prepared:
    """A figure ready for the VAE: pixels (3, H, W) uint8 of exactly its bucket's size."""

    ref: FigureRef
    bucket: Bucket
    placement: tuple[int, int, int, int]
    aspect_ratio: float
    pixels: Tensor
    content: bytes | None


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


def main(config: Config, engine: str = "local") -> int:
    """Encode `config.encode.figures` into the store of `config.dataset`. Returns the exit code.

    `engine` is 'local' (this process; several of them share the shards) or 'ray' (a Ray cluster): the same bytes.

    Raises:
        UserError: no figures, no room on the disk, a store that was made in another way or lies among the figures.
    """
    target, place, source = Target(config), Place.here(), _source(config)
    if engine == "ray" and target.staging is not None:
        raise UserError("--engine ray writes to a folder that all machines share. Encode to cloud storage without it.")
    with sole_user(target.folder, "encode", place.rank, place.world_size):
        _encode(config, source, target, place, engine)
    return 0


def _encode(config: Config, source: str, target: Target, place: Place, engine: str) -> None:
    encode, folder = config.encode, target.folder
    refs, rejected = list_figures(source, encode.image_column, encode.caption_column, encode.max_figures, encode.min_quality,
                                  encode.where)  # fmt: skip
    _LOG.info("%d figures with captions in %s, %d left out at sight", len(refs), source, len(rejected))
    captions = list(dict.fromkeys([EMPTY_PROMPT, *(ref.caption for ref in refs)])) if config.text == "stored" else []
    limits = [encode.max_image_pixels, encode.min_side, encode.max_aspect_ratio]  # other limits reject other figures

    def as_before_0_5(ref: FigureRef) -> list[Any]:
        return [ref.id, ref.caption, ref.size_bytes, *limits]

    def identity(ref: FigureRef) -> list[Any]:
        return [*as_before_0_5(ref), encode.max_upscale, *(ref.bucket or ())]

    figure_work = _plan(folder / "figures", refs, encode.samples_per_shard, identity, as_before_0_5)
    text_work = _plan(folder / "text", captions, encode.samples_per_shard, lambda caption: caption)
    _refuse_strangers(target.shards("figures"), figure_work)
    if captions:
        _refuse_strangers(target.shards("text"), text_work)

    model = build_model(config, place.device())
    model.check_pipeline()  # before hours of work for a model that training refuses
    model.download(["vae", "text_encoder", "tokenizer"] if captions else ["vae"])  # their fingerprints belong to the contract
    model.load_vae()
    _require_sides(model, encode.resolution)
    model.vae_precision = _vae_precision(model, encode, refs, target)
    contract = model.contract()
    picture = {"resolution": encode.resolution, "fit": "scaled into the bucket, padded with the border colour"}
    figures_contract = replace(contract, text={}, picture=picture)
    text_contract = replace(contract, latents={})
    missing_text = _missing(text_work, text_contract, TEXT_PARTS, target)
    missing_figures = _missing(figure_work, figures_contract, FIGURE_PARTS, target)
    missing_figures += _replaced([work for work in figure_work if work not in missing_figures], place)
    missing_figures.sort(key=lambda work: work.number)
    _announce(model, encode, target, missing_text, missing_figures)

    if engine == "ray":
        from OpenSciDraw.engines import ray_engine

        ray_engine.encode(config, missing_text, text_contract, missing_figures, figures_contract)
    else:
        _encode_text(model, encode, _share(missing_text, place), text_contract, target)
        todo, start = _share(missing_figures, place), time.perf_counter()
        _encode_figures(model, todo, figures_contract, encode, target.finished)
        count, seconds = sum(len(work.items) for work in todo), time.perf_counter() - start
        if count:
            _LOG.info("%d figures encoded in %.1f s: %.1f figures/s", count, seconds, count / seconds)
    _summarise(target, figure_work, text_work, rejected, place)


def _encode_text(model: FigureModel, encode: EncodeConfig, todo: list[Work], contract: Contract, target: Target) -> None:
    """Encode shards of captions; a thread writes rows while the next ones are computed, and finishes one shard beside the next."""
    if not todo:
        return
    total = sum(len(work.items) for work in todo)
    model.load_text_encoder()
    sizes = BatchSizes(encode.batch_size, model)
    waiting = max(2, _WAITING_BYTES // encoded_bytes(model.text_shape(), "bfloat16"))

    def write(work: Work, encoded: Iterable[EncodedCaption]) -> None:
        write_captions(work, encoded, contract)
        target.finished(work.path)

    with tqdm(total=total, desc="captions", unit="caption") as bar, Background() as writer:
        for work in todo:
            encoded: Handover[EncodedCaption] = Handover(waiting, writer.check)
            writer.submit(write, work, encoded)
            with encoded:
                for caption in caption_batches(model, work.items, sizes, bar):
                    encoded.put(caption)
    model.free_text_encoder()
    if model.truncated_prompts:
        _LOG.warning("%d of %d captions were cut at max_sequence_length", model.truncated_prompts, total)


# -- what is to do -------------------------------------------------------------------------------
def _source(config: Config) -> str:
    """Where the figures come from. Raises UserError when nobody says, or when the store would lie among them."""
    source = config.encode.figures
    if config.dataset.type == FIGURE_DATASET:
        raise UserError(
            f"dataset.type = {FIGURE_DATASET!r} encodes its figures while training: there is nothing to encode beforehand. "
            "For a store set dataset = dict(type='ArXiVParquetDatasetV2', base_dir=..., parquet_base_path=...)."
        )
    if source is None:
        raise UserError("encode.figures is not set: which figures? Set encode = dict(figures='my_figures/'), or 'drawn:2000'.")
    if source.startswith("drawn:") or config.dataset.is_remote:
        return source
    if real(folder := store_folder(config)).is_relative_to(real(Path(source).expanduser())):
        raise UserError(
            f"The store {folder} (dataset.base_dir / parquet_base_path) lies inside encode.figures = {source!r}: its shards "
            "would be taken for figures. Choose a folder outside."
        )
    return source


def _vae_precision(model: FigureModel, encode: EncodeConfig, refs: Sequence[FigureRef], target: Target) -> str:
    """encode.vae_precision; for "auto" what the store has that is to be finished, or else what its first figures allow."""
    if encode.vae_precision != "auto":
        return encode.vae_precision
    for shard in target.shards("figures"):
        if (info := mended_shard_info(shard)) is not None:
            return recorded_precision(info.contract)
    return choose(model, itertools.islice(_pictures(refs, encode), PICTURES))


def _pictures(refs: Sequence[FigureRef], encode: EncodeConfig) -> Iterator[Tensor]:
    """Usable figures as the VAE takes them, (1, 3, H, W)."""
    for ref in refs:
        try:
            yield to_model_range(prepare(ref, encode).pixels)[None]
        except RejectedFigure:
            continue  # it is named when its turn comes


def _require_sides(model: FigureModel, resolution: int) -> None:
    """Raises UserError when the model cannot take the resolution's buckets."""
    multiple = model.pixel_multiple
    wrong = [bucket for bucket in buckets(resolution) if bucket.height % multiple or bucket.width % multiple]
    if wrong:
        raise UserError(
            f"encode.resolution = {resolution}: {model.requested_source.name} needs sides that are multiples of {multiple} px, "
            f"the bucket {wrong[0].height} x {wrong[0].width} is not one. Choose a larger encode.resolution."
        )


def _plan(folder: Path, items: Sequence[Any], size: int, identity: Any, earlier: Any = None) -> list[Work]:
    works = []
    for number, start in enumerate(range(0, len(items), size)):
        part = items[start : start + size]
        digests = [_digest([of(item) for item in part]) for of in (identity, earlier) if of is not None]
        works.append(Work(number, folder / f"{number:05d}.parquet", part, *digests))
    return works


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _refuse_strangers(shards: list[Path], plan: list[Work]) -> None:
    """A shard that the list of figures does not explain would be trained on unseen."""
    planned = {work.path for work in plan}
    strangers = [path for path in shards if path not in planned]
    if strangers:
        raise UserError(
            f"{strangers[0].parent} holds {len(strangers)} shard(s) that do not belong to this list of figures (first: "
            f"{strangers[0]}): the list is shorter than it was, or samples_per_shard changed. Encode into another folder, or "
            "delete them."
        )


def _missing(plan: list[Work], contract: Contract, parts: Sequence[str], target: Target) -> list[Work]:
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


def _replaced(works: Sequence[Work], place: Place) -> list[Work]:
    """Of this process's finished shards those with a picture that is another one now, though its size in bytes is not.

    As `make` does, only files that changed after their shard was written are looked at, and then by content: a copy of the
    figures on another disk is not encoded again.
    """
    found = []
    newer = {work.number: refs for work in _share(list(works), place) if (refs := _newer_than_shard(work))}
    if newer:
        _LOG.info("%d figures are newer than their shards: comparing their content", sum(map(len, newer.values())))
    for work in works:
        refs = newer.get(work.number, [])
        known = content_of_rows(work.path) if refs else {}
        with ThreadPoolExecutor(_READERS) as pool:
            others = [ref.id for ref, now in zip(refs, pool.map(content_of, refs), strict=True) if known.get(ref.id, now) != now]
        if others:
            _LOG.info("%s: %d of its figures are other pictures now (first: %s): encoded again", work.path, len(others), others[0])
            found.append(work)
    return found


def _newer_than_shard(work: Work) -> list[FigureRef]:
    since = index_path(work.path).stat().st_mtime_ns - _WHILE_ENCODED_NS
    return [ref for ref in work.items if ref.changed_ns > since]


def _share(works: list[Work], place: Place) -> list[Work]:
    """This process's part: by the shard's number, so that processes that start late agree with the others."""
    return [work for work in works if work.number % place.world_size == place.rank]


def _announce(model: FigureModel, encode: EncodeConfig, target: Target, text: list[Work], figures: list[Work]) -> None:
    """Print the expected size before anything is encoded; refuse when the disk is too small. Of all processes together."""
    captions, pictures = sum(len(w.items) for w in text), sum(len(w.items) for w in figures)
    latent = 2 * math.prod(model.latent_shape(encode.resolution, encode.resolution))
    row = encoded_bytes(model.text_shape(), model.text_storage) if captions else 0
    texts = [ref.caption for work in figures for ref in work.items] + [caption for work in text for caption in work.items]
    beside = (len(figures) + len(text)) * _SHARD_BYTES + sum(_ROW_BYTES + 2 * len(caption.encode()) for caption in texts)
    total = pictures * latent + captions * row + beside
    parts = [
        f"{pictures} figures x {latent / 1e6:.3f} MB of latents = {pictures * latent / 1e9:.3f} GB",
        f"{captions} captions x {row / 1e6:.3f} MB of text = {captions * row / 1e9:.3f} GB",
        f"indices {beside / 1e9:.3f} GB",
    ]
    where = target.folder if target.staging is None else target.staging.remote.url
    _LOG.info("still to write to %s: %s; together %.4f GB", where, "; ".join(parts), total / 1e9)
    if target.staging is not None:  # one shard at a time lies here
        total = max(latent, row) * encode.samples_per_shard
    require_space(target.folder, total, parts)


# -- captions ----------------------------------------------------------------------------------
def encode_captions(model: FigureModel, work: Work, contract: Contract, sizes: BatchSizes, bar: tqdm) -> None:
    """Encode and write a shard of captions in this thread."""
    write_captions(work, caption_batches(model, work.items, sizes, bar), contract)


def caption_batches(model: FigureModel, captions: Sequence[str], sizes: BatchSizes, bar: tqdm) -> Iterator[EncodedCaption]:
    """Captions in their order with their embeddings; those of a window that are alike in length are encoded together."""
    for window in by_length(model.prompt_lengths(captions), len(captions), sizes.captions):
        found: dict[int, tuple[HostCopies, int]] = {}
        for batch in window:
            encoded = sizes.whole_or_halves(lambda part: HostCopies(model.encode_prompts([captions[at] for at in part])), batch)
            for part, copies in encoded:
                found |= {at: (copies, place) for place, at in enumerate(part)}
                bar.update(len(part))
        for at in sorted(found):
            yield captions[at], *found[at]


def write_captions(work: Work, encoded: Iterable[EncodedCaption], contract: Contract) -> None:
    """Write a shard of captions, row by row: a whole one may not fit into memory."""
    rows = (_caption_row(caption, copies.wait()[place], contract) for caption, copies, place in encoded)
    write_shard(work.path, TEXT_SCHEMA, rows, contract, {"work": work.digest})


def _caption_row(caption: str, embedding: Tensor, contract: Contract) -> Row:
    row = Row({"key": text_key(caption), "caption": caption}, embedding)
    if wrong := not_finite(embedding):
        computed = contract.origin.get("text_computed_in", "its type")
        raise UserError(
            f"The text encoder, computing in {computed}, gives numbers that are not finite ({wrong}) for {name_row(row.columns)}: "
            "nothing can be trained on them. A model that overflows in fp16 does not in bf16: set mixed_precision = 'bf16'."
        )
    return row


# -- figures -----------------------------------------------------------------------------------
class Decoder:
    """Decodes and fits one figure, in a data worker."""

    def __init__(self, refs: Sequence[FigureRef], encode: EncodeConfig):
        self.refs, self.encode = refs, encode

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> Prepared | Rejection:
        ref = self.refs[index]
        try:
            return prepare(ref, self.encode)
        except RejectedFigure as error:
            content = content_of(ref)
            return Rejection(ref.id, ref.source, str(error), None if content is None else content.hex())


def prepare(ref: FigureRef, encode: EncodeConfig) -> Prepared:
    """Decode a figure and fit it into its bucket. Raises RejectedFigure."""
    given = ref if isinstance(ref, DrawnRef) else ref.read()
    image = load_figure(given, encode.max_image_pixels, encode.min_side, encode.max_aspect_ratio)
    named = Bucket(ref.bucket[1], ref.bucket[0]) if ref.bucket is not None else None
    bucket = named if named in buckets(encode.resolution) else best_bucket(image.width, image.height, encode.resolution)
    scale = min(bucket.width / image.width, bucket.height / image.height)
    if scale > encode.max_upscale:
        raise RejectedFigure(
            f"too coarse: {image.width} x {image.height} px would be enlarged {scale:.3g} times, over max_upscale = "
            f"{encode.max_upscale:g}"
        )
    fitted, placement = fit(image, bucket)
    pixels = torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1).contiguous()
    content = xxhash.xxh3_128_digest(given) if isinstance(given, bytes) else None
    return Prepared(ref, bucket, placement, image.height / image.width, pixels, content)


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 (…) -> float in [-1, 1], as the pipelines' image processors do."""
    return pixels.float() / 127.5 - 1.0


def _encode_figures(
    model: FigureModel, todo: list[Work], contract: Contract, encode: EncodeConfig, finished: Callable[[Path], None]
) -> None:
    refs = [ref for work in todo for ref in work.items]
    loader: DataLoader[Any] = DataLoader(
        Decoder(refs, encode), batch_size=None, num_workers=encode.num_workers,  # type: ignore[arg-type]
        prefetch_factor=16 if encode.num_workers else None,
    )  # fmt: skip
    sizes = BatchSizes(encode.batch_size, model)
    decoded = iter(loader)  # one stream over all shards; its processes begin before there is a thread, which they would inherit

    def write(work: Work, rows: list[Row], rejections: list[Rejection]) -> None:
        write_figures(work, rows, rejections, contract)
        finished(work.path)

    with tqdm(total=len(refs), desc="figures", unit="figure") as bar, Background() as writer:
        for work in todo:
            writer.submit(write, work, *figure_rows(model, decoded, len(work.items), sizes, bar))


def write_figures(work: Work, rows: list[Row], rejections: list[Rejection], contract: Contract) -> None:
    """Write a shard of encoded figures."""
    facts = {"work": work.digest, "rejected": [vars(rejection) for rejection in rejections]}
    write_shard(work.path, FIGURE_SCHEMA, rows, contract, facts)


def figure_rows(
    model: FigureModel, decoded: Iterator[Any], count: int, sizes: BatchSizes, bar: tqdm
) -> tuple[list[Row], list[Rejection]]:
    """The next `count` figures as the rows of a shard, bucket by bucket, so that reading finds neighbours.

    A batch of one bucket is encoded as soon as it is full, while the workers decode on.
    """
    waiting: defaultdict[Bucket, list[Prepared]] = defaultdict(list)
    encoded: defaultdict[Bucket, list[tuple[list[Prepared], HostCopies]]] = defaultdict(list)
    rejections: list[Rejection] = []
    for item in itertools.islice(decoded, count):
        if isinstance(item, Rejection):
            rejections.append(item)
            bar.update(1)
            continue
        waiting[item.bucket].append(item)
        if len(waiting[item.bucket]) >= sizes.of(item.bucket):
            encoded[item.bucket] += _encode_batch(model, waiting.pop(item.bucket), sizes, bar)
    for bucket, items in waiting.items():
        encoded[bucket] += _encode_batch(model, items, sizes, bar)
    rows = []
    for items, latents in (batch for bucket in sorted(encoded) for batch in encoded[bucket]):
        for item, tensor in zip(items, latents.wait()[0], strict=True):
            if wrong := not_finite(tensor):
                rejections.append(Rejection(item.ref.id, item.ref.source, f"latents that are not finite: {wrong}"))
            else:
                rows.append(_figure_row(item, tensor))
    return rows, rejections


def _encode_batch(
    model: FigureModel, items: list[Prepared], sizes: BatchSizes, bar: tqdm
) -> Iterator[tuple[list[Prepared], HostCopies]]:
    """Figures of one bucket without their pixels, and their latents in the store's bf16, on their way to the CPU."""

    def encode(part: Sequence[Prepared]) -> HostCopies:
        pixels = stacked([item.pixels for item in part], model.device)
        return HostCopies([model.encode_images(to_model_range(pixels)).to(torch.bfloat16)])

    for part, latents in sizes.whole_or_halves(encode, items):
        bar.update(len(part))
        yield [replace(item, pixels=_NO_PIXELS) for item in part], latents  # a whole shard waits: not its pixels as well


def _figure_row(item: Prepared, latents: Tensor) -> Row:
    columns = {
        "id": item.ref.id,
        "caption": item.ref.caption,
        "text_key": text_key(item.ref.caption),
        "bucket_w": item.bucket.width,
        "bucket_h": item.bucket.height,
        "aspect_ratio": item.aspect_ratio,
        "placement": list(item.placement),
        "content": item.content,
    }
    return Row(columns, latents)


def _summarise(target: Target, figures: list[Work], text: list[Work], rejected: Sequence[Rejection], place: Place) -> None:
    """The last process to finish writes rejected.jsonl; it needs no word from the others."""
    folder = target.folder
    if target.staging is not None:
        target.staging.refresh()  # others may have brought shards meanwhile
    unfinished = sum(not index_path(work.path).exists() for work in [*figures, *text])
    if unfinished:
        _LOG.info("process %d is done; %d shard(s) are still with other processes", place.rank, unfinished)
        return
    infos = [info for work in figures if (info := read_shard_info(work.path)) is not None]
    all_rejected = [*rejected, *(Rejection(**r) for info in infos for r in info.facts["rejected"])]
    write_rejected(folder / "rejected.jsonl", all_rejected)
    target.finished(folder / "rejected.jsonl")
    rows = sum(info.facts["rows"] for info in infos)
    where = folder if target.staging is None else target.staging.remote.url
    _LOG.info("%s: %d figures in %d shards, %d captions", where, rows, len(infos), sum(len(w.items) for w in text))
    if all_rejected:
        reasons: defaultdict[str, int] = defaultdict(int)
        for rejection in all_rejected:
            reasons[rejection.reason.split(":")[0]] += 1
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda r: -r[1]))
        _LOG.info("%d figures rejected (%s): %s", len(all_rejected), folder / "rejected.jsonl", counts)
    if not rows:
        raise UserError(f"Every figure was rejected: see {folder / 'rejected.jsonl'}.")
