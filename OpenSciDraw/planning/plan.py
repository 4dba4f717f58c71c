"""`scienceflow plan CONFIG.py`: memory, FLOPs, time and disk of a run, before anything loads.

One real step of each picture size runs on fake tensors: FLOPs are counted operation by operation (torch.utils.flop_counter), kept
bytes by training's own ActivationBudget. The rest is arithmetic, see `_memory`. Attention and fp16 as on a CPU, RMSNorm on a GPU.
"""

from __future__ import annotations

import json
import logging
import math
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from typing import Any

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.parallel.sharding import repeated_blocks
from OpenSciDraw.planning.gpus import GPUS
from OpenSciDraw.planning.shapes import Shape, shapes
from OpenSciDraw.planning.step_cost import Step, planned_model, step_cost
from OpenSciDraw.store.codec import encoded_bytes
from OpenSciDraw.training.memory.activations import RESERVE
from OpenSciDraw.training.optimizers.choice import optimizer_bytes
from OpenSciDraw.training.reference import RESIDENT_BLOCKS
from OpenSciDraw.validation_funcs.evaluate_examples import metrics_in_training
from OpenSciDraw.weights import trainable

_LOG = logging.getLogger("OpenSciDraw")
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
DEFAULT_MFU = 0.2  # published for this family: 0.16-0.22 of peak (klein-9B, 4 x A100, 768 px)
DOES_NOT_FIT = 3  # exit code
CONTEXT_BYTES, SPARE = 1.0e9, 0.05  # assumed: CUDA context and libraries; fragmentation, of the GPU's memory
GB = 1e9


_BESIDE = {False: "frozen reference", True: "validation_model"}  # by use_lora: what a second transformer is for
Costs = dict[tuple[Any, ...], "Step"]  # steps that were counted already


# -- what a plan says ---------------------------------------------------------------------------


@dataclass
class Plan:
    """Bytes unless a name says otherwise; `memory` by cause, of one device at its peak while training."""

    model: str
    shapes_from: str
    trainable: int
    frozen: int
    text_encoder: int
    gpu: str
    gpus: int
    engine: str
    mfu: float
    effective_batch: int
    steps: list[Step]
    memory: dict[str, float] = field(default_factory=dict)
    cpu_memory: float = 0.0  # of a process, for a second transformer
    encoding_memory: float = 0.0  # of the phase that encodes prompts, before the transformer loads
    store_per_1000: dict[str, float] = field(default_factory=dict)
    checkpoint: float = 0.0
    checkpoints: int | None = None
    step_flops: float = 0.0  # an optimizer step on one device
    step_seconds: float = 0.0
    total_steps: int | None = None
    changes: list[str] = field(default_factory=list)  # what makes it fit, in order

    @property
    def peak(self) -> float:
        return max(sum(self.memory.values()), self.encoding_memory)

    @property
    def fits(self) -> bool:
        return self.peak <= GPUS[self.gpu].memory_gb * GB


# -- arithmetic -----------------------------------------------------------------------------------
def make_plan(
    config: Config, gpu: str, gpus: int = 1, engine: str = "ddp", mfu: float = DEFAULT_MFU, costs: Costs | None = None
) -> Plan:
    """The plan of `config` on `gpus` devices of kind `gpu` (a name of GPUS).

    Raises:
        UserError: unknown GPU or engine, a model whose shapes are not known, a combination that training refuses.
    """
    if gpu not in GPUS or engine not in ENGINES:
        known = f"GPUs: {', '.join(GPUS)}. Engines: {', '.join(ENGINES)}."
        raise UserError(f"--gpu {gpu} --engine {engine}: not known. {known}")
    if (config.needs_reference or config.trains_rewards) and engine.startswith("zero"):
        what = "keep_base" if config.dataset.keeps_base else repr(config.train_iteration_func_name)
        raise UserError(f"--engine {engine}: {what} does not run under DeepSpeed. Take ddp or fsdp2.")
    if config.mixed_precision == "bf16" and not GPUS[gpu].bf16:
        raise UserError(f"{gpu} has no bf16: mixed_precision = 'bf16' does not run there. Set mixed_precision = 'fp16'.")
    with planned_model(config) as (model, source):
        transformer = model.empty_transformer(trainable.loading_dtype(config))
        trained, parameters = trainable.count_trained(transformer, config), sum(p.numel() for p in transformer.parameters())
        plan = Plan(
            model=config.pretrained_model_name_or_path, shapes_from=source, text_encoder=model.text_encoder_parameters(),
            trainable=trained, frozen=parameters if config.use_lora else 0,
            gpu=gpu, gpus=gpus, engine=engine, mfu=mfu, steps=[],
            effective_batch=config.train_batch_size * config.gradient_accumulation_steps * gpus,
        )  # fmt: skip
        all_shapes = shapes(model, config)
        plan.memory = _memory(plan, config, transformer, model)
        plan.memory[_BESIDE[config.use_lora]], plan.cpu_memory = _frozen_beside(plan, config, transformer)
        plan.encoding_memory = 2 * plan.text_encoder + plan.memory["VAE"] + plan.memory["CUDA context and spare"]
        _disk(plan, config, model, all_shapes)
    plan.steps = _steps(plan, config, all_shapes, {} if costs is None else costs)
    typical, largest = plan.steps[0], plan.steps[-1]
    plan.memory["activations"] = largest.kept
    plan.memory["one block recomputed"] = largest.block if largest.blocks_kept < largest.blocks else 0
    plan.step_flops = typical.flops * config.gradient_accumulation_steps
    plan.step_seconds = plan.step_flops / (GPUS[gpu].tflops * 1e12 * mfu)
    plan.total_steps = config.max_train_steps
    return plan


