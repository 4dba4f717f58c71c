"""A model's components (VAE, text encoder, tokenizer, transformer): loaded when asked for, freed one by one, and their files.

What is the same for every family. What a family must say is in base.py.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from OpenSciDraw.errors import UserError
from OpenSciDraw.models import direct_loading, vae_precision
from OpenSciDraw.models.source import ModelSource, load_component, loading_error
from OpenSciDraw.store.codec import CODECS
from OpenSciDraw.utils.tensor_files import FULL_STEM, TensorReader

_LOG = logging.getLogger("OpenSciDraw")


class Components(ABC):
    """Loading, precision and identity of one model's components.

    The peak of memory stays low in this order: `load_text_encoder`, encode prompts,
    `free_text_encoder`, then `load_transformer`.
    """

    family: ClassVar[str]
    transformer_class: ClassVar[str]
    trained_part: ClassVar[str] = "transformer"  # the component of the diffusers folder that trains
    tokenizer_part: ClassVar[str] = "tokenizer"  # the component that turns prompts into tokens
    pipeline_class: ClassVar[Any]
    base_models = "its base model"  # that a distilled one of this family was made of
    distilled_steps: ClassVar[int] = 4  # that a distilled one of this family draws in

    def __init__(self, source: ModelSource, max_sequence_length: int, weight_dtype: torch.dtype):
        self.requested_source = source
        self.source = source.resolve()
        self.max_sequence_length = max_sequence_length
        self.weight_dtype = weight_dtype
        self.text_storage = CODECS["bf16"]  # of embeddings in a store, see store/codec.py
        self.device = torch.device("cpu")
        self.draws_only = False  # a distilled model is refused where it would train
        self.truncated_prompts = 0
        self.vae_precision = vae_precision.EXACT  # of `encode_images`
        self._vae: nn.Module | None = None
        self._read: dict[str, Any] = {}
        self._vae_copies: dict[torch.dtype, nn.Module] = {}
        self._transformer: nn.Module | None = None
        self._text_encoder: Any = None
        # training sets them where an objective asks for one
        self.reference_policy: Callable[[], AbstractContextManager[Any]] | None = None
        self.old_policy: Callable[[], AbstractContextManager[Any]] | None = None
        self.route_tokens: Callable[[object], None] | None = None  # the key by which the next forward's tokens are drawn

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

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, `velocity` is that of the policy as it was when training began, without gradients.

        Call it before the policy's own forward of a step: what that one recomputes in the backward must be its own.

        Raises:
            RuntimeError: training has not set up a reference.
        """
        if self.reference_policy is None:
            raise RuntimeError("no reference policy: only training with an objective that compares with one has it")
        with torch.no_grad(), self.reference_policy():
            yield

    @contextmanager
    def as_old_policy(self) -> Iterator[None]:
        """Inside, `velocity` is that of the policy that draws while training on rewards, without gradients.

        Call it before the policy's own forward, as `as_reference`.

        Raises:
            RuntimeError: training has not set one up.
        """
        if self.old_policy is None:
            raise RuntimeError("no old policy: only training with an objective that draws has it")
        with torch.no_grad(), self.old_policy():
            yield

    @property
    def text_encoder(self) -> Any:
        if self._text_encoder is None:
            raise RuntimeError("call load_text_encoder() first")
        return self._text_encoder

    @property
    def transformer_type(self) -> Any:
        """The diffusers class of the transformer."""
        import diffusers

        return getattr(diffusers, self.transformer_class)

    def pipeline_index(self) -> dict[str, Any]:
        """model_index.json, whose marks the released pipeline obeys and no weight shows; {} where there is none."""
        source = self.source
        hub = {} if source.is_local else {"revision": source.revision, "cache_dir": source.cache_dir, "token": source.token}
        if hub and "model_index" in self._read:
            return self._read["model_index"]
        try:
            found = dict(self.pipeline_class.load_config(source.name, **hub))
        except OSError:
            return {}  # what lacks it cannot be loaded either, and says so
        if hub:  # asked for again at each validation, without the network
            self._read["model_index"] = found
        return found

    @property
    def distilled_mark(self) -> str | None:
        """What in model_index.json says that the released pipeline draws in few steps and without guidance; None for a base."""
        index = self.pipeline_index()
        return next((name for name in ("is_distilled", "sample_sigmas") if index.get(name)), None)

    @property
    def is_distilled(self) -> bool:
        """Whether the released pipeline draws with it in few steps (`distilled_steps`) and without guidance."""
        return self.distilled_mark is not None

    def check_pipeline(self) -> None:
        """Raises UserError for a model distilled to few steps without guidance, where it would train; says what to train on."""
        if self.is_distilled and not self.draws_only:
            raise UserError(
                f"{self.source.name} is distilled ({self.distilled_mark} in its model_index.json): it draws in few steps without "
                f"guidance, and training on figures would undo that. Train on {self.base_models}. The adapter can be drawn on this "
                "one too: see validation_model and `scienceflow sample --base`."
            )

    def check_transformer(self, config: dict[str, Any]) -> None:
        """Raises UserError when `config` (transformer/config.json) is of a model that this family cannot train."""
        return None

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
            raise loading_error(error, source, self.trained_part) from error
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

    def free_text_encoder(self) -> None:
        self._text_encoder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def note_truncated(self, count: int, longest: int) -> None:
        """Count prompts that are cut at max_sequence_length, as the pipeline cuts them; say so once."""
        if count and not self.truncated_prompts:
            _LOG.warning(
                "prompts longer than max_sequence_length = %d tokens (here %d) are cut, as the pipeline cuts them",
                self.max_sequence_length, longest,
            )  # fmt: skip
        self.truncated_prompts += count

    def read_once(self, cls: Any, part: str) -> Any:
        """A new object of a component without weights (a scheduler); its config is read from disk or hub the first time alone."""
        if part not in self._read:
            self._read[part] = load_component(cls, self.source, part).config
        return cls.from_config(self._read[part])

    def _scheduler(self) -> Any:
        """The scheduler of flow matching that the released pipelines have, new each time: it counts the steps that it takes."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return self.read_once(FlowMatchEulerDiscreteScheduler, "scheduler")

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
                raise loading_error(error, source, ", ".join(parts)) from error

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
