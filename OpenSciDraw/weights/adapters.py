"""LoRA layers with few kernels, and one bf16 copy of what trains for each forward.

Of plain LoRA alone, with or without rsLoRA's scale; DoRA and other kinds (kinds.py) have PEFT's own layers. PEFT makes the layers,
names them, saves and merges them; only their forward, y = x W^T + s (x A^T) B^T (arXiv:2106.09685), differs:

- the low-rank product is added by the matrix product itself (`addmm_`), not scaled, cast and added in kernels of their own;
- layers that read the same input (q, k, v) are computed together: one product with their A stacked, and one gradient of
  the input to which each product adds itself;
- A and B stay fp32 for the optimizer; the type that the base computes in is made of them once a forward, all in one kernel, and
  one kernel takes the gradients back to fp32, where micro-steps accumulate.

Shapes: N tokens of the whole batch, in and out a layer's widths, r the rank, n the layers of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn

from OpenSciDraw.weights.fp8 import Fp8Linear, quantize_rows

ADAPTER = "default"


class AdaptedLinear(lora.Linear):
    """PEFT's LoRA of a linear layer, which takes the short way described above once `Adapters` has given it a group.

    PEFT's own forward stays for what that cannot do: other adapters beside it, merged weights, autocast (fp16), DeepSpeed.
    """

    group: SharedInput | None = None
    place: int = 0  # in the group
    factors: tuple[Tensor, Tensor] | None = None  # this forward's A and B in the base's type; None: cast where they are used
    is_off: bool = False  # see `switched_off` in kinds.py

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.is_off:
            return self.base_layer(x, *args, **kwargs)
        alone = self.active_adapters == [ADAPTER] and not self.merged and not self.disable_adapters and not args and not kwargs
        if self.group is None or not alone or _in_autocast(x):
            return super().forward(x, *args, **kwargs)
        dropout = self.training and isinstance(self.lora_dropout[ADAPTER], nn.Dropout)
        if dropout or not (is_plain(self.base_layer) or isinstance(self.base_layer, Fp8Linear)):
            return self._add_to_base(x)
        return self.group.output(self.place, x)

    def in_type(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) in `dtype`, with their gradients' way to the fp32 weights."""
        if self.factors is not None and self.factors[0].dtype == dtype:
            return self.factors
        return self.lora_A[ADAPTER].weight.to(dtype), self.lora_B[ADAPTER].weight.to(dtype)

    def _add_to_base(self, x: Tensor) -> Tensor:
        """The same sum for a base that computes itself (quantised), or with dropout before A."""
        down, up = self.in_type(x.dtype)
        rows = x.flatten(0, -2)
        y = self.base_layer(rows)
        hidden = self.lora_dropout[ADAPTER](rows) @ down.T
        return y.addmm_(hidden, up.T, alpha=self.scaling[ADAPTER]).unflatten(0, x.shape[:-1])


def _in_autocast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # meta has none


def is_plain(layer: nn.Module) -> bool:
    """Whether it is a frozen nn.Linear with an ordinary weight, not a quantised one."""
    return type(layer) is nn.Linear and type(layer.weight) in (nn.Parameter, Tensor) and not layer.weight.requires_grad


class SharedInput:
    """Layers that are called one after another with the same tensor: the first call computes all of them."""

    def __init__(self, layers: Sequence[AdaptedLinear]):
        self.layers = list(layers)
        self.stacked: Tensor | None = None  # (n r, in): this forward's A of all layers, in the base's type
        self._input: Tensor | None = None
        self._ready: list[Tensor | None] = []  # outputs for `_input` that have not been asked for yet, by place

    def output(self, place: int, x: Tensor) -> Tensor:
        """The output of the layer at `place` for `x` (..., in)."""
        if len(self.layers) == 1:
            return self._compute(x)[0].unflatten(0, x.shape[:-1])
        if x is not self._input or self._ready[place] is None:
            self._input, self._ready = x, list(self._compute(x))
        out = self._ready[place]
        self._ready[place] = None
        if all(other is None for other in self._ready):
            self._input = None
        assert out is not None
        return out.unflatten(0, x.shape[:-1])

    def forget(self) -> None:
        """Drop what nobody asked for (a recomputation stops early)."""
        self._input, self.stacked, self._ready = None, None, []

    def _compute(self, x: Tensor) -> Sequence[Tensor]:
        pairs = [layer.in_type(x.dtype) for layer in self.layers]
        stacked = self.stacked
        if stacked is None or stacked.dtype != x.dtype:
            stacked = pairs[0][0] if len(pairs) == 1 else torch.cat([down for down, _ in pairs])
        rows, ups, bases = x.flatten(0, -2), [up for _, up in pairs], [layer.base_layer for layer in self.layers]
        scales = tuple(layer.scaling[ADAPTER] for layer in self.layers)
        if all(is_plain(base) for base in bases):
            return _Product.apply(rows, scales, stacked, *ups, *(b.weight for b in bases), *(b.bias for b in bases))
        # 8-bit products, of one 8-bit form of the input
        quantized, parts = quantize_rows(rows.detach()), (rows @ stacked.T).chunk(len(bases), 1)
        return [
            base.product(rows, *quantized).addmm_(part, up.T, alpha=scale)
            for base, part, up, scale in zip(bases, parts, ups, scales, strict=True)
        ]


