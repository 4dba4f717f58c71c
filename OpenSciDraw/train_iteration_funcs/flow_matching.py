"""The flow-matching objective: a batch of encoded figures -> a loss. One body for every model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from OpenSciDraw import flow
from OpenSciDraw.config import Config
from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.registry import TRAIN_ITERATION_FUNCS


@dataclass(frozen=True)
class Place:
    """Where a batch stands in training: what noise is keyed by."""

    seed: int
    micro_step: int  # counts every micro-step since step 0, not optimizer steps
    rank: int
    world_size: int


@dataclass(frozen=True)
class LossOutput:
    """`loss` scalar with gradient; `per_sample` and `sigma` (B,) detached, unweighted, for the logs.

    `sigma` is None where an objective has no noise level.
    """

    loss: Tensor
    per_sample: Tensor
    sigma: Tensor | None = None


@TRAIN_ITERATION_FUNCS.register(
    "flow_matching",
    "Flux2Klein_train_iteration_func_parquet",
    "Flux2Klein_train_iteration_func",
    "Flux2Klein_fulltune_train_iteration",
    "Qwen_Image_train_iteration_func_parquet",
    "Qwen_Image_train_iteration_func",
    "QwenImage_fulltune_train_iteration",
)
def flow_matching_loss(model: FigureModel, batch: Batch, place: Place, config: Config, empty_text: Tensor) -> LossOutput:
    """E || v(x_sigma, sigma, text) - (e - x) ||^2 (rectified flow, see flow.py), each sample weighted equally.

    Parts that the batch does not carry (latents, text) are encoded here, by the frozen encoders.
    """
    ids = batch.sample_ids
    with torch.autocast(model.device.type, enabled=False):  # encoders work as `scienceflow encode` runs them
        stored = batch.latents
        latents = model.encode_images(batch.require_pixels()) if stored is None else stored.to(model.device, non_blocking=True)
        rows = batch.text if batch.text is not None else model.encode_prompts(batch.captions)
        clean = model.normalize(latents)

    dropped = flow.keyed_uniform("caption_dropout", place.seed, place.micro_step, ids) < config.caption_dropout
    rows = [empty_text if drop else row for row, drop in zip(rows, dropped.tolist(), strict=True)]
    text = model.collate_text([row.to(clean.device, non_blocking=True) for row in rows])

    first = place.rank * config.train_batch_size
    quantile = flow.stratified_quantiles(
        place.seed, place.micro_step, ids, first, place.world_size * config.train_batch_size
    )
    sigma = flow.sigma_of_quantile(
        quantile, config.weighting_scheme, config.logit_mean, config.logit_std, config.mode_scale
    )
    shift = flow.shift_of(config.timestep_shift, tokens=clean.shape[-2] * clean.shape[-1])
    sigma = flow.shift_sigma(sigma, shift).to(clean.device, non_blocking=True)
    drawn = batch.noise if batch.micro_step == place.micro_step else None
    noise = flow.noise_of(drawn, place.seed, place.micro_step, ids, clean)

    predicted = model.velocity(flow.interpolate(clean, noise, sigma), sigma, text)
    error = predicted.float() - flow.velocity_target(clean, noise)
    per_sample = error.pow(2).flatten(1).mean(1)
    loss = (flow.loss_weight(sigma, config.weighting_scheme) * per_sample).mean()
    return LossOutput(loss, per_sample.detach(), sigma.detach())
