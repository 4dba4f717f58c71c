"""The objective on rewards: DiffusionNFT, "Diffusion Negative-aware FineTuning" (arXiv:2509.16117).

The old policy (velocity v_old) draws G pictures x of each prompt, which are scored. r in [0, 1] says how good a picture is among
those of its prompt. The policy v learns on the forward process of these pictures, x_sigma = (1 - sigma) x + sigma e:

    v+ = (1 - b) v_old + b v        v- = (1 + b) v_old - b v        b = mixing
    loss = (r |v+ - (e - x)|^2 + (1 - r) |v- - (e - x)|^2) / b

At v = v_old its gradient is that of (2 r - 1) |v - (e - x)|^2: towards good pictures, away from bad ones, nothing at r = 1/2.
With `adaptive_weight` errors are those of the clean latents, x_sigma - sigma v+ against x, and each picture's squared error is
divided by its mean absolute error (with `shared_noise` by that of all its group), without gradient. `pull` |v - v_start|^2 is
added: it keeps the policy near the model that training began with.

With `shared_noise` e and sigma are the same for all pictures of a prompt, as in preference.py. Advantages of a group sum to 0, so
what its pictures have in common then cancels in the gradient, and what tells good ones from bad ones is left. That is why all are
divided by one number: a picture that the model drew itself has a smaller error than a figure, and divided by its own it would weigh
more, so that the model would mostly unlearn what it does right.

`figure_weight` |v - (e - x)|^2 is added for the data's own figure x of each group that differs (`include_figure`): supervised
training on what the model fails at, beside the comparison, in whose gradient there is no such part (advantages sum to 0).

The paper draws without guidance. Drawn with guidance, v_old is not the velocity that the sampler followed; the gradient above
stays what it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from OpenSciDraw import flow
from OpenSciDraw.config import Config, RewardConfig
from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.registry import TRAIN_ITERATION_FUNCS
from OpenSciDraw.train_iteration_funcs.flow_matching import LossOutput, Means, Place, drawn_sigma

_LEAST_SPREAD = 1e-6  # standard deviation of a group's scores below which its pictures count as equal
_LEAST_ERROR = 1e-5  # of the adaptive weight, as published


@TRAIN_ITERATION_FUNCS.register("reward")
def reward_loss(model: FigureModel, batch: Batch, place: Place, config: Config, empty_text: Tensor) -> LossOutput:
    """See the module's text. A forward of the old policy, one of the model at the start (unless `pull` is 0), one of the policy.

    Groups whose pictures all score the same teach nothing and are left out; the loss is the sum over the others' pictures divided
    by the number of all of them. Captions are not dropped.
    """
    if batch.drawn is None:
        raise RuntimeError("a batch of this objective carries drawn pictures")
    settings, size = config.reward, config.reward.group_size
    drawn, device = batch.drawn, model.device
    advantage = advantages(drawn.scores, size, list(settings.metrics.values()))
    spread = advantage.view(-1, size).ne(0).any(1)
    chosen, share = _of_groups(spread, size)
    with torch.autocast(device.type, enabled=False):  # encoders work as `scienceflow encode` runs them
        rows = batch.text if batch.text is not None else model.encode_prompts(batch.captions)
    text = model.collate_text([rows[at // size].to(device, non_blocking=True) for at in chosen.tolist()])
    names, sigma = _noise_keys(batch, place, config)
    sigma = sigma[chosen].to(device, non_blocking=True)
    clean = drawn.clean.index_select(0, chosen.to(device, non_blocking=True))
    noise = flow.noise_of(None, place.seed, place.micro_step, [names[at] for at in chosen.tolist()], clean)
    noisy = flow.interpolate(clean, noise, sigma)

    with model.as_old_policy():
        old = model.velocity(noisy, sigma, text).float()
    start: Tensor | None = None
    if settings.pull:
        with model.as_reference():
            start = model.velocity(noisy, sigma, text).float()
    velocity = model.velocity(noisy, sigma, text).float()
    quality = goodness(advantage[chosen], settings.advantage_limit).to(device, non_blocking=True)
    errors = contrasted(velocity, old, noisy, sigma, clean, noise, quality, settings)
    moved = {"distance_to_old": (velocity - old).pow(2).flatten(1).mean(1)}
    if start is not None:
        moved["distance_to_start"] = distance = (velocity - start).pow(2).flatten(1).mean(1)
        errors = errors + settings.pull * distance
    per_sample = (velocity - flow.velocity_target(clean, noise)).pow(2).flatten(1).mean(1)
    if settings.figure_weight:
        is_figure = (chosen % size == size - 1).to(device, non_blocking=True)
        errors = errors + settings.figure_weight * is_figure * per_sample
    loss = share * (flow.loss_weight(sigma, config.weighting_scheme) * errors).sum() / len(names)
    by_policy = drawn.scores.unflatten(0, (-1, size))[:, : size - settings.include_figure].flatten(0, 1)
    distances = {name: share * part.detach() for name, part in moved.items()}
    means = _means(list(settings.metrics), by_policy, spread, distances, share, device)
    return LossOutput(loss, per_sample.detach(), sigma, means)


def picture_ids(prompts: list[str], size: int) -> list[str]:
    """(B G,) names of the pictures of prompts: what the noise that they are drawn from is keyed by."""
    return [f"{prompt}#{number}" for prompt in prompts for number in range(size)]


def _noise_keys(batch: Batch, place: Place, config: Config) -> tuple[list[str], Tensor]:
    """What each picture's noise is keyed by, and its noise level (N,): of its own, or with `shared_noise` those of its prompt."""
    size, shared = config.reward.group_size, config.reward.shared_noise
    assert batch.drawn is not None
    tokens = batch.drawn.clean.shape[-2] * batch.drawn.clean.shape[-1]
    names = batch.sample_ids if shared else picture_ids(batch.sample_ids, size)
    sigma = drawn_sigma(names, place, config, tokens, config.train_batch_size * (1 if shared else size))
    if not shared:
        return names, sigma
    return [name for name in names for _ in range(size)], sigma.repeat_interleave(size)


