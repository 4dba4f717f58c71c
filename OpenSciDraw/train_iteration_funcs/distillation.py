"""The objective that teaches a model to draw in few steps: each step of the student is a stretch of the teacher's own path.

The teacher is the model that the run starts from, with its guidance; the student draws without. s_0 = 1 > ... > s_N = 0 are the
noise levels of the released pipeline for N = `distill.steps`, and x_i is a picture at s_i. The teacher goes from x_i to s_(i+1) in
several Euler steps with guidance, and ends at y. The student learns the velocity of the straight line there:

    loss = E || v(x_i, s_i, text) - (y - x_i) / (s_(i+1) - s_i) ||^2

so that one Euler step of the student is what many of the teacher were. This is progressive distillation (Salimans and Ho,
arXiv:2202.00512) in one stage and with guidance folded in (Meng et al., arXiv:2210.03142), on the windows of a piecewise rectified
flow (Yan et al., arXiv:2405.07510). A teacher's path is a function of its start, so a mean squared error has one answer to find.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from OpenSciDraw import flow
from OpenSciDraw.config import Config
from OpenSciDraw.config.drawing import drawing_of_teacher
from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.models.base import FigureModel, TextBatch
from OpenSciDraw.registry import TRAIN_ITERATION_FUNCS
from OpenSciDraw.train_iteration_funcs.flow_matching import LossOutput, Place


@TRAIN_ITERATION_FUNCS.register("trajectory_distillation")
def trajectory_distillation_loss(model: FigureModel, batch: Batch, place: Place, config: Config, empty_text: Tensor) -> LossOutput:
    """The mean over samples, each at one step of the student's; noise and step are keyed, the steps dealt evenly over the batch.

    `distill.inputs` says what x_i is: a figure at noise s_i ("data"), or where i steps of the student from noise lead ("student"),
    for which no figure is needed but its size. No caption is dropped. Edits are drawn from their references by both.
    """
    ids, settings, stored = batch.sample_ids, config.distill, batch.latents
    with torch.autocast(model.device.type, enabled=False):  # encoders work as `scienceflow encode` runs them
        latents = model.encode_images(batch.require_pixels()) if stored is None else stored.to(model.device, non_blocking=True)
        rows = batch.text if batch.text is not None else model.encode_prompts(batch.captions)
        clean = model.normalize(latents)
        references = model.normalize_references(batch.references, are_pixels=stored is None)
    text = model.collate_text([row.to(clean.device, non_blocking=True) for row in rows])
    drawn = batch.noise if batch.micro_step == place.micro_step else None
    noise = flow.noise_of(drawn, place.seed, place.micro_step, ids, clean)
    first, total = place.rank * config.train_batch_size, place.world_size * config.train_batch_size
    quantile = flow.stratified_quantiles(place.seed, place.micro_step, ids, first, total)
    step = (quantile * settings.steps).long()  # on the CPU

    teacher = drawing_of_teacher(config)
    tokens = clean.shape[-2] * clean.shape[-1]
    levels = model.inference_sigmas(tokens, settings.steps)
    finer = flow.between(levels, model.inference_sigmas(tokens, teacher.steps), teacher.steps // settings.steps)[step]
    finer = finer.to(clean.device, non_blocking=True)  # (B, n + 1)
    begin, end = finer[:, 0], finer[:, -1]
    if settings.inputs == "data":
        start = flow.interpolate(clean, noise, begin)
    else:
        start = own_steps(model, noise, levels.to(noise), step, text, references)
    with model.as_reference():
        negative = model.collate_text([empty_text] * len(ids)) if teacher.guidance > 1 else None
        reached = guided_path(model, start, finer, text, negative, teacher.guidance, references)
    target = (reached - start) / (end - begin).view(-1, 1, 1, 1)
    predicted = _velocity(model, start, begin, text, references)
    per_sample = (predicted.float() - target).pow(2).flatten(1).mean(1)
    return LossOutput(per_sample.mean(), per_sample.detach(), begin.detach())


def _velocity(model: FigureModel, noisy: Tensor, sigma: Tensor, text: TextBatch, references: Sequence[Tensor]) -> Tensor:
    """At the level that the released pipeline gives the transformer for `sigma` (B,): it rounds the timestep."""
    level = model.pipeline_level(sigma, model.weight_dtype)
    return model.velocity(noisy, level, text, references) if references else model.velocity(noisy, level, text)


def guided_path(
    model: FigureModel, start: Tensor, levels: Tensor, text: TextBatch, negative: TextBatch | None, guidance: float,
    references: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """Where the sampler comes to from `start` (B, Cn, hn, wn) along each sample's own `levels` (B, n + 1), in fp32."""
    noisy = start
    for sigma, following in zip(levels[:, :-1].T, levels[:, 1:].T, strict=True):
        velocity = _velocity(model, noisy, sigma, text, references)
        if negative is not None:
            velocity = model.guide(velocity, _velocity(model, noisy, sigma, negative, references), guidance)
        noisy = noisy + (following - sigma).view(-1, 1, 1, 1) * velocity.float()
    return noisy


@torch.no_grad()
def own_steps(
    model: FigureModel, noise: Tensor, levels: Tensor, step: Tensor, text: TextBatch, references: Sequence[Tensor]
) -> Tensor:
    """The student's pictures after `step` (B,) of its own steps along `levels` (N + 1,) from `noise` (B, Cn, hn, wn), in fp32.

    The number of forwards is the same on every rank, also where no sample goes so far: a sharded model gathers in each.
    """
    noisy = noise.clone()
    for at in range(len(levels) - 2):
        there = (step > at).nonzero().flatten()
        goes = there if len(there) else torch.zeros(1, dtype=torch.long)
        rows = goes.to(noise.device, non_blocking=True)
        mask = None if text.mask is None else text.mask[rows]
        part = TextBatch(text.embeds[rows], mask)
        velocity = _velocity(model, noisy[rows], levels[at].expand(len(rows)), part, [made_of[rows] for made_of in references])
        if len(there):
            noisy[rows] += (levels[at + 1] - levels[at]) * velocity.float()
    return noisy
