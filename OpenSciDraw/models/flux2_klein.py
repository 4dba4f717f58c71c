"""FLUX.2-klein (base 9B and 4B): everything that is true of this family alone.

Reference: diffusers `Flux2KleinPipeline`; tests/models/test_flux2_klein.py holds each function here against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from OpenSciDraw.errors import UserError
from OpenSciDraw.models import flux2_blocks, flux2_names
from OpenSciDraw.models.base import FigureModel, TextBatch, load_component
from OpenSciDraw.models.original_names import Place
from OpenSciDraw.registry import MODELS

TEXT_LAYERS = (9, 18, 27)  # hidden states of Qwen3 that are concatenated (Flux2KleinPipeline.encode_prompt)
TEMPLATE = "qwen3-chat: one user turn, add_generation_prompt, enable_thinking=False"


@MODELS.register("Flux2Klein")
class Flux2Klein(FigureModel):
    """FLUX.2-klein-base: `black-forest-labs/FLUX.2-klein-base-9B` (gated) and `…-4B`."""

    family = "Flux2Klein"
    transformer_class = "Flux2Transformer2DModel"
    pipeline_class = Flux2KleinPipeline
    block_layers = (
        "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"
    )
    edits = routes_tokens = True
    text_layers: ClassVar[tuple[int, ...]] = TEXT_LAYERS
    base_models = "black-forest-labs/FLUX.2-klein-base-9B or black-forest-labs/FLUX.2-klein-base-4B"

    # -- components ---------------------------------------------------------------------------
    def load_vae(self, dtype: torch.dtype = torch.float32) -> None:
        vae = load_component(AutoencoderKLFlux2, self.source, "vae", torch_dtype=dtype)
        self._vae = vae.to(self.device).eval().requires_grad_(False)

    def check_transformer(self, config: dict[str, Any]) -> None:
        if config.get("guidance_embeds", True):  # the class's default
            raise UserError(
                f"{self.source.name} has a guidance embedding, so it is FLUX.2-dev or a distilled model. "
                "Train on FLUX.2-klein-base-9B or -4B."
            )

    def load_text_encoder(self) -> None:
        self._tokenizer = load_component(Qwen2TokenizerFast, self.source, "tokenizer")
        encoder = load_component(Qwen3ForCausalLM, self.source, "text_encoder", dtype=self.weight_dtype)
        if len(encoder.model.layers) < TEXT_LAYERS[-1]:
            raise UserError(
                f"text_encoder of {self.source.name} has {len(encoder.model.layers)} layers; FLUX.2-klein reads the "
                f"hidden states {TEXT_LAYERS}. Use the Qwen3 that belongs to the model."
            )
        # Only layers up to 27 are ever read: the rest (a quarter of Qwen3-8B), the final norm and the
        # vocabulary projection are not kept, which changes no hidden state that is used.
        encoder.model.layers = encoder.model.layers[: TEXT_LAYERS[-1]]
        encoder.model.norm = nn.Identity()
        self._text_encoder = encoder.model.to(self.device).eval().requires_grad_(False)

    # -- figures and prompts in ---------------------------------------------------------------
    @property
    def pixel_multiple(self) -> int:
        return 2 * 2 ** (len(self.vae.config.block_out_channels) - 1)  # VAE stride x 2x2 patch

    def encode_with(self, vae: Any, pixels: Tensor) -> Tensor:
        return vae.encode(pixels).latent_dist.mode()

    def _tokenize(self, prompts: Sequence[str]) -> Any:
        texts = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for prompt in prompts
        ]
        inputs = self._tokenizer(
            texts, return_tensors="pt", padding="max_length", padding_side="right", truncation=True,
            max_length=self.max_sequence_length,
        )  # fmt: skip
        cut = [sum(sum(rest.attention_mask) for rest in row.overflowing) for row in inputs.encodings]  # tokens left out
        self.note_truncated(sum(n > 0 for n in cut), self.max_sequence_length + max(cut))
        return inputs

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        inputs = self._tokenize(prompts).to(self.device)
        states = self.text_encoder(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True,
            use_cache=False,
        ).hidden_states  # fmt: skip
        embeds = torch.stack([states[k] for k in self.text_layers], dim=2)  # (B, L, 3, hidden)
        # Pad rows are kept: the transformer has no text mask, so it reads them, and they depend on the prompt.
        return list(embeds.flatten(2))

    def collate_text(self, rows: Sequence[Tensor]) -> TextBatch:
        wrong = {tuple(row.shape) for row in rows if row.shape[0] != self.max_sequence_length}
        if wrong:
            raise UserError(
                f"prompt embeddings of shape {sorted(wrong)}: FLUX.2 keeps its pad rows, so each must have "
                f"max_sequence_length = {self.max_sequence_length} rows. Set max_sequence_length to what the data "
                "was encoded with, or encode again."
            )
        return TextBatch(torch.stack(list(rows)))

    def text_shape(self) -> tuple[int, int]:
        config = load_component(Qwen3Config, self.source, "text_encoder")
        return self.max_sequence_length, len(TEXT_LAYERS) * config.hidden_size

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        stride = self.pixel_multiple // 2
        return self.vae.config.latent_channels, height // stride, width // stride

    # -- the forward --------------------------------------------------------------------------
    def use_few_kernels(self, transformer: nn.Module) -> None:
        flux2_blocks.use_few_kernels(transformer)

    def _bn(self) -> tuple[Tensor, Tensor]:
        bn, eps = self.vae.bn, self.vae.config.batch_norm_eps
        mean = bn.running_mean.view(1, -1, 1, 1).float()
        return mean, torch.sqrt(bn.running_var.view(1, -1, 1, 1).float() + eps)

    def normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._bn()
        patches = Flux2KleinPipeline._patchify_latents(latents.to(self.device, torch.float32))
        return (patches - mean) / std

    @torch.no_grad()
    def decode(self, normalized: Tensor) -> Tensor:
        mean, std = self._bn()
        latents = Flux2KleinPipeline._unpatchify_latents(normalized.float() * std + mean)
        return self.vae.decode(latents.to(self.vae.dtype)).sample

    def _guidance(self, batch: int, device: torch.device) -> Tensor | None:
        return None  # no embedding for it

    def velocity(self, noisy: Tensor, sigma: Tensor, text: TextBatch, references: Sequence[Tensor] = ()) -> Tensor:
        batch, _, height, width = noisy.shape
        # int64 ids: in bf16 only 513 of the first 1024 positions stay distinct
        img_ids = Flux2KleinPipeline._prepare_latent_ids(noisy)
        txt_ids = Flux2KleinPipeline._prepare_text_ids(text.embeds).to(noisy.device, non_blocking=True)
        tokens = [Flux2KleinPipeline._pack_latents(part).to(self.weight_dtype) for part in (noisy, *references)]
        if references:  # clean, behind the noisy ones, at T = 10, 20, ... (Flux2KleinPipeline.prepare_image_latents)
            ids = Flux2KleinPipeline._prepare_image_ids([part[:1] for part in references])
            img_ids = torch.cat([img_ids, ids.expand(batch, -1, -1)], dim=1)
        out = self.transformer(
            hidden_states=torch.cat(tokens, dim=1) if references else tokens[0],
            encoder_hidden_states=text.embeds.to(self.weight_dtype),
            timestep=sigma,  # the transformer multiplies by 1000 itself
            img_ids=img_ids.to(noisy.device, non_blocking=True),
            txt_ids=txt_ids,
            guidance=self._guidance(batch, noisy.device),
            return_dict=False,
        )[0]
        return out[:, : height * width].transpose(1, 2).reshape(batch, -1, height, width)

    def of_tokens(self, arguments: dict[str, Any], kept: Tensor, text: int) -> dict[str, Any]:
        places = torch.cat([torch.arange(text, device=kept.device), kept + text])  # of text and picture in one table
        return {**arguments, "image_rotary_emb": tuple(table[places] for table in arguments["image_rotary_emb"])}

    # -- inference ----------------------------------------------------------------------------
    def inference_sigmas(self, tokens: int, steps: int) -> Tensor:
        scheduler = self._scheduler()
        sigmas = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
        scheduler.set_timesteps(sigmas=sigmas, mu=compute_empirical_mu(tokens, steps))
        return scheduler.sigmas

    def pipeline_arguments(self) -> dict[str, Any]:
        return {**super().pipeline_arguments(), "is_distilled": self.is_distilled}

    def sample(
        self, pipe: Any, prompt_rows: Sequence[Tensor], negative_row: Tensor, *, width: int, height: int, steps: int,
        guidance: float, seeds: Sequence[int], images: Sequence[Any] = (),
    ) -> list[Any]:  # fmt: skip
        embeds = torch.stack(list(prompt_rows)).to(self.device, self.weight_dtype)
        negative = negative_row.to(embeds).expand_as(embeds)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return pipe(
            image=list(images) or None, prompt_embeds=embeds, negative_prompt_embeds=negative, width=width, height=height,
            num_inference_steps=steps, guidance_scale=guidance, generator=generators,
        ).images  # fmt: skip

    # -- export and contract ------------------------------------------------------------------
    def original_lora(self, layers: dict[str, Tensor], alpha: float, rank: int) -> dict[str, Tensor]:
        return flux2_names.original_lora(layers, alpha, rank)

    def original_place(self, parameter: str) -> Place | None:
        return flux2_names.original_place(parameter)

    def family_contract(self) -> dict[str, dict[str, Any]]:
        latents = {
            "vae": "AutoencoderKLFlux2",
            "latents": "posterior mode, raw (before patchify and BatchNorm)",
            "channels": self.vae.config.latent_channels,
        }
        text = {
            "text_encoder": "Qwen3ForCausalLM",
            "layers": list(TEXT_LAYERS),
            "template": TEMPLATE,
            "padding": "max_length, pad rows kept",
            "max_sequence_length": self.max_sequence_length,
            "width": self.text_shape()[1],
        }
        return {"latents": latents, "text": text}
