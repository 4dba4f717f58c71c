"""`scienceflow sample RUN --prompt …`: figures from a trained run, through the family's own pipeline."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from OpenSciDraw import flow
from OpenSciDraw.config import load_config
from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.export import Trained, find_trained
from OpenSciDraw.inference.merge import read_adapters
from OpenSciDraw.inference.other_base import base_name, config_of_adapter
from OpenSciDraw.inference.pictures import drawing_of_trained, encode_prompt, grid, pictures_to_edit, resolutions
from OpenSciDraw.models.base import FigureModel, TextBatch, build_model
from OpenSciDraw.utils.background import Background
from OpenSciDraw.utils.files import make_folder
from OpenSciDraw.weights.start import add_to_base, attach_adapter, load_pretrained

_LOG = logging.getLogger("OpenSciDraw")


@torch.no_grad()
def sample_normalized(
    model: FigureModel, text: TextBatch, negative: TextBatch, noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """Euler sampling with the family's guidance by `FigureModel.velocity`, (B, Cn, hn, wn) -> the same.

    The proof that `velocity` is what the family's pipeline computes: from the same noise it gives the
    pipeline's picture (tests/models/test_flux2_klein.py). Metrics that need latents, not pictures, use it too.
    """
    sigmas = model.inference_sigmas(noise.shape[-2] * noise.shape[-1], steps).to(noise.device)

    def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
        level = model.pipeline_level(sigma, noisy.dtype)
        with model.at_guidance(guidance):
            wanted = model.velocity(noisy, level, text)
        if guidance <= 1 or model.embeds_guidance:
            return wanted
        unwanted = model.velocity(noisy, level, negative)
        return model.guide(wanted, unwanted, guidance)

    return flow.integrate(velocity, noise, sigmas)


def load_for_inference(
    trained: Trained, prompts: Sequence[str], negative: str, image_files: Sequence[str] = ()
) -> tuple[FigureModel, list[Tensor], list[Image]]:
    """The run's model, without its LoRA; the embeddings of `prompts` and of `negative` (last); the pictures that they edit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = trained.config
    if not trained.is_lora and not trained.is_base:
        config = config.model_copy(update={"pretrained_full_ckpt_path": str(trained.path)})
    model = build_model(config, device, draws_only=True)
    images = pictures_to_edit(image_files, model, config.encode, "--image")
    model.load_text_encoder()
    rows = [encode_prompt(model, prompt, images) for prompt in [*prompts, negative]]
    model.free_text_encoder()
    model.load_vae()
    model.load_transformer()
    load_pretrained(model, config)  # all weights, or a base that training changed first
    return model, rows, images


def main(arguments: Namespace) -> int:
    """Draw `--num` pictures of each prompt into `--out`, with a grid of all.

    `--lora` adapters are added to the base with their strengths; the run's own stays beside it.

    Raises:
        UserError: sizes that the model cannot draw, an adapter that does not fit.
    """
    if arguments.run.endswith(".py"):  # the model before training
        config = load_config(arguments.run, complete=False)
        trained = Trained(Path(arguments.run).absolute(), Path(config.model_output_dir), config, is_base=True)
    else:
        trained = find_trained(arguments.run, arguments.ema)
    folder = trained.output_folder("samples")
    if arguments.base is not None:
        if trained.is_base:
            raise UserError(f"--base is for a run's adapter, and {arguments.run} is a config.")
        trained = replace(trained, config=config_of_adapter(trained.path, trained.config, arguments.base))
        folder = folder / f"on_{base_name(arguments.base)}"
    config = trained.config
    negative = arguments.negative_prompt if arguments.negative_prompt is not None else config.negative_prompt or ""
    out = make_folder(Path(arguments.out) if arguments.out else folder)
    model, rows, images = load_for_inference(trained, arguments.prompt, negative, arguments.image)
    pipe = model.pipeline(model.transformer)
    add_to_base(model.transformer, read_adapters(arguments.lora, model))
    if trained.is_lora:
        attach_adapter(model, pipe, trained.path)
    side = config.encode.resolution
    default = [image.size for image in images[:1]] or resolutions(config)[:1] or [(side, side)]
    width, height = arguments.width or default[0][0], arguments.height or default[0][1]
    multiple = model.pixel_multiple
    if width % multiple or height % multiple:
        raise UserError(f"--width {width} --height {height}: both must be multiples of {multiple} px for this model.")
    drawing = drawing_of_trained(model, config, arguments.steps, arguments.guidance)
    jobs = [(at, number) for at in range(len(arguments.prompt)) for number in range(arguments.num)]
    pictures = []
    with Background() as writer:  # a PNG of a megapixel takes a tenth of a second or more
        for at, number in tqdm(jobs, desc="pictures", unit="picture"):
            picture = model.sample(
                pipe, [rows[at]], rows[-1], width=width, height=height, steps=drawing.steps, guidance=drawing.guidance,
                seeds=[arguments.seed + number], **({"images": images} if images else {}),
            )[0]  # fmt: skip
            writer.submit(_save, picture, out / f"{at:02d}_seed{arguments.seed + number}.png")
            pictures.append(picture)
    if len(pictures) > 1:
        grid(pictures, columns=arguments.num if arguments.num > 1 else None).save(out / "grid.png")
        print(out / "grid.png")
    return 0


def _save(picture: Image, path: Path) -> None:
    picture.save(path)
    print(path)
