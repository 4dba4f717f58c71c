"""FigureModel: all that training, encoding, validation and export may know about a model.

Shapes: B batch, (H, W) pixels, (C, h, w) the VAE's raw latents, (Cn, hn, wn) the normalised latents
that the transformer denoises (hn * wn tokens), L text tokens, D text width.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from OpenSciDraw.errors import UserError
from OpenSciDraw.models import direct_loading, vae_precision
from OpenSciDraw.quiet import warn_once
from OpenSciDraw.registry import MODELS
from OpenSciDraw.store.codec import CODECS
from OpenSciDraw.store.table import Contract
from OpenSciDraw.utils.files import parse_json
from OpenSciDraw.utils.tensor_files import FULL_STEM, TensorReader

if TYPE_CHECKING:
    from OpenSciDraw.config import Config

_LOG = logging.getLogger("OpenSciDraw")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


@dataclass(frozen=True)
class TextBatch:
    """Prompt embeddings of a batch.

    `embeds` is (B, L, D); `mask` is (B, L) bool, True on real tokens, or None when every row is full.
    """

    embeds: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> TextBatch:
        mask = None if self.mask is None else self.mask.to(device)
        return TextBatch(self.embeds.to(device, dtype), mask)


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files come from: a hub id, a local folder, or `embedded:NAME`."""

    name: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    token: str | None = field(default=None, repr=False)  # never printed

    def resolve(self) -> ModelSource:
        """Replace an `embedded:` name by the folder that holds it; check that a local path exists."""
        if self.name.startswith("embedded:"):
            from OpenSciDraw.models.embedded import embedded_folder

            return replace(self, name=str(embedded_folder(self.name.removeprefix("embedded:"))), revision=None)
        looks_local = self.name.startswith((".", "/", "~")) or self.name.count("/") != 1
        folder = Path(self.name).expanduser()
        if folder.exists():
            if not (folder / "model_index.json").exists():
                raise UserError(
                    f"pretrained_model_name_or_path = {self.name!r} is a folder without model_index.json. "
                    "Expected a diffusers model folder (transformer/, vae/, text_encoder/, tokenizer/, scheduler/)."
                )
            return replace(self, name=str(folder))
        if looks_local:
            raise UserError(
                f"pretrained_model_name_or_path = {self.name!r}: no such folder, and not a hub id (owner/name) "
                "or an embedded:NAME."
            )
        return self

    @property
    def is_local(self) -> bool:
        return Path(self.name).is_dir()


def load_component(cls: Any, source: ModelSource, subfolder: str, **kwargs: Any) -> Any:
    """`cls.from_pretrained` with errors that say what to do.

    Raises:
        UserError: gated repository, missing or wrong token, no network, missing files.
    """
    if not source.is_local:
        kwargs |= {"revision": source.revision, "cache_dir": source.cache_dir, "token": source.token}
    if source.variant is not None:
        kwargs["variant"] = source.variant
    try:
        return cls.from_pretrained(source.name, subfolder=subfolder, **kwargs)
    except OSError as error:  # the hub's HTTP errors are OSErrors too
        raise _loading_error(error, source, subfolder) from error


