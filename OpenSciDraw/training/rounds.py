"""Training on rewards in rounds: draw pictures of the next prompts, have them scored, learn from them in one step or several.

A round has the prompts of one optimizer step (`gradient_accumulation_steps` batches on each rank), of which the old policy draws
`group_size` pictures each, and `steps_per_round` steps that go over all of them. Its prompts follow from the sampler's place, its
noise from (seed, step, prompt), its scores from the pictures. A checkpoint inside a round keeps the place where the round began and
the old policy, so a run that goes on draws the same pictures again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from OpenSciDraw import flow
from OpenSciDraw.config import Config
from OpenSciDraw.datasets.batch import Batch, Drawn
from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.pictures import draw_guidance
from OpenSciDraw.inference.sample import sample_normalized
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.train_iteration_funcs.reward import picture_ids
from OpenSciDraw.training.old_policy import OldPolicy
from OpenSciDraw.training.scorers import Scorers, Scoring, known_figures

if TYPE_CHECKING:
    from OpenSciDraw.training.run import Training

_LOG = logging.getLogger("OpenSciDraw")


class Rounds:
    """Batches of prompts -> batches of drawn and scored pictures.

    Raises:
        UserError: the figures that prompts are scored by cannot be listed; a reward that no metric gives.
    """

    def __init__(self, config: Config, model: FigureModel, old: OldPolicy, negative: Tensor):
        self.config, self.model, self.old, self.negative = config, model, old, negative
        self.scorers = Scorers(config, known_figures(config))
        self.began: dict[str, Any] | None = None  # the sampler's state where the round that is going on began
        self.seconds = {"drawing": 0.0, "waiting": 0.0}

    def of(self, run: Training, prompts: Iterator[Batch]) -> Iterator[Batch]:
        """The batches that the loop trains on, from the run's place on; `prompts` are read as they are needed."""
        accumulated, steps = self.config.gradient_accumulation_steps, self.config.reward.steps_per_round
        with self.scorers:
            while run.step < run.total_steps:
                self.began = run.sampler.state_dict()
                done = run.step % steps  # of a round that was begun before a stop
                batches = list(islice(prompts, accumulated))
                with run.signals.interruptible(run.accelerator.num_processes == 1):
                    with run.accelerator.autocast():
                        drawn = self._draw(batches, run.step - done)
                for _ in range(done, steps):
                    yield from self._scored(batches, drawn)
                    if run.step >= run.total_steps:
                        return

    def end_step(self, step: int) -> None:
        """After optimizer step `step`: at the end of a round the old policy takes the current one in."""
        steps = self.config.reward.steps_per_round
        if step % steps == 0:
            self.old.update(step // steps)
            self.began = None

    # -- one round --------------------------------------------------------------------------------------------
    def _draw(self, batches: list[Batch], first_step: int) -> list[tuple[Tensor, Scoring]]:
        """Pictures of each batch's prompts, whose scoring begins while the next ones are drawn."""
        start = time.perf_counter()
        drawn = []
        try:
            with self.model.as_old_policy():
                for number, batch in enumerate(batches):
                    clean, pictures = self._pictures(batch, f"round {first_step} {number}")
                    size = self.config.reward.group_size
                    prompts = [prompt for prompt in batch.sample_ids for _ in range(size)]
                    drawn.append((clean, self.scorers.submit(pictures, prompts)))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"Drawing {self.at_once(len(batches[0].sample_ids))} pictures at once does not fit into the GPU's memory. "
                "Set a smaller reward.draw_batch."
            ) from error
        self.seconds["drawing"] += time.perf_counter() - start
        return drawn

    def at_once(self, prompts: int) -> int:
        """How many pictures one call of the sampler draws at most."""
        every = prompts * self.config.reward.group_size
        return min(every, self.config.reward.draw_batch or every)

    def _pictures(self, batch: Batch, round_name: str) -> tuple[Tensor, np.ndarray]:
        """Normalised latents (N, Cn, hn, wn), fp32, on the device, and pictures (N, H, W, 3) uint8, prompt by prompt."""
        model, settings = self.model, self.config.reward
        shape, size = self._shape(batch), settings.group_size
        rows = [row.to(model.device, non_blocking=True) for row in self._text(batch)]
        names = picture_ids([f"{round_name} {prompt}" for prompt in batch.sample_ids], size)
        noise = flow.keyed_noise(self.config.seed, -1, names, shape).to(model.device)
        steps, guidance = settings.draw_steps or self.config.num_inference_steps, draw_guidance(self.config)
        clean, pictures = [], []
        for at in range(0, len(names), self.at_once(len(batch.sample_ids))):
            part = slice(at, at + self.at_once(len(batch.sample_ids)))
            text = model.collate_text([rows[number // size] for number in range(len(names))[part]])
            negative = model.collate_text([self.negative.to(model.device)] * len(names[part]))
            latents = sample_normalized(model, text, negative, noise[part], steps, guidance).float()
            clean.append(latents)
            with torch.autocast(model.device.type, enabled=False):
                pixels = model.decode(latents)
            bytes_of = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)  # as the pipelines do it
            pictures.append(bytes_of.permute(0, 2, 3, 1).cpu().numpy())
        return torch.cat(clean), np.concatenate(pictures)

    def _shape(self, batch: Batch) -> tuple[int, int, int]:
        """(Cn, hn, wn) of the normalised latents of a batch's pictures."""
        if batch.latents is not None:
            raw = batch.latents[:1].to(self.model.device)
        else:
            height, width = batch.require_pixels().shape[-2:]
            raw = torch.zeros(1, *self.model.latent_shape(height, width), device=self.model.device)
        _, channels, height, width = self.model.normalize(raw).shape
        return channels, height, width

    def _text(self, batch: Batch) -> list[Tensor]:
        if batch.text is not None:
            return batch.text
        with torch.autocast(self.model.device.type, enabled=False):
            return self.model.encode_prompts(batch.captions)

    def _scored(self, batches: list[Batch], drawn: list[tuple[Tensor, Scoring]]) -> Iterator[Batch]:
        """One after another, as their scores arrive."""
        for batch, (clean, scoring) in zip(batches, drawn, strict=True):
            start = time.perf_counter()
            scores = torch.from_numpy(scoring.wait())
            self.seconds["waiting"] += time.perf_counter() - start
            yield replace(batch, latents=None, pixels=None, noise=None, drawn=Drawn(clean, scores))
