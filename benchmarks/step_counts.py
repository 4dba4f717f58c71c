"""Kernels, copies between types and bytes of a training step, counted on meta tensors: no GPU, no memory, no noise.

Meta tensors follow the dtype rules of the operations themselves, so without autocast a step on them launches what a GPU
launches, with attention as one kernel forward and three backward (FlashAttention: the row sums of dO * O, dK and dV with
dQ, a cast of dQ).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# what only looks at memory in another way, or only names memory
NO_KERNEL = {
    "view", "_unsafe_view", "t", "transpose", "detach", "slice", "split", "split_with_sizes", "unsqueeze", "squeeze", "expand",
    "alias", "permute", "chunk", "unbind", "select", "as_strided", "empty", "empty_like", "empty_strided", "new_empty",
    "new_empty_strided", "_reshape_alias", "lift_fresh", "is_same_size", "unfold", "view_as_real", "view_as_complex",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_mm"}
TENSORS_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # of torch's multi-tensor kernels, by the number of lists
BLOCKS_A_LAUNCH, CHUNK = 320, 65536
FUSED = {"attention": 1, "attention_backward": 3, "rms_norm": 1, "rms_norm_backward": 1}  # whose weight is frozen
ZERO_AND_COPY = {"slice_backward", "select_backward"}  # two kernels each


def launches(sizes: list[int], lists: int) -> int:
    """Kernels of a multi-tensor operation on `lists` lists of tensors of `sizes` values (aten's MultiTensorApply.cuh)."""
    kernels = tensors = blocks = 0
    for size in sizes:
        tensors += 1
        for _ in range(-(-size // CHUNK)):
            blocks += 1
            if blocks == BLOCKS_A_LAUNCH:
                kernels, blocks, tensors = kernels + 1, 0, 1
        if tensors == TENSORS_A_LAUNCH[lists] and blocks:
            kernels, blocks, tensors = kernels + 1, 0, 0
    return kernels + bool(blocks)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


class StepCount(TorchDispatchMode):
    """`with StepCount() as count:` run a step; then `kernels`, `casts` (copies between types), `other_bytes` (outside products)."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.kernels, self.casts, self.cast_bytes, self.other_bytes, self.products = 0, 0, 0, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = str(function).removeprefix("aten.").split(".")[0]
        if name in NO_KERNEL or name.startswith("sym_"):
            return out
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
        count = 2 if name in ZERO_AND_COPY else 1
        if name.startswith(("_foreach", "_fused_adam")):
            count = launches([t.numel() for t in lists[0]], len(lists))
        moved = _bytes(args) + _bytes(out)
        self.add(name, count, moved)
        copied = name in ("copy_", "_foreach_copy_") and _dtype(args[0]) != _dtype(args[1])
        if copied or (name == "_to_copy" and _dtype(args[0]) != out.dtype):
            self.casts, self.cast_bytes = self.casts + count, self.cast_bytes + moved
        return out

    def add(self, name: str, kernels: int, moved: int) -> None:
        self.by_name[name] += kernels
        self.kernels += kernels
        if name in PRODUCTS:
            self.products += kernels
        elif "attention" not in name:
            self.other_bytes += moved


def _dtype(value: Any) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor) else value[0].dtype


class _Attention(torch.autograd.Function):
    """Attention that only counts itself: (B, heads, N, d) each."""

    @staticmethod
    def forward(ctx: Any, counter: StepCount, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        counter.add("attention", FUSED["attention"], 0)
        ctx.save_for_backward(query, key, value)
        ctx.counter = counter
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.counter.add("attention_backward", FUSED["attention_backward"], 0)
        return (None, *(torch.empty_like(tensor) for tensor in ctx.saved_tensors))


class _RMSNorm(torch.autograd.Function):
    """torch's fused kernel, which needs input and weight of one type."""

    @staticmethod
    def forward(ctx: Any, counter: StepCount, x: Tensor) -> Tensor:
        counter.add("rms_norm", FUSED["rms_norm"], 2 * _bytes(x))
        ctx.save_for_backward(x)
        ctx.counter = counter
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.counter.add("rms_norm_backward", FUSED["rms_norm_backward"], 3 * _bytes(x))
        return None, torch.empty_like(x)


@contextmanager
def fused_kernels(counter: StepCount) -> Iterator[None]:
    """Attention and RMSNorm as the kernels that a GPU has for them; meta tensors would split both into their parts."""
    functional = torch.nn.functional
    real, norm = functional.scaled_dot_product_attention, functional.rms_norm

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Attention.apply(counter, query, key, value)

    def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        one_type = weight is None or weight.dtype == x.dtype
        return _RMSNorm.apply(counter, x) if one_type else norm(x, shape, weight, eps)

    functional.scaled_dot_product_attention, functional.rms_norm = attention, rms_norm  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.rms_norm = real, norm  # type: ignore[assignment]
