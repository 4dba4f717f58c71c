"""Kernels, copies between types and bytes of one training step at real shapes, ours and a bare loop's, without a GPU.

Command:  python benchmarks/run_step_counts.py

Forward, loss, backward and optimizer step of FLUX.2-klein, 1024 x 1024 px (4,096 + 512 tokens), batch 1, a LoRA of rank 128 on
all linear layers of the blocks, on meta tensors (step_counts.py says what is counted as one kernel). Bare: diffusers' model and
PEFT's adapters in bf16 throughout, fused AdamW. Products are matrix products; bytes are what all other kernels but attention
read and write: over the card's bandwidth they give the time outside the products.
"""

from __future__ import annotations

from typing import Any

import torch
from report import Result
from step_counts import StepCount, fused_kernels, launches

from OpenSciDraw.config import Config
from OpenSciDraw.models.base import FigureModel, TextBatch
from OpenSciDraw.planning.step_cost import planned_model
from OpenSciDraw.training.memory.activations import set_checkpointing
from OpenSciDraw.weights import trainable
from OpenSciDraw.weights.precision import compute_throughout

LAYERS = "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"
SIDE, TEXT = 64, 512  # tokens of a side of 1024 px; of a caption


def settings(name: str, recompute: bool = False) -> Config:
    return Config.model_validate({
        "model_type": "Flux2Klein", "pretrained_model_name_or_path": name, "mixed_precision": "bf16", "rank": 128,
        "lora_alpha": 128, "lora_layers": LAYERS, "gradient_checkpointing": recompute, "dataset": {"base_dir": "none"},
    })  # fmt: skip


def prepared(model: FigureModel, config: Config, ours: bool) -> Any:
    """The transformer on meta with its adapters, as training prepares it, or as a bare loop in bf16 does."""
    transformer = model.empty_transformer(torch.bfloat16)
    trainable.make_trainable(transformer, config)
    transformer.to("meta")  # its adapters
    if ours:
        compute_throughout(model, transformer, config)
        set_checkpointing(transformer, config.model_copy(update={"activation_memory_gb": None}), torch.device("cpu"), 0)
    else:
        transformer.to(torch.bfloat16)
    model.transformer = transformer.train()
    return transformer


def count_step(config: Config, ours: bool, side: int = SIDE, text: int = TEXT) -> StepCount:
    """One step on meta tensors."""
    with planned_model(config) as (model, _):
        transformer = prepared(model, config, ours)
        noisy = torch.randn(1, transformer.config.in_channels, side, side, device="meta")
        rows = torch.randn(1, text, model.text_shape()[1], device="meta", dtype=torch.bfloat16)
        with StepCount() as count, fused_kernels(count):
            predicted = model.velocity(noisy, torch.rand(1, device="meta"), TextBatch(rows))
            (predicted.float() - noisy).pow(2).mean().backward()
        sizes = [p.numel() for p in transformer.parameters() if p.requires_grad]
        width = 4 if ours else 2
        count.add("fused AdamW", launches(sizes, 4), 7 * width * sum(sizes))  # weight, gradient, two moments; all but one written
        count.add("norm of gradients", launches(sizes, 1) + 2, width * sum(sizes))
        count.add("clipping", launches(sizes, 1), 2 * width * sum(sizes))
    return count


def main() -> None:
    result = Result(
        "step_counts", "python benchmarks/run_step_counts.py",
        ["model", "step", "kernels", "products", "copies between types", "GB outside products"],
    )  # fmt: skip
    for size in ("4B", "9B"):
        name = f"black-forest-labs/FLUX.2-klein-base-{size}"
        for what, config, ours in (
            ("bare, bf16 throughout", settings(name), False),
            ("ours, nothing recomputed", settings(name), True),
            ("ours, all blocks recomputed", settings(name, recompute=True), True),
        ):
            count = count_step(config, ours)
            gigabytes = count.other_bytes / 1e9
            row = [f"{count.kernels:,}", f"{count.products:,}", f"{count.casts:,}", f"{gigabytes:.1f}"]
            result.rows.append([f"klein-{size}", what, *row])
            result.numbers[f"klein-{size}, {what}"] = {
                "kernels": count.kernels, "products": count.products, "casts": count.casts, "other_bytes": count.other_bytes,
                "by_name": dict(count.by_name.most_common()),
            }  # fmt: skip
    result.notes.append("Goal for klein-4B, nothing recomputed: 2,500 kernels, 200 copies at most. Counted, not measured on a GPU.")
    result.save()


if __name__ == "__main__":
    main()
