"""FLUX.2-klein's VAE and text encoder as models that train themselves: how the embedded model is pretrained.

`model_type` names the part; `FigureModel.transformer`, what the loop trains, is then that part. Objectives and
validation are in train_iteration_funcs/pretraining.py and validation_funcs/pretraining.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from torch import nn
from transformers import Qwen3ForCausalLM

from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import load_component
from OpenSciDraw.models.flux2_klein import Flux2Klein
from OpenSciDraw.registry import MODELS


class _Part(Flux2Klein):
    """A component that trains by itself: it is saved and resumed as any model, and draws nothing."""

    def pipeline(self, transformer: nn.Module) -> Flux2KleinPipeline:
        raise UserError(
            f"This config trains the {self.trained_part} of a model (class {type(self).__name__}), which draws no pictures. "
            "Put what it trained into a model folder, and use that with model_type = 'Flux2Klein'."
        )


@MODELS.register("Flux2KleinVAE")
class Flux2KleinVAE(_Part):
    """The VAE of a FLUX.2 folder, all its weights."""

    transformer_class = "AutoencoderKLFlux2"
    trained_part = "vae"

    def check_transformer(self, config: dict[str, Any]) -> None:
        return None


@MODELS.register("Flux2KleinText")
class Flux2KleinText(_Part):
    """The text encoder of a FLUX.2-klein folder as a language model, all its weights."""

    transformer_class = "Qwen3ForCausalLM"
    trained_part = "text_encoder"

    @property
    def transformer_type(self) -> Any:
        return Qwen3ForCausalLM

    def load_transformer(
        self, quantization: Any = None, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if quantization is not None:
            raise UserError("Flux2KleinText trains all weights: quantization must be None.")
        encoder = load_component(Qwen3ForCausalLM, self.source, self.trained_part, dtype=dtype or self.weight_dtype)
        self._transformer = encoder.to(device or self.device).eval().requires_grad_(False)

    def save_config(self, transformer: Any, folder: Path) -> None:
        transformer.config.save_pretrained(folder)

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask (B, L) of captions in the chat template, as `encode_prompts` makes them."""
        inputs = self._tokenize(captions).to(self.device)
        return inputs["input_ids"], inputs["attention_mask"]
