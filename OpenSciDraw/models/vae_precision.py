"""In which precision the VAE encodes figures, and how "auto" chooses it: by the error that it makes in the latents.

fp32 is exact. In tf32 the factors of products and convolutions have 10 bits after the point, in bf16 all numbers have 7.
torch lets convolutions take tf32 unless it is told otherwise, so both are said here, around the VAE's call alone.
(channels_last is left out: a GroupNorm stands before each convolution of these VAEs, and on CUDA it returns NCHW whatever
it is given, so that every layer would be copied there and back: 61 ms a figure of 1024 px on an H200, where NCHW takes 38.)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from OpenSciDraw.models.base import FigureModel

_LOG = logging.getLogger("OpenSciDraw")
AUTO, EXACT = "auto", "fp32"
FASTEST_FIRST = ("bf16", "tf32", EXACT)  # on tensor cores. Not timed: processes that choose alone must choose alike
ERROR_BOUND = 2.0**-9  # what storing latents in bf16 does to each of them at most: encoding may add no more than that
PICTURES = 4  # that are encoded in order to choose
QUERIES = 4096  # of the VAE's attention at once: 0.27 GB of fp32 scores for a figure of 1024 px


class AttentionByProducts:
    """Processor of diffusers' Attention for (B, C, H, W), as AutoencoderKL's encoder calls it: AttnProcessor2_0 by matrix products.

    Its one head is 512 wide. No fused kernel takes that in fp32 on tensor cores: on an H200 a figure of 1024 px took 48 ms in tf32
    with the kernel that torch chooses and 38 ms so.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: None = None, attention_mask: None = None, temb: None = None
    ) -> Tensor:
        batch, channels, height, width = hidden_states.shape
        rows = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        query, key, value = (
            layer(rows).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        with sdpa_kernel(SDPBackend.MATH):
            parts = [F.scaled_dot_product_attention(part, key, value) for part in query.split(QUERIES, 2)]
        out = attn.to_out[0](torch.cat(parts, 2).transpose(1, 2).flatten(2))
        out = out.transpose(1, 2).reshape(batch, channels, height, width)
        return (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor


def attend_by_products(encoder: nn.Module) -> None:
    """Give each Attention of diffusers in the encoder the processor above; a second call changes nothing."""
    from diffusers.models.attention_processor import Attention

    for module in encoder.modules():
        if isinstance(module, Attention) and not isinstance(module.processor, AttentionByProducts):
            module.set_processor(AttentionByProducts())


@contextmanager
def products_in_tf32(allowed: bool) -> Iterator[None]:
    """Whether CUDA's products and convolutions of fp32 tensors may round their factors; as it was afterwards."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


@torch.no_grad()
def encode_in(precision: str, model: FigureModel, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] -> raw latents (B, C, h, w), fp32. On a CPU tf32 is fp32."""
    vae = model.vae_in(torch.bfloat16) if precision == "bf16" else model.vae
    on_cuda = model.device.type == "cuda"
    if on_cuda and vae.dtype == torch.float32:
        attend_by_products(vae.encoder)
    with products_in_tf32(precision == "tf32") if on_cuda else nullcontext():
        return model.encode_with(vae, pixels.to(model.device, vae.dtype, non_blocking=True)).float()


def latent_errors(model: FigureModel, pictures: Sequence[Tensor], precisions: Sequence[str]) -> dict[str, float]:
    """Of each precision: RMS of the difference from fp32's latents over the RMS of those, over all `pictures` (1, 3, H, W)."""
    difference, size = dict.fromkeys(precisions, 0.0), 0.0
    for picture in pictures:
        exact = encode_in(EXACT, model, picture)
        size += exact.square().sum().item()
        for precision in precisions:
            difference[precision] += (encode_in(precision, model, picture) - exact).square().sum().item()
    return {precision: math.sqrt(total / size) for precision, total in difference.items()}


def fastest_within(errors: dict[str, float], bound: float = ERROR_BOUND) -> str:
    """The fastest precision whose error is at most `bound`; an error that is not a number is above any."""
    return next((name for name in FASTEST_FIRST if name in errors and errors[name] <= bound), EXACT)


def drawn_pictures(height: int, width: int) -> Iterator[Tensor]:
    """Figures drawn by the program as pixels (1, 3, height, width) in [-1, 1]: the same for every process."""
    from OpenSciDraw.drawn.figure import draw_figure

    for index in range(PICTURES):
        image = draw_figure(seed=0, index=index, size=max(height, width)).image.convert("RGB").resize((width, height))
        yield torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def choose(model: FigureModel, pictures: Iterable[Tensor]) -> str:
    """What "auto" means here: on a GPU with tensor cores for tf32 and bf16 what `pictures` (1, 3, H, W) allow, else fp32."""
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (8, 0):
        return EXACT
    pictures = list(pictures)
    if not pictures:
        return EXACT
    errors = latent_errors(model, pictures, FASTEST_FIRST[:-1])
    chosen = fastest_within(errors)
    measured = ", ".join(f"{name} {error:.3%}" for name, error in errors.items())
    _LOG.info(
        "encode.vae_precision = 'auto': error of the latents of %d pictures: %s; allowed %.3f%% (as bf16 rounds): %s",
        len(pictures), measured, 100 * ERROR_BOUND, chosen,
    )  # fmt: skip
    return chosen
