"""Objectives on preferences: a winner against its losers, by how far the loss of each has moved from the reference policy's.

B groups, D axes (1 for plain pairs), N = B winners and then the losers that there are. L is a picture's flow-matching loss, all
of a group at one noise and one noise level, and ref the policy as it was when training began:

    logit_d = (L_ref(winner) - L(winner)) - (L_ref(loser d) - L(loser d))

A positive logit says that the policy has learned to prefer the winner. `dpo` is Diffusion-DPO (arXiv:2311.12908) for flow matching,
`mdpo` the form with a loser for each axis. An axis without a loser takes no part: the published code puts the winner there, whose
logit 0 damps the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from OpenSciDraw import flow
from OpenSciDraw.config import Config, PreferenceConfig
from OpenSciDraw.datasets.batch import AXES, Batch
from OpenSciDraw.models.base import FigureModel, TextBatch
from OpenSciDraw.registry import TRAIN_ITERATION_FUNCS
from OpenSciDraw.train_iteration_funcs.flow_matching import LossOutput, Means, Place, drawn_noise


@TRAIN_ITERATION_FUNCS.register("dpo")
def dpo_loss(model: FigureModel, batch: Batch, place: Place, config: Config, empty_text: Tensor) -> LossOutput:
    """Each loser of a group is a pair with its winner: the mean over a group's losers of -log sigmoid(beta logit)."""
    return _compare(model, batch, place, config, "pooled")


@TRAIN_ITERATION_FUNCS.register("mdpo")
def mdpo_loss(model: FigureModel, batch: Batch, place: Place, config: Config, empty_text: Tensor) -> LossOutput:
    """A group's losers together, as `preference.mode` says; see `losses_of_groups`."""
    return _compare(model, batch, place, config, config.preference.mode)


def _compare(model: FigureModel, batch: Batch, place: Place, config: Config, mode: str) -> LossOutput:
    """One forward of the reference and one of the policy, of all N pictures. No caption is dropped: a pair is about its own."""
    settings = config.preference
    pictures = _pictures(model, batch, place, config)
    with model.as_reference():
        reference = pictures.errors(model)
    errors = pictures.errors(model)
    scale = flow.loss_weight(pictures.sigma, config.weighting_scheme)
    winner, losers = pictures.by_group(scale * errors)
    reference_winner, reference_losers = pictures.by_group(scale * reference)
    change, changes = winner - reference_winner, losers - reference_losers
    logits = changes - change[:, None]
    present = pictures.present
    weights = axis_weights(settings, present)
    harder = (losers - winner[:, None]).detach()
    compared = losses_of_groups(logits, present, weights, mode, settings, harder)
    loss = compared.mean() + settings.winner_weight * winner.mean()
    means = _means(compared.detach(), logits.detach(), change.detach(), changes.detach(), present)
    count = len(batch.sample_ids)
    return LossOutput(loss, errors[:count].detach(), pictures.sigma[:count].detach(), means)


