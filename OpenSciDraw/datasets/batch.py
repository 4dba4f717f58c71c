"""The typed batch that flows from a dataset to an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One figure of a dataset. Absent parts (None) are encoded during training.

    `latents` (C, h, w) raw; `text` (L, D); `pixels` (3, H, W) in [-1, 1].
    """

    id: str
    caption: str
    latents: Tensor | None = None
    text: Tensor | None = None
    pixels: Tensor | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read: quarantined by name, counted, never trained on."""

    id: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """B samples of one bucket.

    `latents` (B, C, h, w) raw or None; `text` B tensors (L_i, D) or None; `pixels` (B, 3, H, W) or None;
    `bad` the rows that were asked for and could not be read; `noise` (B, C h w) keyed by `micro_step` and sample, where the data
    workers have drawn it (datasets/ahead.py).
    """

    sample_ids: list[str]
    captions: list[str]
    latents: Tensor | None
    text: list[Tensor] | None
    pixels: Tensor | None
    bad: list[BadRow]
    noise: Tensor | None = None
    micro_step: int = -1

    def pin_memory(self) -> Batch:
        """In memory that a GPU copies from while the program goes on; DataLoader calls this in a thread of its own."""

        def pinned(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.pin_memory()

        text = None if self.text is None else [row.pin_memory() for row in self.text]
        return replace(self, latents=pinned(self.latents), text=text, pixels=pinned(self.pixels), noise=pinned(self.noise))

    def require_pixels(self) -> Tensor:
        if self.pixels is None:
            raise RuntimeError("a batch carries latents or pixels")
        return self.pixels


def collate(rows: Sequence[Sample | BadRow]) -> Batch:
    """Stack the samples of one bucket; bad rows are carried by name."""
    samples = [row for row in rows if isinstance(row, Sample)]

    def stack(parts: list[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.stack(present) if present else None

    text = [s.text for s in samples if s.text is not None]
    return Batch(
        sample_ids=[s.id for s in samples],
        captions=[s.caption for s in samples],
        latents=stack([s.latents for s in samples]),
        text=text or None,
        pixels=stack([s.pixels for s in samples]),
        bad=[row for row in rows if isinstance(row, BadRow)],
    )
