"""AdamW with 8-bit state and bf16 weights, on torchao's optimizer (an extra: `pip install 'OpenSciDraw[8bit]'`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from OpenSciDraw.flow import keyed_generator
from OpenSciDraw.utils.sharding import copy_into, like, local

BLOCK = 256  # values that share a scale, as in the 8-bit Adam paper's successors (arXiv:2110.02861; torchao, bitsandbytes)
SMALLEST_BLOCK = 64
SMALLEST_TENSOR = 4096  # below it 8 bits save nothing worth the error


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


class LeanAdamW(AdamW8bit):
    """torchao's AdamW (computed in fp32) whose state is 8-bit or fp32, and whose bf16 weights are rounded stochastically.

    torchao's own class keeps bf16 state for bf16 weights, in which the second moment cannot fall: 0.1 % of it is
    less than half of bf16's last place. Here what is not 8-bit is fp32.

    The random numbers depend on (seed, step) alone: a resumed run is exact, and DDP's replicas stay equal.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, quantize: bool, seed: int, **options: Any):
        super().__init__(parameters, bf16_stochastic_round=True, **options)
        self.quantize, self.seed = quantize, seed

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:  # torchao asks here for a moment's memory
        part, block = local(p), block_size(p) if self.quantize else 0
        if block:
            return like(OptimState8bit.zeros(part.shape, signed, block, part.device), p)
        return like(torch.zeros_like(part, dtype=torch.float32), p)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        gpus = sorted({p.device.index for p in parameters if p.is_cuda})
        done = max((float(state["step"]) for state in self.state.values()), default=0.0)
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(keyed_generator("stochastic rounding", self.seed, int(done)).initial_seed())
            if gpus:
                return super().step(closure)
            with torch.compiler.set_stance("force_eager"):  # on a CPU, compiling takes longer than it saves
                return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and values, 8-bit moments as dicts of them, for checkpoints without pickle."""
        whole = super().state_dict()
        groups = [group | {"lr": float(group["lr"])} for group in whole["param_groups"]]
        moments = {at: {k: pack(v) for k, v in values.items()} for at, values in whole["state"].items()}
        return {"state": moments, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, or a checkpoint of it. torch's own would cast the state to the weights' type."""
        groups = [group | {"lr": torch.tensor(group["lr"], dtype=torch.float32)} for group in state_dict["param_groups"]]
        super().load_state_dict({"state": {}, "param_groups": groups})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, values in state_dict["state"].items():
            moments = {k: unpack(v) if isinstance(v, dict) else v for k, v in values.items()}
            device = parameters[index].device
            self.state[parameters[index]] = {k: v if k == "step" else v.to(device) for k, v in moments.items()}


# -- 8-bit state as plain tensors, for checkpoints --------------------------------------------------
def pack(state: Tensor) -> Any:
    """An 8-bit moment as {"codes", "scale", "signed"}, dealt over the ranks as it was; other tensors as they are."""
    part = local(state)
    if not isinstance(part, OptimState8bit):
        return state
    scale = _rows_like(part.scale.view(len(part.codes), -1), state)
    return {"codes": like(part.codes, state), "scale": scale, "signed": part.signed}


def unpack(packed: dict[str, Any]) -> Tensor:
    """What `pack` made, or a checkpoint of it: `codes` may be this rank's rows alone, `scale` is then cut to them."""
    codes, scale = packed["codes"], packed["scale"]
    if isinstance(codes, DTensor) and not isinstance(scale, DTensor):
        whole, empty = scale, torch.empty(len(local(codes)), scale.shape[1], device=local(codes).device)
        scale = _rows_like(empty, codes)
        copy_into(scale, whole)
    part, scales = local(codes), local(scale)
    values = OptimState8bit.zeros((1,), packed["signed"], 1, part.device).qmap  # of the 256 codes
    if _every_rank_has_rows(codes):
        return like(OptimState8bit(part, scales.flatten(), values, packed["signed"]), codes)
    block = math.prod(codes.shape[1:]) // scales.shape[1]  # in fp32: torchao's 8-bit tensor cannot be empty
    return like(values[part.long()] * scales.repeat_interleave(block, 1).view(part.shape), codes)


def _rows_like(part: Tensor, owner: Tensor) -> Tensor:
    """`part` (rows of this rank, n) as a tensor dealt like `owner`, of (all rows, n)."""
    if not isinstance(owner, DTensor):
        return part
    shape = torch.Size((owner.shape[0], part.shape[1]))
    return DTensor.from_local(part, owner.device_mesh, owner.placements, run_check=False, shape=shape, stride=(part.shape[1], 1))
