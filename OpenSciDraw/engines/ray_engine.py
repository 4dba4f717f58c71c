"""`--engine ray`: encode and prepare as Ray Data pipelines over the machines of a cluster. Same shards, same bytes.

    figures    decode and fit (CPU tasks) -> VAE (one actor a GPU) -> write the shard (CPU tasks)
    captions   text encoder and writing (one actor a GPU): a shard of embeddings is too large to be handed on
    papers     unpack, parse, draw and write (CPU tasks, each paper in a bounded process of its own)

The unit that travels is a shard, because what is encoded in one batch decides the last bits. A shard is written whole
or not at all, so what a lost worker had in flight is done again: by Ray, or by the same command.
Files must be where every machine sees them: figures or papers, the store, and a local model folder.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from OpenSciDraw.errors import UserError

if TYPE_CHECKING:
    from OpenSciDraw.config import Config
    from OpenSciDraw.encode import Work
    from OpenSciDraw.prepare.extract import ShardJob
    from OpenSciDraw.prepare.settings import PrepareSettings
    from OpenSciDraw.shards import Contract

_LOG = logging.getLogger("OpenSciDraw")
Item = dict[str, Any]  # a row of a Ray dataset: `value`, pickled


def encode(
    config: Config, text: Sequence[Work], text_contract: Contract, figures: Sequence[Work], figures_contract: Contract
) -> None:
    """Encode the shards that are missing.

    Raises:
        UserError: Ray is not installed; shards that could not be encoded.
    """
    actors = _start()
    if text:
        dataset = _dataset([(work, text_contract) for work in text])
        encoded = dataset.map(_CaptionEncoder, fn_constructor_args=[config], **actors)
        _run(encoded, [len(work.items) for work in text], "captions", "caption")
    if figures:
        dataset = _dataset([(work, figures_contract, config.encode) for work in figures])
        encoded = dataset.map(_decode, num_cpus=1).map(_FigureEncoder, fn_constructor_args=[config], **actors)
        _run(encoded.map(_write, num_cpus=1), [len(work.items) for work in figures], "figures", "figure")
    _require_written([*text, *figures])


def run_prepare(jobs: Sequence[ShardJob], settings: PrepareSettings, scratch: Path) -> None:
    """Extract the shards of papers that are missing. Raises UserError as `encode`."""
    _start()
    dataset = _dataset([(job, settings, scratch.absolute()) for job in jobs])
    _run(dataset.map(_extract, num_cpus=1), [len(job.papers) for job in jobs], "papers", "paper")
    _require_written(jobs)


def _start() -> dict[str, Any]:
    """Join the cluster (RAY_ADDRESS, or the one of this machine, or a new one). Returns how encoder actors are placed."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'OpenSciDraw[ray]' (or '.[ray]').") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts figures, Ray's count blocks
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    count = gpus or max(1, int(resources.get("CPU", 1)) // 2)
    _LOG.info("Ray: %d machine(s), %g CPUs, %d GPUs; %d encoder(s)", len(ray.nodes()), resources.get("CPU", 0), gpus, count)
    place = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    return {"compute": ray.data.ActorPoolStrategy(size=count), **place}  # lost actors are started again, their shards too


def _dataset(items: Sequence[Any]) -> Any:
    """One block for each item, so that each is a task of its own."""
    import ray.data

    values = [{"value": pickle.dumps(item, protocol=5)} for item in items]
    return ray.data.from_items(values, override_num_blocks=len(values))


def _run(dataset: Any, sizes: Sequence[int], what: str, unit: str) -> None:
    with tqdm(total=sum(sizes), desc=what, unit=unit) as bar:
        for row in dataset.iter_rows():
            bar.update(row["count"])


def _require_written(works: Sequence[Work] | Sequence[ShardJob]) -> None:
    missing = [work.path for work in works if not work.path.exists()]
    if missing:
        raise UserError(
            f"{len(missing)} shard(s) are not here after the cluster was done (first: {missing[0]}): this folder must be one "
            "that all machines of the cluster share."
        )


# -- on the workers ------------------------------------------------------------------------------
def _extract(item: Item) -> Item:
    from OpenSciDraw.prepare.extract import run_job

    job, settings, scratch = pickle.loads(item["value"])
    scratch.mkdir(parents=True, exist_ok=True)
    run_job(job, settings, scratch)
    return {"count": len(job.papers)}


def _decode(item: Item) -> Item:
    """A shard's figures, decoded and fitted into their buckets."""
    from OpenSciDraw.encode import Decoder

    work, contract, encode_config = pickle.loads(item["value"])
    decoder = Decoder(work.items, encode_config)
    return {"value": pickle.dumps((work, contract, [decoder[n] for n in range(len(decoder))]), protocol=5)}


class _Encoder:
    """A model on the device that Ray gave to this actor."""

    def __init__(self, config: Config, load: Callable[[Any], None]):
        from OpenSciDraw.encode import Place
        from OpenSciDraw.models.base import build_model

        self.config = config
        self.model = build_model(config, Place(0, 1, 0).device())
        load(self.model)


class _CaptionEncoder(_Encoder):
    def __init__(self, config: Config):
        super().__init__(config, lambda model: model.load_text_encoder())

    def __call__(self, item: Item) -> Item:
        from OpenSciDraw.encode import encode_captions

        work, contract = pickle.loads(item["value"])
        encode_captions(self.model, work, contract, self.config.encode.batch_size, tqdm(disable=True))
        return {"count": len(work.items)}


class _FigureEncoder(_Encoder):
    def __init__(self, config: Config):
        super().__init__(config, lambda model: model.load_vae())

    def __call__(self, item: Item) -> Item:
        from OpenSciDraw.encode import figure_rows

        work, contract, decoded = pickle.loads(item["value"])
        rows, rejections = figure_rows(self.model, iter(decoded), len(decoded), self.config.encode.batch_size, tqdm(disable=True))
        return {"value": pickle.dumps((work, contract, rows, rejections), protocol=5)}


def _write(item: Item) -> Item:
    from OpenSciDraw.encode import write_figures

    work, contract, rows, rejections = pickle.loads(item["value"])
    write_figures(work, rows, rejections, contract)
    return {"count": len(work.items)}
