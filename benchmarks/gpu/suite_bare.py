"""What the loop is held against: the card's own matrix product, a bare training step, the bare pipeline."""

from __future__ import annotations

import time
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from peft import LoraConfig
from suite_bench import Bench, drawn_transformer
from torch import Tensor, nn

from OpenSciDraw.models.base import build_model


def card_rate(bench: Bench) -> dict[str, Any]:
    """TFLOP/s of a product of two bf16 matrices of 8192 x 8192: the card's ceiling, as the suite counts it."""
    side, repetitions = (256, 2) if bench.rehearse else (8192, 20)
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    bench.synchronize()
    start = time.perf_counter()
    for _ in range(repetitions):
        a @ b
    bench.synchronize()
    return {"tflops": 2 * side**3 * repetitions / (time.perf_counter() - start) / 1e12}


def _adapted(bench: Bench, kind: str, in_bf16: bool) -> Any:
    """diffusers' transformer with PEFT's adapters on every linear layer of the blocks; fp32 adapters unless `in_bf16`."""
    model = build_model(bench.config(kind, "bare"), bench.device)
    transformer = drawn_transformer(model, bench.device, torch.bfloat16)
    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    names = [name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear) and name.startswith(blocks)]
    transformer.add_adapter(LoraConfig(r=bench.rank, lora_alpha=bench.rank, target_modules=names))
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16 if in_bf16 else torch.float32)
    return transformer.train()


def bare_step(bench: Bench, kind: str, autocast: bool, recompute: bool, batch: int = 1) -> dict[str, Any]:
    """Forward, backward and fused AdamW on tensors that are on the device, and nothing else (FLUX.2-klein)."""
    transformer = _adapted(bench, kind, in_bf16=not autocast)
    if recompute:
        transformer.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=1e-4, fused=bench.cuda)
    side, device = bench.side // (8 if bench.rehearse else 16), bench.device
    clean = torch.randn(batch, transformer.config.in_channels, side, side, device=device)
    text = torch.randn(batch, bench.text_tokens, transformer.config.joint_attention_dim, device=device, dtype=torch.bfloat16)
    ids = {"img_ids": Flux2KleinPipeline._prepare_latent_ids(clean), "txt_ids": Flux2KleinPipeline._prepare_text_ids(text)}
    ids = {name: value.to(device) for name, value in ids.items()}
    packed = Flux2KleinPipeline._pack_latents(clean)

    def step() -> None:
        noise, sigma = torch.randn_like(packed), torch.rand(batch, device=device)
        level = sigma.view(-1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            predicted: Tensor = transformer(
                hidden_states=((1 - level) * packed + level * noise).bfloat16(), encoder_hidden_states=text, guidance=None,
                timestep=sigma if autocast else sigma.bfloat16(), return_dict=False, **ids,
            )[0]  # fmt: skip
        (predicted.float() - (noise - packed)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = []
    for _ in range(bench.steps(12)):
        bench.synchronize()
        start = time.perf_counter()
        step()
        bench.synchronize()
        seconds.append(time.perf_counter() - start)
    middle = median(seconds[4:] or seconds[-1:])
    found: dict[str, Any] = {"images_per_second": batch / middle}
    if bench.cuda:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found