class _Product(torch.autograd.Function):
    """(x, scales, A (n r, in), B_1 … B_n, W_1 … W_n, bias_1 … bias_n) -> y_1 … y_n, y_i (N, out_i)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], down: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        n = len(scales)
        ups, weights, biases = rest[:n], rest[n : 2 * n], rest[2 * n :]
        hidden = x @ down.T
        outputs = []
        for up, weight, bias, scale, part in zip(ups, weights, biases, scales, hidden.chunk(n, 1), strict=True):
            outputs.append(F.linear(x, weight, bias).addmm_(part, up.T, alpha=scale))
        ctx.save_for_backward(x, hidden, down, *ups, *weights)
        ctx.scales = scales
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n, scales = len(ctx.scales), ctx.scales
        x, hidden, down, *rest = ctx.saved_tensors
        ups, weights = rest[:n], rest[n:]
        grad_hidden = torch.empty_like(hidden)
        grad_ups = []
        for grad, up, scale, part, grad_part in zip(grads, ups, scales, hidden.chunk(n, 1), grad_hidden.chunk(n, 1), strict=True):
            grad_part.addmm_(grad, up, beta=0, alpha=scale)
            grad_ups.append(torch.empty_like(up).addmm_(grad.T, part, beta=0, alpha=scale))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                grad_x.addmm_(grad, weight)
            grad_x.addmm_(grad_hidden, down)
        return (grad_x, None, grad_hidden.T @ x, *grad_ups, *[None] * (2 * n))


# -- once a forward ----------------------------------------------------------------------------------
class _InType(torch.autograd.Function):
    """(dtype, rows, tensors): all in `dtype` by one kernel, neighbours stacked by `rows` (numbers of tensors) along dimension 0."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, rows: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.rows, ctx.dtypes = rows, [tensor.dtype for tensor in tensors]
        stacks, parts = _stacks(rows, tensors, dtype)
        torch._foreach_copy_(parts, list(tensors))
        return tuple(stacks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        parts: list[Tensor] = []
        for count, grad in zip(ctx.rows, grads, strict=True):
            parts += grad.chunk(count) if count > 1 else [grad]
        back = [torch.empty_like(part, dtype=dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True)]
        torch._foreach_copy_(back, parts)
        return (None, None, *back)


def _stacks(rows: Sequence[int], tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Memory for stacked tensors, and views of it, one for each of `tensors`."""
    stacks: list[Tensor] = []
    parts: list[Tensor] = []
    at = 0
    for count in rows:
        first = tensors[at]
        stack = torch.empty(count * first.shape[0], *first.shape[1:], dtype=dtype, device=first.device)
        stacks.append(stack)
        parts += stack.chunk(count) if count > 1 else [stack]
        at += count
    return stacks, parts


class Adapters:
    """The adapters of a transformer: which layers share an input, and the copies of A and B that a forward computes with.

    `shared_inputs`: names of sibling layers that are called with one tensor. The copies are made by a hook before each forward of
    the transformer.
    """

    def __init__(self, transformer: nn.Module, shared_inputs: Iterable[Sequence[str]], dtype: torch.dtype | None):
        self.dtype = dtype
        layers = {name: module for name, module in transformer.named_modules() if isinstance(module, AdaptedLinear)}
        self.groups: list[SharedInput] = []
        for name, layer in layers.items():
            if layer.group is not None:
                continue
            stem, _, last = name.rpartition(".")
            together = next((names for names in shared_inputs if last in names), (last,))
            siblings = [layers[path] for other in together if (path := f"{stem}.{other}" if stem else other) in layers]
            same = [s for s in siblings if s.lora_A[ADAPTER].weight.shape == layer.lora_A[ADAPTER].weight.shape]
            group = SharedInput(same)
            self.groups.append(group)
            for place, member in enumerate(same):
                member.group, member.place = group, place
        if dtype is not None and self.groups:
            transformer.register_forward_pre_hook(lambda *_: self.renew())

    def renew(self) -> None:
        """Copies of A (stacked for each group) and B, of the weights as they are now."""
        assert self.dtype is not None
        downs = [layer.lora_A[ADAPTER].weight for group in self.groups for layer in group.layers]
        ups = [layer.lora_B[ADAPTER].weight for group in self.groups for layer in group.layers]
        sizes = [len(group.layers) for group in self.groups]
        copies = _InType.apply(self.dtype, (*sizes, *[1] * len(ups)), *downs, *ups)
        made = iter(copies[len(sizes) :])
        for group, stacked in zip(self.groups, copies, strict=False):
            group.forget()
            group.stacked = stacked
            for layer, down in zip(group.layers, stacked.chunk(len(group.layers)), strict=True):
                layer.factors = (down, next(made))


def copies_of_parameters(module: nn.Module) -> list[Tensor]:
    """Tensors that stand for the parameters of `module` in this forward: of adapters, or of all weights (precision.py)."""
    found: list[Tensor] = []
    for part in module.modules():
        found += [vars(part)[name] for name in part._parameters if name in vars(part)]
        if isinstance(part, AdaptedLinear) and part.factors is not None:
            found += part.factors  # A is a view of its group's stack: one storage
    return found
