"""What to change when a training step does not fit."""

from __future__ import annotations

from OpenSciDraw.config import Config


def out_of_memory(config: Config, step: int, reason: str) -> str:
    """The keys that would save memory under `config`, the cheapest first. `reason`: the allocator's words."""
    ways = ["mixed_precision = 'bf16'"] if config.mixed_precision == "no" else []
    if not config.gradient_checkpointing:
        ways.append("gradient_checkpointing = True")
    elif config.activation_memory_gb is not None:
        ways.append("activation_memory_gb = None")
    if config.train_batch_size > 1:
        ways.append("train_batch_size = 1 with more gradient_accumulation_steps")
    if not config.use_lora:
        ways += ["use_8bit_adam = True", "master_weights = 'bf16'", "FSDP2 on several GPUs", "use_lora = True"]
    else:
        ways += [] if config.quantization else ["quantization = 'int8'"]
        ways += [] if config.offload else ["offload = True"]
        ways.append(f"a rank below {config.rank}")
    return (
        f"Step {step} does not fit into the device's memory ({reason}). Change one of: {'; '.join(ways)}. "
        "`scienceflow plan CONFIG.py` counts what each saves. The last checkpoint is whole: the same command goes on from there."
    )
