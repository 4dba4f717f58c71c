"""`--engine ray`: encode and prepare as Ray Data pipelines over the machines of a cluster. Same shards, same bytes.

    figures    VAE (one actor a GPU), which has figures decoded ahead of it (CPU tasks) -> write the shard (CPU tasks)
    captions   text encoder and writing (one actor a GPU): a shard of embeddings is too large to be handed on
    papers     unpack, parse, draw and write (CPU tasks, each paper in a bounded process of its own)

The unit that travels is a shard, because what is encoded in one batch decides the last bits. Its pictures do not travel
as one: 256 of 1024 x 1024 px are 0.8 GB, and took 2 GB in the process that decoded them; an encoder has a few at a time
decoded, in their order. A shard is written whole or not at all, so what a lost worker had in flight is done again: by
Ray, or by the same command. Files must be where every machine sees them, under the same path.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from OpenSciDraw.errors import UserError

if TYPE_CHECKING:
    from OpenSciDraw.config import Config, EncodeConfig
    from OpenSciDraw.encode.batches import BatchSizes
    from OpenSciDraw.encode.shards import Prepared
    from OpenSciDraw.encode.work import Work
    from OpenSciDraw.figures.listing import FigureRef, Rejection
    from OpenSciDraw.models.base import FigureModel
    from OpenSciDraw.prepare.extract import ShardJob
    from OpenSciDraw.prepare.settings import PrepareSettings
    from OpenSciDraw.store.shard import Contract

_LOG = logging.getLogger("OpenSciDraw")
_RETRIES = 3  # of one shard whose worker died; Ray would try for ever, and a shard that kills its worker does so each time
_CHUNK, _AHEAD = 8, 4  # figures that one task decodes; such tasks in flight for an encoder: 0.1 GB at 1024 px
_CPU = {"num_cpus": 0.5}  # decoding and writing wait for files half of the time; and a cluster of one CPU has room for both
Item = dict[str, Any]  # a row of a Ray dataset


def encode(
    config: Config, text: Sequence[Work], text_contract: Contract, figures: Sequence[Work], figures_contract: Contract
) -> None:
    """Encode the shards that are missing.

    Raises:
        UserError: Ray is not installed; a machine has another model; workers that die again and again; shards that are
            not here afterwards.
        OSError: as on the worker, a full disk for example.
    """
    _start()
    if text:
        arguments = [config, text_contract]
        encoded = _map(_dataset(text), _CaptionEncoder, fn_constructor_args=arguments, **_encoders(len(text)))
        rows = _run(encoded, [len(work.items) for work in text], "captions", "caption")
        cut, total = sum(row["cut"] for row in rows), sum(row["count"] for row in rows)
        if cut:
            _LOG.warning("%d of %d captions were cut at max_sequence_length", cut, total)
    if figures:
        arguments = [config, figures_contract]
        encoded = _map(_dataset(figures), _FigureEncoder, fn_constructor_args=arguments, **_encoders(len(figures)))
        written = _map(encoded, _write, max_retries=_RETRIES, **_CPU)
        _run(written, [len(work.items) for work in figures], "figures", "figure")
    _require_written([*text, *figures])


def run_prepare(jobs: Sequence[ShardJob], settings: PrepareSettings, scratch: Path) -> None:
    """Extract the shards of papers that are missing. Raises as `encode`."""
    _start()
    dataset = _dataset([(job, settings, scratch.absolute()) for job in jobs])
    extracted = _map(dataset, _extract, max_retries=_RETRIES, num_cpus=1)
    _run(extracted, [len(job.papers) for job in jobs], "papers", "paper")
    _require_written(jobs)


# -- the cluster ---------------------------------------------------------------------------------
def _start() -> None:
    """Join the cluster: RAY_ADDRESS, or the one of this machine, or a new one."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'OpenSciDraw[ray]' (or '.[ray]').") from error
    if int(os.environ.get("RANK", 0)) > 0:
        raise UserError("--engine ray is one command for the whole cluster: start it once, without accelerate or torchrun.")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts figures, Ray's count blocks
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised, and said once


