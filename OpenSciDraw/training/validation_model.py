"""`validation_model`: another base, on which the adapter that trains is drawn too at each validation.

It is for adapters that are trained on a base model and used on its distilled sibling. The first process has it, with its blocks in
CPU memory: each is on the device only while it runs. The pictures lie in `validation_images/step_NNNNNN/<FOLDER>/`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from OpenSciDraw.config import Config, Drawing
from OpenSciDraw.inference.other_base import config_on, require_fit
from OpenSciDraw.inference.pictures import drawing_of_trained, grid
from OpenSciDraw.models.base import FigureModel, build_model
from OpenSciDraw.parallel.sharding import copy_into, gathered
from OpenSciDraw.training.memory.offload import BlockOffload
from OpenSciDraw.training.reference import RESIDENT_BLOCKS
from OpenSciDraw.validation_funcs.sample_prompts import PromptSet, draw_prompts, image_folder
from OpenSciDraw.weights import trainable
from OpenSciDraw.weights.precision import compute_throughout
from OpenSciDraw.weights.start import load_pretrained

_LOG = logging.getLogger("OpenSciDraw")
FOLDER = "validation_model"  # of its pictures, inside a step's


class ValidationModel:
    """`config.validation_model` with the run's adapter on it; `own` is the run's model. Nothing is loaded yet.

    Raises:
        UserError: the adapter does not fit this model; says what differs.
    """

    def __init__(self, config: Config, own: FigureModel, accelerator: Accelerator):
        assert config.validation_model is not None
        self._accelerator = accelerator
        self.config = config_on(config, config.validation_model).model_copy(update={"quantization": None, "fp8_products": False})
        self.model: FigureModel = build_model(self.config, accelerator.device, draws_only=True)
        layers, empty = trainable.resolve_lora_layers(own.empty_transformer(), config.lora_layers), own.empty_transformer()
        shapes = {name: tuple(empty.get_submodule(name).weight.shape) for name in layers}
        require_fit(shapes, own, self.model, self.config, f"validation_model = {config.validation_model!r}")
        self.prompts: PromptSet | None = None
        self._drawing: Drawing | None = None

    def encode_prompts(self, own: FigureModel, prompts: PromptSet) -> None:
        """Embeddings of the prompts by this model's own text encoder; those of the run's where both are the same, to the bit."""
        model = self.model
        model.load_vae()
        ours, theirs = own.contract().text, model.contract().text
        if ours.get("fingerprint") is not None and ours == theirs:
            self.prompts = prompts
            return
        model.load_text_encoder()
        texts = [*prompts.prompts, self.config.negative_prompt or ""]
        *rows, negative = [model.encode_prompts([text])[0].cpu() for text in texts]
        model.free_text_encoder()
        self.prompts = replace(prompts, rows=rows, negative=negative)

    def load(self) -> None:
        """The transformer in CPU memory, with an adapter like the run's."""
        config, model = self.config, self.model
        model.load_transformer(None, torch.device("cpu"), trainable.loading_dtype(config))
        load_pretrained(model, config)
        trainable.make_trainable(model.transformer, config)
        BlockOffload(model.transformer, self._accelerator.device, RESIDENT_BLOCKS)
        self._copies = compute_throughout(model, model.transformer, config)
        model.transformer.eval()
        self._drawing = drawing_of_trained(model, config, config.validation_model_steps, config.validation_model_guidance)
        _LOG.info(
            "validation_model: the adapter is drawn on %s too, in %d steps with guidance %g", config.pretrained_model_name_or_path,
            self._drawing.steps, self._drawing.guidance,
        )  # fmt: skip

    @torch.no_grad()
    def draw(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """The prompts' pictures with the adapter as it is in `parameters`; `both.png` has them beside the run's own."""
        assert self.prompts is not None and self._drawing is not None
        own = trainable.trainable_parameters(self.model.transformer)
        for name, tensor in own.items():
            copy_into(tensor, parameters[name].to(tensor.device))
        folder = image_folder(self.config, step)
        inner, count = folder / FOLDER, len(self.prompts.prompts)
        inner.mkdir(parents=True, exist_ok=True)
        share = [(index, True) for index in range(count)]
        draw_prompts(self.model, self.config, self.prompts, self._drawing, inner, self._accelerator, share)
        pairs = [Image.open(place / f"{index:02d}.png") for index in range(count) for place in (folder, inner)]
        grid(pairs, columns=2).save(folder / "both.png")


def whole(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained tensors that may be dealt over devices, each gathered; every rank calls it."""
    return {name: gathered(tensor).detach() for name, tensor in parameters.items()}