def _memory(plan: Plan, config: Config, transformer: Any, model: FigureModel) -> dict[str, float]:
    """Bytes on one device by cause, without activations."""
    world, engine = plan.gpus, plan.engine
    weights_over = world if engine in ("fsdp2", "zero3") else 1
    state_over = world if engine != "ddp" else 1
    half = 4 if config.mixed_precision == "no" else 2
    blocks = repeated_blocks(transformer)
    sizes = [sum(p.numel() for p in block.parameters()) if config.use_lora else 0 for block in blocks]
    in_blocks, per_weight = sum(sizes), {None: half, "int8": 1.02, "fp8": 1.02, "nf4": 0.5 + 4 / 64}[config.quantization]
    frozen_blocks = in_blocks * per_weight
    if config.offload:
        frozen_blocks = config.resident_blocks * max(sizes) * per_weight
    own = 2 if config.master_weights == "bf16" else 4  # a LoRA's are fp32
    gathered = 0.0
    if engine in ("fsdp2", "zero3"):  # the block that runs and the next one, and its gradients in fp32
        whole = [sum(p.numel() for p in block.parameters()) for block in blocks]
        learning = plan.trainable / len(blocks) if config.use_lora else max(whole)
        gathered = (max(whole) + (learning if config.use_lora else 0)) * half * 2 + learning * 4
    draws = config.validation_prompts or metrics_in_training(config)
    copies = plan.trainable * half if own > half and engine in ("ddp", "zero2") and config.mixed_precision != "no" else 0
    return {
        "frozen weights": (frozen_blocks + (plan.frozen - in_blocks) * half) / weights_over,
        "trained weights": plan.trainable * own / weights_over,
        "their copies in half precision": copies,
        "gradients": plan.trainable * own / state_over,
        "optimizer": plan.trainable * optimizer_bytes(config) / state_over,
        "average (EMA)": plan.trainable * (8 if config.use_ema else 0) / weights_over,  # and the weights it stands in for
        "old policy": plan.trainable * (4 + own if config.trains_rewards else 0) / weights_over,
        "gathered blocks": gathered,
        # fp32 to encode; half, where that is another, to draw
        "VAE": (4 + (half % 4 if draws else 0)) * sum(p.numel() for p in model.vae.parameters()),
        "text encoder": half * plan.text_encoder if config.text == "online" else 0,
        "CUDA context and spare": CONTEXT_BYTES + SPARE * GPUS[plan.gpu].memory_gb * GB,
    }


def _frozen_beside(plan: Plan, config: Config, transformer: Any) -> tuple[float, float]:
    """Bytes on one device, and in a process's CPU memory, of a second transformer.

    Of all weights it is the frozen copy that preferences are compared with or that teaches, of a LoRA `validation_model`.
    """
    copies = config.needs_reference and not config.use_lora
    if not copies and config.validation_model is None:
        return 0.0, 0.0
    each = 2 if config.mixed_precision == "bf16" or (config.use_lora and config.mixed_precision == "fp16") else 4  # autocast: fp32
    if copies and plan.engine != "ddp":  # dealt over the devices; DeepSpeed is refused before this
        return plan.trainable * each / plan.gpus, 0.0
    blocks = [sum(p.numel() for p in block.parameters()) for block in repeated_blocks(transformer)]
    there, rest = sorted(blocks)[-RESIDENT_BLOCKS:], sum(p.numel() for p in transformer.parameters()) - sum(blocks)
    return (rest + sum(there)) * each, sum(blocks) * each


