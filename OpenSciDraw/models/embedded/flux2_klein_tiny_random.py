"""`embedded:flux2_klein_tiny_random`: FLUX.2-klein's own classes at small width, built from code.

Its transformer and text encoder are random; its VAE is a Haar transform written into the weights, so that
encoded figures can be looked at without any training.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from OpenSciDraw.models.embedded import fill, tokenizer
from OpenSciDraw.registry import EMBEDDED

_GROUPS = 4  # GroupNorm groups of the VAE
_K = 64.0  # constant channels of +-K pin GroupNorm's statistics, see _linear_head


@EMBEDDED.register("flux2_klein_tiny_random")
def build_flux2_klein_tiny_random(folder: Path) -> None:
    """FLUX.2-klein at width 192: 2 dual + 2 single blocks, 28-layer Qwen3 of width 64, 4x VAE (8 px a token)."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokens = tokenizer()
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=28,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    fill(text_encoder, seed=1, residual_gain=0.3)
    transformer = Flux2Transformer2DModel(
        in_channels=128, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=6,
        joint_attention_dim=3 * 64, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False,
    )  # fmt: skip
    fill(transformer, seed=2, residual_gain=1.0)
    _straight_through(transformer)
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 32, 80), layers_per_block=1, norm_num_groups=_GROUPS, sample_size=128,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    _write_haar_vae(vae)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, use_dynamic_shifting=True)
    pipe = Flux2KleinPipeline(scheduler, vae, text_encoder, tokens, transformer)
    pipe.save_pretrained(folder)


def _straight_through(transformer: nn.Module) -> None:
    """Let the noisy latent reach the output: orthonormal columns in, their transpose out, AdaLN of the output at zero.

    A random projection would hide the latent behind it. The width is more than the latent's 128 channels, so that
    the final LayerNorm does not fix the size of the output.
    """
    weights = dict(transformer.named_parameters())
    basis, _ = torch.linalg.qr(weights["x_embedder.weight"].double())
    signs = torch.sign(basis[0])  # QR is unique up to signs
    basis = (basis * signs).float()
    with torch.no_grad():
        weights["x_embedder.weight"].copy_(basis)
        weights["proj_out.weight"].copy_(basis.T)
        weights["norm_out.linear.weight"].zero_()


# -- VAE: a two-level Haar transform in the weights of AutoencoderKLFlux2 ------------------------
# Colours: luma and two differences; inverse below. Rows: Y, Cb, Cr from R, G, B.
_TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
# 1-D analysis on pixels (2i, 2i+1): low pass and detail. The detail is a quarter of the difference:
# nearest-neighbour synthesis with the kernel (1, 0, -1) writes it on four pixels instead of two, and
# this is the least-squares factor for a first-order process of correlation 0.9.
_ANALYSIS = ((0.5, 0.5), (-0.25, 0.25))
_SYNTHESIS = ((0.0, 1.0, 0.0), (1.0, 0.0, -1.0))
# Of the 3 x 16 second-level coefficients the 32 kept: all of luma, for colour those of low first level
# and the first-level details' means.
_KEPT = [(0, a, b) for a in range(4) for b in range(4)]
_KEPT += [(c, 0, b) for c in (1, 2) for b in range(4)] + [(c, a, 0) for c in (1, 2) for a in (1, 2, 3)]
_KEPT += [(c, a, 3) for c in (1, 2) for a in (1,)]  # fills up to 32


def _analysis_kernel(band: int) -> Tensor:
    """(3, 3) kernel, stride 2, of band 2 * vertical + horizontal; the third tap is not used."""
    vertical, horizontal = (torch.tensor([*_ANALYSIS[k], 0.0]) for k in divmod(band, 2))
    return torch.outer(vertical, horizontal)


def _synthesis_kernel(band: int) -> Tensor:
    vertical, horizontal = (torch.tensor(_SYNTHESIS[k]) for k in divmod(band, 2))
    return torch.outer(vertical, horizontal)


def _linear_head(channels: int, signals: int) -> tuple[Tensor, Tensor]:
    """(channels, signals) weights and (channels,) bias that make GroupNorm + SiLU a linear map.

    Every signal s appears as +s and -s in one group: silu(s) - silu(-s) = s, and the group's mean stays 0.
    Constants +-K fill the group: its standard deviation is then that of the constants, whatever s is.
    """
    weight, bias = torch.zeros(channels, signals), torch.zeros(channels)
    per_group = channels // _GROUPS
    pairs = math.ceil(signals / _GROUPS)
    for signal in range(signals):
        group, place = divmod(signal, pairs)
        at = group * per_group + 2 * place
        weight[at, signal], weight[at + 1, signal] = 1.0, -1.0
    constants = torch.where(weight.abs().sum(1) == 0)[0]
    bias[constants[0::2]], bias[constants[1::2]] = _K, -_K
    return weight, bias