# -- the N pictures of a batch -----------------------------------------------------------------------------
@dataclass(frozen=True)
class _Pictures:
    """`noisy` and `target` (N, Cn, hn, wn), `sigma` (N,); `present` (B, D) bool, `places` (N - B,) of the losers in B D."""

    noisy: Tensor
    target: Tensor
    sigma: Tensor
    text: TextBatch
    present: Tensor
    places: Tensor

    def errors(self, model: FigureModel) -> Tensor:
        """Unweighted loss of each picture, (N,) fp32."""
        predicted = model.velocity(self.noisy, self.sigma, self.text)
        return (predicted.float() - self.target).pow(2).flatten(1).mean(1)

    def by_group(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) -> the winners' (B,) and the losers' (B, D), 0 where there is none."""
        count = len(self.present)
        empty = values.new_zeros(self.present.numel())
        return values[:count], empty.index_copy(0, self.places, values[count:]).view_as(self.present)


def _pictures(model: FigureModel, batch: Batch, place: Place, config: Config) -> _Pictures:
    """All of a batch on the device: a group's noise, noise level and text once for each of its pictures. No wait for the device."""
    if batch.latents is None or batch.losers is None or batch.axes is None:
        raise RuntimeError("a batch of preferences carries the latents of winners and losers")
    device = model.device

    def moved(part: Tensor) -> Tensor:
        return part.to(device, non_blocking=True)

    there = batch.axes.flatten().nonzero().flatten()  # on the CPU
    groups = torch.cat([torch.arange(len(batch.axes)), there // batch.axes.shape[1]])
    places, of = moved(there), moved(groups)
    with torch.autocast(device.type, enabled=False):  # encoders work as `scienceflow encode` runs them
        winners = moved(batch.latents)
        losers = moved(batch.losers).flatten(0, 1).index_select(0, places)
        clean = model.normalize(torch.cat([winners, losers.to(winners.dtype)]))
        rows = [moved(row) for row in (batch.text if batch.text is not None else model.encode_prompts(batch.captions))]
    text = model.collate_text([rows[group] for group in groups.tolist()])
    sigma, noise = drawn_noise(batch, place, config, clean[: len(winners)])
    sigma, noise = sigma.index_select(0, of), noise.index_select(0, of)
    return _Pictures(
        flow.interpolate(clean, noise, sigma), flow.velocity_target(clean, noise), sigma, text, moved(batch.axes), places
    )


# -- logits to losses ---------------------------------------------------------------------------------------
def axis_weights(settings: PreferenceConfig, present: Tensor) -> Tensor:
    """(B, D) weights of mean 1 over the losers that a group has, 0 elsewhere; those of plain pairs are alike."""
    named = settings.axis_weights.model_dump()
    each = [named[axis] for axis in AXES] if present.shape[1] == len(AXES) else [1.0] * present.shape[1]
    weights = torch.tensor(each).to(present.device, non_blocking=True) * present
    return weights * present.sum(1, keepdim=True) / weights.sum(1, keepdim=True)


def losses_of_groups(
    logits: Tensor, present: Tensor, weights: Tensor, mode: str, settings: PreferenceConfig, harder: Tensor
) -> Tensor:
    """(B,) losses of groups from logits (B, D), over the n axes that are `present`, with weights w of mean 1 over these.

    z = beta min(logit, max_margin); e = -log sigmoid(z):

    - pooled, mean:  sum of a e, a = w / n; with `tau` a ~ w exp(harder / tau), of sum 1
    - adaptive:      sum of a e, a ~ w exp(-z), of sum 1 and without gradient
    - contrastive:   log(1 + sum of w exp(-z)) / n

    With one loser all are -log sigmoid(z). `harder` (B, D) without gradient: by how much the loser's loss is above the winner's.
    """
    capped = logits if settings.max_margin is None else logits.clamp(max=settings.max_margin)
    z = (settings.beta * capped).masked_fill(~present, 0.0)
    log_weights = weights.log()  # -inf where nobody is
    if mode == "contrastive":
        nobody = torch.zeros_like(z[:, :1])  # exp(0) = 1
        return torch.logsumexp(torch.cat([nobody, log_weights - z], 1), 1) / present.sum(1)
    each = -F.logsigmoid(z)
    if mode == "adaptive":
        share = torch.softmax(log_weights - z, 1).detach()
    elif mode == "mean" and settings.tau is not None:
        share = torch.softmax(log_weights + harder.masked_fill(~present, 0.0) / settings.tau, 1)
    else:
        share = weights / present.sum(1, keepdim=True)
    return (share * each).sum(1)


def _means(compared: Tensor, logits: Tensor, change: Tensor, changes: Tensor, present: Tensor) -> Means:
    """Of each axis the share of logits above 0, the mean logit, and by how much the losers' loss is above the reference's; over
    all groups the comparison alone, and by how much the winners' loss is above the reference's."""
    axes = AXES if present.shape[1] == len(AXES) else ("pair",)
    counts = present.sum(0).float()
    by_axis = [((logits > 0) & present).sum(0).float(), (logits * present).sum(0), (changes * present).sum(0)]
    sums = torch.cat([*by_axis, compared.sum()[None], change.sum()[None]])
    of = torch.cat([counts, counts, counts, torch.full_like(sums[:2], len(change))])
    names = [f"preference_{what}_{axis}" for what in ("accuracy", "margin", "loser_change") for axis in axes]
    return Means((*names, "preference_loss", "preference_winner_change"), torch.stack([sums, of]))
