"""The loss on rows that are never trained on, at fixed noise and fixed noise levels."""

from __future__ import annotations

import logging

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from OpenSciDraw import flow
from OpenSciDraw.config import Config
from OpenSciDraw.datasets.arxiv_parquet import RowDataset
from OpenSciDraw.datasets.batch import BadRow, Sample, collate
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.losses import clean_latents, losses_at
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.parallel.ranks import evaluating, share_of

_LOG = logging.getLogger("OpenSciDraw")
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def held_out_loss(
    model: FigureModel, dataset: RowDataset, rows: np.ndarray, config: Config, accelerator: Accelerator
) -> dict[str, float]:
    """Mean unweighted loss over `rows` at the QUANTILES of the trained noise levels (0.9 = noisy), and at each.

    Noise is keyed by (seed, sample) alone, so two steps, two runs and any number of ranks compare like with
    like. Returns `held_out_loss` and, for each quantile, `held_out_loss_q<quantile>`.
    """
    if not len(rows):
        return {}
    quantiles = torch.tensor(QUANTILES)  # of sigma, which falls as diffusers' u rises
    sums = torch.zeros(len(QUANTILES) + 1, device=accelerator.device)
    wrapped = model.transformer
    with evaluating(wrapped, accelerator) as model.transformer:  # unwrapped: DDP's own collectives are not wanted here
        for at, counts in share_of(len(rows), accelerator):
            row = dataset.read(int(rows[at]))
            if isinstance(row, BadRow):  # named and left out; what is run in its place does not count
                _LOG.warning("held-out row %s cannot be read: %s", row.id, row.reason)
                row, counts = _readable(dataset, rows), False
            batch = collate([row])
            sums[-1] += counts
            clean = clean_latents(model, batch)
            shift = flow.shift_of(config.timestep_shift, tokens=clean.shape[-2] * clean.shape[-1])
            base = flow.sigma_of_quantile(
                1 - quantiles, config.weighting_scheme, config.logit_mean, config.logit_std, config.mode_scale
            )
            text = batch.text if batch.text is not None else model.encode_instructions(batch.captions, batch.pictures())
            with accelerator.autocast():
                sums[:-1] += counts * losses_at(model, batch, clean, text, flow.shift_sigma(base, shift), config.seed)
    model.transformer = wrapped
    total: Tensor = accelerator.reduce(sums, reduction="sum").cpu()
    per_level = total[:-1] / total[-1]
    names = [f"held_out_loss_q{q:.1f}" for q in QUANTILES]
    return {"held_out_loss": per_level.mean().item(), **dict(zip(names, per_level.tolist(), strict=True))}


def _readable(dataset: RowDataset, rows: np.ndarray) -> Sample:
    for index in rows.tolist():
        row = dataset.read(index)
        if isinstance(row, Sample):
            return row
    raise UserError(f"None of the {len(rows)} held-out rows can be read: see quarantine.jsonl and `scienceflow verify`.")
