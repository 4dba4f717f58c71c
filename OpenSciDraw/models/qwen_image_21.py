"""Qwen-Image-2.1: text, pictures to edit and the drawn picture in one sequence. What Qwen-Image has too is inherited.

Reference: diffusers `QwenImage21Pipeline`; tests/models/test_qwen_image_21.py holds each function here against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_dimensions
from PIL import Image
from torch import Tensor, nn
from transformers import (
    Qwen2TokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel, TextBatch, load_component
from OpenSciDraw.models.picture_processor import WithoutFilms
from OpenSciDraw.models.qwen_image import QwenImage
from OpenSciDraw.models.qwen_image_21_sequence import QwenImage21Transformer2DModel
from OpenSciDraw.registry import MODELS

# The pipeline's template (QwenImage21Pipeline.__init__): it drops the tokens of the head from the hidden states.
HEAD = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
TEMPLATE = HEAD + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PICTURE = "<image{}><|vision_start|><|image_pad|><|vision_end|>"  # one for each, with spaces between, before the prompt


class PictureProcessor(WithoutFilms, Qwen3VLProcessor):
    """The pipeline's own, without films."""


@MODELS.register("QwenImage21")
class QwenImage21(QwenImage):
    """Qwen-Image-2.1: `Qwen/Qwen-Image-2.1`, which draws and edits."""

    family = "QwenImage21"
    transformer_class = "QwenImage21Transformer2DModel"
    pipeline_class = QwenImage21Pipeline
    tokenizer_part = "processor"
    base_models = "Qwen/Qwen-Image-2.1"
    block_layers = "to_k,to_q,to_v,to_out.0,img_mlp.proj,img_mlp.gate_layer,img_mlp.out"
    shared_inputs = (("to_q", "to_k", "to_v"), ("proj", "gate_layer"))
    pipeline_text_limit = FigureModel.pipeline_text_limit  # the pipeline cuts nothing
    edits = True
    text_sees_pictures = True

    # -- components ---------------------------------------------------------------------------
    @property
    def transformer_type(self) -> Any:
        return QwenImage21Transformer2DModel

    def load_vae(self, dtype: torch.dtype = torch.float32) -> None:
        vae = load_component(AutoencoderKLQwenImage21, self.source, "vae", torch_dtype=dtype)
        self._vae = vae.to(self.device).eval().requires_grad_(False)

    def check_transformer(self, config: dict[str, Any]) -> None:
        return None  # the distilled one, Qwen-Image-2.1-Turbo, has the same; `check_pipeline` knows it by its sample_sigmas

    def load_text_encoder(self) -> None:
        self._load_processor()
        encoder = load_component(Qwen3VLForConditionalGeneration, self.source, "text_encoder", dtype=self.weight_dtype)
        # The pipeline reads the last layer before the final norm; the vocabulary projection changes no hidden state.
        encoder.model.language_model.norm = nn.Identity()
        self._text_encoder = encoder.model.to(self.device).eval().requires_grad_(False)

    def _load_processor(self) -> PictureProcessor:
        self._tokenizer = load_component(Qwen2TokenizerFast, self.source, "processor")
        pictures = load_component(Qwen2VLImageProcessorPil, self.source, "processor")
        self._processor = PictureProcessor(pictures, self._tokenizer, self._tokenizer.chat_template)
        self._dropped = len(self._tokenizer(HEAD).input_ids)
        return self._processor

    # -- figures and prompts in ---------------------------------------------------------------
    def encode_with(self, vae: Any, pixels: Tensor) -> Tensor:
        opaque = torch.ones_like(pixels[:, :1])  # the VAE's fourth channel is alpha
        return super().encode_with(vae, torch.cat([pixels, opaque], dim=1))

    def prompt_lengths(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer([TEMPLATE.format(prompt or " ") for prompt in prompts]).input_ids]

    @torch.no_grad()
    def _rows(self, texts: Sequence[str], images: list[Image.Image] | None = None) -> list[Tensor]:
        """Hidden states (L, D) of each text without its head, cut at the limit of text tokens; of each picture one row of zeros.

        Raises UserError where a picture has not as many tokens in the text as the pipeline takes for it.
        """
        inputs = self._processor(text=list(texts), images=images, padding=True, padding_side="left", return_tensors="pt")
        inputs = inputs.to(self.device)
        states = self.text_encoder(**inputs, use_cache=False).last_hidden_state
        rows, lengths = [], []
        for row, ids, valid in zip(states, inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
            row, of_pictures = row[valid][self._dropped :], ids[valid][self._dropped :] == self._processor.image_token_id
            self._check_places(int(of_pictures.sum()), images or [])
            first = of_pictures & ~torch.cat([of_pictures.new_zeros(1), of_pictures[:-1]])
            row = row.masked_fill(of_pictures[:, None], 0.0)[~of_pictures | first]
            lengths.append(len(row) - len(images or []))
            rows.append(row[: len(row) - max(0, lengths[-1] - self.max_sequence_length)])
        self.note_truncated(sum(length > self.max_sequence_length for length in lengths), max(lengths))
        return rows

    def encode_prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        return self._rows([TEMPLATE.format(prompt or " ") for prompt in prompts])  # an empty text has no token

    def encode_instructions(self, prompts: Sequence[str], pictures: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Each alone. A row of zeros stands for a picture: the transformer puts the tokens of the reference into its place."""
        return [self._instruction(prompt, seen) if seen else self.encode_prompts([prompt])[0]
                for prompt, seen in zip(prompts, pictures, strict=True)]  # fmt: skip

    def _instruction(self, prompt: str, pictures: Sequence[Tensor]) -> Tensor:
        marks = " ".join(PICTURE.format(number) for number in range(1, len(pictures) + 1))
        levels = [((picture + 1) * 127.5).round().clamp(0, 255).byte() for picture in pictures]
        images = [Image.fromarray(level.permute(1, 2, 0).cpu().numpy()) for level in levels]
        return self._rows([TEMPLATE.format(marks + (prompt or " "))], images)[0]

    def _check_places(self, places: int, images: Sequence[Image.Image]) -> None:
        if places != sum(map(_places_of, images)):
            raise UserError(
                f"The processor of {self.source.name} resizes pictures of {_sizes(images)} px, so the text has other places for "
                "them than they have tokens. Choose an encode.resolution within the processor's limits of size."
            )

    @staticmethod
    def _slots(row: Tensor) -> Tensor:
        """(L,) bool: which rows stand for a picture."""
        return (row == 0).all(-1)

    def collate_text(self, rows: Sequence[Tensor]) -> TextBatch:
        text = super().collate_text(rows)
        first = self._slots(rows[0]).tolist()  # one wait for the device; all samples share one layout, and places come before words
        return TextBatch(text.embeds, text.mask, tuple(first + [False] * (text.embeds.shape[1] - len(first))))

    def blank_text(self, batch: int, length: int, references: Sequence[tuple[int, int]] = ()) -> TextBatch:
        text = super().blank_text(batch, max(length, len(references) + 1))
        return TextBatch(text.embeds, slots=tuple(at < len(references) for at in range(text.embeds.shape[1])))

    def text_shape(self) -> tuple[int, int]:
        return self.max_sequence_length, load_component(Qwen3VLConfig, self.source, "text_encoder").text_config.hidden_size

    # -- the forward --------------------------------------------------------------------------
    def normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        return (latents.to(self.device, torch.float32) - mean) / std  # a latent is a token: no patches

    @torch.no_grad()
    def decode(self, normalized: Tensor) -> Tensor:
        mean, std = self._statistics()
        latents = normalized.float() * std + mean
        colours, alpha = self.vae.decode(latents.to(self.vae.dtype).unsqueeze(2)).sample.squeeze(2).split([3, 1], dim=1)
        return 1 + (colours - 1) * (alpha + 1) / 2  # over white

    def velocity(self, noisy: Tensor, sigma: Tensor, text: TextBatch, references: Sequence[Tensor] = ()) -> Tensor:
        batch, _, height, width = noisy.shape
        tokens = [part.flatten(2).transpose(1, 2).to(self.weight_dtype) for part in (*references, noisy)]
        out = self.transformer(
            hidden_states=torch.cat(tokens, dim=1) if references else tokens[0],
            timestep=sigma,  # the transformer multiplies by 1000 itself, and gives text and references the time 0
            encoder_hidden_states=text.embeds.to(self.weight_dtype),
            encoder_hidden_states_mask=text.mask,
            img_shapes=[[(1, *part.shape[-2:]) for part in (*references, noisy)]] * batch,
            img_mask=text.slots or (False,) * text.embeds.shape[1],
            return_dict=False,
        )[0]
        return out[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))

    # -- inference ----------------------------------------------------------------------------
    def guide(self, wanted: Tensor, unwanted: Tensor, guidance: float) -> Tensor:
        return FigureModel.guide(self, wanted, unwanted, guidance)  # without Qwen-Image's norm

    def pipeline_arguments(self) -> dict[str, Any]:
        return {"processor": self._load_processor()}

    def sample(
        self, pipe: Any, prompt_rows: Sequence[Tensor], negative_row: Tensor, *, width: int, height: int, steps: int,
        guidance: float, seeds: Sequence[int], images: Sequence[Any] = (),
    ) -> list[Any]:  # fmt: skip
        wanted = self.collate_text(prompt_rows).to(self.device, self.weight_dtype)
        unwanted = self.collate_text([negative_row] * len(prompt_rows)).to(self.device, self.weight_dtype)
        texts = {id(text.embeds): text for text in (wanted, unwanted)}

        def encode_prompt(*, prompt_embeds: Tensor, **_: Any) -> tuple[Tensor | None, ...]:
            text, sizes = texts[id(prompt_embeds)], iter(images)  # the pipeline's own takes no embeddings made with pictures
            assert text.slots is not None
            counts = [_places_of(next(sizes)) if slot else 1 for slot in text.slots]
            repeats = torch.tensor(counts, device=self.device)
            slots = torch.tensor([text.slots] * len(text.embeds), device=self.device)
            parts = [None if part is None else part.repeat_interleave(repeats, 1) for part in (text.embeds, text.mask, slots)]
            return tuple(parts)

        pipe.encode_prompt = encode_prompt
        pictures = pipe(
            image=list(images) or None, prompt_embeds=wanted.embeds, true_cfg_scale=guidance,
            negative_prompt_embeds=unwanted.embeds if guidance > 1 else None, width=width, height=height,
            num_inference_steps=steps, generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_resolution=_resolution_of(images),
        ).images  # fmt: skip
        return [Image.alpha_composite(Image.new("RGBA", p.size, "white"), p.convert("RGBA")).convert("RGB") for p in pictures]

    def family_contract(self) -> dict[str, dict[str, Any]]:
        parts = super().family_contract()
        parts["latents"]["vae"] = "AutoencoderKLQwenImage21, opaque"
        parts["text"] |= {
            "text_encoder": "Qwen3VLForConditionalGeneration", "layers": "last layer before the final norm", "template": TEMPLATE,
            "picture": PICTURE, "dropped_tokens": HEAD,
        }  # fmt: skip
        return parts


def _resolution_of(images: Sequence[Image.Image]) -> float:
    """The pipeline's output_resolution with which it leaves `images` as large as they are. Raises UserError where there is none."""
    if not images:
        return 1024  # of no effect: width and height are given
    for sized in images:
        resolution = math.sqrt(sized.width * sized.height)
        if all(calculate_dimensions(resolution * resolution, i.width / i.height)[:2] == i.size for i in images):
            return resolution
    raise UserError(
        f"Pictures of {_sizes(images)} px together: the pipeline of Qwen-Image-2.1 gives all pictures that are edited one area, "
        "so it would resize some. Give pictures of one shape."
    )


def _places_of(image: Image.Image) -> int:
    """Tokens of a picture in the text: of 32 x 32 px each."""
    return image.width // 32 * (image.height // 32)


def _sizes(images: Sequence[Image.Image]) -> str:
    return ", ".join(f"{image.width} x {image.height}" for image in images)
