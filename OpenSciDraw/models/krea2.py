"""Krea 2 (raw): everything that is true of this family alone. Its VAE and its latents are Qwen-Image's, and inherited.

Reference: diffusers `Krea2Pipeline`; tests/models/test_krea2.py holds each function here against it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import Krea2Pipeline
from diffusers.pipelines.krea2.pipeline_krea2 import calculate_shift
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast, Qwen3VLConfig, Qwen3VLModel

from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel, load_component
from OpenSciDraw.models.original_names import Place
from OpenSciDraw.models.qwen_image import DROPPED, TEMPLATE, QwenImage
from OpenSciDraw.registry import MODELS

# The pipeline's template is Qwen-Image's. It cuts a prompt before the end of the user's turn, which always stays.
PREFIX, SUFFIX = TEMPLATE.split("{}")
SUFFIX_TOKENS = 5
STATES = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)  # the pipeline's, where model_index.json names none

# Layers in diffusers and in the original, as diffusers reads a LoRA of the original's names (lora_conversion_utils.py).
_BLOCKS = {
    "transformer_blocks": "blocks",
    "text_fusion.layerwise_blocks": "txtfusion.layerwise_blocks",
    "text_fusion.refiner_blocks": "txtfusion.refiner_blocks",
}
_IN_BLOCK = {
    "attn.to_q": "attn.wq", "attn.to_k": "attn.wk", "attn.to_v": "attn.wv", "attn.to_out.0": "attn.wo",
    "attn.to_gate": "attn.gate", "ff.gate": "mlp.gate", "ff.up": "mlp.up", "ff.down": "mlp.down",
}  # fmt: skip
_OUTER = {
    "img_in": "first", "final_layer.linear": "last.linear", "time_embed.linear_1": "tmlp.0", "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1", "txt_in.linear_1": "txtmlp.1", "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector",
}  # fmt: skip


@MODELS.register("Krea2")
class Krea2(QwenImage):
    """Krea 2, the raw model: `krea/Krea-2-Raw`."""

    family = "Krea2"
    transformer_class = "Krea2Transformer2DModel"
    pipeline_class = Krea2Pipeline
    block_layers = "to_q,to_k,to_v,to_gate,to_out.0,ff.gate,ff.up,ff.down"
    shared_inputs = (("to_q", "to_k", "to_v", "to_gate"), ("gate", "up"))
    pipeline_text_limit = FigureModel.pipeline_text_limit  # the pipeline takes any max_sequence_length
    base_models = "krea/Krea-2-Raw"
    distilled_steps = 8

    # -- components ---------------------------------------------------------------------------
    def check_transformer(self, config: dict[str, Any]) -> None:
        index = self.pipeline_index()
        if index.get("patch_size", 2) != 2:
            raise UserError(f"{self.source.name} has patch_size = {index['patch_size']} in model_index.json; Krea 2 has 2.")
        if config.get("num_text_layers", 12) != len(self._states):
            raise UserError(
                f"{self.source.name}: text_encoder_select_layers in model_index.json names {len(self._states)} states, and "
                f"num_text_layers in transformer/config.json is {config.get('num_text_layers', 12)}. Train on {self.base_models}."
            )

    @property
    def _states(self) -> tuple[int, ...]:
        """Which hidden states of the text encoder the transformer reads: 0 is the embedding, i is what layer i gives."""
        return tuple(self.pipeline_index().get("text_encoder_select_layers") or STATES)

    def load_text_encoder(self) -> None:
        self._tokenizer = load_component(Qwen2TokenizerFast, self.source, "tokenizer")
        encoder = load_component(Qwen3VLModel, self.source, "text_encoder", dtype=self.weight_dtype).language_model
        if max(self._states) < len(encoder.layers):  # what comes after the last state that is read changes nothing in it
            encoder.layers = encoder.layers[: max(self._states)]
            encoder.norm = nn.Identity()
        self._text_encoder = encoder.to(self.device).eval().requires_grad_(False)  # without the vision tower: prompts are text

    # -- figures and prompts in ---------------------------------------------------------------
    def _tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt in the template; one that is too long is cut before the template's end."""
        longest, end = DROPPED + self.max_sequence_length - SUFFIX_TOKENS, self._tokenizer(SUFFIX).input_ids
        whole = self._tokenizer([PREFIX + prompt for prompt in prompts]).input_ids
        over = [len(ids) for ids in whole if len(ids) > longest]
        self.note_truncated(len(over), max(over, default=0) - DROPPED + SUFFIX_TOKENS)
        return [ids[:longest] + end for ids in whole]

    def prompt_lengths(self, prompts: Sequence[str]) -> list[int]:
        longest, end = DROPPED + self.max_sequence_length - SUFFIX_TOKENS, len(self._tokenizer(SUFFIX).input_ids)
        return [min(len(ids), longest) + end for ids in self._tokenizer([PREFIX + prompt for prompt in prompts]).input_ids]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        """Rows (L, states * D): the states that the transformer reads, side by side, of the prompt's own tokens.

        The pipeline pads between prompt and template's end, and counts no pad in the positions: without pads there the
        numbers are the same but for rounding. Pads come last here, where the encoder, which is causal, sees none.
        """
        ids = [torch.tensor(row) for row in self._tokens(prompts)]
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(self.device)
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self._tokenizer.pad_token_id).to(self.device)
        out = self.text_encoder(input_ids=padded, attention_mask=mask, use_cache=False, output_hidden_states=True)
        states = torch.cat([out.hidden_states[at] for at in self._states], dim=2)
        return [row[valid][DROPPED:] for row, valid in zip(states, mask.bool(), strict=True)]

    def text_shape(self) -> tuple[int, int]:
        width = load_component(Qwen3VLConfig, self.source, "text_encoder").text_config.hidden_size
        return self.max_sequence_length, len(self._states) * width

    # -- the forward --------------------------------------------------------------------------
    def velocity(self, noisy: Tensor, sigma: Tensor, text: Any, references: Sequence[Tensor] = ()) -> Tensor:
        assert not references  # `edits` is False
        height, width = noisy.shape[-2:]
        out = self.transformer(
            hidden_states=noisy.flatten(2).transpose(1, 2).to(self.weight_dtype),
            encoder_hidden_states=text.embeds.to(self.weight_dtype).unflatten(2, (len(self._states), -1)),
            timestep=sigma.to(self.weight_dtype),  # of 0 to 1, as the pipeline rounds it
            position_ids=Krea2Pipeline.prepare_position_ids(text.embeds.shape[1], height, width, noisy.device),
            encoder_attention_mask=text.mask,
            return_dict=False,
        )[0]
        return out.transpose(1, 2).unflatten(2, (height, width))

    # -- inference ----------------------------------------------------------------------------
    def pipeline_level(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        return sigma.to(dtype)  # the pipeline divides by 1000 first

    def guide(self, wanted: Tensor, unwanted: Tensor, guidance: float) -> Tensor:
        return wanted + (guidance - 1) * (wanted - unwanted)  # the pipeline's own form, which rounds otherwise; no norm

    def inference_sigmas(self, tokens: int, steps: int) -> Tensor:
        scheduler = self._scheduler()
        given = {"base_image_seq_len": 256, "max_image_seq_len": 6400, "base_shift": 0.5, "max_shift": 1.15}
        mu = calculate_shift(tokens, *(scheduler.config.get(name, default) for name, default in given.items()))
        mu = 1.15 if self.is_distilled else mu
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return scheduler.sigmas

    def pipeline_arguments(self) -> dict[str, Any]:
        marks = {"text_encoder_select_layers": self._states, "is_distilled": self.is_distilled}
        return {**super().pipeline_arguments(), **marks}

    def sample(
        self, pipe: Any, prompt_rows: Sequence[Tensor], negative_row: Tensor, *, width: int, height: int, steps: int,
        guidance: float, seeds: Sequence[int], images: Sequence[Any] = (),
    ) -> list[Any]:  # fmt: skip
        # one position grid serves both passes of the pipeline, so both have the length of the longest
        both = self.collate_text([*prompt_rows, *[negative_row] * len(prompt_rows)]).to(self.device, self.weight_dtype)
        full = torch.ones(both.embeds.shape[:2], dtype=torch.bool, device=self.device)
        embeds = both.embeds.unflatten(2, (len(self._states), -1)).chunk(2)
        masks = (full if both.mask is None else both.mask).chunk(2)
        negative = {"negative_prompt_embeds": embeds[1], "negative_prompt_embeds_mask": masks[1]} if guidance > 1 else {}
        return pipe(
            prompt_embeds=embeds[0], prompt_embeds_mask=masks[0], **negative, width=width, height=height,
            num_inference_steps=steps, guidance_scale=max(guidance - 1, 0.0),  # it counts from 0, which is none
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images  # fmt: skip

    # -- export and contract ------------------------------------------------------------------
    def original_lora(self, layers: dict[str, Tensor], alpha: float, rank: int) -> dict[str, Tensor]:
        """`diffusion_model.<original module>.{lora_down,lora_up}.weight` and `.alpha`; ComfyUI has the original's names.

        Raises:
            UserError: a layer that the original has not.
        """
        named = ((name.partition(".lora_"), tensor) for name, tensor in layers.items())
        return super().original_lora({_original_module(m) + dot + rest: t for (m, dot, rest), t in named}, alpha, rank)

    def original_place(self, parameter: str) -> Place | None:
        return None  # names of norms and tables in the original's file of all weights are not published in diffusers

    def family_contract(self) -> dict[str, dict[str, Any]]:
        parts = super().family_contract()
        parts["text"] |= {"text_encoder": "Qwen3VLModel", "layers": list(self._states)}
        return parts


def _original_module(module: str) -> str:
    """The original's name of a linear layer of diffusers' transformer."""
    found = re.fullmatch(r"(.+_blocks)\.(\d+)\.(.+)", module)
    if module in _OUTER:
        return _OUTER[module]
    if found is None or found[1] not in _BLOCKS or found[3] not in _IN_BLOCK:
        raise UserError(f"LoRA on {module!r} has no counterpart in the original names; export --format diffusers.")
    return f"{_BLOCKS[found[1]]}.{found[2]}.{_IN_BLOCK[found[3]]}"
