"""A Ray cluster: joining it, running a dataset of shards on it, and what travels. Used by the engines of encode and prepare."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from OpenSciDraw.errors import UserError


class Shard(Protocol):
    """A piece of work that makes one file."""

    @property
    def path(self) -> Path: ...


RETRIES = 3  # of one shard whose worker died; Ray would try for ever, and a shard that kills its worker does so each time
CPU = {"num_cpus": 0.5}  # decoding and writing wait for files half of the time; and a cluster of one CPU has room for both
Item = dict[str, Any]  # a row of a Ray dataset


def join_cluster() -> None:
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


def dataset_of(items: Sequence[Any]) -> Any:
    """One block for each item, so that each is a task of its own."""
    import ray.data

    values = [pack(item) for item in items]
    return ray.data.from_items(values, override_num_blocks=len(values))


def mapped(dataset: Any, task: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of limits to retries: Ray 2.64 will not take them here
        return dataset.map(task, **options)


def run(dataset: Any, sizes: Sequence[int], what: str, unit: str) -> list[Item]:
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
            f"A worker died {RETRIES + 1} times in the same work, of memory for example: see Ray's logs on its machine. What is "
            f"finished is kept: run the same command again.\n  {type(cause).__name__}: {str(cause).splitlines()[0]}"
        ) from error
    return rows


def require_written(works: Sequence[Shard]) -> None:
    missing = [work.path for work in works if not work.path.exists()]
    if missing:
        raise UserError(
            f"{len(missing)} shard(s) are not here after the cluster was done (first: {missing[0]}): this folder must be one "
            "that all machines of the cluster share."
        )


def pack(value: Any, **columns: int) -> Item:
    return {"value": pickle.dumps((os.getcwd(), value), protocol=5), **columns}


def unpack(item: Item) -> Any:
    """The value, in the folder in which the command was started: relative paths of a config begin there."""
    folder, value = pickle.loads(item["value"])
    enter(folder)
    return value


def enter(folder: str) -> None:
    if not os.path.isdir(folder):
        raise UserError(
            f"{socket.gethostname()} has no folder {folder}, in which the command was started. Start it in a folder that all "
            "machines have."
        )
    os.chdir(folder)
