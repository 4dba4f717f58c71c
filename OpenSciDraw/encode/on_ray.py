"""`encode --engine ray`: Ray Data pipelines over the machines of a cluster. Same shards, same bytes.

    figures    VAE (one actor a GPU), which has figures decoded ahead of it (CPU tasks) -> write the shard (CPU tasks)
    captions   text encoder and writing (one actor a GPU): a shard of embeddings is too large to be handed on

The unit that travels is a shard, because what is encoded in one batch decides the last bits. Its pictures do not travel
as one: 256 of 1024 x 1024 px are 0.8 GB, and took 2 GB in the process that decoded them; an encoder has a few at a time
decoded, in their order. A shard is written whole or not at all, so what a lost worker had in flight is done again: by
Ray, or by the same command. Files must be where every machine sees them, under the same path.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from OpenSciDraw.errors import UserError
from OpenSciDraw.utils.ray_cluster import (
    CPU,
    RETRIES,
    Item,
    dataset_of,
    enter,
    join_cluster,
    mapped,
    pack,
    require_written,
    run,
    unpack,
)

if TYPE_CHECKING:
    from OpenSciDraw.config import Config, EncodeConfig
    from OpenSciDraw.encode.batches import BatchSizes
    from OpenSciDraw.encode.work import Work
    from OpenSciDraw.figures.fitting import Prepared
    from OpenSciDraw.figures.listing import FigureRef, Rejection
    from OpenSciDraw.models.base import FigureModel
    from OpenSciDraw.store.contract import Contract

_LOG = logging.getLogger("OpenSciDraw")
_CHUNK, _AHEAD = 8, 4  # figures that one task decodes; such tasks in flight for an encoder: 0.1 GB at 1024 px


def encode(
    config: Config, text: Sequence[Work], text_contract: Contract, figures: Sequence[Work], figures_contract: Contract
) -> None:
    """Encode the shards that are missing.

    Raises:
        UserError: Ray is not installed; a machine has another model; workers that die again and again; shards that are
            not here afterwards.
        OSError: as on the worker, a full disk for example.
    """
    join_cluster()
    if text:
        arguments = [config, text_contract]
        encoded = mapped(dataset_of(text), _CaptionEncoder, fn_constructor_args=arguments, **_encoders(len(text)))
        rows = run(encoded, [len(work.items) for work in text], "captions", "caption")
        cut, total = sum(row["cut"] for row in rows), sum(row["count"] for row in rows)
        if cut:
            _LOG.warning("%d of %d captions were cut at max_sequence_length", cut, total)
    if figures:
        arguments = [config, figures_contract]
        encoded = mapped(dataset_of(figures), _FigureEncoder, fn_constructor_args=arguments, **_encoders(len(figures)))
        written = mapped(encoded, _write, max_retries=RETRIES, **CPU)
        run(written, [len(work.items) for work in figures], "figures", "figure")
    require_written([*text, *figures])


# -- the cluster ---------------------------------------------------------------------------------


def _encoders(shards: int) -> dict[str, Any]:
    """How encoder actors are placed: one on each GPU, or on half of the CPUs of a cluster without; no more than shards."""
    import ray
    from ray.data import ActorPoolStrategy

    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0), int(resources.get("GPU", 0))
    count = min(shards, gpus or max(1, int(cpus) // 2))
    machines = sum(node["Alive"] for node in ray.nodes())
    _LOG.info("Ray: %d machine(s), %g CPUs, %d GPUs; %d encoder(s) for %d shard(s)", machines, cpus, gpus, count, shards)
    place = {**CPU, "num_gpus": 1} if gpus else CPU
    return {"compute": ActorPoolStrategy(size=count), "max_restarts": RETRIES, **place}


# -- on the workers ------------------------------------------------------------------------------


class _Encoder:
    """A model on the device that Ray gave to this actor. It is loaded by the first shard, whose error it then is."""

    part: str  # of the contract

    def __init__(self, config: Config, contract: Contract):
        self.config, self.contract = config, contract

    @cached_property
    def model(self) -> FigureModel:
        """Raises UserError when this machine's files are not those of the machine that wrote the contract."""
        from OpenSciDraw.encode.work import Place
        from OpenSciDraw.models.base import build_model
        from OpenSciDraw.store.contract import recorded_precision

        model = build_model(self.config, Place(0, 1, 0).device())
        model.download(self.components(model))
        model.load_empty_vae()
        model.vae_precision = recorded_precision(self.contract)  # what "auto" was found to mean where the command was started
        differences = self.contract.differences(model.contract(), [self.part])
        if differences:
            raise UserError(
                f"The model on {socket.gethostname()} is not the one of the machine on which the command was started ('here'):\n  "
                + "\n  ".join(differences) + "\nSet revision, or a model folder that all machines share."
            )  # fmt: skip
        self.load(model)
        return model

    @cached_property
    def sizes(self) -> BatchSizes:
        from OpenSciDraw.encode.batches import BatchSizes

        return BatchSizes(self.config.encode.batch_size, self.model)

    def components(self, model: FigureModel) -> list[str]:
        """Of the model, those that are needed."""
        raise NotImplementedError

    def load(self, model: FigureModel) -> None:
        raise NotImplementedError


class _CaptionEncoder(_Encoder):
    part = "text"

    def components(self, model: FigureModel) -> list[str]:
        return ["text_encoder", model.tokenizer_part]

    def load(self, model: FigureModel) -> None:
        model.load_text_encoder()

    def __call__(self, item: Item) -> Item:
        from OpenSciDraw.encode.shards import encode_captions

        work: Work = unpack(item)
        before = self.model.truncated_prompts
        encode_captions(self.model, work, self.contract, self.sizes, tqdm(disable=True), self.config.encode)
        return {"count": len(work.items), "cut": self.model.truncated_prompts - before}


class _FigureEncoder(_Encoder):
    part = "latents"

    def components(self, model: FigureModel) -> list[str]:
        return ["vae"]

    def load(self, model: FigureModel) -> None:
        model.load_vae()

    def __call__(self, item: Item) -> Item:
        from OpenSciDraw.encode.shards import figure_rows

        work: Work = unpack(item)
        decoded = _decoded(work.items, self.config.encode)
        rows, rejections = figure_rows(self.model, decoded, len(work.items), self.sizes, tqdm(disable=True))
        return pack((work, self.contract, rows, rejections))


def _decoded(refs: Sequence[FigureRef], encode_config: EncodeConfig) -> Iterator[Prepared | Rejection]:
    """Figures in their order, decoded on any machine; few enough in flight that memory does not grow with the shard."""
    import ray

    remote: Any = ray.remote  # its types are those of functions alone
    decode = remote(max_retries=RETRIES, **CPU)(_decode)
    waiting: deque[Any] = deque()
    for start in range(0, len(refs), _CHUNK):
        if len(waiting) == _AHEAD:
            yield from ray.get(waiting.popleft())
        waiting.append(decode.remote(os.getcwd(), refs[start : start + _CHUNK], encode_config))
    while waiting:
        yield from ray.get(waiting.popleft())


def _decode(folder: str, refs: Sequence[FigureRef], encode_config: EncodeConfig) -> list[Prepared | Rejection]:
    from OpenSciDraw.encode.shards import Decoder

    enter(folder)
    decoder = Decoder(refs, encode_config)
    return [decoder[number] for number in range(len(decoder))]


def _write(item: Item) -> Item:
    from OpenSciDraw.encode.shards import write_figures

    work, contract, rows, rejections = unpack(item)
    write_figures(work, rows, rejections, contract)
    return {"count": len(work.items)}
