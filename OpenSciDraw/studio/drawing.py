"""Pictures for the playground, by the functions of `scienceflow sample`; and what the structure metric reads. Runs in a worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from OpenSciDraw.config import load_saved_config
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.decode import RejectedFigure, decode_picture
from OpenSciDraw.inference.export import Trained, find_trained
from OpenSciDraw.inference.other_base import config_of_adapter
from OpenSciDraw.inference.pictures import drawing_of_trained, resolutions
from OpenSciDraw.inference.sample import load_for_inference
from OpenSciDraw.inference.strength import Strength
from OpenSciDraw.utils.files import unfinished
from OpenSciDraw.weights.start import attach_adapter

_kept: dict[str, Any] = {}  # the last model with its prompt: other seeds and strengths of it come without loading


def trained_of(target: str, base: str, ema: bool) -> Trained:
    """A run's or checkpoint's weights; or, of a saved config, its model before training. No config is run."""
    if target.endswith(".py"):
        config = load_saved_config(target)
        trained = Trained(Path(target), Path(config.model_output_dir), config, is_base=True)
    else:
        trained = find_trained(target, ema)
    if not base:
        return trained
    if trained.is_base:
        raise UserError("Another base is for a run's adapter, and this is a base itself.")
    return replace(trained, config=config_of_adapter(trained.path, trained.config, base))


@torch.no_grad()
def draw(
    report: Callable[[Any], None], target: str, prompt: str, seeds: list[int], strengths: list[float], out: str,
    negative: str | None = None, images: list[str] | None = None, width: int | None = None, height: int | None = None,
    steps: int | None = None, guidance: float | None = None, base: str = "", ema: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Draw the prompt with every seed at every strength into `out`/N.png, seed by seed; reports each one.

    Raises:
        UserError: as `scienceflow sample`; an adapter of a kind that has no strength.
    """
    trained, images = trained_of(target, base, ema), images or []
    key = [target, trained.path.stat().st_mtime_ns, base, ema, prompt, negative, images]
    if _kept.get("key") != key:
        _kept.clear()
        report({"state": "loading"})
        words = negative if negative is not None else trained.config.negative_prompt or ""
        model, rows, pictures = load_for_inference(trained, [prompt], words, images)
        pipe = model.pipeline(model.transformer)
        if trained.is_lora:
            attach_adapter(model, pipe, trained.path)
        _kept.update(key=key, model=model, rows=rows, pictures=pictures, pipe=pipe, strength=Strength(pipe.transformer))
    model, rows, pictures, pipe = (_kept[name] for name in ("model", "rows", "pictures", "pipe"))
    config, side = trained.config, trained.config.encode.resolution
    default = ([picture.size for picture in pictures[:1]] or resolutions(config)[:1] or [(side, side)])[0]
    size = (width or default[0], height or default[1])
    if size[0] % model.pixel_multiple or size[1] % model.pixel_multiple:
        raise UserError(f"width {size[0]}, height {size[1]}: both must be multiples of {model.pixel_multiple} px for this model.")
    drawing = drawing_of_trained(model, config, steps, guidance)
    number = 0
    for seed in seeds:
        for strength in strengths:
            _kept["strength"].set(strength)
            picture = model.sample(
                pipe, rows[:1], rows[-1], width=size[0], height=size[1], steps=drawing.steps, guidance=drawing.guidance,
                seeds=[seed], **({"images": pictures} if pictures else {}),
            )[0]  # fmt: skip
            with unfinished(Path(out) / f"{number}.png") as part:
                picture.save(part, "PNG")
            report({"picture": number, "seed": seed, "strength": strength})
            number += 1
    _kept["strength"].set(1.0)
    return {"pictures": number, "steps": drawing.steps, "guidance": drawing.guidance, "width": size[0], "height": size[1]}


def read_picture(report: Callable[[Any], None], file: str) -> dict[str, Any]:
    """What the structure metric sees in a picture, in pixels of it."""
    from OpenSciDraw.evaluation.structure import read_structure, require_opencv

    require_opencv()
    try:
        picture: Image.Image = decode_picture(Path(file).read_bytes())
    except RejectedFigure as error:
        raise UserError(str(error)) from error
    found = read_structure(picture)
    parts = [{"shape": part.shape, "color": part.color, "label": part.label, "box": [float(v) for v in part.box]}
             for part in found.components]  # fmt: skip
    arrows = [{"source": arrow.source, "target": arrow.target, "directed": bool(arrow.directed)} for arrow in found.arrows]
    texts = [{"text": text.text, "box": [float(v) for v in text.box]} for text in found.texts]
    return {"width": picture.width, "height": picture.height, "components": parts, "arrows": arrows, "texts": texts}
