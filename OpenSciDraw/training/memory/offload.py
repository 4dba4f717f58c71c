"""Frozen blocks in CPU memory, each on the device only while it runs.

diffusers' group offloading is for inference: it takes weights away after a block's forward, while autograd still needs them for
the backward. Here every block is recomputed in the backward pass (gradient checkpointing), so that nothing but a
block's inputs outlives its forward, and the recomputation, a forward like any other, brings its weights back. While a block
is away its weights are placeholders of no size: a use at the wrong moment is a crash, on any device, never a wrong result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from OpenSciDraw.parallel.sharding import repeated_blocks


def each(tensor: Any, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of a tensor; of a quantised one, of each tensor inside it (values, scales)."""
    if not is_traceable_wrapper_subclass(tensor):
        return function(tensor)
    names, context = tensor.__tensor_flatten__()
    parts = {name: each(getattr(tensor, name), function) for name in names}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())


class BlockOffload:
    """Keeps the frozen weights of `transformer`'s blocks, which lie on the CPU, there; moves all else to `device`.

    Forward: block i runs while i + 1 is fetched (on a CUDA stream of its own); backward: while i - 1 is. At most
    `resident_blocks` (>= 2) are on the device: before a block's memory is given up, the host waits until the device is
    done with it, so that it cannot queue fetches faster than blocks run. Trained weights (LoRA) are always on the device. Every
    block must be recomputed: one that keeps its activations keeps its weights there as well.
    """

    def __init__(self, transformer: nn.Module, device: torch.device, resident_blocks: int):
        self.device, self.limit = device, resident_blocks
        self.blocks = repeated_blocks(transformer)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._home = [self._take_home(block) for block in self.blocks]
        transformer.to(device)  # the blocks' frozen weights are placeholders now
        self._here: dict[int, torch.cuda.Event | None] = {}  # blocks on the device, and the end of their copying
        self._done: dict[int, torch.cuda.Event] = {}  # the end of their running
        self._running = -1
        self.peak_resident, self.fetched = 0, 0  # blocks at a time; fetches so far
        transformer.register_forward_pre_hook(self._begin)
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda *_, index=index: self._need(index))

    def _take_home(self, block: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
        home = []
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.requires_grad:
                    data = parameter.data if self._stream is None else each(parameter.data, Tensor.pin_memory)
                    home.append((module, name, data))
                    self._set(module, name, self._placeholder(data))
        return home

    def _placeholder(self, data: Tensor) -> Tensor:
        return torch.empty(0, dtype=data.dtype, device=self.device)

    @staticmethod
    def _set(module: nn.Module, name: str, data: Tensor) -> None:
        module._parameters[name] = nn.Parameter(data, requires_grad=False)  # also where data is a quantised subclass

    def _begin(self, *_: Any) -> None:
        self._ran()
        self._running = -1

    def _ran(self) -> None:
        """All that the running block asked of the device is queued."""
        if self._stream is not None and self._running >= 0:
            self._done[self._running] = torch.cuda.current_stream(self.device).record_event()

    def _need(self, index: int) -> None:
        """Block `index` runs now; fetch the one that runs next. Forward goes up; recomputation starts at the last and goes down."""
        following = index + 1 if index > self._running else index - 1
        self._ran()
        self._running = index
        self._fetch(index, keep={index})
        copied = self._here[index]
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
        if 0 <= following < len(self.blocks):
            self._fetch(following, keep={index, following})

    def _fetch(self, index: int, keep: set[int]) -> None:
        if index in self._here:
            return
        while len(self._here) >= self.limit:
            self._send_away(max((at for at in self._here if at not in keep), key=lambda at: abs(at - index)))
        self._here[index] = self._bring(index)
        self.fetched += 1
        self.peak_resident = max(self.peak_resident, len(self._here))

    def _send_away(self, index: int) -> None:
        del self._here[index]
        done = self._done.pop(index, None)
        if done is not None:
            done.synchronize()  # its memory belongs to the copying stream, which may fill it again at once
        for module, name, data in self._home[index]:
            self._set(module, name, self._placeholder(data))

    def _bring(self, index: int) -> torch.cuda.Event | None:
        with torch.cuda.stream(self._stream):  # None: no stream is set
            for module, name, data in self._home[index]:
                self._set(module, name, each(data, lambda tensor: tensor.to(self.device, non_blocking=True)))
            return None if self._stream is None else self._stream.record_event()
