"""Pictures of examples by the family's own pipeline: what draws them, with which noise, in which batches."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from OpenSciDraw.config import Config, Drawing, EvaluateConfig
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.examples import Example
from OpenSciDraw.figures.buckets import Bucket, fit
from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.figures.fitting import pixels_of, to_model_range
from OpenSciDraw.flow import keyed_generator
from OpenSciDraw.inference.export import Trained
from OpenSciDraw.inference.pictures import decoded, encode_prompt
from OpenSciDraw.models.base import FigureModel, build_model
from OpenSciDraw.models.fingerprints import fingerprint
from OpenSciDraw.utils.files import unfinished, unfinished_mark
from OpenSciDraw.weights.adapter_files import adapter_path
from OpenSciDraw.weights.start import attach_adapter, load_pretrained

_LOG = logging.getLogger("OpenSciDraw")


@dataclass(frozen=True)
class Sampler:
    """How a picture comes out of noise; `seed` and an example's id give its noise."""

    steps: int
    guidance: float
    seed: int

    @classmethod
    def of(cls, settings: EvaluateConfig, drawing: Drawing) -> Sampler:
        """`evaluate.steps` and `evaluate.guidance`, else as the weights draw by themselves."""
        guidance = drawing.guidance if settings.guidance is None else settings.guidance
        return cls(settings.steps or drawing.steps, guidance, settings.seed)

    def noise_seed(self, identity: str) -> int:
        """The same for an example whatever is drawn with it, before it or on another rank."""
        return keyed_generator("evaluate", self.seed, identity).initial_seed()


@dataclass(frozen=True)
class DrawingBatch:
    """Examples that are drawn together, all at `width` x `height` pixels."""

    examples: list[Example]
    width: int
    height: int


def batches_of(examples: Iterable[Example], multiple: int, batch_size: int) -> list[DrawingBatch]:
    """Examples of one size together; a size becomes the nearest one whose sides are multiples of `multiple` pixels."""
    by_size: dict[tuple[int, int, str], list[Example]] = {}
    for example in examples:  # a pipeline edits the same pictures in all of a batch, so that an edit is one of its own
        width, height = (max(multiple, round(side / multiple) * multiple) for side in (example.width, example.height))
        by_size.setdefault((width, height, example.id if example.sources else ""), []).append(example)
    return [
        DrawingBatch(group[at : at + batch_size], width, height)
        for (width, height, _), group in by_size.items()
        for at in range(0, len(group), batch_size)
    ]


@torch.no_grad()
def draw(
    model: FigureModel, pipe: Any, batch: DrawingBatch, rows: Sequence[Tensor], negative: Tensor, sampler: Sampler,
    may_halve: bool = True,
) -> list[Any]:  # fmt: skip
    """Pictures (PIL) of a batch; `rows` are its prompts' embeddings.

    Raises UserError for an edit whose source cannot be read, or of a model that does not edit.

    A batch that a GPU cannot hold is drawn in halves, unless not `may_halve`: ranks that share a model draw alike.
    """
    images = source_images(model, batch.examples[0])

    def once(part: slice) -> list[Any]:
        return model.sample(
            pipe, rows[part], negative, width=batch.width, height=batch.height, steps=sampler.steps, guidance=sampler.guidance,
            seeds=[sampler.noise_seed(example.id) for example in batch.examples[part]], **({"images": images} if images else {}),
        )  # fmt: skip

    return in_halves(once, slice(0, len(batch.examples)), may_halve)


