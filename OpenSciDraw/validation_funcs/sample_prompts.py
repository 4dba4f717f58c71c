"""Pictures for the config's prompts, from the family's own pipeline with the weights being trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from OpenSciDraw.config import Config, Drawing, drawing_of_run
from OpenSciDraw.evaluation.examples import Example
from OpenSciDraw.inference.pictures import grid, resolutions
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.parallel.ranks import evaluating, share_of
from OpenSciDraw.registry import VALIDATION_FUNCS
from OpenSciDraw.utils.background import Background


@dataclass(frozen=True)
class PromptSet:
    """Validation prompts with their embeddings (L, D), encoded once before the transformer loads.

    `examples` are those of evaluate.figures, for validation functions that measure; `example_rows` their prompts' embeddings.
    """

    prompts: list[str]
    rows: list[Tensor]
    negative: Tensor
    examples: list[Example] = field(default_factory=list)
    example_rows: list[Tensor] = field(default_factory=list)
    images: list[list[Image.Image]] = field(default_factory=list)  # that each prompt edits; [] where none does
    negatives: list[Tensor] = field(default_factory=list)  # of each prompt, then of each example; [] where all have `negative`

    def negative_of(self, index: int) -> Tensor:
        """(L, D) of the negative prompt beside the prompt at `index`, or the example behind the prompts."""
        return self.negatives[index] if self.negatives else self.negative


def image_folder(config: Config, step: int) -> Path:
    root = Path(config.image_output_dir or Path(config.model_output_dir) / "validation_images")
    return root / f"step_{step:06d}"


@VALIDATION_FUNCS.register(
    "generic_validation_func",
    "QwenImage_validation_func",
    "Flux2Klein_validation_func",
    "Flux2Klein_fulltune_validation_func",
    "Flux2Klein_fulltune_validation_func_parquet",
    "QwenImage_fulltune_validation_func",
    "QwenImage_fulltune_validation_func_parquet",
)
@torch.no_grad()
def sample_prompts(
    model: FigureModel, config: Config, prompts: PromptSet, step: int, accelerator: Accelerator
) -> dict[str, float]:
    """Write `validation_images/step_NNNNNN/{index}.png` and `grid.png`; prompts are shared out over the ranks.

    Seeds are fixed (`validation_seed` + index), so pictures of different steps differ by the weights alone;
    shift, guidance and template are the pipeline's own.
    """
    folder = image_folder(config, step)
    folder.mkdir(parents=True, exist_ok=True)
    draw_prompts(model, config, prompts, drawing_of_run(config), folder, accelerator, share_of(len(prompts.prompts), accelerator))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and prompts.prompts:
        pictures = [Image.open(folder / f"{index:02d}.png") for index in range(len(prompts.prompts))]
        grid(pictures).save(folder / "grid.png")
    return {}


@torch.no_grad()
def draw_prompts(
    model: FigureModel, config: Config, prompts: PromptSet, drawing: Drawing, folder: Path, accelerator: Accelerator,
    share: list[tuple[int, bool]],
) -> None:  # fmt: skip
    """Pictures of the prompts of `share` (index, whether it is kept) into `folder`, by the transformer as it is now."""
    sizes = resolutions(config)
    with evaluating(model.transformer, accelerator) as transformer, Background() as writer:
        pipe = model.pipeline(transformer)
        for index, counts in share:
            images = prompts.images[index] if prompts.images else []
            with accelerator.autocast():
                image = model.sample(
                    pipe, [prompts.rows[index]], prompts.negative_of(index), width=sizes[index][0], height=sizes[index][1],
                    steps=drawing.steps, guidance=drawing.guidance, seeds=[config.validation_seed + index],
                    **({"images": images} if images else {}),
                )[0]  # fmt: skip
            if counts:
                writer.submit(image.save, folder / f"{index:02d}.png")
