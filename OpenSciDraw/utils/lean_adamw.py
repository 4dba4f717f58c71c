"""AdamW with 8-bit state, and with bf16 weights that are rounded stochastically: few bytes, and nothing to compile first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from OpenSciDraw.flow import keyed_generator
from OpenSciDraw.utils.sharding import copy_into, like, local

BLOCK = 256  # values that share a scale, as in the 8-bit Adam paper's successors (arXiv:2110.02861; torchao, bitsandbytes)
SMALLEST_BLOCK = 64
SMALLEST_TENSOR = 4096  # below it 8 bits save nothing worth the error
AT_A_TIME = 2**24  # values of a tensor that are updated together: each of the six fp32 temporaries is then 64 MB at most
MOMENTS = ("exp_avg", "exp_avg_sq")


def block_size(parameter: Tensor) -> int:
    """Values of a row that share a scale; 0 = this parameter's state stays in fp32.

    Blocks never cross rows, and the choice looks at the whole tensor: so the state is the same on any number of ranks
    that all have rows of it.
    """
    block = math.gcd(math.prod(parameter.shape[1:]), BLOCK)
    fits = parameter.numel() >= SMALLEST_TENSOR and block >= SMALLEST_BLOCK
    return block if fits and _every_rank_has_rows(parameter) else 0


def _every_rank_has_rows(tensor: Tensor) -> bool:
    if not isinstance(tensor, DTensor):
        return True
    world = tensor.device_mesh.size()
    return -(-tensor.shape[0] // world) * (world - 1) < tensor.shape[0]  # rows are dealt as torch.chunk cuts


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) computed in fp32; its moments are 8-bit (`quantize`) or fp32, its weights fp32 or bf16.

    bf16 weights are rounded up or down with the probability that keeps the mean. A moment of 8 bits is a dict: `codes` (uint8,
    shaped as the parameter), `scale` (rows, blocks of a row) and whether it is `signed`; dealt parameters (FSDP2) have dealt state.

    The random numbers depend on (seed, step) alone: a resumed run is exact, and DDP's replicas stay equal.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, quantize: bool, seed: int, lr: float, betas: tuple[float, float],
        weight_decay: float, eps: float,
    ):  # fmt: skip
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})
        self.quantize, self.seed = quantize, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        done = max((float(state["step"]) for state in self.state.values()), default=0.0)
        random = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                device = parameter.device
                if device not in random:
                    seed = keyed_generator("stochastic rounding", self.seed, int(done)).initial_seed()
                    random[device] = torch.Generator(device).manual_seed(seed)
                self._update(parameter, group, random[device])
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], random: torch.Generator) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state |= {name: self._new_moment(parameter, signed=name == "exp_avg") for name in MOMENTS}
        state["step"] += 1
        step, lr, (beta1, beta2) = float(state["step"]), float(group["lr"]), group["betas"]
        root = math.sqrt(1 - beta2**step)
        weight, gradient = _as_rows(local(parameter)), _as_rows(local(parameter.grad))  # type: ignore[arg-type]
        for rows in _pieces(weight):
            new, grad = weight[rows].float(), gradient[rows].float()
            first, second = (_read(state[name], rows) for name in MOMENTS)
            first.lerp_(grad, 1 - beta1)
            second.lerp_(grad.square(), 1 - beta2)
            new = new.mul(1 - lr * group["weight_decay"])
            new.addcdiv_(first, second.sqrt().div_(root).add_(group["eps"]), value=-lr / (1 - beta1**step))
            _write(state["exp_avg"], rows, first)
            _write(state["exp_avg_sq"], rows, second)
            weight[rows] = rounded(new, random) if weight.dtype == torch.bfloat16 else new

    def _new_moment(self, parameter: Tensor, signed: bool) -> Any:
        part, block = local(parameter), block_size(parameter) if self.quantize else 0
        if not block:
            return like(torch.zeros_like(part, dtype=torch.float32), parameter)
        scale = torch.zeros(len(part), math.prod(part.shape[1:]) // block, device=part.device)
        codes = torch.full_like(part, int(code_book(signed).index(0.0)), dtype=torch.uint8)
        return {"codes": like(codes, parameter), "scale": _rows_like(scale, parameter), "signed": signed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, or a checkpoint of it. torch's own would cast the state to the weights' type."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, values in state_dict["state"].items():
            device = parameters[index].device
            moments = {name: _placed(values[name], device) for name in MOMENTS}
            self.state[parameters[index]] = {"step": values["step"], **moments}


def rounded(values: Tensor, random: torch.Generator) -> Tensor:
    """fp32 -> bf16, away from zero with the probability of what would be cut off (arXiv:2010.06192)."""
    bits = torch.randint(0, 1 << 16, values.shape, generator=random, device=values.device, dtype=torch.int32)
    return bits.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


# -- rows of weights and moments ------------------------------------------------------------------
def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.view(tensor.shape[0], math.prod(tensor.shape[1:])) if tensor.ndim > 1 else tensor.view(1, tensor.numel())


def _pieces(rows: Tensor) -> Iterator[slice]:
    """Slices of rows, of about AT_A_TIME values each."""
    count = max(1, AT_A_TIME // max(1, rows.shape[1]))
    return (slice(start, start + count) for start in range(0, rows.shape[0], count))


def _read(moment: Any, rows: slice) -> Tensor:
    """Rows of a moment in fp32: a view of it, or the numbers that its codes stand for."""
    if isinstance(moment, Tensor):
        return _as_rows(local(moment))[rows]
    return values_of(_as_rows(local(moment["codes"]))[rows], local(moment["scale"])[rows], moment["signed"])


def _write(moment: Any, rows: slice, values: Tensor) -> None:
    """Put what `_read` gave and an update changed back; a view of fp32 has it already."""
    if isinstance(moment, Tensor):
        return
    scale = local(moment["scale"])[rows]
    blocks = values.view(len(values), scale.shape[1], -1)
    torch.amax(blocks.abs(), -1, out=scale)
    scale.clamp_(min=1e-12)
    _, bounds = _tables(moment["signed"], values.device)
    codes = torch.bucketize(blocks / scale[..., None], bounds, out_int32=True, right=True)
    _as_rows(local(moment["codes"]))[rows] = codes.view(values.shape).to(torch.uint8)


# -- 8-bit numbers ------------------------------------------------------------------------------------
@lru_cache(maxsize=2)
def code_book(signed: bool) -> tuple[float, ...]:
    """The 256 numbers of [-1, 1] or [0, 1] in ascending order: dynamic tree quantisation (arXiv:1511.04561, 2110.02861).

    Decade 10^(e - 6) is cut into 2^e (unsigned: 2^(e + 1)) equal parts from its tenth on, whose middles are the codes; 0 and 1 are
    exact.
    """
    found = {0.0, 1.0}
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1)
        middles = (10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        found |= {*middles, *(-value for value in middles)} if signed else {*middles}
    return tuple(sorted(found))


@lru_cache(maxsize=8)
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The code book, and the bounds between its numbers, (256,) and (255,) fp32."""
    book = torch.tensor(code_book(signed), dtype=torch.float32, device=device)
    return book, book[:-1] + (book[1:] - book[:-1]) * 0.5