def _steps(plan: Plan, config: Config, all_shapes: list[Shape], costs: Costs) -> list[Step]:
    """The typical size (nearest to the data's mean tokens) and the largest."""
    budget = None
    if config.gradient_checkpointing and config.activation_memory_gb == "auto" and not config.offload:
        total = GPUS[plan.gpu].memory_gb * GB
        budget = max(1, int(total - sum(plan.memory.values()) - RESERVE * total))
    elif isinstance(config.activation_memory_gb, float):
        budget = int(config.activation_memory_gb * GB)
    mean = sum(shape.tokens * shape.share for shape in all_shapes)
    typical, largest = min(all_shapes, key=lambda shape: abs(shape.tokens - mean)), max(all_shapes, key=lambda shape: shape.tokens)
    steps = []
    for shape in dict.fromkeys((typical, largest)):
        key = (shape, config.train_batch_size, config.use_lora, config.master_weights, config.gradient_checkpointing, budget)
        if key not in costs:
            costs[key] = step_cost(config, shape, budget)
        steps.append(costs[key])
    return steps


def _disk(plan: Plan, config: Config, model: FigureModel, all_shapes: list[Shape]) -> None:
    """Bytes of the store for 1,000 figures, and of a checkpoint."""
    latents = sum(s.share * 2 * math.prod(model.latent_shape(s.height, s.width)) for s in all_shapes)
    row = encoded_bytes((all_shapes[0].text, model.text_shape()[1]), model.text_storage)
    text = row if config.text == "stored" else 0
    plan.store_per_1000 = {"latents": 1000 * latents, "text (at most)": 1000 * text}
    own = 2 if config.master_weights == "bf16" else 4
    state = optimizer_bytes(config.model_copy(update={"offload_optimizer": False}))
    plan.checkpoint = plan.trainable * (own + state + 4 * (config.use_ema + config.trains_rewards))
    plan.checkpoints = config.checkpoints_total_limit


# -- what to change ---------------------------------------------------------------------------------
def _candidates(config: Config, engine: str, gpus: int) -> list[tuple[dict[str, Any], str]]:
    """Changes that save memory, the cheapest first: config keys, or an engine ({} then)."""
    out: list[tuple[dict[str, Any], str]] = []
    if not config.gradient_checkpointing:
        out.append(({"gradient_checkpointing": True}, ""))
    elif isinstance(config.activation_memory_gb, float):  # "auto" gives way by itself
        out.append(({"activation_memory_gb": None}, ""))
    if gpus > 1 and engine == "ddp" and not config.use_lora:
        out.append(({}, "fsdp2"))
    if config.train_batch_size > 1:
        saved = config.train_batch_size
        accumulate = config.gradient_accumulation_steps * saved
        out.append(({"train_batch_size": 1, "gradient_accumulation_steps": accumulate}, ""))
    if config.use_lora:
        if config.quantization is None and config.bnb_quantization_config_path is None:
            out.append(({"quantization": "int8"}, ""))
        if not config.offload:
            out.append(({"offload": True}, ""))
    else:
        if config.optimizer == "AdamW" and not config.use_8bit_adam:
            out.append(({"use_8bit_adam": True}, ""))
        if config.master_weights == "fp32" and config.optimizer == "AdamW" and config.mixed_precision == "bf16":
            out.append(({"master_weights": "bf16"}, ""))
        out.append(({"use_lora": True}, ""))
    return out


def plan_with_changes(config: Config, gpu: str, gpus: int, engine: str, mfu: float = DEFAULT_MFU) -> tuple[Plan, Plan | None]:
    """The plan, and where it does not fit the plan of the fewest changes (in `changes`) that makes it fit, or None."""
    costs: Costs = {}
    plan = make_plan(config, gpu, gpus, engine, mfu, costs)
    if plan.fits:
        return plan, None
    changed, made = config, []
    while candidates := _candidates(changed, engine, gpus):
        update, other_engine = candidates[0]
        changed, engine = changed.model_copy(update=update), other_engine or engine
        other = f"--engine {engine}, as accelerate_cfg/1m8g_{engine}.yaml"
        made += [f"{key} = {value!r}" for key, value in update.items()] or [other]
        better = make_plan(changed, gpu, gpus, engine, mfu, costs)
        if better.fits:
            better.changes = made
            return plan, better
    return plan, None


