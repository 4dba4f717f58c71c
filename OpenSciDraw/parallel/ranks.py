"""What each rank does of a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator


@contextmanager
def evaluating(module: Any, accelerator: Accelerator) -> Iterator[Any]:
    """What trains without DDP's wrapper, in eval mode (LoRA dropout is for training); as it was afterwards."""
    inner = accelerator.unwrap_model(module)
    was_training = inner.training
    inner.eval()
    try:
        yield inner
    finally:
        inner.train(was_training)


def share_of(count: int, accelerator: Accelerator) -> list[tuple[int, bool]]:
    """This rank's share of `count` things: (index, whether it counts).

    Every rank gets the same number, because a sharded model runs on all ranks together or not at all: one that has
    nothing left repeats another's and leaves the result out.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    return [(at if at < count else at % count, at < count) for at in range(rank, -(-count // world) * world, world)]
