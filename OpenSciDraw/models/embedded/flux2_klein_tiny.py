"""The shapes of `embedded:flux2_klein_tiny`, with random weights: where its pretraining starts (configs/tiny/pretrain_*).

The trained weights lie in shipped/flux2_klein_tiny; docs/embedded-model.md tells how they were made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from OpenSciDraw.models.embedded import tokenizer
from OpenSciDraw.registry import EMBEDDED

TEXT_WIDTH = 64


@EMBEDDED.register("flux2_klein_tiny_start")
def build_flux2_klein_tiny_start(folder: Path) -> None:
    """FLUX.2-klein at width 256: 1 dual + 5 single blocks, 28-layer Qwen3 of width 64, 8x VAE (16 px a token)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

    torch.manual_seed(0)
    tokens = tokenizer(512, rich=100, small=300)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, use_dynamic_shifting=True)
    pipe = Flux2KleinPipeline(scheduler, _vae(), _text_encoder(len(tokens)), tokens, _transformer())
    pipe.save_pretrained(folder)


def _vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        block_out_channels=(16, 32, 48, 64), layers_per_block=1, norm_num_groups=8, latent_channels=16, sample_size=128,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def _text_encoder(vocabulary: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary, hidden_size=TEXT_WIDTH, intermediate_size=160, num_hidden_layers=28,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def _transformer() -> Any:
    """Modulation and output start at zero, so that every block starts as the identity (Peebles and Xie 2023, DiT)."""
    from diffusers import Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=5, attention_head_dim=32, num_attention_heads=8,
        joint_attention_dim=3 * TEXT_WIDTH, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False,
    )  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if "modulation" in name or name.startswith(("proj_out", "norm_out")):
            nn.init.zeros_(parameter)
    return transformer