# -- output -------------------------------------------------------------------------------------------
def format_plan(plan: Plan) -> str:
    """The plan as text."""
    gpu, largest, typical = GPUS[plan.gpu], plan.steps[-1].shape, plan.steps[0]
    beside = "reference" if _BESIDE[False] in plan.memory else "2nd base"
    counts = f"{plan.trainable / 1e6:,.2f} M trained, {plan.frozen / 1e6:,.2f} M frozen"
    lines = [
        f"{plan.model}, shapes from {plan.shapes_from}",
        f"  parameters  {counts}; text encoder {plan.text_encoder / 1e6:,.0f} M",
        f"  devices     {plan.gpus} x {plan.gpu} ({gpu.memory_gb:.1f} GB, {gpu.tflops:.0f} TFLOP/s), "
        f"{plan.engine if plan.gpus > 1 else 'one process'}; effective batch {plan.effective_batch}",
        "",
        f"  memory of a device in training, at its largest picture ({largest.width} x {largest.height}):",
    ]
    lines += [f"    {name:<34}{size / GB:>9.2f} GB" for name, size in plan.memory.items() if size >= 1e6]
    lines += [
        f"    {'total':<34}{sum(plan.memory.values()) / GB:>9.2f} GB of {gpu.memory_gb:.1f}: "
        + ("fits" if plan.fits else "DOES NOT FIT"),
        f"    {'before it, encoding prompts':<34}{plan.encoding_memory / GB:>9.2f} GB",
        *([f"    {f'CPU memory of a process, {beside}':<34}{plan.cpu_memory / GB:>9.2f} GB"] if plan.cpu_memory else []),
        "",
        "  a micro-step       px          tokens        TFLOP   activations   blocks kept",
    ]
    for step, name in zip(plan.steps, ("typical", "largest"), strict=False):
        s = step.shape
        lines.append(
            f"    {name:<10}{s.width:>8} x {s.height:<6}{s.tokens:>6} + {s.text:<6}{step.flops / 1e12:>9.2f}"
            f"{step.kept / GB:>11.2f} GB{step.blocks_kept:>9} of {step.blocks}"
        )
    if typical.drawing:
        lines += [f"    drawing takes {typical.drawing / typical.flops:.0%} of it (decoding and scoring are not counted)"]
    images = plan.effective_batch / plan.step_seconds
    lines += ["", f"  time at {plan.mfu:.0%} of peak: {plan.step_seconds:.2f} s a step ({images:.2f} images/s over all devices)"]
    if plan.total_steps:
        hours = plan.total_steps * plan.step_seconds / 3600
        lines[-1] += f"; {plan.total_steps:,} steps: {hours:,.1f} hours, {hours * plan.gpus:,.0f} GPU hours"
    kept = f", {plan.checkpoints} kept: {plan.checkpoint * plan.checkpoints / GB:.2f} GB" if plan.checkpoints else ", all are kept"
    disk = ", ".join(f"{name} {size / GB:.2f} GB" for name, size in plan.store_per_1000.items())
    lines += [f"  disk: store for 1,000 figures: {disk}; a checkpoint {plan.checkpoint / GB:.2f} GB{kept}"]
    return "\n".join(lines)


def main(arguments: Namespace) -> int:
    """Print the plan; 0 when it fits, 3 when it does not."""
    from OpenSciDraw.config import load_config

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    config = load_config(arguments.config, arguments.cfg_options)
    plan, better = plan_with_changes(config, arguments.gpu, arguments.gpus, arguments.engine, arguments.mfu)
    if arguments.json:
        print(json.dumps({"fits": plan.fits, **asdict(plan), "would_fit": asdict(better) if better else None}, indent=1))
        return 0 if plan.fits else DOES_NOT_FIT
    print(format_plan(plan))
    if better is not None:
        print(f"\n  It fits ({better.peak / GB:.1f} GB, {better.step_seconds:.2f} s a step) with: " + "; ".join(better.changes))
    elif not plan.fits:
        print("\n  Nothing that this program can change makes it fit: take a larger GPU, more of them, or a smaller picture.")
    norms = ", and norms that CUDA's autocast keeps in fp32" if config.mixed_precision == "fp16" else ""
    print(f"\n  Computed, not measured on a GPU. Not counted: validation's own activations{norms}.")
    return 0 if plan.fits else DOES_NOT_FIT
