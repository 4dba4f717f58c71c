"""Training on rewards in rounds: draw pictures of the next prompts, have them scored, learn from them in one step or several.

A round has the prompts of one optimizer step (`gradient_accumulation_steps` batches on each rank), of which the old policy draws
`group_size` pictures each, and `steps_per_round` steps that go over all of them. Its prompts follow from the sampler's place, its
noise from (seed, step, prompt), its scores from the pictures. A checkpoint inside a round keeps the place where the round began and
the old policy, so a run that goes on draws the same pictures again.
"""

from __future__ import annotations

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
from OpenSciDraw.inference.pictures import decoded, draw_guidance
from OpenSciDraw.inference.sample import sample_normalized
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.train_iteration_funcs.reward import picture_ids
from OpenSciDraw.training.old_policy import OldPolicy
from OpenSciDraw.training.scorers import Scorers, Scoring, known_figures

if TYPE_CHECKING:
    from OpenSciDraw.training.run import Training


class Rounds:
    """Batches of prompts -> batches of drawn and scored pictures.

    Raises:
        UserError: the figures that prompts are scored by cannot be listed; a reward that no metric gives.
    """

    def __init__(self, config: Config, model: FigureModel, old: OldPolicy, negative: Tensor):
        self.config, self.model, self.old, self.negative = config, model, old, negative
        self.scorers = Scorers(config, known_figures(config))
        self.began: dict[str, Any] | None = None  # the sampler's state where the round that is going on began

    def of(self, run: Training, prompts: Iterator[Batch]) -> Iterator[Batch]:
        """The batches that the loop trains on, from the run's place on; `prompts` are read as they are needed."""
        accumulated, steps = self.config.gradient_accumulation_steps, self.config.reward.steps_per_round
        with self.scorers:
            while run.step < run.total_steps:
                self.began = run.sampler.state_dict()
                done = run.step % steps  # of a round that was begun before a stop
                batches = list(islice(prompts, accumulated))
                with run.signals.interruptible(run.accelerator.num_processes == 1), run.accelerator.autocast():
                    drawn = self._draw(batches, run.step - done)
                for _ in range(done, steps):
                    for batch, scoring in drawn:
                        start = time.perf_counter()
                        scores = torch.from_numpy(scoring.wait())
                        run.log.waited(time.perf_counter() - start)
                        assert batch.drawn is not None
                        yield replace(batch, drawn=replace(batch.drawn, scores=scores))
                    if run.step >= run.total_steps:
                        return

    def end_step(self, step: int) -> None:
        """After optimizer step `step`: at the end of a round the old policy takes the current one in."""
        steps = self.config.reward.steps_per_round
        if step % steps == 0:
            self.old.update(step // steps)
            self.began = None

    # -- one round --------------------------------------------------------------------------------------------
    def _draw(self, batches: list[Batch], first_step: int) -> list[tuple[Batch, Scoring]]:
        """Each batch with pictures of its prompts, whose scoring begins while the next ones are drawn."""
        drawn = []
        try:
            with self.model.as_old_policy():
                for number, batch in enumerate(batches):
                    batch = replace(batch, text=self._text(batch))  # encoded once
                    clean, pictures = self._pictures(batch, f"round {first_step} {number}")
                    prompts = [prompt for prompt in batch.sample_ids for _ in range(self.config.reward.group_size)]
                    there = Drawn(clean, torch.empty(0))  # scores follow
                    batch = replace(batch, latents=None, pixels=None, noise=None, drawn=there)
                    drawn.append((batch, self.scorers.submit(pictures, prompts)))
        except torch.OutOfMemoryError as error:
            raise UserError(
                "Drawing so many pictures at once does not fit into the GPU's memory. Set a smaller reward.draw_batch (now "
                f"{self.config.reward.draw_batch}; None: {self.config.train_batch_size * self.config.reward.group_size})."
            ) from error
        return drawn

    def _pictures(self, batch: Batch, round_name: str) -> tuple[Tensor, np.ndarray]:
        """Normalised latents (N, Cn, hn, wn), fp32, on the device, and pictures (N, H, W, 3) uint8, prompt by prompt.

        All ranks call the sampler equally often, because a sharded model runs on all of them together: who has too few pictures
        for that draws the first one again and leaves it out.
        """
        model, settings = self.model, self.config.reward
        shape, size = self._shape(batch), settings.group_size
        drawn = size - settings.include_figure  # of each prompt
        calls = -(-self.config.train_batch_size * drawn // settings.draw_batch) if settings.draw_batch else 1
        rows = [row.to(model.device, non_blocking=True) for row in self._text(batch)]
        names = picture_ids([f"{round_name} {prompt}" for prompt in batch.sample_ids], drawn)
        noise = flow.keyed_noise(self.config.seed, -1, names, shape).to(model.device)
        steps, guidance = settings.draw_steps or self.config.num_inference_steps, draw_guidance(self.config)
        clean, pictures = [], []
        for part in np.array_split(np.arange(len(names)), calls):
            chosen = part.tolist() or [0]
            text = model.collate_text([rows[number // drawn] for number in chosen])
            negative = model.collate_text([self.negative.to(model.device)] * len(chosen))
            latents = sample_normalized(model, text, negative, noise[chosen], steps, guidance).float()
            if len(part):
                clean.append(latents)
                pictures.append(decoded(model, latents))
        if not settings.include_figure:
            return torch.cat(clean), np.concatenate(pictures)
        figures = self._figures(batch)
        both = zip(torch.cat(clean).split(drawn), figures.split(1), strict=True)
        shown = zip(np.split(np.concatenate(pictures), len(figures)), np.split(decoded(model, figures), len(figures)), strict=True)
        return torch.cat([part for pair in both for part in pair]), np.concatenate([part for pair in shown for part in pair])

    def _figures(self, batch: Batch) -> Tensor:
        """The data's own figures, (B, Cn, hn, wn) normalised latents."""
        with torch.autocast(self.model.device.type, enabled=False):
            stored = batch.latents
            raw = self.model.encode_images(batch.require_pixels()) if stored is None else stored.to(self.model.device)
            return self.model.normalize(raw).float()

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
