"""`prepare --engine ray`: papers as tasks over the machines of a cluster. Same shards, same bytes.

A paper is unpacked, parsed, drawn and written by one CPU task, in a bounded process of its own. See encode/on_ray.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from OpenSciDraw.utils.ray_cluster import (
    RETRIES,
    Item,
    dataset_of,
    join_cluster,
    mapped,
    require_written,
    run,
    unpack,
)

if TYPE_CHECKING:
    from OpenSciDraw.prepare.extract import ShardJob
    from OpenSciDraw.prepare.settings import PrepareSettings


def run_prepare(jobs: Sequence[ShardJob], settings: PrepareSettings, scratch: Path) -> None:
    """Extract the shards of papers that are missing. Raises as `encode`."""
    join_cluster()
    dataset = dataset_of([(job, settings, scratch.absolute()) for job in jobs])
    extracted = mapped(dataset, _extract, max_retries=RETRIES, num_cpus=1)
    run(extracted, [len(job.papers) for job in jobs], "papers", "paper")
    require_written(jobs)


def _extract(item: Item) -> Item:
    from OpenSciDraw.prepare.extract import run_job

    job, settings, scratch = unpack(item)
    scratch.mkdir(parents=True, exist_ok=True)
    run_job(job, settings, scratch)
    return {"count": len(job.papers)}
