"""Z-Image (6B, Apache-2.0): everything that is true of this family alone.

Reference: diffusers `ZImagePipeline`; tests/models/test_z_image.py holds each function here against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from OpenSciDraw.errors import UserError
from OpenSciDraw.models.autoencoder_kl import WithAutoencoderKL
from OpenSciDraw.models.base import TextBatch, load_component
from OpenSciDraw.models.embedded import fill, tokenizer
from OpenSciDraw.registry import EMBEDDED, MODELS

TEMPLATE = "qwen3-chat: one user turn, add_generation_prompt, enable_thinking=True"


@MODELS.register("ZImage")
class ZImage(WithAutoencoderKL):
    """Z-Image, the base model: `Tongyi-MAI/Z-Image`."""

    family = "ZImage"
    transformer_class = "ZImageTransformer2DModel"
    pipeline_class = ZImagePipeline
    block_layers = "to_q,to_k,to_v,to_out.0,feed_forward.w1,feed_forward.w2,feed_forward.w3,adaLN_modulation.0"
    shared_inputs = (("to_q", "to_k", "to_v"), ("w1", "w3"))
    pipeline_text_limit = 512
    base_models = "Tongyi-MAI/Z-Image"

    # -- components ---------------------------------------------------------------------------
    def check_transformer(self, config: dict[str, Any]) -> None:
        if config.get("siglip_feat_dim") is not None:
            raise UserError(f"{self.source.name} is Z-Image-Omni, which reads pictures by SigLIP. Train on {self.base_models}.")
        if "turbo" in self.requested_source.name.lower():  # no file of it has a mark
            raise UserError(
                f"{self.requested_source.name} is distilled by its name: it draws in 8 steps without guidance, and training on "
                f"figures would undo that. Train on {self.base_models}; the adapter can be tried on Z-Image-Turbo afterwards."
            )

    def load_text_encoder(self) -> None:
        self._tokenizer = load_component(Qwen2TokenizerFast, self.source, "tokenizer")
        encoder = load_component(Qwen3ForCausalLM, self.source, "text_encoder", dtype=self.weight_dtype)
        # hidden_states[-2] goes into the last layer: that layer, the final norm and the vocabulary projection change nothing in it
        encoder.model.layers = encoder.model.layers[:-1]
        encoder.model.norm = nn.Identity()
        self._text_encoder = encoder.model.to(self.device).eval().requires_grad_(False)

    # -- figures and prompts in ---------------------------------------------------------------
    def _in_template(self, prompts: Sequence[str]) -> list[str]:
        return [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for prompt in prompts
        ]

    def prompt_lengths(self, prompts: Sequence[str]) -> list[int]:
        return [min(len(ids), self.max_sequence_length) for ids in self._tokenizer(self._in_template(prompts)).input_ids]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        """Rows (L, D) trimmed to the prompt's own tokens, the template's with them.

        The pipeline pads all to 512 tokens and cuts after the encoder, which is causal: the same numbers for less work.
        """
        inputs = self._tokenizer(
            self._in_template(prompts), return_tensors="pt", padding=True, padding_side="right", truncation=True,
            max_length=self.max_sequence_length,
        )  # fmt: skip
        cut = [sum(sum(rest.attention_mask) for rest in row.overflowing) for row in inputs.encodings]  # tokens left out
        self.note_truncated(sum(n > 0 for n in cut), self.max_sequence_length + max(cut))
        ids, mask = inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device)
        states = self.text_encoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return [row[valid] for row, valid in zip(states, mask.bool(), strict=True)]

    def collate_text(self, rows: Sequence[Tensor]) -> TextBatch:
        return TextBatch.padded(rows)

    def text_shape(self) -> tuple[int, int]:
        return self.max_sequence_length, load_component(Qwen3Config, self.source, "text_encoder").hidden_size

    # -- the forward --------------------------------------------------------------------------
    def velocity(self, noisy: Tensor, sigma: Tensor, text: TextBatch, references: Sequence[Tensor] = ()) -> Tensor:
        assert not references  # `edits` is False
        latents = F.pixel_shuffle(noisy, 2).to(self.weight_dtype).unsqueeze(2)  # a frame axis; it makes its patches itself
        rows = list(text.embeds.to(self.weight_dtype))
        if text.mask is not None:  # rows of different lengths are given as a list, not as a mask
            rows = [row[:length] for row, length in zip(rows, text.mask.sum(1).tolist(), strict=True)]
        # time runs from noise at 0 to the picture at 1, and the prediction is clean - noise; rounded as the pipeline does it
        out = self.transformer(list(latents), (1000 - 1000 * sigma) / 1000, rows, return_dict=False)[0]
        return -F.pixel_unshuffle(torch.stack(out).squeeze(2).float(), 2)  # guidance and steps are fp32 in the pipeline

    # -- inference ----------------------------------------------------------------------------
    def inference_sigmas(self, tokens: int, steps: int) -> Tensor:
        scheduler = self._scheduler()
        given = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        mu = calculate_shift(tokens, *(scheduler.config.get(name, default) for name, default in given.items()))
        scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps), mu=mu)
        return scheduler.sigmas

    def sample(
        self, pipe: Any, prompt_rows: Sequence[Tensor], negative_row: Tensor, *, width: int, height: int, steps: int,
        guidance: float, seeds: Sequence[int], images: Sequence[Any] = (),
    ) -> list[Any]:  # fmt: skip
        rows = [row.to(self.device, self.weight_dtype) for row in (*prompt_rows, negative_row)]
        return pipe(
            prompt_embeds=rows[:-1], negative_prompt_embeds=rows[-1:] * len(prompt_rows), width=width, height=height,
            num_inference_steps=steps, guidance_scale=max(guidance - 1, 0.0),  # it counts from 0, which is none
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images  # fmt: skip

    # -- contract -----------------------------------------------------------------------------
    def family_contract(self) -> dict[str, dict[str, Any]]:
        text = {
            "text_encoder": "Qwen3ForCausalLM",
            "layers": "last but one",
            "template": TEMPLATE,
            "padding": "trimmed",
            "max_sequence_length": self.max_sequence_length,
            "width": self.text_shape()[1],
        }
        return {"latents": self.latents_contract(), "text": text}


@EMBEDDED.register("z_image_tiny")
def build_z_image_tiny(folder: Path) -> None:
    """Z-Image's own classes with random weights: 3 blocks of width 96 and 1 + 1 refiners, 3-layer Qwen3, 4x VAE (8 px a token)."""
    tokens = tokenizer()
    text_encoder = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokens), hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, tie_word_embeddings=True,
    ))  # fmt: skip
    fill(text_encoder, seed=1, residual_gain=0.3)
    transformer = ZImageTransformer2DModel(
        dim=96, n_layers=3, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=48, axes_dims=[8, 12, 12],
        axes_lens=[1024, 512, 512],
    )  # fmt: skip
    fill(transformer, seed=2, residual_gain=1.0)
    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=4, latent_channels=16,
        up_block_types=("UpDecoderBlock2D",) * 3, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ZImagePipeline(scheduler, vae, text_encoder, tokens, transformer).save_pretrained(folder)
