"""accelerate with the config's values: what its file, its launcher or the environment say is checked against them."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

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
        UserError: a launcher that contradicts the config; fp16 without a GPU.
    """
    on_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if autocast == "fp16" and not on_gpu:  # accelerate would run neither autocast nor loss scaling, without a word
        raise UserError("mixed_precision = 'fp16' needs a GPU, and this machine shows none. Set mixed_precision = 'bf16' or 'no'.")
    accelerator = Accelerator(
        cpu=not on_gpu,
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

