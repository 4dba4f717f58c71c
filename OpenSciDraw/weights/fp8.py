"""Products of the frozen base in 8-bit floats (`fp8_products`): forward, and the gradient of the input.

Each product's factors are scaled to the range of e4m3 (448), row by row: a token's activations, an output's weights; for the
gradient a token's gradient, an input's weights. Two 8-bit copies of a weight, one for each direction (Hopper's kernel wants the
rows of both factors to run along the sum), replace the bf16 one: the same bytes. Sums are fp32 and results bf16; adapters, norms
and attention stay as they are.
Formats: arXiv:2209.05433. Kernel: torch._scaled_mm with rowwise scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from OpenSciDraw.errors import UserError
from OpenSciDraw.parallel.sharding import repeated_blocks

TYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(TYPE).max  # 448
CAPABILITY = (8, 9)  # Ada and Hopper have such products
MULTIPLE = 16  # of both sides of a weight, for the kernel


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, K) -> 8-bit values (N, K) and fp32 scales (N, 1): x = values * scales."""
    scale = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True, dtype=torch.float32).clamp_(min=1e-12).div_(LARGEST)
    return (x / scale).clamp_(-LARGEST, LARGEST).to(TYPE), scale


def scaled_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(a a_scale) (b b_scale)^T in `dtype` of 8-bit a (N, K), b (M, K) with scales (N, 1), (M, 1).

    Devices without the kernel multiply the numbers that the values stand for, in fp32: the same up to the order of sums, and slow.
    """
    if a.device.type == "cuda":
        return torch._scaled_mm(a, b.T, scale_a=a_scale, scale_b=b_scale.T, out_dtype=dtype, use_fast_accum=True)
    return ((a.float() * a_scale) @ (b.float() * b_scale).T).to(dtype)


class Fp8Linear(nn.Module):
    """A frozen nn.Linear whose products are 8-bit: `forward` for x (N, in) -> (N, out) in x's type."""

    weight: Tensor
    weight_scale: Tensor
    turned: Tensor
    turned_scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        for name, matrix in (("weight", layer.weight.detach()), ("turned", layer.weight.detach().T)):
            values, scale = quantize_rows(matrix.contiguous())
            self.register_buffer(name, values)
            self.register_buffer(f"{name}_scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        return self.product(rows, *quantize_rows(rows.detach())).unflatten(0, x.shape[:-1])

    def product(self, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        """The layer's output for x (N, in), whose 8-bit form is known."""
        return _Product.apply(x, values, scale, self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor, layer: Fp8Linear) -> Tensor:
        ctx.layer = layer
        y = scaled_product(values, scale, layer.weight, layer.weight_scale, x.dtype)
        return y if layer.bias is None else y.add_(layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        values, scale = quantize_rows(grad)
        layer = ctx.layer
        return scaled_product(values, scale, layer.turned, layer.turned_scale, grad.dtype), None, None, None


def use_fp8_products(transformer: nn.Module, device: torch.device) -> int:
    """Replace the frozen linear layers in `transformer`'s blocks, adapted or not; returns how many.

    Raises:
        UserError: the GPU has no such products.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"fp8_products = True: {name} has no 8-bit float products (Ada, Hopper and later have). Set it to False.")
    count = 0
    for block in repeated_blocks(transformer):
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if not isinstance(child, nn.Linear) or type(child) is not nn.Linear or child.weight.requires_grad:
                    continue
                if child.in_features % MULTIPLE == 0 and child.out_features % MULTIPLE == 0:
                    setattr(module, name, Fp8Linear(child))
                    count += 1
    return count
