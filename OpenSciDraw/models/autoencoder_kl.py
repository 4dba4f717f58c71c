"""Families whose VAE is diffusers' `AutoencoderKL` with a shift and a scale, and whose tokens are 2 x 2 patches of its latents."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from OpenSciDraw.models.base import FigureModel, load_component


class WithAutoencoderKL(FigureModel):
    """Figures to latents and back; a family says the rest."""

    def load_vae(self, dtype: torch.dtype = torch.float32) -> None:
        vae = load_component(AutoencoderKL, self.source, "vae", torch_dtype=dtype)
        self._vae = vae.to(self.device).eval().requires_grad_(False)

    @property
    def _stride(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def pixel_multiple(self) -> int:
        return 2 * self._stride  # VAE stride x 2x2 patch

    def encode_with(self, vae: Any, pixels: Tensor) -> Tensor:
        return vae.encode(pixels).latent_dist.mode()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.vae.config.latent_channels, height // self._stride, width // self._stride

    def normalize(self, latents: Tensor) -> Tensor:
        """One position for each token: channels c * 4 + 2 * row + column of its 2x2 patch."""
        config = self.vae.config
        return F.pixel_unshuffle((latents.to(self.device, torch.float32) - config.shift_factor) * config.scaling_factor, 2)

    @torch.no_grad()
    def decode(self, normalized: Tensor) -> Tensor:
        config = self.vae.config
        latents = F.pixel_shuffle(normalized.float(), 2) / config.scaling_factor + config.shift_factor
        return self.vae.decode(latents.to(self.vae.dtype)).sample

    def latents_contract(self) -> dict[str, Any]:
        """The part of `family_contract` that is about latents."""
        return {
            "vae": "AutoencoderKL", "latents": "posterior mode, raw (before shift_factor and scaling_factor)",
            "channels": self.vae.config.latent_channels,
        }  # fmt: skip
