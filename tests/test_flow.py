"""Noise levels and noise: diffusers' densities, strata over the batch, keys instead of history."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from OpenSciDraw import flow

KEYS = {"logit_mean": 0.4, "logit_std": 0.8, "mode_scale": 1.29}


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"])
def test_densities_are_those_of_diffusers(scheme: str) -> None:
    """Quantiles of sigma against 1 - u of the diffusers scripts, which index a descending table."""
    torch.manual_seed(0)
    u = compute_density_for_timestep_sampling(scheme, 200_000, **KEYS)
    levels = torch.linspace(0.05, 0.95, 19)
    theirs = torch.quantile((1 - u).double(), levels.double())
    grid = (torch.arange(100_000) + 0.5) / 100_000
    ours = torch.quantile(flow.sigma_of_quantile(grid, scheme, **KEYS).double(), levels.double())
    assert torch.allclose(ours, theirs, atol=6e-3)


def test_a_positive_logit_mean_means_less_noise() -> None:
    grid = (torch.arange(1000) + 0.5) / 1000
    assert flow.sigma_of_quantile(grid, "logit_normal", 1.0, 1.0, 1.29).median() < 0.3


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "logit_normal", "cosmap"])
def test_loss_weights_are_those_of_diffusers(scheme: str) -> None:
    sigma = torch.linspace(0.01, 1, 50)
    theirs = compute_loss_weighting_for_sd3(scheme, sigma)
    assert torch.allclose(flow.loss_weight(sigma, scheme), theirs)


def test_the_resolution_shift_is_3_16_at_1024_pixels() -> None:
    assert flow.resolution_shift(4096) == pytest.approx(3.158, abs=1e-3)  # 1024^2 px = 4096 tokens of 16 px
    assert flow.shift_sigma(torch.tensor([0.5]), flow.resolution_shift(4096)).item() == pytest.approx(0.76, abs=0.005)


def test_noise_is_keyed_by_seed_step_and_sample_and_differs_in_each() -> None:
    base = flow.keyed_noise(1, 10, ["a", "b"], (4, 2, 2))
    assert torch.equal(base, flow.keyed_noise(1, 10, ["a", "b"], (4, 2, 2)))
    assert torch.equal(base[1], flow.keyed_noise(1, 10, ["b"], (4, 2, 2))[0])  # whatever stands beside it
    for other in (flow.keyed_noise(2, 10, ["a"], (4, 2, 2)), flow.keyed_noise(1, 11, ["a"], (4, 2, 2)),
                  flow.keyed_noise(1, 10, ["c"], (4, 2, 2))):  # fmt: skip
        assert not torch.equal(base[0], other[0])


def test_every_rank_and_micro_step_has_its_own_strata_that_cover_the_batch() -> None:
    ranks = [flow.stratified_quantiles(0, 5, [f"r{rank}s{i}" for i in range(4)], 4 * rank, 8) for rank in range(2)]
    strata = (torch.cat(ranks) * 8).long().tolist()
    assert sorted(strata) == list(range(8))
    again = flow.stratified_quantiles(0, 6, [f"r0s{i}" for i in range(4)], 0, 8)
    assert not torch.equal(ranks[0], again)


def test_a_single_quantile_is_uniform() -> None:
    values = torch.cat([flow.stratified_quantiles(0, step, ["x"], 2, 8) for step in range(4000)])
    assert values.mean().item() == pytest.approx(0.5, abs=0.02) and values.std().item() == pytest.approx(0.2887, abs=0.01)
