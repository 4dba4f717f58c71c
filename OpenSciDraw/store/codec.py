"""How prompt embeddings lie in the bytes of a store: exact in bf16, or in half of that.

An embedding is (L, D): one row a token. In "int8" each GROUP channels of a token share a scale (bf16), the
largest magnitude among them / 127; in "fp8" all channels of a token share one that puts their largest at
448, the end of float8_e4m3fn. Scales are per token because a few tokens of a language model are a hundred
times larger than the rest (Sun et al. 2024, "Massive Activations in Large Language Models"), and int8's
are per group because a few channels are as well. Measured errors: benchmarks/RESULTS.md, docs/encode.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CODECS = {"bf16": "bfloat16", "int8": "int8", "fp8": "fp8"}  # config's name: the contract's
GROUP = 128  # channels of a token that share a scale in int8: 1.6 % of the bytes
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def encoded_bytes(shape: Sequence[int], codec: str) -> int:
    """Bytes of a tensor of this shape."""
    values = math.prod(shape)
    return 2 * values if codec == "bfloat16" else values + 2 * _scales(shape, codec)


def encode(tensor: Tensor, codec: str) -> bytes:
    """Bytes of a tensor: bf16 of any shape; int8 and fp8 of (L, D), the values and then their scales.

    Raises:
        ValueError: values that are not finite, which no scale could bear.
    """
    if codec == "bfloat16":
        return _bytes_of(tensor.to(torch.bfloat16))
    groups = _grouped(tensor.float(), codec)
    scale = (groups.abs().amax(-1, keepdim=True) / _LARGEST[codec]).bfloat16()
    if not torch.isfinite(scale).all():
        raise ValueError(f"the embedding has values that are not finite: it cannot be stored as {codec}")
    scaled = groups / torch.where(scale == 0, 1.0, scale.float())
    scaled = scaled.clamp(-_LARGEST[codec], _LARGEST[codec])  # the scale was rounded, perhaps down
    values = (scaled.round() if codec == "int8" else scaled).to(_TYPES[codec])
    return _bytes_of(values) + _bytes_of(scale)


def decode(buffer: Tensor, shape: Sequence[int], codec: str) -> Tensor:
    """The tensor, bf16, of `buffer` (bytes,) uint8; for bf16 it shares the buffer's memory."""
    if codec == "bfloat16":
        return buffer.view(torch.bfloat16).view(*shape)
    count = math.prod(shape)
    values = _grouped(buffer[:count].view(_TYPES[codec]).view(*shape), codec)
    scale = buffer[count:].clone().view(torch.bfloat16).view(*values.shape[:-1], 1)  # cloned: bf16 needs even addresses
    return (values.float() * scale.float()).bfloat16().view(*shape)


def _scales(shape: Sequence[int], codec: str) -> int:
    tokens, width = shape
    return tokens * (width // _group(width) if codec == "int8" else 1)


def _grouped(tensor: Tensor, codec: str) -> Tensor:
    """(L, groups, channels) of (L, D)."""
    tokens, width = tensor.shape
    return tensor.reshape(tokens, -1, _group(width) if codec == "int8" else width)


def _group(width: int) -> int:
    return math.gcd(width, GROUP)


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