def _close_head(norm: nn.GroupNorm, weight: Tensor, bias: Tensor) -> Tensor:
    """Set GroupNorm's gain to undo its own scaling; return (signals, channels), the inverse map after SiLU."""
    constants = bias.view(_GROUPS, -1)
    std = constants.pow(2).mean(1).sqrt()
    with torch.no_grad():
        norm.weight.copy_(std.repeat_interleave(constants.shape[1]))
        norm.bias.zero_()
        norm.weight[bias != 0] = 0.0
    return weight.T


def _write_haar_vae(vae: Any) -> None:
    """Zero every residual branch and write the transform into the convolutions around them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(vae.named_parameters()):
            silent = any(part in name for part in ("conv2.", "to_out.0"))
            if parameter.ndim == 4 and not silent and "conv1" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            elif not (parameter.ndim == 1 and "norm" in name and name.endswith("weight")):
                parameter.zero_()
        _write_encoder(vae)
        _write_decoder(vae)
    _set_bn(vae)


def _write_encoder(vae: Any) -> None:
    net = vae.encoder
    net.conv_in.weight[:3, :, 1, 1] = _TO_YCC
    first, second = (net.down_blocks[i].downsamplers[0].conv for i in (0, 1))
    for colour in range(3):
        for band in range(4):
            first.weight[4 * colour + band, colour] = _analysis_kernel(band)
    shortcut = net.down_blocks[1].resnets[0].conv_shortcut
    shortcut.weight[:12, :, 0, 0] = torch.eye(12, 16)
    for at, (colour, a, b) in enumerate(_KEPT):
        second.weight[at, 4 * colour + a] = _analysis_kernel(b)
    weight, bias = _linear_head(80, 32)
    head = net.down_blocks[2].resnets[0].conv_shortcut
    head.weight[:, :, 0, 0] = weight
    head.bias.copy_(bias)
    net.conv_out.weight[:32, :, 1, 1] = _close_head(net.conv_norm_out, weight, bias)
    net.conv_out.bias[32:] = -10.0  # log-variance: the posterior is as good as its mode
    vae.quant_conv.weight[:, :, 0, 0] = torch.eye(64)
    vae.post_quant_conv.weight[:, :, 0, 0] = torch.eye(32)


def _write_decoder(vae: Any) -> None:
    net = vae.decoder
    net.conv_in.weight[:32, :, 1, 1] = torch.eye(32)
    first, second = (net.up_blocks[i].upsamplers[0].conv for i in (0, 1))
    for at, (colour, a, b) in enumerate(_KEPT):
        first.weight[4 * colour + a, at] += _synthesis_kernel(b)
    net.up_blocks[1].resnets[0].conv_shortcut.weight[:12, :, 0, 0] = torch.eye(12, 80)
    for colour in range(3):
        for band in range(4):
            second.weight[colour, 4 * colour + band] = _synthesis_kernel(band)
    weight, bias = _linear_head(16, 3)
    head = net.up_blocks[2].resnets[0].conv_shortcut
    head.weight[:, :3, 0, 0] = weight
    head.bias.copy_(bias)
    to_rgb = torch.linalg.inv(_TO_YCC.double()).float()
    net.conv_out.weight[:, :, 1, 1] = to_rgb @ _close_head(net.conv_norm_out, weight, bias)


def _set_bn(vae: Any) -> None:
    """BatchNorm statistics of 2x2-patched latents of drawn figures, rounded so that they are the same anywhere."""
    import numpy as np

    from OpenSciDraw.drawn.figure import draw_figure

    rows = []
    for index in range(48):
        image = draw_figure(seed=11, index=index, size=128).image.resize((128, 128))
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mode()
        b, c, h, w = latents.shape
        rows.append(latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4 * c))
    values = torch.cat(rows).double()
    vae.bn.running_mean.copy_(torch.round(values.mean(0) * 100) / 100)
    vae.bn.running_var.copy_(torch.round(values.var(0) * 1e5).clamp(min=10) / 1e5)
