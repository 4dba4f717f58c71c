"""`embedded:qwen_image_edit_tiny`: Qwen-Image-Edit-2511's own classes at small width, built from code, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from OpenSciDraw.models.embedded import fill, tokenizer
from OpenSciDraw.models.embedded.qwen_image_tiny import SCHEDULER
from OpenSciDraw.registry import EMBEDDED
from OpenSciDraw.utils.files import write_json

_LATENTS = 16  # channels
_PICTURE_WORDS = "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
# With these words as one token each the template's system turn is about as long as with Qwen's own tokenizer.
_TEMPLATE_WORDS = (
    "system user assistant Describe the key features of input image color shape size texture objects background then explain how "
    "text instruction should alter or modify Generate new that meets requirements while maintaining consistency with original "
    "where appropriate"
)


@EMBEDDED.register("qwen_image_edit_tiny")
def build_qwen_image_edit_tiny(folder: Path) -> None:
    """Qwen-Image-Edit-2511 at width 128: 3 blocks, 2-layer Qwen2.5-VL of width 64, 8x VAE of base width 4 (16 px a token)."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from tokenizers import AddedToken
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    tokens = tokenizer()
    tokens.add_tokens(_PICTURE_WORDS.split(), special_tokens=True)
    for word in _TEMPLATE_WORDS.split():
        inside = word not in ("system", "user", "assistant", "Describe")  # a line break, not a space, goes before or after these
        tokens.add_tokens([AddedToken(word, single_word=True, lstrip=inside, normalized=False)])
    pictures = Qwen2VLImageProcessorPil(patch_size=14, temporal_patch_size=2, merge_size=2)
    ids = {name: tokens.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    text = dict(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokens.eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[1])
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=ids["image_pad"],
            video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
        )
    )  # fmt: skip
    fill(text_encoder, seed=1, residual_gain=0.3)
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * _LATENTS, out_channels=_LATENTS, num_layers=3, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, axes_dims_rope=(8, 12, 12), zero_cond_t=True,
    )  # fmt: skip
    fill(transformer, seed=2, residual_gain=1.0)
    torch.manual_seed(3)
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=_LATENTS, dim_mult=[1, 1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[round(0.1 * at - 0.8, 2) for at in range(_LATENTS)],
        latents_std=[round(0.5 + 0.05 * at, 2) for at in range(_LATENTS)],
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    parts = {"scheduler": scheduler, "vae": vae, "text_encoder": text_encoder, "transformer": transformer, "tokenizer": tokens}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    for part in (tokens, pictures):  # the whole processor has a part for films, which needs torchvision
        part.save_pretrained(folder / "processor")
    index = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()}
    index |= {"processor": ["transformers", "Qwen2VLProcessor"]}
    write_json(folder / "model_index.json", {"_class_name": "QwenImageEditPlusPipeline", **index})