def _of_groups(spread: Tensor, size: int) -> tuple[Tensor, float]:
    """Which pictures are run, and what their loss is multiplied by: where no group has a spread, the first one, by 0.

    (Every rank needs a forward and a backward where one has.)
    """
    if not spread.any():
        return torch.arange(size), 0.0
    return spread.repeat_interleave(size).nonzero().flatten(), 1.0


# -- scores to advantages -------------------------------------------------------------------------------------------
def advantages(scores: Tensor, size: int, weights: list[float]) -> Tensor:
    """(N,) advantages of pictures from their scores (N, M), in groups of `size` pictures of one prompt.

    Each score less its group's mean, divided by the group's standard deviation; then the sum over the scores by `weights`. A score
    that does not apply to a prompt (NaN), or is the same for all of its pictures, adds nothing.
    """
    groups = scores.double().view(-1, size, scores.shape[1])
    centred = groups - groups.mean(1, keepdim=True)
    deviation = centred.pow(2).mean(1, keepdim=True).sqrt()
    normal = torch.where(deviation > _LEAST_SPREAD, centred / deviation, 0.0)  # a comparison with NaN is False
    return (normal @ torch.tensor(weights, dtype=torch.float64)).flatten().float()


def goodness(advantage: Tensor, limit: float) -> Tensor:
    """r in [0, 1]: 1/2 + A / (2 limit), cut (the paper's optimality probability)."""
    return (0.5 + advantage / (2 * limit)).clamp(0, 1)


# -- velocities to losses ---------------------------------------------------------------------------------------------
def contrasted(
    velocity: Tensor, old: Tensor, noisy: Tensor, sigma: Tensor, clean: Tensor, noise: Tensor, quality: Tensor,
    settings: RewardConfig,
) -> Tensor:  # fmt: skip
    """(N,) losses of pictures with r = `quality` (N,); all else (N, Cn, hn, wn) and sigma (N,), see the module's text."""
    b = settings.mixing
    better, worse = (1 - b) * old + b * velocity, (1 + b) * old - b * velocity
    losses = []
    for implied in (better, worse):
        if settings.adaptive_weight:
            error = (noisy - sigma.view(-1, 1, 1, 1) * implied - clean).flatten(1)
            mean = error.detach().abs().mean(1)
            if settings.shared_noise:
                mean = mean.view(-1, settings.group_size).mean(1).repeat_interleave(settings.group_size)
            losses.append(error.pow(2).mean(1) / mean.clamp(min=_LEAST_ERROR))
        else:
            losses.append((implied - flow.velocity_target(clean, noise)).pow(2).flatten(1).mean(1))
    return (quality * losses[0] + (1 - quality) * losses[1]) / b


def _means(
    names: list[str], scores: Tensor, spread: Tensor, moved: dict[str, Tensor], share: float, device: torch.device
) -> Means:
    """Means of the scores of what the policy has drawn; the share of groups that teach; how far it has moved (mean squares)."""
    there = ~scores.isnan()
    sums = [*scores.nan_to_num().sum(0), spread.sum()]
    counts = [*there.sum(0), torch.tensor(len(spread))]
    on_cpu = torch.stack([torch.stack([part.float() for part in parts]) for parts in (sums, counts)]).to(device, non_blocking=True)
    count = share * torch.ones_like(scores[0, 0], device=device) * len(next(iter(moved.values())))
    measured = torch.stack([torch.stack([part.sum(), count]) for part in moved.values()], 1)
    labels = [f"reward_{name}" for name in (*names, "groups_that_differ", *moved)]
    return Means(tuple(labels), torch.cat([on_cpu, measured], 1))
