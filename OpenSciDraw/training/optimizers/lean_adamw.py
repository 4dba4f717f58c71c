"""AdamW with 8-bit state and bf16 weights: the same plain operations on CPU and GPU, nothing compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from OpenSciDraw.flow import keyed_generator
from OpenSciDraw.parallel.sharding import copy_into, like, local

BLOCK = 256  # values that share a scale, as in the 8-bit Adam paper's successors (arXiv:2110.02861; torchao, bitsandbytes)
SMALLEST_BLOCK = 64
SMALLEST_TENSOR = 4096  # below it 8 bits save nothing worth the error
CHUNK = 2**23  # values updated at once: up to 28 bytes of temporary memory each, 235 MB
Moment = Any  # a tensor in fp32, or {"codes": uint8, of the weight's shape, "scale": fp32 (rows, blocks of a row), "signed": bool}


def block_size(parameter: Tensor) -> int:
    """Values of a row that share a scale; 0 = this parameter's state stays in fp32.

    Blocks never cross rows, and the choice looks at the whole tensor: so the state is the same on any number of ranks.
    """
    block = math.gcd(math.prod(parameter.shape[1:]), BLOCK)
    return block if parameter.numel() >= SMALLEST_TENSOR and block >= SMALLEST_BLOCK else 0


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (computed in fp32) whose state is 8-bit or fp32, and whose bf16 weights are rounded stochastically.

    Code book, blocks and steps are those of torchao's AdamW8bit, to the bit on a CPU (a test compares them), but what is
    not 8-bit is fp32: in bf16 the second moment cannot fall, because 0.1 % of it is less than half of the last place.

    Weights are updated some rows at a time (CHUNK), so that the fp32 copies stay small; small ones go together.
    The random numbers depend on (seed, step) alone: a resumed run is exact, and DDP's replicas stay equal.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, quantize: bool, seed: int, lr: float, betas: tuple[float, float],
        eps: float, weight_decay: float,
    ):  # fmt: skip
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.quantize, self.seed = quantize, seed

    def _start(self, p: Tensor) -> None:
        def zeros(signed: bool) -> Moment:
            part, block = local(p), block_size(p) if self.quantize else 0
            if not block:
                return like(torch.zeros_like(part, dtype=torch.float32), p)
            codes = torch.zeros(part.shape, dtype=torch.uint8, device=part.device)
            scale = torch.zeros(len(part), math.prod(part.shape[1:]) // block, device=part.device)
            return {"codes": like(codes, p), "scale": _rows_like(scale, p), "signed": signed}

        self.state[p] |= {"step": torch.zeros(()), "exp_avg": zeros(True), "exp_avg_sq": zeros(False)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        done = max((float(state["step"]) for state in self.state.values()), default=0.0)
        seed = keyed_generator("stochastic rounding", self.seed, int(done)).initial_seed()
        draws: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                if not self.state[p]:
                    self._start(p)
                self.state[p]["step"] += 1
            for chunk in _chunks(slices for p in trained for slices in _slices(p, self.state[p])):
                device = chunk[0].weight.device
                if device not in draws:
                    draws[device] = torch.Generator(device).manual_seed(seed)
                _update(chunk, group, draws[device])
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and values, 8-bit moments as dicts of them, for checkpoints without pickle."""
        whole = super().state_dict()
        return {"state": whole["state"], "param_groups": [_plain(group) for group in whole["param_groups"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, or a checkpoint of it. torch's own would cast the state to the weights' type."""
        super().load_state_dict({"state": {}, "param_groups": [_plain(group) for group in state_dict["param_groups"]]})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, values in state_dict["state"].items():
            p = parameters[index]
            self.state[p] = {k: v.clone() if k == "step" else _placed(v, p.device) for k, v in values.items()}


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """Rates as numbers: schedulers may make them tensors, and so did this optimizer once."""
    return {key: float(value) if isinstance(value, Tensor) else value for key, value in group.items()}


# -- a step ---------------------------------------------------------------------------------------
class Slice(NamedTuple):
    """Some rows of a parameter (shared memory), those of its moments, and the number of its step."""

    weight: Tensor
    grad: Tensor
    exp_avg: Moment
    exp_avg_sq: Moment
    step: float


def _slices(p: Tensor, state: dict[str, Any]) -> Iterator[Slice]:
    weight, grad = local(p), local(p.grad)  # type: ignore[arg-type]
    if weight.numel() == 0:
        return
    if weight.ndim == 0:
        weight, grad = weight.view(1), grad.view(1)
    rows = max(1, CHUNK * len(weight) // weight.numel())

    def part(moment: Moment, first: int) -> Moment:
        if isinstance(moment, dict):
            cut = {key: local(moment[key])[first : first + rows] for key in ("codes", "scale")}
            return cut | {"signed": moment["signed"]}
        return local(moment).view(weight.shape)[first : first + rows]

    for first in range(0, len(weight), rows):
        average, square = part(state["exp_avg"], first), part(state["exp_avg_sq"], first)
        yield Slice(weight[first : first + rows], grad[first : first + rows], average, square, float(state["step"]))


def _chunks(slices: Iterable[Slice]) -> Iterator[list[Slice]]:
    """Slices in order, in lists of at most CHUNK values (or one slice), alike in what an update needs alike."""
    chunk: list[Slice] = []
    size, kind = 0, None
    for each in slices:
        own = (each.weight.device, each.weight.dtype, each.grad.dtype, each.step)
        if chunk and (own != kind or size + each.weight.numel() > CHUNK):
            yield chunk
            chunk, size = [], 0
        chunk.append(each)
        size, kind = size + each.weight.numel(), own
    if chunk:
        yield chunk


def _update(chunk: list[Slice], options: dict[str, Any], draw: torch.Generator) -> None:
    """One step of AdamW, each operation rounded as torchao's, therefore with no fused multiply and add but lerp's."""
    beta1, beta2 = options["betas"]
    rate, step = torch.tensor(float(options["lr"])), torch.tensor(chunk[0].step)  # in fp32, on the CPU: nothing waits
    correction1, correction2 = float(1 - beta1**step), float((1 - beta2**step).sqrt())
    stored = [each.weight for each in chunk]
    flat, weights = _as_fp32(stored)
    gradients = _as_fp32([each.grad for each in chunk])[1]
    torch._foreach_sub_(weights, torch._foreach_mul(weights, float(rate * options["weight_decay"])))
    average, square = Opened([each.exp_avg for each in chunk]), Opened([each.exp_avg_sq for each in chunk])
    torch._foreach_lerp_(average.values, gradients, 1 - beta1)
    torch._foreach_lerp_(square.values, torch._foreach_mul(gradients, gradients), 1 - beta2)
    del gradients
    change = torch._foreach_div(average.values, correction1)
    torch._foreach_mul_(change, float(rate))
    average.close()
    root = torch._foreach_sqrt(square.values)
    square.close()
    torch._foreach_div_(root, correction2)
    torch._foreach_add_(root, options["eps"])
    torch._foreach_div_(change, root)
    torch._foreach_sub_(weights, change)
    if flat is not None:
        if stored[0].dtype == torch.bfloat16:
            round_stochastically(flat, draw)
        torch._foreach_copy_(stored, weights)


def _as_fp32(tensors: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """Tensors of one type: themselves where it is fp32; else copies, and the memory in which these lie one after another."""
    if tensors[0].dtype == torch.float32:
        return None, tensors
    flat = torch.empty(sum(t.numel() for t in tensors), device=tensors[0].device)
    copies = _split(flat, tensors)
    torch._foreach_copy_(copies, tensors)
    return flat, copies


def _split(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def round_stochastically(values: Tensor, draw: torch.Generator) -> None:
    """fp32 values to ones that bf16 can hold, in place: to the next larger one with the probability that keeps the mean.

    An fp32 number is a bf16 number and 16 more bits. It grows by one place of bf16 if a random 16-bit number is less than these.
    """
    bits = values.view(torch.int32)
    random = torch.randint(0, 1 << 16, bits.shape, generator=draw, dtype=torch.int32, device=bits.device)
    bits.add_((1 << 16) - 1).sub_(random).bitwise_and_(-(1 << 16))


# -- 8-bit state ----------------------------------------------------------------------------------
@lru_cache
def code_book(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers that codes stand for, ascending: "dynamic" 8 bits of arXiv:1511.04561, as torchao's and bitsandbytes'.

    Seven decades below 1, each with twice as many numbers as the one below: middles of equal parts of it. And 0, and 1.
    """
    decades = []
    for exponent in range(-6, 1):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + 6 if signed else exponent + 7) + 1, device="cpu")
        decades.append((edges[:-1] + edges[1:]) / 2 * 10**exponent)
    positive = torch.cat(decades)
    rest = torch.tensor([0.0, 1.0], device="cpu")
    return torch.cat([positive, rest, *([-positive] if signed else [])]).sort().values.to(device)


@lru_cache
def thresholds(signed: bool, device: torch.device) -> Tensor:
    """The 255 least fp32 numbers that are nearer to the next code's number (or as near), as computed in fp32."""
    book = code_book(signed, torch.device("cpu"))
    low, high = book[:-1], book[1:]
    half = (high - low) * 0.5
    least, down = low + half, torch.full_like(low, -math.inf)
    for _ in range(4):  # subtraction rounds: so start above the middle, and go down as long as it is "nearer"
        least = torch.nextafter(least, -down)
    for _ in range(8):
        below = torch.nextafter(least, down)
        least = torch.where(below - low >= half, below, least)
    return least.to(device)


def quantized(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Blocks (n, values of a block) in fp32, used up, as codes (n, values) and scales (n)."""
    scale = torch.linalg.vector_norm(values, math.inf, dim=-1).clip_(1e-12)
    places = torch.bucketize(values.div_(scale[:, None]), thresholds(signed, values.device), right=True, out_int32=True)
    return places.to(torch.uint8), scale


def dequantized(moment: dict[str, Any]) -> Tensor:
    """An 8-bit moment, or rows of it, in fp32."""
    codes, scale = moment["codes"], moment["scale"]
    values = code_book(moment["signed"], codes.device).index_select(0, codes.flatten().int())
    return values.view(scale.numel(), -1).mul_(scale.reshape(-1, 1)).view(codes.shape)


class Opened:
    """A moment of each slice in fp32: fp32 state itself, and copies of 8-bit state, which `close` writes back."""

    def __init__(self, moments: list[Moment]):
        self.values = list(moments)
        self._copies: list[tuple[Tensor, list[dict[str, Any]]]] = []
        packed = [(at, moment) for at, moment in enumerate(moments) if isinstance(moment, dict)]
        for block in sorted({_block(moment) for _, moment in packed}):
            same = [(at, moment) for at, moment in packed if _block(moment) == block]
            codes = torch.cat([moment["codes"].flatten() for _, moment in same])
            scale = torch.cat([moment["scale"].flatten() for _, moment in same])
            flat = dequantized({"codes": codes, "scale": scale, "signed": same[0][1]["signed"]})
            copies = _split(flat, [moment["codes"] for _, moment in same])
            for (at, _), copy in zip(same, copies, strict=True):
                self.values[at] = copy
            self._copies.append((flat.view(-1, block), [moment for _, moment in same]))

    def close(self) -> None:
        """Write the copies back; the values are then used up."""
        for flat, moments in self._copies:
            codes, scale = quantized(flat, moments[0]["signed"])
            for key, new in (("codes", codes), ("scale", scale)):
                old = [moment[key] for moment in moments]
                torch._foreach_copy_(old, _split(new.flatten(), old))
        self.values, self._copies = [], []


def _block(moment: dict[str, Any]) -> int:
    return moment["codes"].numel() // moment["scale"].numel()


def _placed(moment: Moment, device: torch.device) -> Moment:
    """A checkpoint's moment: `codes` may be this rank's rows alone, `scale` is then cut to them."""
    if not isinstance(moment, dict):
        return moment.to(device)
    codes, scale = moment["codes"], moment["scale"]
    if isinstance(codes, DTensor) and not isinstance(scale, DTensor):
        whole, empty = scale, torch.empty(len(local(codes)), scale.shape[1], device=local(codes).device)
        scale = _rows_like(empty, codes)
        copy_into(scale, whole)
    return {"codes": codes.to(device), "scale": scale.to(device), "signed": moment["signed"]}


def _rows_like(part: Tensor, owner: Tensor) -> Tensor:
    """`part` (rows of this rank, n) as a tensor dealt like `owner`, of (all rows, n)."""
    if not isinstance(owner, DTensor):
        return part
    shape = torch.Size((owner.shape[0], part.shape[1]))
    return DTensor.from_local(part, owner.device_mesh, owner.placements, run_check=False, shape=shape, stride=(part.shape[1], 1))