def in_halves(once: Callable[[slice], list[Any]], part: slice, may_halve: bool = True) -> list[Any]:
    """What `once` makes of `part` of a batch, or of its halves, one after the other, where a GPU cannot hold the whole."""
    count = part.stop - part.start
    try:
        return once(part)
    except torch.OutOfMemoryError:
        if count == 1 or not may_halve:
            raise
    torch.cuda.empty_cache()
    middle = part.start + count // 2
    _LOG.info("%d pictures at once do not fit into the GPU's memory: now %d", count, count // 2)
    return [*in_halves(once, slice(part.start, middle)), *in_halves(once, slice(middle, part.stop))]


def source_images(model: FigureModel, example: Example) -> list[Any]:
    """The pictures (PIL) that an example edits. Raises UserError as `draw`."""
    if example.sources and not model.edits:
        raise UserError(f"{example.id!r} edits a picture, and the pipeline of {model.family} takes none. Choose other figures.")
    try:
        return example.source_images()
    except RejectedFigure as error:
        raise UserError(f"What {example.id!r} edits cannot be used: {error}. Replace it or leave the edit out.") from error


def save_picture(picture: Any, path: Path) -> None:
    """As PNG; the file is there whole or not at all."""
    with unfinished(path) as part:
        picture.save(part, format="PNG")


@dataclass(frozen=True)
class SeenText:
    """A prompt, and the example whose pictures it `edits`, where there is one."""

    prompt: str
    edits: Example | None = None

    def key(self, model: FigureModel) -> tuple[str, str]:
        """Texts of one key have one row: the pictures count where the text encoder reads them."""
        return self.prompt, self.edits.id if self.edits is not None and model.text_sees_pictures else ""


class TextRows:
    """Embeddings of texts, on disk: 10,000 prompts of a large model's encoder are hundreds of gigabytes."""

    def __init__(self, folder: Path):
        mark, end = unfinished_mark().rsplit(".", 1)
        self._folder = tempfile.TemporaryDirectory(prefix=f".text{mark}.", suffix=f".{end}", dir=folder)
        self._files: dict[tuple[str, str], Path] = {}

    def encode(self, model: FigureModel, texts: Iterable[SeenText]) -> None:
        """Each text alone, so that none depends on which others there are."""
        new = {key: text for text in texts if (key := text.key(model)) not in self._files}
        for key, text in tqdm(new.items(), desc="prompts", unit="prompt", disable=len(new) < 2):
            images = source_images(model, text.edits) if text.edits is not None and model.text_sees_pictures else []
            path = Path(self._folder.name) / f"{len(self._files):07d}.safetensors"
            save_file({"row": encode_prompt(model, text.prompt, images).contiguous()}, path)
            self._files[key] = path

    def row(self, model: FigureModel, text: SeenText) -> Tensor:
        return load_file(self._files[text.key(model)])["row"]

    def delete(self) -> None:
        self._folder.cleanup()


class Artist:
    """The model of a run, or of a config before training; it loads when there is something to do."""

    def __init__(self, config: Config, trained: Trained | None, folder: Path):
        self.config, self.trained, self.folder = config, trained, folder
        if trained is not None and not trained.is_lora:
            self.config = config.model_copy(update={"pretrained_full_ckpt_path": str(trained.path)})
        self.negative = config.negative_prompt or ""
        self.model: FigureModel = build_model(
            self.config, torch.device("cuda" if torch.cuda.is_available() else "cpu"), draws_only=True
        )
        self.pipe: Any = None
        self.text: TextRows | None = None

    def identity(self, sampler: Sampler) -> dict[str, Any]:
        """All that decides how a picture of a prompt comes out; pictures of different identities do not mix."""
        config, trained = self.config, self.trained
        found: dict[str, Any] = {
            "model": config.pretrained_model_name_or_path,
            "model_weights": fingerprint(self.model.component_files(self.model.trained_part)),
            "trained": None if trained is None else "LoRA" if trained.is_lora else "all weights",
            "trained_weights": None if trained is None else fingerprint(trained.path.parent if trained.is_lora else trained.path),
            "steps": sampler.steps, "guidance": sampler.guidance, "seed": sampler.seed, "negative_prompt": self.negative,
            "precision": config.mixed_precision, "max_sequence_length": config.max_sequence_length,
        }  # fmt: skip
        if config.pretrained_full_ckpt_path and (trained is None or trained.is_lora):
            found["pretrained_full_ckpt_path"] = config.pretrained_full_ckpt_path
        if config.pretrained_lora_ckpt_path and (trained is None or config.fuse_pretrained_lora):
            found["pretrained_lora_ckpt_path"] = config.pretrained_lora_ckpt_path
        return found

    def load(self, prompts: Iterable[str], examples: Iterable[Example] = ()) -> None:
        """Text encoder -> embeddings of `prompts` and of `examples` -> free; then VAE and transformer, with what was trained."""
        self.text = TextRows(self.folder)
        self.model.load_text_encoder()
        texts = [SeenText(prompt) for prompt in (*prompts, self.negative)]
        self.text.encode(self.model, [*texts, *(text for example in examples for text in self._texts(example))])
        self.model.free_text_encoder()
        self.model.load_vae()
        self.model.load_transformer()
        load_pretrained(self.model, self.config)
        self.pipe = self.model.pipeline(self.model.transformer)
        adapter = self._adapter()
        if adapter is not None:
            attach_adapter(self.model, self.pipe, adapter)

    def _adapter(self) -> Path | None:
        """The run's LoRA; before training, the one that it would start from."""
        if self.trained is not None:
            return self.trained.path if self.trained.is_lora else None
        start = self.config.pretrained_lora_ckpt_path
        if start is None or self.config.fuse_pretrained_lora:
            return None
        return adapter_path(start, "pretrained_lora_ckpt_path")

    def _texts(self, example: Example) -> tuple[SeenText, SeenText]:
        """What an example is drawn from, and the negative prompt beside it."""
        edits = example if example.sources else None
        return SeenText(example.prompt, edits), SeenText(self.negative, edits)

    def draw(self, batch: DrawingBatch, sampler: Sampler) -> list[Any]:
        """Pictures (PIL) of a batch whose examples were given to `load`."""
        assert self.text is not None
        rows = [self.text.row(self.model, self._texts(example)[0]) for example in batch.examples]
        negative = self.text.row(self.model, self._texts(batch.examples[0])[1])  # an edit is a batch of its own
        return draw(self.model, self.pipe, batch, rows, negative, sampler)

    def rows_of(self, texts: Sequence[str]) -> list[Tensor]:
        """Embeddings (L, D) of prompts that were given to `load`."""
        assert self.text is not None
        return [self.text.row(self.model, SeenText(text)) for text in texts]

    def close(self) -> None:
        if self.text is not None:
            self.text.delete()


class Rebuilder(Artist):
    """Draws nothing: each figure goes into the VAE and comes out again. No picture of this VAE can be expected to score more."""

    def identity(self, sampler: Sampler) -> dict[str, Any]:
        return {"model": self.config.pretrained_model_name_or_path, "rebuilt by": fingerprint(self.model.component_files("vae"))}

    def load(self, prompts: Iterable[str], examples: Iterable[Example] = ()) -> None:
        if self.model.trained_part != "transformer":
            raise UserError(
                f"--rebuilt measures the VAE that a model draws with, and this config trains the {self.model.trained_part} of one. "
                "Put what it trained into a model folder, and evaluate a config of that."
            )
        self.model.load_vae()

    @torch.no_grad()
    def draw(self, batch: DrawingBatch, sampler: Sampler) -> list[Any]:
        pixels = torch.stack([self._pixels(example, batch) for example in batch.examples])

        def once(part: slice) -> list[Any]:
            latents = self.model.normalize(self.model.encode_images(pixels[part].to(self.model.device)))
            return [Image.fromarray(picture) for picture in decoded(self.model, latents)]

        return in_halves(once, slice(0, len(pixels)))

    @staticmethod
    def _pixels(example: Example, batch: DrawingBatch) -> Tensor:
        try:
            figure = example.reference_image()
        except RejectedFigure as error:
            raise UserError(f"The figure of {example.id!r} cannot be read: {error}. Replace it or leave it out.") from error
        if figure is None:
            raise UserError(f"--rebuilt shows what the VAE makes of figures, and {example.id!r} is a prompt without one.")
        shown, _ = fit(figure, Bucket(batch.width, batch.height))
        return to_model_range(pixels_of(shown))