def _loading_error(error: OSError, source: ModelSource, part: str) -> UserError:
    """What to do about a component that cannot be loaded."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    where = f"{part}/ of {source.name}" + (f" at revision {source.revision}" if source.revision else "")
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = " ".join(str(e) for e in chain).lower()
    if any(isinstance(e, GatedRepoError) for e in chain) or "gated repo" in text or "401" in text or "403" in text:
        return UserError(
            f"Cannot load {where}: the repository is gated or the access token is missing or not allowed.\n"
            f"  1. Open https://huggingface.co/{source.name} and accept its licence.\n"
            "  2. Run `hf auth login` (older: `huggingface-cli login`), or set HF_TOKEN in the environment."
        )
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return UserError(f"Cannot load {where}: no such repository (or it is private: log in, see HF_TOKEN).")
    hint = (
        "The files are not in the local cache and the hub cannot be reached."
        if any(isinstance(e, LocalEntryNotFoundError) for e in chain) or "connect" in text
        else "Check the name, the revision and the folder's files."
    )
    return UserError(f"Cannot load {where}: {hint}\n  {type(error).__name__}: {str(error).splitlines()[0]}")


def fingerprint(folder: Path) -> str | None:
    """Short hash that changes with a component's weights, read without loading them.

    Covers the config, every tensor's name, dtype and shape, and 64 bytes at the start, middle and end
    of each tensor in the folder's safetensors files. None when the folder holds no safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    rows: list[str] = []
    for path in files:
        try:
            rows += _tensor_rows(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged, or no safetensors file ({type(error).__name__}). Copy it again.") from error
    for row in sorted(rows):  # independent of how the tensors are spread over files
        digest.update(row.encode())
    return digest.hexdigest()[:16]


def _tensor_rows(path: Path) -> Iterator[str]:
    """A line for each tensor of a safetensors file: name, type, shape, and a few of its bytes."""
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if header_size > 100_000_000:
            raise ValueError(f"a header of {header_size} bytes")
        for name, info in parse_json(file.read(header_size)).items():
            if name == "__metadata__":
                continue
            start, end = info["data_offsets"]
            windows = []
            for at in (start, (start + end) // 2, max(start, end - 64)):
                file.seek(8 + header_size + at)
                windows.append(file.read(min(64, end - at)).hex())
            yield f"{name} {info['dtype']} {info['shape']} {windows}"


def tokenizer_fingerprint(folder: Path) -> str | None:
    """Short hash of what decides which tokens a text becomes: vocabulary, merges, added tokens, chat template."""
    names = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
    content = [path.read_bytes() for name in names if (path := folder / name).is_file()]
    if not content:
        return None
    template, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file():
        content.append(template.read_bytes())
    elif settings.is_file():
        content.append(json.dumps(parse_json(settings.read_bytes()).get("chat_template")).encode())
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in content)).hexdigest()[:16]


