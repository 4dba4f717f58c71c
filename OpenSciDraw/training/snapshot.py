"""Copies in CPU memory of all that a checkpoint holds, so that a thread can write them while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch import Tensor

from OpenSciDraw.parallel.sharding import gathered

SPARE = 0.1  # of the machine's memory, which a snapshot leaves to others


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested dicts and lists, in the order in which `Snapshot.take` copies them."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for node in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_of(node)


class Snapshot:
    """Takes copies, one set at a time: the memory is used again by the next one, and stays with the run.

    From a GPU, whose copies go into pinned memory, `take` only queues them: they are made in the order of the device's work, before
    the next step changes anything, and `arrived` waits for them.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._event: torch.cuda.Event | None = None

    def fits(self, tree: Any) -> bool:
        """Whether there is memory for copies of `tree`, those that are there already counted in."""
        here = sum(buffer.nbytes for buffer in self._buffers)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(tree))
        memory = psutil.virtual_memory()
        return needed <= here or needed - here < memory.available - SPARE * memory.total

    def reserve(self, tree: Any) -> None:
        """Get the memory for copies of `tree` where it fits, before it is needed: to get it takes longer than to fill it."""
        if self.fits(tree):
            self._buffers = [torch.zeros(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in tensors_of(tree)]

    def take(self, tree: Any, keep: bool = True) -> Any:
        """`tree` with copies in the place of its tensors; dealt ones (FSDP2) are gathered, which every rank must ask for.

        Without `keep` (ranks that do not write) nothing is copied and None stands in their places.
        """
        buffers, self._buffers = self._buffers, []
        on_gpu: list[Tensor] = []

        def copy(tensor: Tensor) -> Tensor | None:
            whole = gathered(tensor).detach()
            if not keep:
                return None
            old = buffers[len(self._buffers)] if len(self._buffers) < len(buffers) else None
            if old is None or old.shape != whole.shape or old.dtype != whole.dtype:
                old = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=whole.is_cuda)
            self._buffers.append(old)
            on_gpu.extend([whole] if whole.is_cuda else [])
            return old.copy_(whole, non_blocking=True)

        copied = _mapped(tree, copy)
        self._event = torch.cuda.current_stream(on_gpu[0].device).record_event() if on_gpu else None
        return copied

    def arrived(self) -> None:
        """Wait until the copies are there."""
        if self._event is not None:
            self._event.synchronize()


def _mapped(node: Any, copy: Callable[[Tensor], Tensor | None]) -> Any:
    if isinstance(node, Tensor):
        return copy(node)
    if isinstance(node, dict):
        return {key: _mapped(value, copy) for key, value in node.items()}
    return [_mapped(value, copy) for value in node] if isinstance(node, (list, tuple)) else node
