"""Qwen-Image-Edit-2511: what is true of this family and not of Qwen-Image, whose VAE, guidance and noise levels it has.

Reference: diffusers `QwenImageEditPlusPipeline`; tests/models/test_qwen_image_edit.py holds each function here against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as released
from PIL import Image
from torch import Tensor
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel, TextBatch, load_component
from OpenSciDraw.models.original_names import Place
from OpenSciDraw.models.picture_processor import WithoutFilms
from OpenSciDraw.models.qwen_image import QwenImage
from OpenSciDraw.quiet import warn_once
from OpenSciDraw.registry import MODELS

# The pipeline's prompt template, the number of its leading tokens that it drops, and what stands for a picture before the prompt.
TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED = 64
PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"


class PictureProcessor(WithoutFilms, Qwen2VLProcessor):
    """The pipeline's own, without films."""


@MODELS.register("QwenImageEdit")
class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit-2511: `Qwen/Qwen-Image-Edit-2511`, which edits pictures and draws none without."""

    family = "QwenImageEdit"
    pipeline_class = QwenImageEditPlusPipeline
    base_models = "Qwen/Qwen-Image-Edit-2511"
    pipeline_text_limit = FigureModel.pipeline_text_limit  # the pipeline cuts nothing
    edits = only_edits = True
    text_sees_pictures = True

    # -- components ---------------------------------------------------------------------------
    def check_transformer(self, config: dict[str, Any]) -> None:
        others = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope")
        wrong = [f"{name} = True" for name in others if config.get(name, False)]
        if not config.get("zero_cond_t", False):  # Qwen-Image, Edit and Edit-2509 have one configuration, without it
            wrong.append("zero_cond_t is not True, as it is of 2511")
        if wrong:
            raise UserError(f"{self.source.name} is not Qwen-Image-Edit-2511 ({'; '.join(wrong)}). Train on {self.base_models}.")

    def load_text_encoder(self) -> None:
        self._load_processor()
        encoder = load_component(
            Qwen2_5_VLForConditionalGeneration, self.source, "text_encoder", dtype=self.weight_dtype
        )
        self._text_encoder = encoder.model.to(self.device).eval().requires_grad_(False)  # with the vision tower

    def _load_processor(self) -> PictureProcessor:
        self._tokenizer = load_component(Qwen2TokenizerFast, self.source, "tokenizer")
        pictures = load_component(Qwen2VLImageProcessorPil, self.source, "processor")
        self._processor = PictureProcessor(pictures, self._tokenizer, self._tokenizer.chat_template)
        return self._processor

    # -- prompts and their pictures in --------------------------------------------------------
    def prompt_lengths(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer([TEMPLATE.format(prompt) for prompt in prompts]).input_ids]

    @torch.no_grad()
    def _rows(self, texts: Sequence[str], images: list[Image.Image] | None = None) -> list[Tensor]:
        """Hidden states (L, D) of each text without the dropped tokens, cut at the limit of tokens that are of no picture."""
        inputs = self._processor(text=list(texts), images=images, padding=True, return_tensors="pt").to(self.device)
        # With the token types, which the pipeline leaves out (diffusers issue 14194): from transformers 5 on, pictures have
        # positions in rows and columns, as Qwen2.5-VL was trained, with them alone.
        states = self.text_encoder(**inputs, use_cache=False).last_hidden_state
        rows, lengths = [], []
        for row, ids, valid in zip(states, inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
            row, of_pictures = row[valid][DROPPED:], ids[valid][DROPPED:] == self._processor.image_token_id
            lengths.append(len(row) - int(of_pictures.sum()))
            rows.append(row[: len(row) - max(0, lengths[-1] - self.max_sequence_length)])
        self.note_truncated(sum(length > self.max_sequence_length for length in lengths), max(lengths))
        return rows

    def encode_prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        return self._rows([TEMPLATE.format(prompt) for prompt in prompts])

    def encode_instructions(self, prompts: Sequence[str], pictures: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Each alone, as the pipeline takes one prompt a call. A picture is about 190 rows of the text, whatever its size."""
        return [self._instruction(prompt, seen) if seen else self.encode_prompts([prompt])[0]
                for prompt, seen in zip(prompts, pictures, strict=True)]  # fmt: skip

    def _instruction(self, prompt: str, pictures: Sequence[Tensor]) -> Tensor:
        levels = [((picture + 1) * 127.5).round().clamp(0, 255).byte() for picture in pictures]
        images = [_condition(Image.fromarray(level.permute(1, 2, 0).cpu().numpy())) for level in levels]
        marks = "".join(PICTURE.format(number) for number in range(1, len(images) + 1))
        return self._rows([TEMPLATE.format(marks + prompt)], images)[0]

    # -- the forward --------------------------------------------------------------------------
    def velocity(self, noisy: Tensor, sigma: Tensor, text: TextBatch, references: Sequence[Tensor] = ()) -> Tensor:
        """As of every family. Raises UserError without references: the released pipeline cannot draw so."""
        if not references:
            raise UserError(
                "Qwen-Image-Edit-2511 edits: its pipeline draws nothing without a picture, so figures without references cannot be "
                "trained or drawn. Give each figure a reference (docs/edit.md), set validation_images where validation_prompts are "
                "set, or train Qwen-Image-2512 (model_type = 'QwenImage')."
            )
        batch, _, height, width = noisy.shape
        parts = (noisy, *references)  # the picture that is drawn comes first
        out = self.transformer(
            hidden_states=torch.cat([part.flatten(2).transpose(1, 2).to(self.weight_dtype) for part in parts], dim=1),
            encoder_hidden_states=text.embeds.to(self.weight_dtype),
            encoder_hidden_states_mask=text.mask,
            timestep=sigma,  # the transformer multiplies by 1000 itself, and gives references the time 0
            img_shapes=[[(1, *part.shape[-2:]) for part in parts]] * batch,
            return_dict=False,
        )[0]
        return out[:, : height * width].transpose(1, 2).unflatten(2, (height, width))

    # -- inference ----------------------------------------------------------------------------
    def pipeline_arguments(self) -> dict[str, Any]:
        return {"tokenizer": None, "processor": None}

    def sample(
        self, pipe: Any, prompt_rows: Sequence[Tensor], negative_row: Tensor, *, width: int, height: int, steps: int,
        guidance: float, seeds: Sequence[int], images: Sequence[Any] = (),
    ) -> list[Any]:  # fmt: skip
        if not images:
            raise UserError(
                "Qwen-Image-Edit-2511 draws nothing without a picture to edit. Set validation_images, or give `scienceflow sample "
                "--image FILE`."
            )
        pictures = []
        with _shown_as_they_are(images):
            for row, seed in zip(prompt_rows, seeds, strict=True):  # the pipeline takes one prompt a call
                arguments: dict[str, Tensor] = {}
                for name, given in {"": row, "negative_": negative_row}.items():
                    if guidance > 1 or not name:
                        embeds = given[None].to(self.device, self.weight_dtype)
                        arguments[f"{name}prompt_embeds"] = embeds
                        arguments[f"{name}prompt_embeds_mask"] = torch.ones_like(embeds[..., 0], dtype=torch.bool)
                pictures += pipe(
                    image=list(images), **arguments, width=width, height=height, num_inference_steps=steps,
                    true_cfg_scale=guidance, generator=torch.Generator("cpu").manual_seed(seed),
                ).images  # fmt: skip
        return pictures

    # -- export and contract ------------------------------------------------------------------
    def original_place(self, parameter: str) -> Place | None:
        """None: ComfyUI tells 2511 by a mark in the file of all weights, which diffusers' transformer has not."""
        return None

    def family_contract(self) -> dict[str, dict[str, Any]]:
        parts = super().family_contract()
        parts["text"] |= {
            "template": TEMPLATE, "picture": PICTURE, "dropped_tokens": DROPPED, "seen_area": released.CONDITION_IMAGE_SIZE,
            "picture_positions": "rows and columns",
        }  # fmt: skip
        return parts


