"""FLUX.2-dev (32B): what is true of this family and not of FLUX.2-klein, its small sibling.

Reference: diffusers `Flux2Pipeline`; tests/models/test_flux2_dev.py holds each function here against it. The VAE, the positions,
the noise levels and the transformer's class are klein's. Its own are the text encoder and guidance, which is an input of the
transformer: it was distilled from a model with classifier-free guidance, and draws in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from torch import Tensor, nn
from transformers import AutoTokenizer, BatchEncoding, Mistral3Config, Mistral3ForConditionalGeneration

from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import load_component
from OpenSciDraw.models.embedded import embedded_folder, fill, tokenizer
from OpenSciDraw.models.flux2_klein import Flux2Klein
from OpenSciDraw.registry import EMBEDDED, MODELS

TEMPLATE = "mistral-chat: the pipeline's system message and one user turn, [IMG] taken out, no generation prompt"


@MODELS.register("Flux2Dev")
class Flux2Dev(Flux2Klein):
    """FLUX.2-dev: `black-forest-labs/FLUX.2-dev` (gated)."""

    family = "Flux2Dev"
    pipeline_class = Flux2Pipeline
    embeds_guidance = True
    text_layers = (10, 20, 30)  # hidden states of Mistral (Flux2Pipeline.encode_prompt)
    base_models = "black-forest-labs/FLUX.2-dev"

    # -- components ---------------------------------------------------------------------------
    def check_transformer(self, config: dict[str, Any]) -> None:
        if not config.get("guidance_embeds", True):
            raise UserError(
                f"{self.source.name} has no guidance embedding, so it is not FLUX.2-dev. For FLUX.2-klein set "
                "model_type = 'Flux2Klein'."
            )

    def load_text_encoder(self) -> None:
        # Of the pipeline's processor only the tokenizer reads text; the rest needs torchvision.
        self._tokenizer = load_component(AutoTokenizer, self.source, "tokenizer")
        encoder = load_component(Mistral3ForConditionalGeneration, self.source, "text_encoder", dtype=self.weight_dtype)
        language = encoder.model.language_model
        if len(language.layers) < self.text_layers[-1]:
            raise UserError(
                f"text_encoder of {self.source.name} has {len(language.layers)} layers; FLUX.2-dev reads the hidden states "
                f"{self.text_layers}. Use the Mistral that belongs to the model."
            )
        # The vision tower, the layers above 30, the final norm and the vocabulary projection change nothing that is read.
        language.layers = language.layers[: self.text_layers[-1]]
        language.norm = nn.Identity()
        self._text_encoder = language.to(self.device).eval().requires_grad_(False)

    # -- prompts in ---------------------------------------------------------------------------
    def _tokenize(self, prompts: Sequence[str]) -> BatchEncoding:
        messages = format_input(list(prompts))
        common: dict[str, Any] = dict(add_generation_prompt=False, tokenize=True, return_dict=True)
        lengths = [len(ids) for ids in self._tokenizer.apply_chat_template(messages, **common)["input_ids"]]
        self.note_truncated(sum(n > self.max_sequence_length for n in lengths), max(lengths))
        encoded: BatchEncoding = self._tokenizer.apply_chat_template(
            messages, **common, return_tensors="pt", padding="max_length", truncation=True, max_length=self.max_sequence_length
        )
        return encoded

    def text_shape(self) -> tuple[int, int]:
        config = load_component(Mistral3Config, self.source, "text_encoder")
        return self.max_sequence_length, len(self.text_layers) * config.text_config.hidden_size

    # -- the forward --------------------------------------------------------------------------
    def _guidance(self, batch: int, device: torch.device) -> Tensor:
        return torch.full((batch,), self.embedded_guidance, device=device)  # the transformer multiplies by 1000 itself

    # -- inference ----------------------------------------------------------------------------
    def pipeline_arguments(self) -> dict[str, Any]:
        return {"tokenizer": None}

    def sample(
        self, pipe: Any, prompt_rows: Sequence[Tensor], negative_row: Tensor, *, width: int, height: int, steps: int,
        guidance: float, seeds: Sequence[int], images: Sequence[Any] = (),
    ) -> list[Any]:  # fmt: skip
        return pipe(
            image=list(images) or None, prompt_embeds=torch.stack(list(prompt_rows)).to(self.device, self.weight_dtype),
            width=width, height=height, num_inference_steps=steps, guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images  # fmt: skip

    # -- contract -----------------------------------------------------------------------------
    def family_contract(self) -> dict[str, dict[str, Any]]:
        parts = super().family_contract()
        own = {"text_encoder": "Mistral3ForConditionalGeneration", "layers": list(self.text_layers), "template": TEMPLATE}
        return {"latents": parts["latents"], "text": {**parts["text"], **own}}


_MISTRAL_TEMPLATE = (
    "<s>{% for message in messages %}{% set text %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endset %}"
    "{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ text }}[/INST]{% endif %}"
    "{% endfor %}"
)


@EMBEDDED.register("flux2_dev_tiny")
def build_flux2_dev_tiny(folder: Path) -> None:
    """FLUX.2-dev at width 192: random transformer with guidance embedding, 31-layer Mistral of width 48, klein's analytic VAE."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    tokens = tokenizer()
    tokens.add_special_tokens({"additional_special_tokens": ["<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]})
    tokens.chat_template, tokens.padding_side = _MISTRAL_TEMPLATE, "left"
    text = dict(
        model_type="mistral", vocab_size=len(tokens), hidden_size=48, intermediate_size=96, num_hidden_layers=31, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, sliding_window=None,
    )  # fmt: skip
    vision = dict(
        model_type="pixtral", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28
    )
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    fill(encoder, seed=1, residual_gain=0.3)
    transformer = Flux2Transformer2DModel(
        in_channels=128, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=6,
        joint_attention_dim=3 * 48, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=True,
    )  # fmt: skip
    fill(transformer, seed=2, residual_gain=1.0)
    vae = AutoencoderKLFlux2.from_pretrained(embedded_folder("flux2_klein_tiny_random"), subfolder="vae")
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, use_dynamic_shifting=True)
    Flux2Pipeline(scheduler, vae, encoder, tokens, transformer).save_pretrained(folder)
