"""FLUX.2's rotary embedding, SwiGLU and attention with fewer kernels: the pipeline's bits forward, half of its work backward.

Shapes: B batch, N tokens, H heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
    Flux2PosEmbed,
    Flux2SwiGLU,
)
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]  # cosines and signed sines (N, d), fp32


class _Rotate(torch.autograd.Function):
    """x (B, N, H, d) turned by cos, sin (N, d): x cos + R x sin, R (a, b) = (-b, a) for neighbouring pairs.

    `signed` is sin with the signs of R, (-sin, sin) for each pair, so that R x sin is x with its pairs swapped times `signed`.
    diffusers' `apply_rotary_emb` computes in fp32 and rounds once. So does this, but numbers are converted inside the products and
    the sum, not by copies of x; the gradient is rounded once too. The two of a pair have one angle, so R^T (g sin) = (R^T g) sin.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed)
        return torch.add(x * cos[:, None], _swapped(x) * signed[:, None], out=torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        cos, signed = ctx.saved_tensors
        return torch.sub(grad * cos[:, None], _swapped(grad) * signed[:, None], out=torch.empty_like(grad)), None, None


def _swapped(x: Tensor) -> Tensor:
    """(…, a, b, c, d) -> (…, b, a, d, c)"""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _with_signs(module: nn.Module, arguments: Any, rotary: Rotary) -> Rotary:
    """Hook behind Flux2PosEmbed: the sines as `_Rotate` wants them, once a forward."""
    cos, sin = rotary
    first, second = sin.unflatten(-1, (-1, 2)).unbind(-1)
    return cos, torch.stack([-first, second], -1).flatten(-2)


class _SwiGLU(torch.autograd.Function):
    """x (…, 2 n) -> silu(a) b of its halves a, b; keeps x alone, and writes its gradient in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, value = x.chunk(2, -1)
        return F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        gate, value = x.chunk(2, -1)
        if torch.compiler.is_compiling():  # which makes one kernel of it, and knows no `out` that is part of a tensor
            return torch.cat([torch.ops.aten.silu_backward(grad * value, gate), grad * F.silu(gate)], -1)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_gate, grad_value = out.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=grad_value)
        torch.ops.aten.silu_backward.grad_input(grad * value, gate, grad_input=grad_gate)
        return out


class SwiGLU(nn.Module):
    """In the place of diffusers' Flux2SwiGLU, which has no parameters either."""

    def forward(self, x: Tensor) -> Tensor:
        return _SwiGLU.apply(x)


class DualAttention(Flux2AttnProcessor):
    """Flux2AttnProcessor for whole q, k, v projections, with the rotation above."""

    def __call__(
        self, attn: Flux2Attention, hidden_states: Tensor, encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None, image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert image_rotary_emb is not None
        image = [layer(hidden_states).unflatten(-1, (-1, attn.head_dim)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = [layer(encoder_hidden_states).unflatten(-1, (-1, attn.head_dim)) for layer in added]
        query = torch.cat([attn.norm_added_q(text[0]), attn.norm_q(image[0])], dim=1)
        key = torch.cat([attn.norm_added_k(text[1]), attn.norm_k(image[1])], dim=1)
        value = torch.cat([text[2], image[2]], dim=1)
        out = dispatch_attention_fn(
            _Rotate.apply(query, *image_rotary_emb), _Rotate.apply(key, *image_rotary_emb), value,
            attn_mask=attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config,
        ).flatten(2, 3)  # fmt: skip
        length = encoder_hidden_states.shape[1]
        of_text, of_image = out.split([length, out.shape[1] - length], dim=1)
        return attn.to_out[1](attn.to_out[0](of_image)), attn.to_add_out(of_text)


class SingleAttention(Flux2ParallelSelfAttnProcessor):
    """Flux2ParallelSelfAttnProcessor whose q, k, v and MLP part are split once, so that their gradients are joined once."""

    def __call__(
        self, attn: Flux2ParallelSelfAttention, hidden_states: Tensor,
        attention_mask: Tensor | None = None, image_rotary_emb: Rotary | None = None,
    ) -> Tensor:  # fmt: skip
        assert image_rotary_emb is not None
        width = attn.inner_dim
        projected = attn.to_qkv_mlp_proj(hidden_states)
        *qkv, mlp = projected.split([width, width, width, projected.shape[-1] - 3 * width], dim=-1)
        query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in qkv)
        out = dispatch_attention_fn(
            _Rotate.apply(attn.norm_q(query), *image_rotary_emb), _Rotate.apply(attn.norm_k(key), *image_rotary_emb), value,
            attn_mask=attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config,
        ).flatten(2, 3)  # fmt: skip
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(mlp)], dim=-1))


def use_few_kernels(transformer: nn.Module) -> None:
    """Put the classes above in the place of diffusers' own, in `transformer` (a Flux2Transformer2DModel)."""
    for module in list(transformer.modules()):
        if isinstance(module, Flux2PosEmbed) and _with_signs not in module._forward_hooks.values():
            module.register_forward_hook(_with_signs)
        elif isinstance(module, Flux2Attention):
            module.set_processor(DualAttention())
        elif isinstance(module, Flux2ParallelSelfAttention):
            module.set_processor(SingleAttention())
        for name, child in module.named_children():
            if isinstance(child, Flux2SwiGLU):
                setattr(module, name, SwiGLU())
