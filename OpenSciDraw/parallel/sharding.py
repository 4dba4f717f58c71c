"""One transformer over several devices: torch's FSDP2, applied here, so that CPUs (gloo) and GPUs (NCCL) run one path.

accelerate knows FSDP2 too, but ignores it on a CPU and then runs DDP; so its launcher's wish is read here, and
accelerate itself runs as in DDP, for everything but the model. Rows of each tensor (dimension 0) are dealt over
all ranks. Parameters, gradients, optimizer state and EMA exist once over all ranks; a block's parameters are
gathered when it runs, in the type it computes in, and gradients are averaged in fp32.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from OpenSciDraw.errors import UserError
from OpenSciDraw.parallel.zero import gathered_master


@dataclass(frozen=True)
class Sharding:
    """What accelerate's file asks for; see accelerate_cfg/1m8g_fsdp2.yaml."""

    reshard_after_forward: bool = True  # False keeps gathered parameters until the backward pass: faster, more memory


def take_request() -> Sharding | None:
    """The launcher's wish for FSDP, taken out of the environment, so that accelerate does not act on it as well.

    Raises:
        UserError: FSDP1, or options that this path does not have.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate's file asks for FSDP 1. Set fsdp_version: 2, as in accelerate_cfg/1m8g_fsdp2.yaml.")
    for option, instead in (
        ("FSDP_OFFLOAD_PARAMS", "master_weights = 'bf16', use_8bit_adam or more devices"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "gradient_checkpointing and activation_memory_gb of the config"),
    ):
        if os.environ.get(option, "false").lower() == "true":
            name = option.lower()
            raise UserError(f"accelerate's file sets {name}: true, which is not used here. Set it to false; use {instead}.")
    del os.environ["ACCELERATE_USE_FSDP"]
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None  # nothing to share
    return Sharding(os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true")


def block_lists(transformer: nn.Module) -> dict[str, nn.ModuleList]:
    """The ModuleLists that hold the transformer's blocks (classes that it names as its units), by name, in order."""
    names = set(getattr(transformer, "_no_split_modules", None) or [])
    lists = {name: module for name, module in transformer.named_children() if isinstance(module, nn.ModuleList)}
    # by all names of a class: fully_shard makes a subclass of each
    return {n: blocks for n, blocks in lists.items() if all(names & {c.__name__ for c in type(b).__mro__} for b in blocks)}


def repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The transformer's blocks, in order."""
    return [block for blocks in block_lists(transformer).values() for block in blocks]


def shard(transformer: nn.Module, sharding: Sharding, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Deal the parameters over all ranks, in place; those on meta get memory here (and values by `copy_into`).

    `compute_dtype`: what parameters are gathered in; norms and rotary tables keep the types they have without FSDP,
    because inputs are not cast.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    half = compute_dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if half else None, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
    )
    options: dict[str, Any] = {
        "mesh": mesh, "mp_policy": policy, "reshard_after_forward": sharding.reshard_after_forward,
    }  # fmt: skip
    for block in repeated_blocks(transformer):
        fully_shard(block, **options)
    fully_shard(transformer, **{**options, "reshard_after_forward": True})
    empty = {
        name: DTensor.from_local(
            torch.empty_like(p.to_local(), device=device), p.device_mesh, p.placements, run_check=False,
            shape=p.shape, stride=p.stride(),
        )
        for name, p in transformer.named_parameters() if p.is_meta and isinstance(p, DTensor)
    }  # fmt: skip
    transformer.load_state_dict(empty, strict=False, assign=True)


def leave_to_each_rank(transformer: nn.Module) -> None:
    """DDP does not send frozen weights around: every rank has read the same files, and quantised ones cannot be sent."""
    frozen = [name for name, parameter in transformer.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, buffer in transformer.named_buffers() if buffer.is_floating_point() and buffer.itemsize == 1]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, frozen)


# -- whole tensors and this rank's rows of them --------------------------------------------------
def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor; every rank must ask for it."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    master = gathered_master(tensor)
    return tensor if master is None else master


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a dealt tensor (shared memory), or the tensor itself."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _rows(tensor: DTensor) -> slice:
    count, world = tensor.shape[0], tensor.device_mesh.size()
    each = -(-count // world)  # as torch.chunk cuts
    first = min(tensor.device_mesh.get_local_rank() * each, count)
    return slice(first, min(first + each, count))


def copy_into(target: Tensor, source: Any) -> None:
    """Fill `target` from a whole tensor or a safetensors slice, of which only this rank's rows are read."""
    part = source[_rows(target)] if isinstance(target, DTensor) else source[:] if target.ndim else source
    with torch.no_grad():
        local(target).copy_(part)


def like(part: Tensor, parameter: Tensor) -> Tensor:
    """`part`, this rank's rows, as a dealt tensor where `parameter` is one; else `part`."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def deal(source: Any, shape: tuple[int, ...], parameter: Tensor) -> Tensor | None:
    """This rank's part of a stored tensor that belongs to a dealt parameter of the same shape; None for others."""
    if isinstance(parameter, DTensor) and tuple(parameter.shape) == shape:
        return like(source[_rows(parameter)].to(parameter.device_mesh.device_type), parameter)
    return None


def clip_gradients(parameters: Mapping[str, nn.Parameter], max_norm: float) -> Tensor:
    """Clip dealt gradients by the L2 norm of all of them over all ranks; returns the norm."""
    return gathered(torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm))
