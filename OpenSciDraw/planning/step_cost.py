"""What one training step costs, operation by operation, from the model's config alone: FLOPs, and bytes kept for backward."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from OpenSciDraw.config import Config
from OpenSciDraw.config.drawing import drawing_of_teacher
from OpenSciDraw.datasets.batch import AXES
from OpenSciDraw.inference.pictures import draw_guidance
from OpenSciDraw.models.base import FigureModel, TextBatch, build_model
from OpenSciDraw.parallel.sharding import block_lists
from OpenSciDraw.planning.shapes import Shape
from OpenSciDraw.training.memory.activations import ActivationBudget, keeps, measure_saved_bytes
from OpenSciDraw.training.token_routing import TokenRouting, routed_blocks
from OpenSciDraw.utils.files import parse_json
from OpenSciDraw.weights import trainable
from OpenSciDraw.weights.kinds import switched_off
from OpenSciDraw.weights.precision import autocast_type, compute_throughout
from OpenSciDraw.weights.trainable import resolve_lora_layers


@dataclass(frozen=True)
class Step:
    """One micro-step of one device at one Shape: `kept` bytes for backward, `block` of them at most by one block.

    `drawing`: how many of the `flops` draw pictures, of training on rewards.
    """

    shape: Shape
    flops: int
    kept: int
    block: int
    blocks_kept: int
    blocks: int
    drawing: int = 0


@contextmanager
def planned_model(config: Config) -> Iterator[tuple[FigureModel, str]]:
    """The model with its VAE on meta, and where its shapes came from: its files, or what we know of some hub models.

    Raises:
        UserError: the model's config files are neither here nor on the hub.
    """
    known = parse_json((Path(__file__).parents[1] / "models" / "known_configs.json").read_text())
    name = config.pretrained_model_name_or_path
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(config)
        source = "its config files"
        if name in known and not model.is_on_this_machine("transformer"):
            source = "this program (its files are not on this machine)"
            for file, values in known[name].items():
                path = Path(folder) / file
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(values))
            model = build_model(config.model_copy(update={"pretrained_model_name_or_path": folder}))
        model.load_empty_vae()
        yield model, source


def _as_fake(transformer: nn.Module) -> nn.Module:
    """Its parameters as tensors of the active FakeTensorMode, which knows CPU tensors (and autocast) without memory."""
    for module in transformer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return transformer.train()


def count_flops() -> FlopCounterMode:
    """torch's counter, with the CPU's attention, which it does not know."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop(query, key, value)

    def backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_backward_flop(grad, query, key, value)

    return FlopCounterMode(display=False, custom_mapping={attention: forward_flops, backward: backward_flops})


