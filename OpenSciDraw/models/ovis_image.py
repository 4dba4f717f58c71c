"""Ovis-Image (7B, Apache-2.0), made for legible text: everything that is true of this family alone.

Reference: diffusers `OvisImagePipeline`; tests/models/test_ovis_image.py holds each function here against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel
from diffusers.loaders.lora_pipeline import ZImageLoraLoaderMixin
from diffusers.pipelines.ovis_image.pipeline_ovis_image import calculate_shift
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3Model

from OpenSciDraw.errors import UserError
from OpenSciDraw.models import ovis_image_names
from OpenSciDraw.models.autoencoder_kl import WithAutoencoderKL
from OpenSciDraw.models.base import TextBatch, load_component
from OpenSciDraw.models.embedded import fill, tokenizer
from OpenSciDraw.registry import EMBEDDED, MODELS

# What the pipeline writes before the prompt, and the number of leading tokens that it drops (OvisImagePipeline.__init__).
SYSTEM = (
    "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships of the objects and "
    "background: "
)
DROPPED = 28
TEMPLATE = f"qwen3-chat: one user turn of {SYSTEM!r} and the prompt, add_generation_prompt, enable_thinking=False"


@MODELS.register("OvisImage")
class OvisImage(WithAutoencoderKL):
    """Ovis-Image: `AIDC-AI/Ovis-Image-7B`."""

    family = "OvisImage"
    transformer_class = "OvisImageTransformer2DModel"
    pipeline_class = OvisImagePipeline
    block_layers = (  # proj_out is the name of the single blocks' last layer and of the transformer's
        "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,ff.net.0.proj,ff.net.2,ff_context.net.0.proj,"
        "ff_context.net.2,proj_mlp,proj_out,norm.linear,norm1.linear,norm1_context.linear"
    )
    pipeline_text_limit = 256
    base_models = "AIDC-AI/Ovis-Image-7B"

    # -- components ---------------------------------------------------------------------------
    def load_text_encoder(self) -> None:
        self._tokenizer = load_component(Qwen2TokenizerFast, self.source, "tokenizer")
        encoder = load_component(Qwen3Model, self.source, "text_encoder", dtype=self.weight_dtype)
        self._text_encoder = encoder.to(self.device).eval().requires_grad_(False)

    # -- figures and prompts in ---------------------------------------------------------------
    def _tokenize(self, prompts: Sequence[str]) -> Any:
        texts = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": SYSTEM + prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for prompt in prompts
        ]
        inputs = self._tokenizer(
            texts, return_tensors="pt", padding="max_length", padding_side="right", truncation=True,
            max_length=DROPPED + self.max_sequence_length, add_special_tokens=False,
        )  # fmt: skip
        cut = [sum(sum(rest.attention_mask) for rest in row.overflowing) for row in inputs.encodings]  # tokens left out
        self.note_truncated(sum(n > 0 for n in cut), self.max_sequence_length + max(cut))
        return inputs

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        """Rows (L, D) trimmed to the prompt's own tokens: the pipeline sets pads to zero, and `collate_text` puts them back."""
        inputs = self._tokenize(prompts).to(self.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        states = self.text_encoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return [row[valid][DROPPED:] for row, valid in zip(states, mask.bool(), strict=True)]

    def collate_text(self, rows: Sequence[Tensor]) -> TextBatch:
        """All `max_sequence_length` rows: the transformer has no mask, so pads are read, as zeros, and their number matters."""
        longest = max(len(row) for row in rows)
        if longest > self.max_sequence_length:
            raise UserError(
                f"prompt embeddings of {longest} tokens: Ovis-Image fills each prompt up to max_sequence_length = "
                f"{self.max_sequence_length} tokens. Set max_sequence_length to what the data was encoded with, or encode again."
            )
        return TextBatch(torch.stack([F.pad(row, (0, 0, 0, self.max_sequence_length - len(row))) for row in rows]))

    def text_shape(self) -> tuple[int, int]:
        return self.max_sequence_length, load_component(Qwen3Config, self.source, "text_encoder").hidden_size

    # -- the forward --------------------------------------------------------------------------
    def velocity(self, noisy: Tensor, sigma: Tensor, text: TextBatch, references: Sequence[Tensor] = ()) -> Tensor:
        assert not references  # `edits` is False
        height, width = noisy.shape[-2:]
        index = torch.arange(text.embeds.shape[1], device=noisy.device)
        # the pipeline's positions are in the weights' type: bf16 holds integers to 256, which is 4096 px and all of the text
        out = self.transformer(
            hidden_states=noisy.flatten(2).transpose(1, 2).to(self.weight_dtype),
            encoder_hidden_states=text.embeds.to(self.weight_dtype),
            timestep=sigma,  # the transformer multiplies by 1000 itself
            txt_ids=torch.stack([torch.zeros_like(index), index, index], dim=1).to(self.weight_dtype),
            img_ids=OvisImagePipeline._prepare_latent_image_ids(len(noisy), height, width, noisy.device, self.weight_dtype),
            return_dict=False,
        )[0]
        return out.transpose(1, 2).unflatten(2, (height, width))

    # -- inference ----------------------------------------------------------------------------
    def inference_sigmas(self, tokens: int, steps: int) -> Tensor:
        scheduler = self._scheduler()
        given = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        mu = calculate_shift(tokens, *(scheduler.config.get(name, default) for name, default in given.items()))
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist(), mu=mu)
        return scheduler.sigmas

    def sample(
        self, pipe: Any, prompt_rows: Sequence[Tensor], negative_row: Tensor, *, width: int, height: int, steps: int,
        guidance: float, seeds: Sequence[int], images: Sequence[Any] = (),
    ) -> list[Any]:  # fmt: skip
        text, negative = (
            self.collate_text(rows).embeds.to(self.device, self.weight_dtype)
            for rows in (prompt_rows, [negative_row] * len(prompt_rows))
        )
        return pipe(
            prompt_embeds=text, negative_prompt=None, negative_prompt_embeds=negative,  # its default "" beside them is refused
            width=width, height=height, num_inference_steps=steps, guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images  # fmt: skip

    # -- export and contract ------------------------------------------------------------------
    def save_lora(self, folder: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        # OvisImagePipeline has no methods for LoRA; all of diffusers' with one transformer write the same file
        ZImageLoraLoaderMixin.save_lora_weights(
            folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
        )

    def load_lora(self, pipe: Any, file: Path) -> None:
        pipe.transformer.load_lora_adapter(str(file.parent), weight_name=file.name)

    def original_lora(self, layers: dict[str, Tensor], alpha: float, rank: int) -> dict[str, Tensor]:
        return ovis_image_names.original_lora(layers, alpha, rank)

    def family_contract(self) -> dict[str, dict[str, Any]]:
        text = {
            "text_encoder": "Qwen3Model",
            "layers": "last hidden state",
            "template": TEMPLATE,
            "dropped_tokens": DROPPED,
            "padding": "trimmed; zeros up to max_sequence_length in a batch",
            "max_sequence_length": self.max_sequence_length,
            "width": self.text_shape()[1],
        }
        return {"latents": self.latents_contract(), "text": text}


@EMBEDDED.register("ovis_image_tiny")
def build_ovis_image_tiny(folder: Path) -> None:
    """Ovis-Image's own classes with random weights: 2 double and 3 single blocks of width 96, 3-layer Qwen3, 4x VAE."""
    tokens = tokenizer()
    text_encoder = Qwen3Model(Qwen3Config(
        vocab_size=len(tokens), hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
    ))  # fmt: skip
    fill(text_encoder, seed=1, residual_gain=0.3)
    transformer = OvisImageTransformer2DModel(
        num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=3, joint_attention_dim=48,
        axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    fill(transformer, seed=2, residual_gain=1.0)
    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=4, latent_channels=16,
        up_block_types=("UpDecoderBlock2D",) * 3, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    OvisImagePipeline(scheduler, vae, text_encoder, tokens, transformer).save_pretrained(folder)
