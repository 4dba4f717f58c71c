"""`scienceflow encode`: figures -> store, sharded and resumable.

What goes into which shard is a function of the list of figures alone, so any number of processes can
work on it side by side (shard i belongs to process i mod n) without talking to each other, and a run
that was killed goes on where it stopped: only the shard in flight is encoded twice.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from OpenSciDraw.config import Config, EncodeConfig
from OpenSciDraw.config.data_checks import FIGURE_DATASET, MIXED_DATASET, SOURCES_DATASET
from OpenSciDraw.encode.batches import BatchSizes
from OpenSciDraw.encode.shards import (
    Decoder,
    EncodedCaption,
    figure_rows,
    texts_of,
    write_captions,
    write_figures,
)
from OpenSciDraw.encode.work import (
    Instruction,
    Place,
    Target,
    Work,
    captions_of,
    missing_shards,
    plan_of,
    refuse_strangers,
    share_of,
    store_folder,
    texts_to_encode,
    with_replaced_pictures,
    with_replaced_sources,
)
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.buckets import buckets
from OpenSciDraw.figures.fitting import prepare, to_model_range
from OpenSciDraw.figures.listing import FigureRef, RejectedFigure, Rejection, figures_of, write_rejected
from OpenSciDraw.models.base import FigureModel, build_model
from OpenSciDraw.models.vae_precision import PICTURES, choose
from OpenSciDraw.store.codec import encoded_bytes
from OpenSciDraw.store.contract import Contract, recorded_precision
from OpenSciDraw.store.shard import (
    FIGURE_PARTS,
    TEXT_PARTS,
    Row,
    index_path,
    mended_shard_info,
    read_shard_info,
    require_space,
)
from OpenSciDraw.utils.background import Background, Handover
from OpenSciDraw.utils.files import real
from OpenSciDraw.utils.sole_user import sole_user

_LOG = logging.getLogger("OpenSciDraw")
_WAITING_BYTES = 500_000_000  # of captions' embeddings between the device and the file
_ROW_BYTES, _SHARD_BYTES = 1_000, 5_000  # beside tensors and captions (which lie in shard and index), measured


def main(config: Config, engine: str = "local", place: Place | None = None) -> int:
    """Encode `config.encode.figures` into the store of `config.dataset`. Returns the exit code.

    `engine` is 'local' (this process; several of them share the shards) or 'ray' (a Ray cluster): the same bytes.
    `place`: this process among those that share the shards; None = as the environment says.

    Raises:
        UserError: no figures, no room on the disk, a store that was made in another way or lies among the figures.
    """
    target, place, source = Target(config), place or Place.here(), _source(config)
    if engine == "ray" and target.staging is not None:
        raise UserError("--engine ray writes to a folder that all machines share. Encode to cloud storage without it.")
    with sole_user(target.folder, "encode", place.rank, place.world_size):
        _encode(config, source, target, place, engine)
    return 0


def _encode(config: Config, source: str, target: Target, place: Place, engine: str) -> None:
    encode, folder = config.encode, target.folder
    refs, rejected = figures_of(encode)
    _LOG.info("%d figures with captions in %s, %d left out at sight", len(refs), source, len(rejected))
    model = build_model(config, place.device())
    _require_references(model, refs)
    captions, instructions = texts_to_encode(refs, model.text_sees_pictures) if config.text == "stored" else ([], [])
    started_from = sorted({r.id: r for ref in refs for r in ref.references}.values(), key=lambda ref: ref.id)
    _say_described(refs)
    if started_from:
        edits = sum(bool(ref.references) for ref in refs)
        _LOG.info("%d of them are edits, which start from %d pictures", edits, len(started_from))
    plan = plan_of(config, folder, refs, started_from, captions, instructions)
    for kind, works in plan.items():
        if works:
            refuse_strangers(target.shards(kind), works)

    model.check_pipeline()  # before hours of work for a model that training refuses
    of_text = ["text_encoder", model.tokenizer_part] if captions else []
    model.download(["vae", *of_text])  # their fingerprints belong to the contract
    model.load_vae()
    _require_sides(model, encode.resolution)
    model.vae_precision = _vae_precision(model, encode, refs, target)
    contract = model.contract()
    picture = {"resolution": encode.resolution, "fit": "scaled into the bucket, padded with the border colour"}
    figures_contract = replace(contract, text={}, picture=picture)
    text_contract = replace(contract, latents={})
    missing_text = missing_shards(plan["text"], text_contract, TEXT_PARTS, target)
    if instructions:
        there = [work for work in plan["text"] if work not in missing_text]
        missing_text = sorted([*missing_text, *with_replaced_sources(there)], key=lambda work: work.number)
    missing_figures = []  # and of the pictures that edits start from
    for kind in ("references", "figures"):
        missing = missing_shards(plan[kind], figures_contract, FIGURE_PARTS, target)
        numbers = {work.number for work in missing}
        missing += with_replaced_pictures([work for work in plan[kind] if work.number not in numbers], place)
        missing_figures += sorted(missing, key=lambda work: work.number)
    _announce(model, encode, target, missing_text, missing_figures)

    if engine == "ray":
        from OpenSciDraw.encode import on_ray

        on_ray.encode(config, missing_text, text_contract, missing_figures, figures_contract)
    else:
        _encode_text(model, encode, share_of(missing_text, place), text_contract, target)
        todo, start = share_of(missing_figures, place), time.perf_counter()
        _encode_figures(model, todo, figures_contract, encode, target.finished)
        count, seconds = sum(len(work.items) for work in todo), time.perf_counter() - start
        if count:
            _LOG.info("%d figures encoded in %.1f s: %.1f figures/s", count, seconds, count / seconds)
    _summarise(target, plan, rejected, place)


def _say_described(refs: Sequence[FigureRef]) -> None:
    """What is said of figures beside one caption acts in training, so it is counted here."""
    several, masks, weights = (
        sum(values) for values in zip(*((bool(r.captions), r.mask is not None, r.weight != 1) for r in refs), strict=True)
    )
    if several or masks or weights:
        _LOG.info("%d of them have several captions, %d a mask, %d a weight other than 1", several, masks, weights)


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
                for caption in texts_of(model, work, sizes, bar, encode):
                    encoded.put(caption)
    model.free_text_encoder()
    if model.truncated_prompts:
        _LOG.warning("%d of %d captions were cut at max_sequence_length", model.truncated_prompts, total)


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


def _source(config: Config) -> str:
    """Where the figures come from. Raises UserError when nobody says, or when the store would lie among them."""
    source = config.encode.figures
    if config.dataset.type == FIGURE_DATASET:
        raise UserError(
            f"dataset.type = {FIGURE_DATASET!r} encodes its figures while training: there is nothing to encode beforehand. "
            "For a store set dataset = dict(type='ArXiVParquetDatasetV2', base_dir=..., parquet_base_path=...)."
        )
    if config.dataset.type in (MIXED_DATASET, SOURCES_DATASET):
        raise UserError(
            f"dataset.type = {config.dataset.type!r} reads several folders of rows that are encoded already, and `encode` "
            "writes one store. Encode each by a config of its own, with "
            "dataset = dict(type='ArXiVParquetDatasetV2', base_dir=..., parquet_base_path=...)."
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


def _require_references(model: FigureModel, refs: Sequence[FigureRef]) -> None:
    plain = next((ref.id for ref in refs if not ref.references), None) if model.only_edits else None
    if plain is not None:
        raise UserError(f"{plain} has no reference, and {model.family} draws nothing without. Give each figure one (docs/edit.md).")


def _require_sides(model: FigureModel, resolution: int) -> None:
    """Raises UserError when the model cannot take the resolution's buckets."""
    multiple = model.pixel_multiple
    wrong = [bucket for bucket in buckets(resolution) if bucket.height % multiple or bucket.width % multiple]
    if wrong:
        raise UserError(
            f"encode.resolution = {resolution}: {model.requested_source.name} needs sides that are multiples of {multiple} px, "
            f"the bucket {wrong[0].height} x {wrong[0].width} is not one. Choose a larger encode.resolution."
        )