@dataclass(frozen=True)
class _Run:
    """FLOPs and kept bytes of one micro-step, with all activations kept and with every block recomputed."""

    flops: int
    kept: int
    recomputed_flops: int
    recomputed_kept: int
    drawing: float = 0.0  # FLOPs, part of both

    def minus(self, other: _Run) -> _Run:
        return _Run(*(mine - theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def plus(self, other: _Run, times: int) -> _Run:
        return _Run(*(mine + times * theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


class _FusedRMSNorm(torch.autograd.Function):
    """What CUDA's kernel keeps: its input and one number a row. Elsewhere torch splits the norm up, and keeps an fp32 copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.empty_like(grads[0])


@contextmanager
def norms_as_on_a_gpu() -> Iterator[None]:
    """torch.nn.RMSNorm in one dtype as the kernel that torch has for it on CUDA (since 2.9)."""
    norm = torch.nn.functional.rms_norm

    def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        fused = hasattr(torch.ops.aten, "_fused_rms_norm") and (weight is None or weight.dtype == x.dtype)
        return _FusedRMSNorm.apply(x) if fused else norm(x, shape, weight, eps)

    torch.nn.functional.rms_norm = rms_norm  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.rms_norm = norm  # type: ignore[assignment]


def pictures_of_a_sample(config: Config) -> int:
    """How many pictures a sample of the batch is at most: of preferences a winner and a loser for each axis, of rewards a group."""
    if config.trains_rewards:
        return config.reward.group_size
    return 1 + len(AXES) if config.trains_preferences else 1


def forwards_beside(config: Config) -> float:
    """Forwards without gradients of a micro-step, beside the one that trains: the reference's, the teacher's, the student's own."""
    if not config.distills:
        return float(config.needs_reference)
    steps, teacher = config.distill.steps, drawing_of_teacher(config)
    own = (steps - 1) / 2 if config.distill.inputs == "student" else 0.0  # of samples that begin at the steps alike
    return own + teacher.steps // steps * (2 if teacher.guidance > 1 else 1)


def _drawing_forwards(config: Config) -> float:
    """Forwards of the whole batch by which a micro-step's pictures are drawn, shared out over the steps that learn from them."""
    steps: float = config.reward.draw_steps or config.num_inference_steps
    steps *= 1 - config.reward.include_figure / config.reward.group_size
    return steps * (2 if draw_guidance(config) > 1 else 1) / config.reward.steps_per_round if config.trains_rewards else 0


def _run(model: FigureModel, config: Config, shape: Shape, blocks: dict[str, int], routed: range | None = None) -> _Run:
    """A micro-step of the transformer with only the first `blocks` of each of its lists; `routed`: those that see fewer tokens."""
    transformer = model.empty_transformer(trainable.loading_dtype(config))
    layers = resolve_lora_layers(transformer, config.lora_layers) if config.use_lora else []
    for name, count in blocks.items():
        setattr(transformer, name, getattr(transformer, name)[:count])
    there = dict(transformer.named_modules())
    present = [name for name in layers if name in there]
    trainable.make_trainable(transformer, config.model_copy(update={"lora_layers": present}) if layers else config)
    with FakeTensorMode(allow_non_fake_inputs=True), norms_as_on_a_gpu():
        model.transformer = _as_fake(transformer)
        compute_throughout(model, transformer, config)
        if routed:
            settings = config.token_routing.model_copy(update={"first_block": routed[0], "last_block": routed[-1]})
            TokenRouting(model, transformer, settings)
        noisy, text, references = _inputs(model, shape, config.train_batch_size * pictures_of_a_sample(config))

        def forward() -> Tensor:
            if routed and model.route_tokens:
                model.route_tokens("any")
            with torch.autocast("cpu", dtype=torch.float16, enabled=autocast_type(config, model) == "fp16"):
                return model.velocity(noisy, torch.full((len(noisy),), 0.5), text, *([references] if references else []))

        def without_gradients(adapted: bool) -> int:
            with count_flops() as counter, torch.no_grad():
                with nullcontext() if adapted else switched_off(transformer):
                    forward()
            return counter.get_total_flops()

        drawing = _drawing_forwards(config) * without_gradients(True) if config.trains_rewards else 0.0
        others = drawing + (without_gradients(True) if config.trains_rewards else 0)  # the old policy
        if beside := forwards_beside(config):  # by the same transformer, or one of the same shapes
            others += beside * without_gradients(False)
        numbers: list[int] = []
        for recompute in (False, True):
            if recompute:
                ActivationBudget(transformer, None)
            with count_flops() as counter:
                forward().float().pow(2).mean().backward()
            numbers += [counter.get_total_flops() + round(others), measure_saved_bytes(forward, transformer)]
    return _Run(numbers[0], numbers[1], numbers[2], numbers[3], drawing)


def _routed_block(
    model: FigureModel, config: Config, shape: Shape, few: dict[str, int], name: str, count: int, start: _Run, one: _Run
) -> tuple[_Run, _Run]:  # fmt: skip
    """One block of a list, as it is and between others that see only part of the tokens.

    `start`: the run with `few` blocks. `one`: what a third block of this list adds to it, where there is a third.
    """
    there = min(count, 3)
    last = sum(few[other] for other in list(few)[: list(few).index(name)]) + there - 1
    narrow = _run(model, config, shape, {**few, name: there}, range(last, last + 1))
    if count > 3:
        return one, _run(model, config, shape, {**few, name: 4}, range(last, last + 2)).minus(narrow)
    # its input, kept where it is recomputed, is still that of all tokens
    fewer = start if count == 3 else _run(model, config, shape, {**few, name: there - 1})
    return one if count == 3 else start.minus(fewer), narrow.minus(fewer)


def step_cost(config: Config, shape: Shape, budget: int | None) -> Step:
    """One training micro-step at `shape`, with activations kept within `budget` bytes where blocks are recomputed.

    Blocks of one list cost the same, so two and three of each are run and the rest is a straight line; so are those that see
    only part of the tokens, between others that do.
    """
    with planned_model(config) as (model, _):
        lists = {name: len(blocks) for name, blocks in block_lists(model.empty_transformer()).items()}
        few = {name: min(2, count) for name, count in lists.items()}
        start = whole = _run(model, config, shape, few)
        each: list[_Run] = []  # of every block, in order
        routed = routed_blocks(config.token_routing, sum(lists.values()))
        for name, count in lists.items():
            here = range(len(each), len(each) + count)
            one = _run(model, config, shape, {**few, name: 3}).minus(start) if count > 2 else _Run(0, 0, 0, 0)
            whole = whole.plus(one, count - few[name])
            each += [one] * count
            if within := [at for at in here if at in routed]:
                plain, narrow = _routed_block(model, config, shape, few, name, count, start, one)
                whole = whole.plus(narrow.minus(plain), len(within))
                for at in within:
                    each[at] = narrow if count > 2 else _Run(0, 0, 0, 0)
    largest = max((one.kept for one in each), default=0)
    if not config.gradient_checkpointing:
        return Step(shape, whole.flops, whole.kept, largest, len(each), len(each), round(whole.drawing))
    flops, kept, used, stay = whole.recomputed_flops, whole.recomputed_kept, 0, 0
    for at, one in enumerate(each, 1):
        inputs, cost = one.recomputed_kept, one.kept - one.recomputed_kept
        used += inputs
        if budget and keeps(budget, used, cost, inputs, len(each) - at):
            used, kept, stay = used + cost, kept + cost, stay + 1
            flops -= one.recomputed_flops - one.flops
    return Step(shape, flops, kept, largest, stay, len(each), round(whole.drawing))


def _inputs(model: FigureModel, shape: Shape, batch: int) -> tuple[Tensor, TextBatch, list[Tensor]]:
    def normalized(height: int, width: int) -> Tensor:
        latents = model.normalize(torch.zeros(1, *model.latent_shape(height, width)))
        return torch.zeros(batch, *latents.shape[1:])

    references = [normalized(*size) for size in shape.references]
    text = model.blank_text(batch, shape.text, [(part.shape[-2], part.shape[-1]) for part in references])
    return normalized(shape.height, shape.width), text, references
