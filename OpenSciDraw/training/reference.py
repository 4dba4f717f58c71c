"""The reference policy: the transformer as it was when training began, with which preferences
are compared, to which rewards are held, or which teaches.

Of a LoRA it is the base: the same transformer with its adapters off. Of all weights it is a second, frozen transformer, read from
where training started, also by a run that is resumed. Its blocks lie in CPU memory, in the type that the policy computes in, and
each is on the device only while it runs (offload.py); under FSDP2 it is dealt over the devices as the policy is.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from OpenSciDraw.config import Config
from OpenSciDraw.config.drawing import drawing_of_teacher
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import DTYPES, FigureModel
from OpenSciDraw.parallel import sharding
from OpenSciDraw.training.memory.offload import BlockOffload
from OpenSciDraw.weights import trainable
from OpenSciDraw.weights.kinds import switched_off
from OpenSciDraw.weights.precision import autocast_type, cast_inputs
from OpenSciDraw.weights.start import load_pretrained

_LOG = logging.getLogger("OpenSciDraw")
RESIDENT_BLOCKS = 2  # of the frozen copy, on the device at a time: one runs, the next comes


class Reference:
    """`model.as_reference()` is this policy from now on. `identity`: which weights it has, "base" or their checksum."""

    def __init__(self, model: FigureModel, config: Config, accelerator: Accelerator, request: sharding.Sharding | None):
        self.model, self.identity = model, "base"
        self._policy = accelerator.unwrap_model(model.transformer)  # without DDP, whose collectives are for what trains
        if config.use_lora:
            model.reference_policy = self._adapters_off
            what = "the base, with the adapter off"
        else:
            self._frozen = _dealt(model, config, accelerator, request) if request else _in_cpu_memory(model, config)
            self.identity = checksum(self._frozen, DTYPES[config.mixed_precision], accelerator if request else None)
            if not request:
                BlockOffload(self._frozen, accelerator.device, RESIDENT_BLOCKS)
            model.reference_policy = self._frozen_copy
            what = "a frozen copy of the weights at the start, " + ("dealt over the devices" if request else "in CPU memory")
        if accelerator.is_main_process and config.dataset.keeps_base:
            kept = ", ".join(source.label for source in config.dataset.sources if source.keep_base)
            _LOG.info("prior preservation on %s: the target is what the base predicts (%s)", kept, what)
        elif accelerator.is_main_process:
            _LOG.info(
                "%s: %s, reference: %s; captions are not dropped", config.train_iteration_func_name, _settings(config), what
            )

    def require_same(self, identity: str | None, folder: Path) -> None:
        """Raises UserError unless a checkpoint's reference (None: its run had none) is this one."""
        if identity is None:
            raise UserError(
                f"{folder} was trained without a reference, so it cannot go on with one. Start a new run from its weights: with "
                "pretrained_full_ckpt_path, or pretrained_lora_ckpt_path and fuse_pretrained_lora = True."
            )
        if identity != self.identity:
            raise UserError(
                f"{folder} was trained against another reference: the weights that the run started from "
                "(pretrained_model_name_or_path, pretrained_full_ckpt_path) have changed since. Put the old ones back."
            )

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        with self._in_place(self._policy), switched_off(self._policy):
            yield

    def _frozen_copy(self) -> Any:
        return self._in_place(self._frozen)

    @contextmanager
    def _in_place(self, transformer: Any) -> Iterator[None]:
        own, self.model.transformer = self.model.transformer, transformer
        try:
            yield
        finally:
            self.model.transformer = own


def _settings(config: Config) -> str:
    """What the objective does, in a line's part."""
    if config.trains_preferences:
        return f"beta {config.preference.beta:g}, margin up to {config.preference.max_margin}"
    if config.trains_rewards:
        return f"pull {config.reward.pull:g}"
    teacher, steps = drawing_of_teacher(config), config.distill.steps
    guided = f"guidance {teacher.guidance:g}" if teacher.guidance > 1 else "no guidance"
    return f"{steps} steps without guidance learn from {teacher.steps} steps with {guided}; what is drawn has {steps} steps"


@contextmanager
def _built_apart(model: FigureModel) -> Iterator[None]:
    """What is loaded as `model.transformer` inside is not the model's afterwards."""
    own = model.transformer
    try:
        yield
    finally:
        model.transformer = own


def _in_cpu_memory(model: FigureModel, config: Config) -> Any:
    """Loaded as the policy was, then in the type that the policy's products have: the bits of its first forward."""
    with _built_apart(model):
        model.load_transformer(None, torch.device("cpu"), trainable.loading_dtype(config))
        load_pretrained(model, config)
        frozen = model.transformer
    if autocast_type(config, model) != config.mixed_precision:  # bf16 throughout
        for parameter in frozen.parameters():
            parameter.data = parameter.data.to(DTYPES[config.mixed_precision])
    if config.mixed_precision != "fp16":
        model.use_few_kernels(frozen)
    return frozen.requires_grad_(False).eval()


def _dealt(model: FigureModel, config: Config, accelerator: Accelerator, request: sharding.Sharding) -> Any:
    dtype = DTYPES[config.mixed_precision]
    with _built_apart(model):
        model.transformer = frozen = model.empty_transformer(dtype).requires_grad_(False).eval()
        sharding.shard(frozen, request, accelerator.device, dtype)
        cast_inputs(frozen, dtype)
        trainable.fill(model, config)
    return frozen


def checksum(transformer: nn.Module, dtype: torch.dtype, over: Accelerator | None) -> str:
    """Of all parameters in `dtype`: a hash of each one's name, shape and sum of bits; `over` the ranks that they are dealt over."""
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    names, sums = [], []
    for name, parameter in transformer.named_parameters():
        names.append(f"{name} {tuple(parameter.shape)}")
        sums.append(sharding.local(parameter).to(dtype).view(integers).sum(dtype=torch.int64))
    total = torch.stack(sums)
    if over is not None:
        total = over.reduce(total, reduction="sum")
    return hashlib.blake2b(repr((names, total.tolist())).encode(), digest_size=16).hexdigest()