def _condition(image: Image.Image) -> Image.Image:
    """A picture as the text encoder sees it: of about 384 x 384 px, in multiples of 32, resized as the pipeline does it."""
    width, height = released.calculate_dimensions(released.CONDITION_IMAGE_SIZE, image.width / image.height)
    return VaeImageProcessor().resize(image, height, width)


def _kept_by(area: int, images: Sequence[Image.Image]) -> bool:
    """Whether the pipeline leaves all images as large as they are when it gives each this area (pixels)."""
    return all(released.calculate_dimensions(area, image.width / image.height) == image.size for image in images)


@contextmanager
def _shown_as_they_are(images: Sequence[Image.Image]) -> Iterator[None]:
    """Inside, the pipeline gives `images` to the VAE as large as they are, as in training; else it resizes them to 1024 x 1024.

    Raises UserError where no one area keeps the size of all.
    """
    usual = released.VAE_IMAGE_SIZE
    area = next((a for a in (usual, *(i.width * i.height for i in images)) if _kept_by(a, images)), None)
    sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
    if area is None:
        raise UserError(
            f"Pictures of {sizes} px: the pipeline of Qwen-Image-Edit-2511 gives all pictures that are edited one area and "
            "sides in multiples of 32, so it would resize some. Give pictures of one shape, with encode.resolution 512 or 1024."
        )
    if area != usual:
        warn_once(
            f"pictures of {sizes} px are edited as large as they are, as in training; the released pipeline and other programs "
            "enlarge them to about 1024 x 1024 px. encode.resolution = 1024 trains what those draw from"
        )
    released.VAE_IMAGE_SIZE = area
    try:
        yield
    finally:
        released.VAE_IMAGE_SIZE = usual
