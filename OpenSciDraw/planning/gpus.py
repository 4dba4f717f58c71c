"""What GPUs have: memory and peak speed, from NVIDIA's data sheets (dense tensor-core rates, without sparsity)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    memory_gb: float  # 1e9 bytes that a program can use, about
    tflops: float  # 1e12 FLOP/s with bf16 inputs; fp16 where `bf16` is False
    bf16: bool = True


GPUS: dict[str, Gpu] = {
    "V100-32GB": Gpu(34.0, 125, bf16=False),
    "RTX3090-24GB": Gpu(25.3, 71),
    "RTX4090-24GB": Gpu(25.3, 165),
    "RTX5090-32GB": Gpu(33.7, 209),
    "A6000-48GB": Gpu(50.9, 155),
    "L40S-48GB": Gpu(47.7, 362),
    "A100-40GB": Gpu(42.3, 312),
    "A100-80GB": Gpu(84.9, 312),
    "H100-80GB": Gpu(84.9, 989),
    "H200-141GB": Gpu(150.0, 989),
    "B200-180GB": Gpu(191.0, 2250),
}
