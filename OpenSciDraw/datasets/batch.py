"""The typed batch that flows from a dataset to an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

AXES = ("component", "arrow", "text")  # what a loser fails at: the order of axes in every tensor that has them


@dataclass(frozen=True)
class Sample:
    """One figure of a dataset. Absent parts (None) are encoded during training.

    `latents` (C, h, w) raw; `text` (L, D); `pixels` (3, H, W) in [-1, 1]. Of the result of an edit, whose caption is the
    instruction: `references`, what it was made from, raw latents (C, h_i, w_i) or pixels (3, H_i, W_i) as the figure itself is
    given; `edit_boxes` (n, 4), where it changes the figure: x0, y0, x1, y1 as fractions of width and height; None: not known;
    `unprompted` (L, D), the text of the empty prompt, where a text encoder reads it together with the references.
    Of a group of preferences, whose winner is the figure itself: `losers` (D, C, h, w) raw latents, one for each axis (D = 1: the
    one loser of a pair), and `axes` (D,) bool, whether there is a loser; where there is none, its latents mean nothing.
    Of a mixed data set: `source`, which one the figure is of, and `keeps_base`, whether what the base predicts is the target.
    `mask` (H / 8, W / 8) uint8, where the figure counts in the loss, 255 = in full; None: everywhere. `weight`: how much it does.
    """

    id: str
    caption: str
    latents: Tensor | None = None
    text: Tensor | None = None
    pixels: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    edit_boxes: Tensor | None = None
    losers: Tensor | None = None
    axes: Tensor | None = None
    unprompted: Tensor | None = None
    mask: Tensor | None = None
    weight: float = 1.0
    source: int = 0
    keeps_base: bool = False


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read: quarantined by name, counted, never trained on."""

    id: str
    reason: str


@dataclass(frozen=True)
class Drawn:
    """G pictures of each prompt of a batch, which the policy has drawn, and their scores; N = B G, prompt by prompt.

    With `reward.include_figure` the last of each G is the data's own figure.

    `clean` (N, Cn, hn, wn) normalised latents on the device; `scores` (N, M) in [0, 1], on the CPU, one column for each of
    `reward.metrics`, NaN where a score does not apply to a prompt.
    """

    clean: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Batch:
    """B samples of one bucket.

    `latents` (B, C, h, w) raw or None; `text` B tensors (L_i, D) or None; `pixels` (B, 3, H, W) or None;
    `bad` the rows that were asked for and could not be read; `noise` (B, C h w) keyed by `micro_step` and sample, where the data
    workers have drawn it (datasets/ahead.py). Of edits `references`, each stacked to (B, …), `edit_boxes`, one entry for each
    sample, and `unprompted`, B tensors (L_i, D) or None, as in Sample. Of preferences `losers` (B, D, C, h, w) and `axes` (B, D),
    on the CPU. `drawn`: pictures of the captions, where training draws and scores some. `masks`, one entry for each
    sample, `weights` (B,) fp32, `sources` (B,) int64 and `keeps_base` (B,) bool, all on the CPU, as in Sample.
    """

    sample_ids: list[str]
    captions: list[str]
    latents: Tensor | None
    text: list[Tensor] | None
    pixels: Tensor | None
    bad: list[BadRow]
    noise: Tensor | None = None
    micro_step: int = -1
    references: tuple[Tensor, ...] = ()
    edit_boxes: tuple[Tensor | None, ...] = ()
    losers: Tensor | None = None
    axes: Tensor | None = None
    unprompted: list[Tensor] | None = None
    drawn: Drawn | None = None
    masks: tuple[Tensor | None, ...] = ()
    weights: Tensor | None = None
    sources: Tensor | None = None
    keeps_base: Tensor | None = None

    def pictures(self) -> list[list[Tensor]]:
        """Of each sample the pictures that it edits, (3, H_i, W_i) in [-1, 1]; none where the batch carries latents."""
        if self.latents is not None:
            return [[] for _ in self.sample_ids]
        return [[part[at] for part in self.references] for at in range(len(self.sample_ids))]

    def pin_memory(self) -> Batch:
        """In memory that a GPU copies from while the program goes on; DataLoader calls this in a thread of its own."""

        def pinned(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.pin_memory()

        text, unprompted = (None if rows is None else [row.pin_memory() for row in rows] for rows in (self.text, self.unprompted))
        references = tuple(part.pin_memory() for part in self.references)
        return replace(
            self, latents=pinned(self.latents), text=text, pixels=pinned(self.pixels), noise=pinned(self.noise),
            references=references, losers=pinned(self.losers), unprompted=unprompted,
        )  # fmt: skip

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
    unprompted = [s.unprompted for s in samples if s.unprompted is not None]
    return Batch(
        sample_ids=[s.id for s in samples],
        captions=[s.caption for s in samples],
        latents=stack([s.latents for s in samples]),
        text=text or None,
        pixels=stack([s.pixels for s in samples]),
        bad=[row for row in rows if isinstance(row, BadRow)],
        references=tuple(torch.stack(parts) for parts in zip(*(s.references for s in samples), strict=True)),
        edit_boxes=tuple(s.edit_boxes for s in samples),
        losers=stack([s.losers for s in samples]),
        axes=stack([s.axes for s in samples]),
        unprompted=unprompted or None,
        masks=tuple(s.mask for s in samples),
        weights=torch.tensor([s.weight for s in samples]),
        sources=torch.tensor([s.source for s in samples]),
        keeps_base=torch.tensor([s.keeps_base for s in samples]),
    )
