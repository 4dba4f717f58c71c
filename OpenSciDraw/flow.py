"""Flow matching: the one owner of sign, time and noise.

x is a clean latent, e noise, sigma in [0, 1] the noise level (1 = noise):
x_sigma = (1 - sigma) x + sigma e,  velocity v = e - x  (rectified flow, arXiv:2209.03003, 2403.03206).
Tensors are (B, C, h, w); sigma is (B,).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SIGMA_MIN = 1e-3  # the smallest level of the 1000-step table that the diffusers scripts index
SIGMA_BINS = 10


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x + sigma e."""
    s = sigma.view(-1, *[1] * (clean.ndim - 1))
    return (1 - s) * clean + s * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """v = e - x."""
    return noise - clean


def euler_step(noisy: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One step of dx/dsigma = v, as FlowMatchEulerDiscreteScheduler takes it (in fp32)."""
    return (noisy.float() + (next_sigma - sigma) * velocity).to(velocity.dtype)


def integrate(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor) -> Tensor:
    """Euler integration of `velocity(noisy, sigma (B,))` from noise along `sigmas` (steps + 1,), descending to 0."""
    noisy = noise
    for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
        noisy = euler_step(noisy, velocity(noisy, sigma.expand(len(noisy))), sigma, next_sigma)
    return noisy


def pipeline_level(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """What the transformer gets for `sigma`: the released pipelines keep the timestep 1000 sigma in `dtype`, which rounds it."""
    return (1000 * sigma).to(dtype) / 1000


def between(levels: Tensor, finer: Tensor, parts: int) -> Tensor:
    """Noise levels from each of `levels` (N + 1,) to the next one, in `parts` steps: (N, parts + 1), ends included.

    `finer` (M + 1,) is a schedule of more steps, which says how levels lie: between two ends they are evenly spaced by their
    place in it, as the sampler's own steps are. Both descend to 0.
    """
    fine, count = finer.double(), len(finer) - 1
    ends = levels.double().clamp(fine[-1], fine[0])
    after = torch.searchsorted(-fine, -ends).clamp(1, count)
    place = after - (ends - fine[after]) / (fine[after - 1] - fine[after])  # of each end in `finer`, with fractions
    share = torch.linspace(0, 1, parts + 1, dtype=torch.float64)
    places = place[:-1, None] * (1 - share) + place[1:, None] * share
    low = places.floor().long().clamp(max=count - 1)
    found = torch.lerp(fine[low], fine[low + 1], places - low).to(levels.dtype)
    found[:, 0], found[:, -1] = levels[:-1], levels[1:]
    return found


# -- which noise levels are trained ------------------------------------------------------------
def sigma_of_quantile(quantile: Tensor, scheme: str, logit_mean: float, logit_std: float, mode_scale: float) -> Tensor:
    """The noise level at a quantile in (0, 1) of a weighting scheme's density.

    The schemes and their keys mean what `compute_density_for_timestep_sampling` and the example
    scripts of diffusers mean: those draw u and index a *descending* table, so sigma = 1 - u, and a
    positive `logit_mean` means *less* noise (the opposite of musubi-tuner and SimpleTuner).
    Source: arXiv:2403.03206, section 3.1.
    """
    if scheme == "logit_normal":
        u = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(quantile.double())).to(quantile)
    elif scheme == "mode":
        u = 1 - quantile - mode_scale * (torch.cos(math.pi * quantile / 2) ** 2 - 1 + quantile)
    else:  # none, sigma_sqrt, cosmap: uniform; the latter two weigh the loss
        u = quantile
    return (1 - u).clamp(SIGMA_MIN, 1.0)


def loss_weight(sigma: Tensor, scheme: str) -> Tensor:
    """Weight of each sample's loss, (B,): diffusers' `compute_loss_weighting_for_sd3`."""
    if scheme == "sigma_sqrt":
        return sigma**-2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """sigma' = a sigma / (1 + (a - 1) sigma), arXiv:2403.03206 eq. 23; a > 1 trains on more noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def resolution_shift(tokens: int) -> float:
    """exp(mu), mu linear in image tokens: 0.5 at 256 and 1.15 at 4096 (3.16 at 1024 x 1024)."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def shift_of(timestep_shift: str | float, tokens: int) -> float:
    """The factor that a config's `timestep_shift` ('none', 'resolution' or a number) means here."""
    if timestep_shift == "resolution":
        return resolution_shift(tokens)
    return 1.0 if timestep_shift == "none" else float(timestep_shift)


def sigma_bin(sigma: Tensor) -> Tensor:
    """Index of sigma's bin among SIGMA_BINS equal bins of [0, 1]."""
    return (sigma * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1)


# -- noise as a function of (seed, step, sample), never of history -------------------------------
def keyed_generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by a hash of its key: the same for the same key on any rank or resume."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_noise(seed: int, step: int, sample_ids: Sequence[str], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape), fp32, each row keyed by (seed, step, sample)."""
    return torch.stack([torch.randn(*shape, generator=keyed_generator("noise", seed, step, s)) for s in sample_ids])


def noise_of(noise: Tensor | None, seed: int, step: int, sample_ids: Sequence[str], clean: Tensor) -> Tensor:
    """Noise like `clean` (B, C, h, w), on its device: `noise` (B, C h w) of `keyed_noise`, or drawn now. The same bits."""
    if noise is None:
        noise = keyed_noise(seed, step, sample_ids, clean.shape[1:])
    return noise.to(clean.device, non_blocking=True).view(clean.shape)


def keyed_uniform(name: str, seed: int, step: int, sample_ids: Sequence[str]) -> Tensor:
    """Uniform numbers (B,) in [0, 1), each keyed by (name, seed, step, sample)."""
    return torch.cat([torch.rand(1, generator=keyed_generator(name, seed, step, s)) for s in sample_ids])


def stratified_quantiles(seed: int, step: int, sample_ids: Sequence[str], first: int, total: int) -> Tensor:
    """Quantiles (B,): sample i falls into its own of `total` equal strata of (0, 1).

    `total` counts the samples of the whole micro-step over ranks and `first` this rank's offset: a
    permutation keyed by (seed, step) deals the strata, so each quantile alone is still uniform.
    """
    strata = torch.randperm(total, generator=keyed_generator("strata", seed, step))[first : first + len(sample_ids)]
    jitter = keyed_uniform("sigma", seed, step, sample_ids)
    return ((strata + jitter) / total).clamp(1e-6, 1 - 1e-6)
