"""Qwen-Image (2512 and 1.0): everything that is true of this family alone.

Reference: diffusers `QwenImagePipeline`; tests/models/test_qwen_image.py holds each function here against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel, TextBatch, load_component
from OpenSciDraw.models.original_names import Place
from OpenSciDraw.registry import MODELS

# The pipeline's prompt template and the number of its leading tokens that it drops (QwenImagePipeline.__init__).
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED = 34

# Switches of the transformer's config that a plain text-to-image model leaves off, and whose they are.
_OTHER_MODELS = {
    "guidance_embeds": "a guidance-distilled model",
    "zero_cond_t": "an editing model (Qwen-Image-Edit-2511: set model_type = 'QwenImageEdit')",
    "use_additional_t_cond": "Qwen-Image-Layered",
    "use_layer3d_rope": "Qwen-Image-Layered",
}


@MODELS.register("QwenImage")
class QwenImage(FigureModel):
    """Qwen-Image: `Qwen/Qwen-Image-2512` and `Qwen/Qwen-Image`, one architecture."""

    family = "QwenImage"
    transformer_class = "QwenImageTransformer2DModel"
    pipeline_class = QwenImagePipeline
    block_layers = (
        "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,img_mod.1,txt_mod.1,img_mlp.net.0.proj,"
        "img_mlp.net.2,txt_mlp.net.0.proj,txt_mlp.net.2"
    )
    pipeline_text_limit = 1024
    routes_tokens = True

    # -- components ---------------------------------------------------------------------------
    def load_vae(self, dtype: torch.dtype = torch.float32) -> None:
        vae = load_component(AutoencoderKLQwenImage, self.source, "vae", torch_dtype=dtype)
        self._vae = vae.to(self.device).eval().requires_grad_(False)

    def check_transformer(self, config: dict[str, Any]) -> None:
        wrong = [f"{name} = True: {whose}" for name, whose in _OTHER_MODELS.items() if config.get(name, False)]
        if wrong:
            raise UserError(
                f"{self.source.name} is not a text-to-image model of this family ({'; '.join(wrong)}). "
                "Train on Qwen/Qwen-Image-2512 or Qwen/Qwen-Image."
            )

    def load_text_encoder(self) -> None:
        self._tokenizer = load_component(Qwen2TokenizerFast, self.source, "tokenizer")
        encoder = load_component(
            Qwen2_5_VLForConditionalGeneration, self.source, "text_encoder", dtype=self.weight_dtype
        )
        # Prompts are text alone: the vision tower and the vocabulary projection change no hidden state and are not kept.
        self._text_encoder = encoder.model.language_model.to(self.device).eval().requires_grad_(False)

    # -- figures and prompts in ---------------------------------------------------------------
    @property
    def _stride(self) -> int:
        return 2 ** len(self.vae.config.temperal_downsample)  # pixels of a latent's side, as the pipeline counts them

    @property
    def pixel_multiple(self) -> int:
        return 2 * self._stride  # VAE stride x 2x2 patch

    def encode_with(self, vae: Any, pixels: Tensor) -> Tensor:
        return vae.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2)  # the VAE is one for films: (B, 3, frames, H, W)

    def _tokenize(self, prompts: Sequence[str]) -> Any:
        inputs = self._tokenizer(
            [TEMPLATE.format(prompt) for prompt in prompts], return_tensors="pt", padding=True, truncation=True,
            max_length=DROPPED + self.max_sequence_length,
        )  # fmt: skip
        cut = [sum(sum(rest.attention_mask) for rest in row.overflowing) for row in inputs.encodings]  # tokens left out
        self.note_truncated(sum(n > 0 for n in cut), self.max_sequence_length + max(cut))
        return inputs

    def prompt_lengths(self, prompts: Sequence[str]) -> list[int]:
        longest = DROPPED + self.max_sequence_length
        return [min(len(ids), longest) for ids in self._tokenizer([TEMPLATE.format(prompt) for prompt in prompts]).input_ids]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        """Rows (L, D) trimmed to the prompt's own tokens; the pipeline cuts after the encoder, which is causal: the same."""
        inputs = self._tokenize(prompts).to(self.device)
        mask = inputs["attention_mask"]
        states = self.text_encoder(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False).last_hidden_state
        return [row[valid][DROPPED:] for row, valid in zip(states, mask.bool(), strict=True)]

    def collate_text(self, rows: Sequence[Tensor]) -> TextBatch:
        return TextBatch.padded(rows)

    def text_shape(self) -> tuple[int, int]:
        config = load_component(Qwen2_5_VLConfig, self.source, "text_encoder")
        return self.max_sequence_length, config.text_config.hidden_size

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.vae.config.z_dim, height // self._stride, width // self._stride

    # -- the forward --------------------------------------------------------------------------
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (1, C, 1, 1) of each latent channel, fp32."""
        config = self.vae.config
        mean, std = (torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return mean, std

    def normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        # channels c * 4 + 2 * row + column of a 2x2 patch, as QwenImagePipeline._pack_latents orders them
        return F.pixel_unshuffle((latents.to(self.device, torch.float32) - mean) / std, 2)

    @torch.no_grad()
    def decode(self, normalized: Tensor) -> Tensor:
        mean, std = self._statistics()
        latents = F.pixel_shuffle(normalized.float(), 2) * std + mean
        return self.vae.decode(latents.to(self.vae.dtype).unsqueeze(2)).sample.squeeze(2)

    def velocity(self, noisy: Tensor, sigma: Tensor, text: TextBatch, references: Sequence[Tensor] = ()) -> Tensor:
        assert not references  # `edits` is False: Qwen-Image-Edit is a family of its own
        height, width = noisy.shape[-2:]
        out = self.transformer(
            hidden_states=noisy.flatten(2).transpose(1, 2).to(self.weight_dtype),
            encoder_hidden_states=text.embeds.to(self.weight_dtype),
            encoder_hidden_states_mask=text.mask,
            timestep=sigma,  # the transformer multiplies by 1000 itself
            img_shapes=[[(1, height, width)]] * len(noisy),
            return_dict=False,
        )[0]
        return out.transpose(1, 2).unflatten(2, (height, width))

    def of_tokens(self, arguments: dict[str, Any], kept: Tensor, text: int) -> dict[str, Any]:
        image, of_text = arguments["image_rotary_emb"]
        index = arguments.get("modulate_index")  # (B, image tokens): which are of the picture that is edited
        index = None if index is None else index[:, kept]
        return {**arguments, "image_rotary_emb": (image[kept], of_text), "modulate_index": index}

    # -- inference ----------------------------------------------------------------------------
    def guide(self, wanted: Tensor, unwanted: Tensor, guidance: float) -> Tensor:
        """The pipeline's guidance: each token of the combination gets back the norm that it had with the prompt alone."""
        combined = super().guide(wanted, unwanted, guidance)
        return combined * (wanted.norm(dim=1, keepdim=True) / combined.norm(dim=1, keepdim=True))

    def inference_sigmas(self, tokens: int, steps: int) -> Tensor:
        scheduler = self._scheduler()
        config = scheduler.config
        mu = calculate_shift(
            tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist(), mu=mu)
        return scheduler.sigmas

    def sample(
        self, pipe: Any, prompt_rows: Sequence[Tensor], negative_row: Tensor, *, width: int, height: int, steps: int,
        guidance: float, seeds: Sequence[int], images: Sequence[Any] = (),
    ) -> list[Any]:  # fmt: skip
        text = {"": list(prompt_rows), "negative_": [negative_row] * len(prompt_rows) if guidance > 1 else []}
        arguments: dict[str, Tensor] = {}
        for name, rows in text.items():
            if rows:
                batch = self.collate_text(rows).to(self.device, self.weight_dtype)
                full = torch.ones(batch.embeds.shape[:2], dtype=torch.bool, device=self.device)
                arguments[f"{name}prompt_embeds"] = batch.embeds
                arguments[f"{name}prompt_embeds_mask"] = full if batch.mask is None else batch.mask
        if self.max_sequence_length > self.pipeline_text_limit:  # what it refuses, the model takes: build_model has warned
            pipe.check_inputs = lambda *_, **__: None
        return pipe(
            **arguments, width=width, height=height, num_inference_steps=steps, true_cfg_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            max_sequence_length=self.max_sequence_length,
        ).images  # fmt: skip

    # -- export and contract ------------------------------------------------------------------
    def original_place(self, parameter: str) -> Place | None:
        """The original has diffusers' names."""
        return Place(parameter)

    def family_contract(self) -> dict[str, dict[str, Any]]:
        latents = {
            "vae": "AutoencoderKLQwenImage",
            "latents": "posterior mode, raw (before latents_mean and latents_std), without the frame axis",
            "channels": self.vae.config.z_dim,
        }
        text = {
            "text_encoder": "Qwen2_5_VLForConditionalGeneration",
            "layers": "last hidden state",
            "template": TEMPLATE,
            "dropped_tokens": DROPPED,
            "padding": "trimmed",
            "max_sequence_length": self.max_sequence_length,
            "width": self.text_shape()[1],
        }
        return {"latents": latents, "text": text}
