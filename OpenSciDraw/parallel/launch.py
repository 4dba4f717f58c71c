"""accelerate with the config's values: what its file, its launcher or the environment say is checked against them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.training.trackers import trackers_of

# A rank may wait this long for another: one that downloads a model, or draws more pictures. A rank that dies is
# noticed at once by the launcher, which ends the job.
COLLECTIVE_TIMEOUT = timedelta(minutes=60)


def build_accelerator(config: Config, autocast: str) -> Accelerator:
    """accelerate for one process, DDP, or (with the model left out, see sharding.py) FSDP2.

    `autocast`: "no", "fp16" or "bf16", see precision.py.

    Raises:
        UserError: a launcher that contradicts the config.
    """
    accelerator = Accelerator(
        cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        mixed_precision=autocast,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
        ),
        log_with=trackers_of(config) or None,
        project_dir=str(Path(config.model_output_dir) / config.logging_dir),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else gradients of all weights exist twice
        ],
    )
    real = (accelerator.gradient_accumulation_steps, accelerator.mixed_precision, accelerator.num_processes)
    asked = (config.gradient_accumulation_steps, autocast, int(os.environ.get("WORLD_SIZE", "1")))
    if real != asked:
        raise UserError(
            f"accelerate runs with (accumulation, precision, processes) = {real}, the config and the launcher ask for "
            f"{asked}. Correct accelerate's file or the launch command."
        )
    return accelerator


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
