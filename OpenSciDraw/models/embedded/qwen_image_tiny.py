"""`embedded:qwen_image_tiny`: Qwen-Image's own classes at small width, built from code.

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

_K = 64.0  # constant channels of +-K pin the size of a pixel's RMS norm, see _linear_head
_LATENTS = 16  # channels, as in the large model
# With these words as one token each the template is 34 + 5 tokens long, as with Qwen's own tokenizer.
_TEMPLATE_WORDS = (
    "system user assistant Describe the image by detailing color shape size texture quantity text spatial relationships "
    "of objects and background"
)
# Qwen/Qwen-Image-2512, scheduler/scheduler_config.json
SCHEDULER = {
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 8192, "max_shift": 0.9, "num_train_timesteps": 1000,
    "shift": 1.0, "shift_terminal": 0.02, "time_shift_type": "exponential", "use_dynamic_shifting": True,
}  # fmt: skip


def template_tokenizer() -> Any:
    """The embedded tokenizer with one token for each word of Qwen-Image's template, which Krea 2 has too."""
    from tokenizers import AddedToken

    tokens = tokenizer()
    for word in _TEMPLATE_WORDS.split():
        inside = word not in ("system", "user", "assistant", "Describe")  # a line break, not a space, goes before or after these
        tokens.add_tokens([AddedToken(word, single_word=True, lstrip=inside, normalized=False)])
    return tokens


@EMBEDDED.register("qwen_image_tiny")
def build_qwen_image_tiny(folder: Path) -> None:
    """Qwen-Image at width 128: 3 dual-stream blocks, 2-layer Qwen2.5-VL of width 64, 4x VAE (8 px a token)."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokens = template_tokenizer()
    text = dict(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokens.eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[0])
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    text_encoder = Qwen2_5_VLForConditionalGeneration(config)
    fill(text_encoder, seed=1, residual_gain=0.3)
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * _LATENTS, out_channels=_LATENTS, num_layers=3, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    fill(transformer, seed=2, residual_gain=1.0)
    _straight_through(transformer)
    vae = AutoencoderKLQwenImage(
        base_dim=16, z_dim=_LATENTS, dim_mult=[1, 1, 3], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * _LATENTS, latents_std=[1.0] * _LATENTS,
    )  # fmt: skip
    _write_haar_vae(vae)
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    QwenImagePipeline(scheduler, vae, text_encoder, tokens, transformer).save_pretrained(folder)


def _straight_through(transformer: nn.Module) -> None:
    """Let the noisy latent reach the output: orthonormal columns in, their transpose out, AdaLN of the output at zero.

    A random projection would hide the latent behind it. The width is twice the latent's 64 channels, so that the final
    LayerNorm does not fix the size of the output.
    """
    weights = dict(transformer.named_parameters())
    basis, _ = torch.linalg.qr(weights["img_in.weight"].double())
    basis = (basis * torch.sign(basis[0])).float()  # QR is unique up to signs
    with torch.no_grad():
        weights["img_in.weight"].copy_(basis)
        weights["proj_out.weight"].copy_(basis.T)
        weights["norm_out.linear.weight"].zero_()


# -- VAE: a two-level Haar transform in the weights of AutoencoderKLQwenImage ---------------------
# Only the last tap in time is written: of a film's first frame the causal convolutions see nothing else.
_TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])  # Y, Cb, Cr from R, G, B
# 1-D analysis on pixels (2i, 2i+1): low pass and detail. The detail is a quarter of the difference: upsampling to the
# nearest and the kernel (1, 0, -1) write it on four pixels instead of two, and this is the least-squares factor for a
# first-order process of correlation 0.9.
_ANALYSIS = ((0.5, 0.5, 0.0), (-0.25, 0.25, 0.0))
_SYNTHESIS = ((0.0, 1.0, 0.0), (1.0, 0.0, -1.0))
# (colour, band of the first level, band of the second) of the channels: of 3 x 4 x 4 about those that vary most over drawn
# figures. A band is 2 * vertical + horizontal.
_KEPT = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 1, 0), (0, 1, 1), (0, 1, 2), (0, 2, 0), (0, 2, 1), (0, 2, 2)]
_KEPT += [(1, 0, 0), (1, 0, 1), (1, 0, 2), (2, 0, 0), (2, 0, 1), (2, 0, 2)]


def _kernel(taps: tuple[tuple[float, ...], ...], band: int) -> Tensor:
    """(3, 3) kernel of a band."""
    return torch.outer(*(torch.tensor(taps[k]) for k in divmod(band, 2)))


def _linear_head(channels: int, signals: int) -> tuple[Tensor, Tensor]:
    """(channels, signals) weights and (channels,) bias that make RMS norm + SiLU a linear map.

    Every signal s appears as +s and -s: silu(s) - silu(-s) = s. The other channels hold +-K, so large that the pixel's
    norm is theirs whatever s is.
    """
    weight, bias = torch.zeros(channels, signals), torch.zeros(channels)
    weight[0 : 2 * signals : 2], weight[1 : 2 * signals : 2] = torch.eye(signals), -torch.eye(signals)
    bias[2 * signals :: 2], bias[2 * signals + 1 :: 2] = _K, -_K
    return weight, bias


def _close_head(norm: nn.Module, weight: Tensor, bias: Tensor) -> Tensor:
    """Set the RMS norm's gain to undo its own scaling; return (signals, channels), the inverse map after SiLU."""
    gain = (bias.norm() / math.sqrt(len(bias))) * (bias == 0)
    norm.get_parameter("gamma").copy_(gain.view(-1, 1, 1, 1))
    return weight.T