class FigureModel(ABC):
    """One model family. Components are loaded when asked for and can be freed one by one.

    The peak of memory stays low in this order: `load_text_encoder`, encode prompts,
    `free_text_encoder`, then `load_transformer`.
    """

    family: ClassVar[str]
    transformer_class: ClassVar[str]
    block_layers: ClassVar[str] = ""  # lora_layers of all linear layers of its blocks
    pipeline_text_limit: ClassVar[int] = 1 << 30  # tokens of text at which the released pipeline stops
    trained_part: ClassVar[str] = "transformer"  # the component of the diffusers folder that trains
    pipeline_class: ClassVar[Any]
    # layers of one module that are called with the same tensor: their adapters are computed together (weights/adapters.py)
    shared_inputs: ClassVar[tuple[tuple[str, ...], ...]] = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))

    def __init__(self, source: ModelSource, max_sequence_length: int, weight_dtype: torch.dtype):
        self.requested_source = source
        self.source = source.resolve()
        self.max_sequence_length = max_sequence_length
        self.weight_dtype = weight_dtype
        self.text_storage = CODECS["bf16"]  # of embeddings in a store, see store/codec.py
        self.device = torch.device("cpu")
        self.truncated_prompts = 0
        self.vae_precision = vae_precision.EXACT  # of `encode_images`
        self._vae: nn.Module | None = None
        self._read: dict[str, Any] = {}
        self._vae_copies: dict[torch.dtype, nn.Module] = {}
        self._transformer: nn.Module | None = None
        self._text_encoder: Any = None

    # -- components ---------------------------------------------------------------------------
    @property
    def vae(self) -> Any:
        if self._vae is None:
            raise RuntimeError("call load_vae() first")
        return self._vae

    def pipeline_vae(self) -> Any:
        """The VAE in the dtype in which the released pipeline runs it; encoding may need it in another."""
        return self.vae_in(self.weight_dtype)

    def vae_in(self, dtype: torch.dtype) -> Any:
        """The VAE in `dtype`: itself, or a copy that is made once."""
        if self.vae.dtype == dtype:
            return self.vae
        if dtype not in self._vae_copies:
            self._vae_copies[dtype] = copy.deepcopy(self.vae).to(dtype)
        return self._vae_copies[dtype]

    @property
    def transformer(self) -> Any:
        """The module that `velocity` calls: as loaded, or as wrapped by accelerate."""
        if self._transformer is None:
            raise RuntimeError("call load_transformer() first")
        return self._transformer

    @transformer.setter
    def transformer(self, module: nn.Module) -> None:
        self._transformer = module

    @property
    def text_encoder(self) -> Any:
        if self._text_encoder is None:
            raise RuntimeError("call load_text_encoder() first")
        return self._text_encoder

    @abstractmethod
    def load_vae(self, dtype: torch.dtype = torch.float32) -> None:
        """Load the VAE (frozen, eval), in fp32 unless told otherwise, on `self.device`."""

    @property
    def transformer_type(self) -> Any:
        """The diffusers class of the transformer."""
        import diffusers

        return getattr(diffusers, self.transformer_class)

    def check_transformer(self, config: dict[str, Any]) -> None:
        """Raises UserError when `config` (transformer/config.json) is of a model that this family cannot train."""
        return None

    base_models = "its base model"  # that a distilled one of this family was made of

    def check_pipeline(self) -> None:
        """Reads model_index.json, whose marks the released pipeline obeys and no weight shows.

        Raises:
            UserError: a model distilled to few steps without guidance; says what to train on.
        """
        source = self.source
        hub = {} if source.is_local else {"revision": source.revision, "cache_dir": source.cache_dir, "token": source.token}
        try:
            index = self.pipeline_class.load_config(source.name, **hub)
        except OSError:
            return  # what lacks it cannot be loaded either, and says so
        if index.get("is_distilled"):
            raise UserError(
                f"{source.name} is distilled (is_distilled in its model_index.json): it draws in few steps without guidance, and "
                f"training on figures would undo that. Train on {self.base_models}."
            )

    def transformer_config(self) -> dict[str, Any]:
        """transformer/config.json of the source; no weights are read.

        Raises:
            UserError: not there, or of a model that this family cannot train.
        """
        source = self.source
        hub = {} if source.is_local else {"revision": source.revision, "cache_dir": source.cache_dir, "token": source.token}
        try:
            config = self.transformer_type.load_config(source.name, subfolder=self.trained_part, **hub)
        except OSError as error:
            raise _loading_error(error, source, self.trained_part) from error
        self.check_pipeline()
        self.check_transformer(config)
        return config

    def empty_transformer(self, dtype: torch.dtype | None = None) -> Any:
        """The transformer with its parameters on meta, in `dtype` or else `weight_dtype`: shapes without memory."""
        return direct_loading.empty(self.transformer_type, self.transformer_config(), dtype or self.weight_dtype)

    def _component_class(self, part: str) -> tuple[Any, dict[str, Any]]:
        """The class of a component by model_index.json, and how to reach the hub."""
        import diffusers
        import transformers

        source = self.source
        hub = {} if source.is_local else {"revision": source.revision, "cache_dir": source.cache_dir, "token": source.token}
        library, name = self.pipeline_class.load_config(source.name, **hub)[part]
        return getattr({"diffusers": diffusers, "transformers": transformers}[library], name), hub

    def load_empty_vae(self) -> None:
        """The VAE from its config alone, parameters on meta: for shapes and sizes (`latent_shape`, `pixel_multiple`)."""
        from accelerate import init_empty_weights

        vae_class, hub = self._component_class("vae")
        with init_empty_weights():
            self._vae = vae_class.from_config(vae_class.load_config(self.source.name, subfolder="vae", **hub))

    def text_encoder_parameters(self) -> int:
        """How many the text encoder has, counted on meta from its config."""
        from accelerate import init_empty_weights

        encoder_class, hub = self._component_class("text_encoder")
        config = encoder_class.config_class.from_pretrained(self.source.name, subfolder="text_encoder", **hub)
        with init_empty_weights():
            return sum(p.numel() for p in encoder_class(config).parameters())

    def load_transformer(
        self, quantization: Any = None, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Load the transformer (frozen, eval) in `dtype` or else `weight_dtype`, on `device` or else `self.device`.

        Plain weights in safetensors files go from the file to the device; others by diffusers' own loader, through memory.
        `quantization`: a diffusers quantization config, or None.

        Raises:
            UserError: a tensor is missing, damaged or of another shape; what `load_component` raises.
        """
        config = self.transformer_config()  # its checks come before gigabytes are read
        device, dtype = device or self.device, dtype or self.weight_dtype
        plain = quantization is None and config.get("quantization_config") is None
        folder = direct_loading.local_folder(self.source, self.trained_part) if plain else None
        if folder is not None:
            reader = TensorReader(folder, FULL_STEM, device, self.source.variant)
            loaded = direct_loading.load(self.transformer_type, config, reader, dtype, device)
            loaded.register_to_config(_name_or_path=self.source.name)
            self._transformer = loaded
            return
        extra = {} if quantization is None else {"quantization_config": quantization}
        transformer = load_component(self.transformer_type, self.source, self.trained_part, torch_dtype=dtype, **extra)
        self._transformer = transformer.to(device).eval().requires_grad_(False)

    def save_config(self, transformer: Any, folder: Path) -> None:
        """Write the trained part's config.json beside its weights."""
        transformer.save_config(folder)

    @abstractmethod
    def load_text_encoder(self) -> None:
        """Load tokenizer and text encoder (frozen, eval) in `weight_dtype` on `self.device`."""

    def free_text_encoder(self) -> None:
        self._text_encoder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- figures and prompts in ---------------------------------------------------------------
    @property
    @abstractmethod
    def pixel_multiple(self) -> int:
        """Width and height of a picture must be multiples of this (pixels per token side)."""

    def note_truncated(self, count: int, longest: int) -> None:
        """Count prompts that are cut at max_sequence_length, as the pipeline cuts them; say so once."""
        if count and not self.truncated_prompts:
            _LOG.warning(
                "prompts longer than max_sequence_length = %d tokens (here %d) are cut, as the pipeline cuts them",
                self.max_sequence_length, longest,
            )  # fmt: skip
        self.truncated_prompts += count

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

    def prompt_lengths(self, prompts: Sequence[str]) -> list[int] | None:
        """Tokens of each prompt where a batch is padded to its longest; None where all are padded alike."""
        return None

    @abstractmethod
    def collate_text(self, rows: Sequence[Tensor]) -> TextBatch:
        """Stored (L, D) rows -> the batch that `velocity` takes."""

    @abstractmethod
    def text_shape(self) -> tuple[int, int]:
        """(L, D) of the longest text row, read from configs alone: for estimates of size."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the raw latents of an (H, W) picture; the VAE must be loaded."""

    # -- the forward --------------------------------------------------------------------------
    def use_few_kernels(self, transformer: nn.Module) -> None:
        """Replace parts of `transformer` by ones that compute the same bits with less work; before it trains."""
        return None

    @abstractmethod
    def normalize(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> what the transformer denoises (B, Cn, hn, wn), fp32."""

    @abstractmethod
    def decode(self, normalized: Tensor) -> Tensor:
        """Normalised latents (B, Cn, hn, wn) -> pixels (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def velocity(self, noisy: Tensor, sigma: Tensor, text: TextBatch) -> Tensor:
        """Predicted noise - clean at noise level sigma (B,) in [0, 1]; (B, Cn, hn, wn) as `noisy`."""

    # -- inference ----------------------------------------------------------------------------
    def guide(self, wanted: Tensor, unwanted: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance of two velocities (B, Cn, hn, wn), with and without the prompt, as the pipeline does it."""
        return unwanted + guidance * (wanted - unwanted)

    def read_once(self, cls: Any, part: str) -> Any:
        """A new object of a component without weights (a scheduler); its config is read from disk or hub the first time alone."""
        if part not in self._read:
            self._read[part] = load_component(cls, self.source, part).config
        return cls.from_config(self._read[part])

    @abstractmethod
    def inference_sigmas(self, tokens: int, steps: int) -> Tensor:
        """The pipeline's noise levels (steps + 1,), descending to 0, for a picture of `tokens` tokens."""

    @abstractmethod
    def pipeline(self, transformer: nn.Module) -> Any:
        """The diffusers pipeline around `transformer`; prompts go in as embeddings."""

    @abstractmethod
    def sample(
        self, pipe: Any, prompt_rows: Sequence[Tensor], negative_row: Tensor, *, width: int, height: int, steps: int,
        guidance: float, seeds: Sequence[int],
    ) -> list[Any]:
        """Pictures (PIL) from the family's own pipeline, one for each (L, D) prompt row and seed."""

    @abstractmethod
    def original_lora(self, layers: dict[str, Tensor], alpha: float, rank: int) -> dict[str, Tensor]:
        """LoRA tensors in diffusers names -> the original repository's names that ComfyUI loads, with alpha."""

    # -- contract -----------------------------------------------------------------------------
    @abstractmethod
    def family_contract(self) -> dict[str, dict[str, Any]]:
        """The facts of the family that decide what an encoded row means: {"latents": {…}, "text": {…}}."""

    def contract(self) -> Contract:
        """How rows encoded by this model are made; stored in every shard and compared before training."""
        parts = self.family_contract()
        for part, component in (("latents", "vae"), ("text", "text_encoder")):
            folder = self._component_folder(component)
            parts[part]["fingerprint"] = None if folder is None else fingerprint(folder)
        tokenizer = self._component_folder("tokenizer")
        parts["text"]["tokenizer"] = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
        source = self.requested_source
        origin = {"source": source.name, "revision": source.revision, "text_computed_in": str(self.weight_dtype)}
        parts["latents"]["stored_dtype"], parts["text"]["stored_dtype"] = "bfloat16", self.text_storage
        parts["latents"]["vae_precision"] = self.vae_precision
        return Contract(family=self.family, origin=origin, latents=parts["latents"], text=parts["text"])

    def download(self, parts: Sequence[str]) -> None:
        """Fetch components of a hub model, so that their fingerprints are known before they are loaded."""
        from huggingface_hub import snapshot_download

        if not self.source.is_local:
            source, patterns = self.source, [f"{part}/*" for part in parts]
            try:
                snapshot_download(
                    source.name, revision=source.revision, cache_dir=source.cache_dir, token=source.token,
                    allow_patterns=patterns,
                )  # fmt: skip
            except OSError as error:
                raise _loading_error(error, source, ", ".join(parts)) from error

    def is_on_this_machine(self, part: str) -> bool:
        return self._component_folder(part) is not None

    def component_files(self, part: str) -> Path:
        """The folder of a component's files on this machine; fetched from the hub where it is not here yet."""
        self.download([part])
        folder = self._component_folder(part)
        assert folder is not None  # download raises when there is nothing
        return folder

    def _component_folder(self, part: str) -> Path | None:
        """The folder of a component's files on this machine, or None when it is not here."""
        if self.source.is_local:
            return Path(self.source.name) / part
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self.source.name, f"{part}/config.json", cache_dir=self.source.cache_dir, revision=self.source.revision
        )
        return Path(found).parent if isinstance(found, str) else None


def build_model(config: Config, device: torch.device | None = None) -> FigureModel:
    """The FigureModel that `config.model_type` names; nothing is loaded yet."""
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
    model: FigureModel = model_class(source, config.max_sequence_length, DTYPES[config.mixed_precision])
    model.text_storage = CODECS[config.encode.text_storage]
    model.vae_precision = config.encode.vae_precision
    if device is not None:
        model.device = device
    return model
