"""Frozen blocks in CPU memory, each on the device only while it runs.

diffusers' group offloading is for inference: it takes weights away after a block's forward, while autograd still needs them for
the backward. Here every block is recomputed in the backward pass (gradient checkpointing), so that nothing but a
block's inputs outlives its forward, and its weights come back for the recomputation. While a block is away its
weights are placeholders of no size: a use at the wrong moment is a crash, on any device, never a wrong result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from OpenSciDraw.utils.sharding import repeated_blocks


class BlockOffload:
    """Keeps the frozen weights of `transformer`'s blocks, which lie on the CPU, there; moves all else to `device`.

    Forward: block i runs while i + 1 is fetched (on a CUDA stream of its own); backward: while i - 1 is. At most
    `resident_blocks` (>= 2) are on the device. Trained weights (LoRA) always are. Every block must be recomputed.
    """

    def __init__(self, transformer: nn.Module, device: torch.device, resident_blocks: int):
        self.device, self.limit = device, resident_blocks
        self.blocks = repeated_blocks(transformer)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._home = [self._take_home(block) for block in self.blocks]
        transformer.to(device)  # the blocks' frozen weights are placeholders now
        self._here: dict[int, torch.cuda.Event | None] = {}
        self._backward = False
        self.peak_resident, self.fetched = 0, 0  # blocks at a time; fetches so far
        transformer.register_forward_pre_hook(self._begin)
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda *_, index=index: self._need(index))
            block.register_full_backward_pre_hook(lambda *_, index=index: self._need_backward(index))

    def _take_home(self, block: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
        home = []
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.requires_grad:
                    data = parameter.data.pin_memory() if self._stream is not None else parameter.data
                    home.append((module, name, data))
                    self._set(module, name, self._placeholder(data))
        return home

    def _placeholder(self, data: Tensor) -> Tensor:
        return torch.empty(0, dtype=data.dtype, device=self.device)

    @staticmethod
    def _set(module: nn.Module, name: str, data: Tensor) -> None:
        module._parameters[name] = nn.Parameter(data, requires_grad=False)  # also where data is a quantised subclass

    def _begin(self, *_: Any) -> None:
        self._backward = False

    def _need_backward(self, index: int) -> None:
        self._backward = True
        self._need(index)

    def _need(self, index: int) -> None:
        """Block `index` runs now; fetch the one that runs next."""
        following = index - 1 if self._backward else index + 1
        self._fetch(index, keep={index})
        event = self._here[index]
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
            self._here[index] = None
        if 0 <= following < len(self.blocks):
            self._fetch(following, keep={index, following})

    def _fetch(self, index: int, keep: set[int]) -> None:
        if index in self._here:
            return
        while len(self._here) >= self.limit:
            away = max((at for at in self._here if at not in keep), key=lambda at: abs(at - index))
            del self._here[away]
            for module, name, data in self._home[away]:
                self._set(module, name, self._placeholder(data))
        self._here[index] = self._bring(index)
        self.fetched += 1
        self.peak_resident = max(self.peak_resident, len(self._here))

    def _bring(self, index: int) -> torch.cuda.Event | None:
        if self._stream is None:
            for module, name, data in self._home[index]:
                self._set(module, name, data.to(self.device))
            return None
        main = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            for module, name, data in self._home[index]:
                copy = data.to(self.device, non_blocking=True)
                copy.record_stream(main)  # its memory is not given to others before the block has run
                self._set(module, name, copy)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event
