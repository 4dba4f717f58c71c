"""FigureModel: all that training, encoding, validation and export may know about a model.

Shapes: B batch, (H, W) pixels, (C, h, w) the VAE's raw latents, (Cn, hn, wn) the normalised latents
that the transformer denoises (hn * wn tokens), L text tokens, D text width.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from OpenSciDraw import flow
from OpenSciDraw.errors import UserError
from OpenSciDraw.models import vae_precision
from OpenSciDraw.models.components import Components
from OpenSciDraw.models.fingerprints import fingerprint, tokenizer_fingerprint
from OpenSciDraw.models.original_names import Place
from OpenSciDraw.models.source import ModelSource, load_component
from OpenSciDraw.quiet import warn_once
from OpenSciDraw.registry import MODELS
from OpenSciDraw.store.codec import CODECS
from OpenSciDraw.store.contract import SEEN, Contract

if TYPE_CHECKING:
    from OpenSciDraw.config import Config

# what the file of a family needs comes from here
__all__ = ["DTYPES", "FigureModel", "ModelSource", "TextBatch", "build_model", "load_component"]
_LOG = logging.getLogger("OpenSciDraw")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


@dataclass(frozen=True)
class TextBatch:
    """Prompt embeddings of a batch.

    `embeds` is (B, L, D); `mask` is (B, L) bool, True on real tokens, or None when every row is full. `slots` are L bools, one True
    for each picture that is edited, where a transformer of one sequence puts its tokens, at the same places in every row; None
    where the transformer has no such places.
    """

    embeds: Tensor
    mask: Tensor | None = None
    slots: tuple[bool, ...] | None = None

    @classmethod
    def padded(cls, rows: Sequence[Tensor]) -> TextBatch:
        """Rows (L_i, D) of their own lengths, padded with zeros; without a mask, which costs time, where all are equally long."""
        lengths = torch.tensor([len(row) for row in rows])
        embeds = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        if bool((lengths == lengths[0]).all()):
            return cls(embeds)
        return cls(embeds, (torch.arange(embeds.shape[1]) < lengths[:, None]).to(embeds.device, non_blocking=True))

    def to(self, device: torch.device, dtype: torch.dtype) -> TextBatch:
        mask = None if self.mask is None else self.mask.to(device)
        return TextBatch(self.embeds.to(device, dtype), mask, self.slots)


class FigureModel(Components):
    """One model family: what its file must say (the abstract methods), and what it may say otherwise.

    Loading, memory and files are inherited from `Components`.
    """

    block_layers: ClassVar[str] = ""  # lora_layers of all linear layers of its blocks
    pipeline_text_limit: ClassVar[int] = 1 << 30  # tokens of text at which the released pipeline stops
    edits: ClassVar[bool] = False  # whether the released pipeline takes pictures to edit, and `velocity` references
    only_edits: ClassVar[bool] = False  # whether that pipeline draws nothing without a picture to edit
    text_sees_pictures: ClassVar[bool] = False  # whether its text encoder reads these pictures too: text then belongs to an edit
    embeds_guidance: ClassVar[bool] = False  # whether guidance is an input of the transformer, in place of a second pass
    embedded_guidance = 1.0  # that input while training; `build_model` sets it
    routes_tokens: ClassVar[bool] = False  # whether its blocks can run on part of a picture's tokens (`of_tokens`)
    # layers of one module that are called with the same tensor: their adapters are computed together (weights/adapters.py)
    shared_inputs: ClassVar[tuple[tuple[str, ...], ...]] = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))

    # -- components ----------------------------------------------------------------------------------
    @abstractmethod
    def load_vae(self, dtype: torch.dtype = torch.float32) -> None:
        """Load the VAE (frozen, eval), in fp32 unless told otherwise, on `self.device`."""

    @abstractmethod
    def load_text_encoder(self) -> None:
        """Load tokenizer and text encoder (frozen, eval) in `weight_dtype` on `self.device`."""

    # -- figures and prompts in ----------------------------------------------------------------------
    @property
    @abstractmethod
    def pixel_multiple(self) -> int:
        """Width and height of a picture must be multiples of this (pixels per token side)."""

    @abstractmethod
    def encode_with(self, vae: Any, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], on `vae`'s device and in its dtype -> raw latents (B, C, h, w): posterior mode."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> raw latents (B, C, h, w), fp32, computed in `vae_precision`: not normalised."""
        if self.vae_precision == vae_precision.AUTO:  # encoding while training: chosen by pictures that a resumed run has too
            self.vae_precision = vae_precision.choose(self, vae_precision.drawn_pictures(*pixels.shape[-2:]))
        return vae_precision.encode_in(self.vae_precision, self, pixels)

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        """Prompts -> one (L, D) tensor each, as stored and as given to `collate_text`."""

    def encode_instructions(self, prompts: Sequence[str], pictures: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """As `encode_prompts`, of prompts that edit `pictures`: of each prompt its own, (3, H, W) in [-1, 1]; none for a figure.

        A family whose `text_sees_pictures` overrides it. For all others the pictures change nothing.
        """
        return self.encode_prompts(prompts)

    def prompt_lengths(self, prompts: Sequence[str]) -> list[int] | None:
        """Tokens of each prompt where a batch is padded to its longest; None where all are padded alike."""
        return None

    @abstractmethod
    def collate_text(self, rows: Sequence[Tensor]) -> TextBatch:
        """Stored (L, D) rows -> the batch that `velocity` takes."""

    @abstractmethod
    def text_shape(self) -> tuple[int, int]:
        """(L, D) of the longest text row of a figure, read from configs alone: for estimates of size."""

    def blank_text(self, batch: int, length: int, references: Sequence[tuple[int, int]] = ()) -> TextBatch:
        """Text of `length` tokens without content, for estimates of cost; `references`: (rows, columns) of tokens of each."""
        return TextBatch(torch.zeros(batch, length, self.text_shape()[1], dtype=self.weight_dtype))

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the raw latents of an (H, W) picture; the VAE must be loaded."""

    # -- the forward ---------------------------------------------------------------------------------
    def use_few_kernels(self, transformer: nn.Module) -> None:
        """Replace parts of `transformer` by ones that compute the same bits with less work; before it trains."""
        return None

    @abstractmethod
    def normalize(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> what the transformer denoises (B, Cn, hn, wn), fp32."""

    def normalize_references(self, references: Sequence[Tensor], are_pixels: bool) -> list[Tensor]:
        """Pictures that edits start from, as raw latents or as pixels in [-1, 1], each (B, …) -> what `velocity` takes of them."""
        raw = [self.encode_images(part) for part in references] if are_pixels else references
        return [self.normalize(part.to(self.device, non_blocking=True)) for part in raw]

    @abstractmethod
    def decode(self, normalized: Tensor) -> Tensor:
        """Normalised latents (B, Cn, hn, wn) -> pixels (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def velocity(self, noisy: Tensor, sigma: Tensor, text: TextBatch, references: Sequence[Tensor] = ()) -> Tensor:
        """Predicted noise - clean at noise level sigma (B,) in [0, 1]; (B, Cn, hn, wn) as `noisy`.

        Whatever the transformer's own time and sign are. One that `embeds_guidance` gets `self.embedded_guidance`.
        `references`: normalised latents, each (B, Cn, h_i, w_i), of the pictures that are edited; of a family that `edits` alone.
        """

    def of_tokens(self, arguments: dict[str, Any], kept: Tensor, text: int) -> dict[str, Any]:
        """A block's arguments by name, less its hidden states, for the image tokens `kept` (K,) alone, of a text of `text` tokens.

        A family whose `routes_tokens` overrides it: what belongs to a token's place, above all its rotary embedding.
        """
        raise NotImplementedError(f"{self.family} does not say what of a block's arguments belongs to a token")

    # -- inference -----------------------------------------------------------------------------------
    def pipeline_level(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """What the released pipeline gives the transformer for `sigma` with latents of `dtype`; most round 1000 sigma to it."""
        return flow.pipeline_level(sigma, dtype)

    @contextmanager
    def at_guidance(self, guidance: float) -> Iterator[None]:
        """Inside, `velocity` of a family that `embeds_guidance` has this guidance."""
        before, self.embedded_guidance = self.embedded_guidance, guidance
        try:
            yield
        finally:
            self.embedded_guidance = before

    def guide(self, wanted: Tensor, unwanted: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance of two velocities (B, Cn, hn, wn), with and without the prompt, as the pipeline does it."""
        return unwanted + guidance * (wanted - unwanted)

    @abstractmethod
    def inference_sigmas(self, tokens: int, steps: int) -> Tensor:
        """The pipeline's noise levels (steps + 1,), descending to 0, for a picture of `tokens` tokens."""

    def pipeline_arguments(self) -> dict[str, Any]:
        """What the pipeline's class takes beside scheduler, VAE, transformer and a text encoder, which is None."""
        return {"tokenizer": None}

    def pipeline(self, transformer: nn.Module) -> Any:
        """The diffusers pipeline around `transformer`; prompts go in as embeddings."""
        parts = {"scheduler": self._scheduler(), "vae": self.pipeline_vae(), "text_encoder": None, "transformer": transformer}
        pipe = self.pipeline_class(**parts, **self.pipeline_arguments())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @abstractmethod
    def sample(
        self, pipe: Any, prompt_rows: Sequence[Tensor], negative_row: Tensor, *, width: int, height: int, steps: int,
        guidance: float, seeds: Sequence[int], images: Sequence[Any] = (),
    ) -> list[Any]:
        """Pictures (PIL) from the family's own pipeline, one for each (L, D) prompt row and seed.

        `guidance` is that of classifier-free guidance, 1 being none, whatever the pipeline calls it; of a family that
        `embeds_guidance` it is the transformer's input, and `negative_row` has no effect.
        `images`: pictures (PIL) that all of them edit; of a family that `edits` alone.
        """

    def save_lora(self, folder: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write LoRA tensors and PEFT's config of them as the released pipeline's `save_lora_weights` does.

        A family whose pipeline has no such method overrides it.
        """
        self.pipeline_class.save_lora_weights(
            folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
        )

    def load_lora(self, pipe: Any, file: Path) -> None:
        """Add what `save_lora` wrote to the pipeline that draws."""
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)

    def original_lora(self, layers: dict[str, Tensor], alpha: float, rank: int) -> dict[str, Tensor]:
        """LoRA tensors in diffusers names -> the names that ComfyUI loads, with alpha.

        Here `diffusion_model.<module>.{lora_down,lora_up}.weight` and `.alpha`, of models whose modules ComfyUI knows by diffusers'
        names (comfy/lora.py, model_lora_keys_unet) and that fuse nothing, or that it fuses itself; diffusers'
        `load_lora_weights` reads them as well. A family with other names overrides it.
        """
        out: dict[str, Tensor] = {}
        for module in sorted({name.rsplit(".lora_", 1)[0] for name in layers}):
            key = f"diffusion_model.{module}"
            out[f"{key}.lora_down.weight"] = layers[f"{module}.lora_A.weight"].contiguous()
            out[f"{key}.lora_up.weight"] = layers[f"{module}.lora_B.weight"].contiguous()
            out[f"{key}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        return out

    def original_place(self, parameter: str) -> Place | None:
        """Where a parameter of diffusers' transformer lies in the original file of all weights, which ComfyUI loads.

        None: the original has none, or the family does not say. Such weights are exported to diffusers alone.
        """
        return None

    # -- contract ------------------------------------------------------------------------------------
    @abstractmethod
    def family_contract(self) -> dict[str, dict[str, Any]]:
        """The facts of the family that decide what an encoded row means: {"latents": {…}, "text": {…}}."""

    def contract(self) -> Contract:
        """How rows encoded by this model are made; stored in every shard and compared before training."""
        parts = self.family_contract()
        for part, component in (("latents", "vae"), ("text", "text_encoder")):
            folder = self._component_folder(component)
            parts[part]["fingerprint"] = None if folder is None else fingerprint(folder)
        tokenizer = self._component_folder(self.tokenizer_part)
        parts["text"]["tokenizer"] = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
        if self.text_sees_pictures:
            parts["text"]["pictures"] = SEEN
        source = self.requested_source
        origin = {"source": source.name, "revision": source.revision, "text_computed_in": str(self.weight_dtype)}
        parts["latents"]["stored_dtype"], parts["text"]["stored_dtype"] = "bfloat16", self.text_storage
        parts["latents"]["vae_precision"] = self.vae_precision
        return Contract(family=self.family, origin=origin, latents=parts["latents"], text=parts["text"])


def build_model(config: Config, device: torch.device | None = None, draws_only: bool = False) -> FigureModel:
    """The FigureModel that `config.model_type` names; nothing is loaded yet. `draws_only`: it may be a distilled one."""
    import os

    source = ModelSource(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        token=config.huggingface_token or os.environ.get("HF_TOKEN"),
    )
    model_class = MODELS.get(config.model_type)
    if config.max_sequence_length > model_class.pipeline_text_limit:
        warn_once(
            f"max_sequence_length = {config.max_sequence_length}: the released pipeline of {config.model_type} stops at "
            f"{model_class.pipeline_text_limit} tokens, so other programs cannot draw from longer prompts"
        )
    if config.embedded_guidance is not None and not model_class.embeds_guidance:
        raise UserError(
            f"embedded_guidance = {config.embedded_guidance}: the transformer of {config.model_type} has no input for guidance. "
            "Leave it out; guidance_scale is the guidance of sampled pictures."
        )
    model: FigureModel = model_class(source, config.max_sequence_length, DTYPES[config.mixed_precision])
    model.text_storage = CODECS[config.encode.text_storage]
    model.vae_precision = config.encode.vae_precision
    if config.embedded_guidance is not None:
        model.embedded_guidance = config.embedded_guidance
    model.draws_only = draws_only
    if device is not None:
        model.device = device
    return model
