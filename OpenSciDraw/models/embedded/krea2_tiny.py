"""`embedded:krea2_tiny`: Krea 2's own classes at small width, built from code, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from OpenSciDraw.models.embedded import fill
from OpenSciDraw.models.embedded.qwen_image_tiny import template_tokenizer
from OpenSciDraw.registry import EMBEDDED

_LATENTS = 16  # channels, as in the large model
# The values that Krea2Pipeline's docstring asks of the scheduler.
_SCHEDULER = {
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 6400, "max_shift": 1.15, "use_dynamic_shifting": True,
}  # fmt: skip


@EMBEDDED.register("krea2_tiny")
def build_krea2_tiny(folder: Path) -> None:
    """Krea 2 at width 128: 3 blocks, 4-layer Qwen3-VL of width 48 of which 3 states are read, 4x VAE (8 px a token)."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        Krea2Pipeline,
        Krea2Transformer2DModel,
    )
    from transformers import Qwen3VLConfig, Qwen3VLModel

    tokens = template_tokenizer()
    text = dict(
        vocab_size=len(tokens), hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokens.eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=48, num_position_embeddings=64,
        deepstack_visual_indexes=[0],
    )  # fmt: skip
    text_encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
    fill(text_encoder, seed=1, residual_gain=0.3)
    transformer = Krea2Transformer2DModel(
        in_channels=4 * _LATENTS, num_layers=3, attention_head_dim=32, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=256, timestep_embed_dim=64, text_hidden_dim=48, num_text_layers=3, text_num_attention_heads=4,
        text_num_key_value_heads=4, text_intermediate_size=96, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    fill(transformer, seed=2, residual_gain=1.0)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))  # its norms multiply by 1 + weight
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=_LATENTS, dim_mult=[1, 1, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[round(0.1 * at - 0.8, 2) for at in range(_LATENTS)],
        latents_std=[round(0.5 + 0.05 * at, 2) for at in range(_LATENTS)],
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(**_SCHEDULER)
    Krea2Pipeline(
        scheduler, vae, text_encoder, tokens, transformer, text_encoder_select_layers=(1, 2, 3)
    ).save_pretrained(folder)