def _encoders(shards: int) -> dict[str, Any]:
    """How encoder actors are placed: one on each GPU, or on half of the CPUs of a cluster without; no more than shards."""
    import ray
    from ray.data import ActorPoolStrategy

    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0), int(resources.get("GPU", 0))
    count = min(shards, gpus or max(1, int(cpus) // 2))
    machines = sum(node["Alive"] for node in ray.nodes())
    _LOG.info("Ray: %d machine(s), %g CPUs, %d GPUs; %d encoder(s) for %d shard(s)", machines, cpus, gpus, count, shards)
    place = {**_CPU, "num_gpus": 1} if gpus else _CPU
    return {"compute": ActorPoolStrategy(size=count), "max_restarts": _RETRIES, **place}


def _dataset(items: Sequence[Any]) -> Any:
    """One block for each item, so that each is a task of its own."""
    import ray.data

    values = [_pack(item) for item in items]
    return ray.data.from_items(values, override_num_blocks=len(values))


def _map(dataset: Any, task: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of limits to retries: Ray 2.64 will not take them here
        return dataset.map(task, **options)


def _run(dataset: Any, sizes: Sequence[int], what: str, unit: str) -> list[Item]:
    """The rows that come out; an error is raised as it was on its worker."""
    from ray.exceptions import RayError, RayTaskError

    rows = []
    try:
        with tqdm(total=sum(sizes), desc=what, unit=unit) as bar:
            for row in dataset.iter_rows():
                rows.append(row)
                bar.update(row["count"])
    except RayError as error:
        cause: BaseException = error
        while isinstance(cause, RayTaskError) and isinstance(cause.cause, BaseException):
            cause = cause.cause
        if not isinstance(cause, RayError):
            raise cause from error
        raise UserError(
            f"A worker died {_RETRIES + 1} times in the same work, of memory for example: see Ray's logs on its machine. What is "
            f"finished is kept: run the same command again.\n  {type(cause).__name__}: {str(cause).splitlines()[0]}"
        ) from error
    return rows


def _require_written(works: Sequence[Work] | Sequence[ShardJob]) -> None:
    missing = [work.path for work in works if not work.path.exists()]
    if missing:
        raise UserError(
            f"{len(missing)} shard(s) are not here after the cluster was done (first: {missing[0]}): this folder must be one "
            "that all machines of the cluster share."
        )


# -- what travels --------------------------------------------------------------------------------
def _pack(value: Any, **columns: int) -> Item:
    return {"value": pickle.dumps((os.getcwd(), value), protocol=5), **columns}


def _unpack(item: Item) -> Any:
    """The value, in the folder in which the command was started: relative paths of a config begin there."""
    folder, value = pickle.loads(item["value"])
    _enter(folder)
    return value


def _enter(folder: str) -> None:
    if not os.path.isdir(folder):
        raise UserError(
            f"{socket.gethostname()} has no folder {folder}, in which the command was started. Start it in a folder that all "
            "machines have."
        )
    os.chdir(folder)


# -- on the workers ------------------------------------------------------------------------------
def _extract(item: Item) -> Item:
    from OpenSciDraw.prepare.extract import run_job

    job, settings, scratch = _unpack(item)
    scratch.mkdir(parents=True, exist_ok=True)
    run_job(job, settings, scratch)
    return {"count": len(job.papers)}


class _Encoder:
    """A model on the device that Ray gave to this actor. It is loaded by the first shard, whose error it then is."""

    part: str  # of the contract
    components: tuple[str, ...]  # of the model

    def __init__(self, config: Config, contract: Contract):
        self.config, self.contract = config, contract

    @cached_property
    def model(self) -> FigureModel:
        """Raises UserError when this machine's files are not those of the machine that wrote the contract."""
        from OpenSciDraw.encode.work import Place
        from OpenSciDraw.models.base import build_model
        from OpenSciDraw.store.shard import recorded_precision

        model = build_model(self.config, Place(0, 1, 0).device())
        model.download(self.components)
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

    def load(self, model: FigureModel) -> None:
        raise NotImplementedError


class _CaptionEncoder(_Encoder):
    part, components = "text", ("text_encoder", "tokenizer")

    def load(self, model: FigureModel) -> None:
        model.load_text_encoder()

    def __call__(self, item: Item) -> Item:
        from OpenSciDraw.encode.shards import encode_captions

        work: Work = _unpack(item)
        before = self.model.truncated_prompts
        encode_captions(self.model, work, self.contract, self.sizes, tqdm(disable=True))
        return {"count": len(work.items), "cut": self.model.truncated_prompts - before}


class _FigureEncoder(_Encoder):
    part, components = "latents", ("vae",)

    def load(self, model: FigureModel) -> None:
        model.load_vae()

    def __call__(self, item: Item) -> Item:
        from OpenSciDraw.encode.shards import figure_rows

        work: Work = _unpack(item)
        decoded = _decoded(work.items, self.config.encode)
        rows, rejections = figure_rows(self.model, decoded, len(work.items), self.sizes, tqdm(disable=True))
        return _pack((work, self.contract, rows, rejections))


def _decoded(refs: Sequence[FigureRef], encode_config: EncodeConfig) -> Iterator[Prepared | Rejection]:
    """Figures in their order, decoded on any machine; few enough in flight that memory does not grow with the shard."""
    import ray

    remote: Any = ray.remote  # its types are those of functions alone
    decode = remote(max_retries=_RETRIES, **_CPU)(_decode)
    waiting: deque[Any] = deque()
    for start in range(0, len(refs), _CHUNK):
        if len(waiting) == _AHEAD:
            yield from ray.get(waiting.popleft())
        waiting.append(decode.remote(os.getcwd(), refs[start : start + _CHUNK], encode_config))
    while waiting:
        yield from ray.get(waiting.popleft())


def _decode(folder: str, refs: Sequence[FigureRef], encode_config: EncodeConfig) -> list[Prepared | Rejection]:
    from OpenSciDraw.encode.shards import Decoder

    _enter(folder)
    decoder = Decoder(refs, encode_config)
    return [decoder[number] for number in range(len(decoder))]


def _write(item: Item) -> Item:
    from OpenSciDraw.encode.shards import write_figures

    work, contract, rows, rejections = _unpack(item)
    write_figures(work, rows, rejections, contract)
    return {"count": len(work.items)}
