"""Seconds a picture: validation's pictures and `FigureModel.sample` against the family's pipeline alone.

    python benchmarks/run_sample.py

The bare pipeline gets the same embeddings, size, steps, guidance and seeds, and saves no file. Validation draws with the weights
in training and writes a PNG of each picture and one of all. What is called is counted as well: transformer forwards a picture.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from report import Result, in_turn, ratio

from OpenSciDraw.config import Config
from OpenSciDraw.models.base import build_model
from OpenSciDraw.validation_funcs.sample_prompts import PromptSet, sample_prompts

TARGET = 0.98
REPETITIONS = 5
SIDE, STEPS, GUIDANCE = 128, 4, 4.0
PROMPTS = ["Two boxes and an arrow.", "A line chart.", "A circle in a square.", "A table of four rows."]


class Drawing:
    """The same pictures in three ways, all of the embedded model."""

    def __init__(self, folder: Path):
        self.config = Config.model_validate({
            "pretrained_model_name_or_path": "embedded:flux2_klein_tiny", "mixed_precision": "no", "max_sequence_length": 128,
            "dataset": {"base_dir": str(folder)}, "model_output_dir": str(folder), "resolution_list": [[SIDE, SIDE]],
            "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "validation_prompts": PROMPTS,
        })  # fmt: skip
        self.model = build_model(self.config)
        self.model.load_text_encoder()
        rows = [self.model.encode_prompts([prompt])[0] for prompt in [*PROMPTS, ""]]
        self.model.free_text_encoder()
        self.model.load_vae()
        self.model.load_transformer()
        self.prompts = PromptSet(PROMPTS, rows[:-1], rows[-1])
        self.pipe = self.model.pipeline(self.model.transformer)
        self.accelerator = Accelerator(cpu=True)
        self.forwards = 0
        self.model.transformer.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.forwards += 1

    def seeds(self) -> list[int]:
        return [self.config.validation_seed + index for index in range(len(PROMPTS))]

    @torch.no_grad()
    def bare(self) -> float:
        start = time.perf_counter()
        for row, seed in zip(self.prompts.rows, self.seeds(), strict=True):
            self.pipe(
                prompt_embeds=row[None], negative_prompt_embeds=self.prompts.negative[None], width=SIDE, height=SIDE,
                num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=torch.Generator("cpu").manual_seed(seed),
            )  # fmt: skip
        return time.perf_counter() - start

    def sample(self) -> float:
        start = time.perf_counter()
        for row, seed in zip(self.prompts.rows, self.seeds(), strict=True):
            self.model.sample(
                self.pipe, [row], self.prompts.negative, width=SIDE, height=SIDE, steps=STEPS, guidance=GUIDANCE, seeds=[seed]
            )
        return time.perf_counter() - start

    def validation(self) -> float:
        start = time.perf_counter()
        sample_prompts(self.model, self.config, self.prompts, 0, self.accelerator)
        return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    result = Result("sample", "python benchmarks/run_sample.py", ["what", "s a picture", "forwards a picture", "bare / this"])
    with tempfile.TemporaryDirectory() as folder:
        drawing = Drawing(Path(folder))
        ways = {"bare pipeline": drawing.bare, "FigureModel.sample": drawing.sample, "validation": drawing.validation}
        forwards = {}
        for name, way in ways.items():
            drawing.forwards = 0
            way()
            forwards[name] = drawing.forwards / len(PROMPTS)
        seconds = in_turn(ways, REPETITIONS)
    shares = {name: ratio(seconds["bare pipeline"], values) for name, values in seconds.items()}
    for name, values in seconds.items():
        result.rows.append([name, f"{median(values) / len(PROMPTS):.3f}", f"{forwards[name]:g}", f"{shares[name]:.3f}"])
    result.numbers = {"seconds": seconds, "forwards": forwards, "ratio": shares}
    result.notes = [f"Target: {TARGET} or more. {SIDE} x {SIDE} px, {STEPS} steps, guidance {GUIDANCE:g}, batch 1, fp32."]
    result.save()


if __name__ == "__main__":
    main()