def values_of(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The fp32 numbers of `codes` (rows, …) with `scale` (rows, blocks of a row)."""
    book, _ = _tables(signed, codes.device)
    block = math.prod(codes.shape[1:]) // scale.shape[1]
    return (book[codes.int()].view(len(codes), scale.shape[1], block) * scale[..., None]).view(codes.shape)


# -- state of dealt parameters -----------------------------------------------------------------------
def _placed(moment: Any, device: torch.device) -> Any:
    """A moment of a checkpoint on `device`. Its `codes` may be this rank's rows alone; `scale` is then cut to them."""
    if isinstance(moment, Tensor):
        return moment.to(device)
    codes, scale = moment["codes"].to(device), moment["scale"]
    if isinstance(codes, DTensor) and not isinstance(scale, DTensor):
        whole, scale = scale, _rows_like(torch.empty(len(local(codes)), scale.shape[1], device=local(codes).device), codes)
        copy_into(scale, whole)
    if _every_rank_has_rows(codes):
        return {"codes": codes, "scale": scale.to(device), "signed": moment["signed"]}
    return like(values_of(local(codes), local(scale), moment["signed"]), codes)  # a rank without rows keeps fp32 state


def _rows_like(part: Tensor, owner: Tensor) -> Tensor:
    """`part` (rows of this rank, n) as a tensor dealt like `owner`, of (all rows, n)."""
    if not isinstance(owner, DTensor):
        return part
    shape = torch.Size((owner.shape[0], part.shape[1]))
    return DTensor.from_local(part, owner.device_mesh, owner.placements, run_check=False, shape=shape, stride=(part.shape[1], 1))