def _write_haar_vae(vae: Any) -> None:
    """Zero every residual branch and write the transform into the convolutions around them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(vae.named_parameters()):
            if "conv1.weight" in name:  # conv2 after it is silent
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            elif not name.endswith("gamma"):
                parameter.zero_()
        _write_encoder(vae)
        _write_decoder(vae)
    _set_statistics(vae)


def _write_encoder(vae: Any) -> None:
    net = vae.encoder
    net.conv_in.weight[:3, :, -1, 1, 1] = _TO_YCC
    shrink = [net.down_blocks[at].resample[1] for at in (1, 3)]
    for colour in range(3):
        for band in range(4):
            shrink[0].weight[4 * colour + band, colour] = _kernel(_ANALYSIS, band)
    for at, (colour, first, second) in enumerate(_KEPT):
        shrink[1].weight[at, 4 * colour + first] = _kernel(_ANALYSIS, second)
    weight, bias = _linear_head(48, _LATENTS)
    head = net.down_blocks[-1].conv_shortcut
    head.weight[:, :, 0, 0, 0] = weight
    head.bias.copy_(bias)
    net.conv_out.weight[:_LATENTS, :, -1, 1, 1] = _close_head(net.norm_out, weight, bias)
    net.conv_out.bias[_LATENTS:] = -10.0  # log-variance: the posterior is as good as its mode
    vae.quant_conv.weight[:, :, 0, 0, 0] = torch.eye(2 * _LATENTS)
    vae.post_quant_conv.weight[:, :, 0, 0, 0] = torch.eye(_LATENTS)


def _write_decoder(vae: Any) -> None:
    net = vae.decoder
    net.conv_in.weight[:_LATENTS, :, -1, 1, 1] = torch.eye(_LATENTS)
    first_level, second_level = (block.upsamplers[0].resample[1] for block in net.up_blocks[:2])
    for at, (colour, first, second) in enumerate(_KEPT):
        first_level.weight[4 * colour + first, at] = _kernel(_SYNTHESIS, second)
    net.up_blocks[1].resnets[0].conv_shortcut.weight[:12, :12, 0, 0, 0] = torch.eye(12)
    for colour in range(3):
        for band in range(4):
            second_level.weight[colour, 4 * colour + band] = _kernel(_SYNTHESIS, band)
    weight, bias = _linear_head(16, 3)
    head = net.up_blocks[2].resnets[0].conv_shortcut
    head.weight[:, :3, 0, 0, 0] = weight
    head.bias.copy_(bias)
    net.conv_out.weight[:, :, -1, 1, 1] = torch.linalg.inv(_TO_YCC.double()).float() @ _close_head(net.norm_out, weight, bias)


def _set_statistics(vae: Any) -> None:
    """latents_mean and latents_std of drawn figures, rounded so that they are the same anywhere."""
    import numpy as np

    from OpenSciDraw.drawn.figure import draw_figure

    images = [draw_figure(seed=11, index=index, size=128).image.resize((128, 128)) for index in range(48)]
    pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in images]).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = vae.encode((pixels.float() / 127.5 - 1).unsqueeze(2)).latent_dist.mode().double()
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(
        latents_mean=[round(value, 2) for value in mean.tolist()],
        latents_std=[max(round(value, 4), 0.001) for value in std.tolist()],
    )
