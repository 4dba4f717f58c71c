"""`embedded:qwen_image_21_tiny`: Qwen-Image-2.1's own classes at small width, built from code, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from OpenSciDraw.models.embedded import fill, tokenizer
from OpenSciDraw.registry import EMBEDDED
from OpenSciDraw.utils.files import write_json

_LATENTS = 16  # channels
_WORDS = "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
_MESSAGES = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}{{ part['text'] }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)
# Qwen/Qwen-Image-2.1, scheduler/scheduler_config.json
_SCHEDULER = {
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 8192, "max_shift": 0.9, "num_train_timesteps": 1000,
    "shift": 1.0, "shift_terminal": 0.02, "time_shift_type": "exponential", "use_dynamic_shifting": True,
}  # fmt: skip


@EMBEDDED.register("qwen_image_21_tiny")
def build_qwen_image_21_tiny(folder: Path) -> None:
    """Qwen-Image-2.1 at width 128: 3 blocks, 2-layer Qwen3-VL of width 64, 16x VAE of base width 4 (16 px a token)."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Transformer2DModel,
    )
    from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokens = tokenizer()
    tokens.add_tokens(_WORDS.split(), special_tokens=True)
    tokens.chat_template = _MESSAGES
    pictures = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 32 * 32, "longest_edge": 4096 * 4096}, patch_size=16, temporal_patch_size=2, merge_size=2,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    ids = {name: tokens.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    text = dict(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokens.eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, num_position_embeddings=64,
        deepstack_visual_indexes=[0],
    )  # fmt: skip
    text_encoder = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=ids["image_pad"],
            video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
        )
    )  # fmt: skip
    fill(text_encoder, seed=1, residual_gain=0.3)
    transformer = QwenImage21Transformer2DModel(
        in_channels=_LATENTS, out_channels=_LATENTS, num_layers=3, attention_head_dim=32, num_attention_heads=4,
        context_in_dim=64, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    fill(transformer, seed=2, residual_gain=1.0)
    torch.manual_seed(3)
    vae = AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=_LATENTS, dim_mult=[1, 1, 2, 2, 2], num_res_blocks=1,
        latents_mean=[round(0.1 * at - 0.8, 2) for at in range(_LATENTS)],
        latents_std=[round(0.5 + 0.05 * at, 2) for at in range(_LATENTS)],
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(**_SCHEDULER)
    parts = {"scheduler": scheduler, "vae": vae, "text_encoder": text_encoder, "transformer": transformer}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    for part in (tokens, pictures):  # the whole processor has a part for films, which needs torchvision
        part.save_pretrained(folder / "processor")
    index = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()}
    index |= {"processor": ["transformers", "Qwen3VLProcessor"]}
    write_json(folder / "model_index.json", {"_class_name": "QwenImage21Pipeline", **index})
