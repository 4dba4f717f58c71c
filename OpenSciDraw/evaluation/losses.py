"""The loss of figures at given noise levels: of held-out rows while training, and of a run in `evaluate`."""

from __future__ import annotations

import torch
from torch import Tensor

from OpenSciDraw import flow
from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.models.base import FigureModel


def clean_latents(model: FigureModel, batch: Batch) -> Tensor:
    """What the transformer denoises, (B, Cn, hn, wn): from stored latents, or from pixels."""
    return model.normalize(batch.latents if batch.latents is not None else model.encode_images(batch.require_pixels()))


@torch.no_grad()
def losses_at(model: FigureModel, batch: Batch, clean: Tensor, text_rows: list[Tensor], sigmas: Tensor, seed: int) -> Tensor:
    """Mean unweighted loss of a batch at each noise level of `sigmas` (K,); (K,). Noise is keyed by (seed, sample)."""
    text = model.collate_text([row.to(clean.device) for row in text_rows])
    references = model.normalize_references(batch.references, are_pixels=batch.latents is None)
    noise = flow.keyed_noise(seed, -1, batch.sample_ids, clean.shape[1:]).to(clean.device)
    losses = []
    for level in sigmas.to(clean.device):
        level = level.expand(len(clean))
        noisy = flow.interpolate(clean, noise, level)
        predicted = model.velocity(noisy, level, text, references) if references else model.velocity(noisy, level, text)
        losses.append((predicted.float() - flow.velocity_target(clean, noise)).pow(2).mean())
    return torch.stack(losses)
