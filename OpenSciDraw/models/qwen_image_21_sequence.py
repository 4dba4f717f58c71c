"""Qwen-Image-2.1's transformer with its sequence laid out in Python: the same bits, and nothing waits for the device.

The released forward reads which token stands where from a mask on the device, several times a step. All samples of a batch share
one layout, so it is known beforehand: here it comes as a tuple, and a plan without memory (fake tensors) runs it as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import diffusers
import torch
from torch import Tensor

Shapes = tuple[tuple[int, int, int], ...]  # frames, rows, columns of each picture; the last is the one that is drawn


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one sequence come from, and where they are.

    `order` (S,): positions in text tokens followed by the tokens of all pictures. `positions` 3 x (S,): frame, row, column. `drawn`
    (S,): whether a token is of the picture that is drawn. `segments`: start, end and whether it is text, of all before it.
    """

    order: list[int]
    positions: tuple[list[int], list[int], list[int]]
    drawn: list[bool]
    segments: list[tuple[int, int, bool]]


@lru_cache(maxsize=64)
def layout_of(slots: tuple[bool, ...], shapes: Shapes) -> Layout:
    """`slots` (L,): which tokens of the text stand for a picture that is edited.

    Raises ValueError where they are not as many as these pictures.
    """
    counts = [rows * columns for _, rows, columns in shapes]
    if sum(slots) != len(shapes) - 1:
        raise ValueError(f"the text has places for {sum(slots)} pictures, and there are {len(shapes) - 1}")
    order: list[int] = []
    frames: list[int] = []
    rows: list[int] = []
    columns: list[int] = []
    segments: list[tuple[int, int, bool]] = []
    at = position = picture = 0  # in the text, on all three axes, among the pictures

    def put_picture() -> None:
        nonlocal position, picture
        _, height, width = shapes[picture]
        start = len(slots) + sum(counts[:picture])
        order.extend(range(start, start + counts[picture]))
        frames.extend([position] * counts[picture])
        rows.extend(row for row in range(height // 2 - height, height // 2) for _ in range(width))
        columns.extend(column for _ in range(height) for column in range(width // 2 - width, width // 2))
        position, picture = position + max(height, width), picture + 1

    while at < len(slots):
        begin = len(order)
        if slots[at]:
            at += 1
            put_picture()
            segments.append((begin, len(order), False))
            continue
        end = next((place for place in range(at, len(slots)) if slots[place]), len(slots))
        order.extend(range(at, end))
        for axis in (frames, rows, columns):
            axis.extend(range(position, position + end - at))
        position, at = position + end - at, end
        segments.append((begin, len(order), True))
    before = len(order)
    put_picture()
    return Layout(order, (frames, rows, columns), [False] * before + [True] * counts[-1], segments)


class QwenImage21Transformer2DModel(diffusers.QwenImage21Transformer2DModel):
    """The released class (a folder that it writes names that one); `img_mask` may be the `slots` of `layout_of`."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, img_shapes: Sequence[Sequence[Any]],
        img_mask: Tensor | tuple[bool, ...], encoder_hidden_states_mask: Tensor | None = None, return_dict: bool = True,
        **of_the_pipeline: Any,
    ) -> Any:  # fmt: skip
        if isinstance(img_mask, Tensor):  # the pipeline's own call
            return super().forward(
                hidden_states, encoder_hidden_states, timestep, img_shapes, img_mask, encoder_hidden_states_mask,
                return_dict=return_dict, **of_the_pipeline,
            )  # fmt: skip
        device, batch = hidden_states.device, len(hidden_states)
        layout = layout_of(img_mask, tuple(tuple(shape) for shape in img_shapes[0]))
        order = torch.tensor(layout.order, device=device)
        images, text = self.img_in(hidden_states), self.txt_in(encoder_hidden_states)
        joint = torch.cat([text, images], dim=1).index_select(1, order)
        key_valid = None
        if encoder_hidden_states_mask is not None:
            always = encoder_hidden_states_mask.new_ones(batch, images.shape[1])
            key_valid = torch.cat([encoder_hidden_states_mask, always], dim=1).bool().index_select(1, order)
        self.pos_embed.freqs = [table.to(device) for table in self.pos_embed.freqs]
        places = [torch.tensor(axis, device=device) for axis in layout.positions]
        rotary = torch.cat([table[place] for table, place in zip(self.pos_embed.freqs, places, strict=True)], dim=-1)
        timestep, drawn = timestep.to(images.dtype), None
        if self.config.causal_condition:  # the last row is that of text and of pictures that are edited
            timestep, drawn = torch.cat([timestep, timestep.new_zeros(1)]), torch.tensor(layout.drawn, device=device)
        embedded = self.time_text_embed(timestep, images)
        modulation = self.modulation(embedded)
        for block in self.transformer_blocks:
            # positions of the block's arguments: attention_mask, target_token_mask, three of the cache, segments, key_valid
            rest = (rotary, None, drawn, None, None, None, layout.segments, key_valid)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                joint = self._gradient_checkpointing_func(block, joint, modulation, *rest)
            else:
                joint = block(joint, modulation, *rest)
        output = self.proj_out(self.norm_out(joint, embedded, drawn))
        return {"sample": output} if return_dict else (output,)