def _announce(model: FigureModel, encode: EncodeConfig, target: Target, text: list[Work], figures: list[Work]) -> None:
    """Print the expected size before anything is encoded; refuse when the disk is too small. Of all processes together."""
    captions, pictures = sum(len(w.items) for w in text), sum(len(w.items) for w in figures)
    latent = 2 * math.prod(model.latent_shape(encode.resolution, encode.resolution))
    row = encoded_bytes(model.text_shape(), model.text_storage) if captions else 0
    texts = [caption for work in figures for ref in work.items for caption in captions_of(ref)]
    texts += [item.caption if isinstance(item, Instruction) else item for work in text for item in work.items]
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


def _summarise(target: Target, plan: dict[str, list[Work]], rejected: Sequence[Rejection], place: Place) -> None:
    """The last process to finish writes rejected.jsonl; it needs no word from the others."""
    folder = target.folder
    if target.staging is not None:
        target.staging.refresh()  # others may have brought shards meanwhile
    unfinished = sum(not index_path(work.path).exists() for works in plan.values() for work in works)
    if unfinished:
        _LOG.info("process %d is done; %d shard(s) are still with other processes", place.rank, unfinished)
        return
    infos = [info for work in plan["figures"] if (info := read_shard_info(work.path)) is not None]
    pictures = [info for work in plan["references"] if (info := read_shard_info(work.path)) is not None]
    all_rejected = [*rejected, *(Rejection(**r) for info in [*infos, *pictures] for r in info.facts["rejected"])]
    write_rejected(folder / "rejected.jsonl", all_rejected)
    target.finished(folder / "rejected.jsonl")
    rows = sum(info.facts["rows"] for info in infos)
    where = folder if target.staging is None else target.staging.remote.url
    _LOG.info("%s: %d figures in %d shards, %d captions", where, rows, len(infos), sum(len(w.items) for w in plan["text"]))
    if all_rejected:
        reasons: defaultdict[str, int] = defaultdict(int)
        for rejection in all_rejected:
            reasons[rejection.reason.split(":")[0]] += 1
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda r: -r[1]))
        _LOG.info("%d figures rejected (%s): %s", len(all_rejected), folder / "rejected.jsonl", counts)
    if not rows:
        raise UserError(f"Every figure was rejected: see {folder / 'rejected.jsonl'}.")
