"""Activations: recompute in the backward pass only what does not fit (gradient checkpointing per block), compile blocks.

Recomputing every block costs about half a LoRA step's FLOPs again. Each block whose activations stay saves its share of that,
so memory that lies idle is time lost: `ActivationBudget` keeps as many blocks as the budget holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from OpenSciDraw.config import Config
from OpenSciDraw.parallel.sharding import repeated_blocks
from OpenSciDraw.weights.adapters import copies_of_parameters

RESERVE = 0.15  # of the device's memory, for "auto": fragmentation, one block's recomputation, the rest of the step


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # an identity that meta tensors have too


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, also inside tuples, lists and dicts."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
    return found


class SavedBytes:
    """`with SavedBytes(module, inputs) as saved:` notes what autograd keeps meanwhile; afterwards `saved.total` is its bytes.

    Not counted: `inputs`; parameters of `module`, which linear layers keep as views, their copies, and buffers. Nor are weights
    that FSDP2 gathered for the forward: their storage is empty again afterwards, or it is the parameter's own. Works on meta.
    """

    def __init__(self, module: nn.Module, inputs: Iterable[Tensor] = ()):
        self._module, self._inputs = module, list(inputs)
        self._kept: dict[int, torch.UntypedStorage] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.total = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        self._kept[_storage(tensor)] = tensor.untyped_storage()
        return tensor.detach()  # an operation's own output would hold the operation, and that the output

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        module = self._module
        skip = {_storage(t) for t in (*self._inputs, *module.parameters(), *module.buffers(), *copies_of_parameters(module))}
        self.total = sum(storage.nbytes() for key, storage in self._kept.items() if key not in skip)
        self._kept.clear()  # the hooks hold this object, and it the hooks: what stays here stays until Python looks for cycles
        self._inputs.clear()


def measure_saved_bytes(function: Callable[[], Any], module: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of `function()`, without parameters and buffers of `module`."""
    with SavedBytes(module) as saved:
        result = function()
    del result
    return saved.total


def keeps(budget: int, used: int, cost: int, inputs: int, blocks_to_come: int) -> bool:
    """Whether a block that keeps `cost` bytes stays within the budget, with `used` so far and the inputs of those to come."""
    return used + cost + inputs * max(0, blocks_to_come) <= budget


class ActivationBudget:
    """Decides at each call of a block: run it and keep its activations, or keep its inputs and recompute it.

    What a block keeps is measured when its kind (class and trained weights) first meets a shape of inputs, and remembered;
    that one call keeps its activations, whatever the budget, because to run it twice would gather its weights twice under
    FSDP2, on this rank alone. Blocks are kept from the first on, while what is kept, and the inputs of all blocks to come,
    stay within `budget_bytes`; None or 0 recomputes every block. Results are the same bits either way. The block that is
    being recomputed needs its activations on top of the budget.
    """

    def __init__(self, transformer: Any, budget_bytes: int | None):
        self.budget_bytes = budget_bytes or None
        self._blocks = len(repeated_blocks(transformer))
        self._buffers = list(transformer.buffers())
        self._cost: dict[tuple[Any, ...], int] = {}
        self._seen: set[int] = set()
        self.used, self.calls, self.kept = 0, 0, 0  # bytes, blocks and kept blocks of the last training forward
        transformer.register_forward_pre_hook(self._begin)
        transformer.enable_gradient_checkpointing(self)

    def _begin(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._seen.clear()
            self.used, self.calls, self.kept = 0, 0, 0

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        self.calls += 1
        if self.budget_bytes is None:
            return checkpoint(block, *args, use_reentrant=False)
        inputs = _tensors(args)
        own = self._count_new(inputs)
        self.used += own
        trained = tuple(parameter.requires_grad for parameter in block.parameters())
        key = (type(block), trained, tuple((t.shape, t.dtype, t.requires_grad) for t in inputs))
        if key not in self._cost:
            with SavedBytes(block, [*inputs, *self._buffers]) as saved:
                result = block(*args)
            self._cost[key] = saved.total
        else:
            if not keeps(self.budget_bytes, self.used, self._cost[key], own, self._blocks - self.calls):
                return checkpoint(block, *args, use_reentrant=False)
            result = block(*args)
        self.used += self._cost[key]
        self.kept += 1
        return result

    def recompute_more(self) -> bool:
        """After running out of memory: keep two thirds of what the last forward kept, or nothing. False where nothing was kept."""
        if self.budget_bytes is None:
            return False
        smaller = min(self.budget_bytes, self.used) * 2 // 3
        self.budget_bytes = smaller if self.kept > 1 and smaller > 0 else None
        return True

    def _count_new(self, inputs: list[Tensor]) -> int:
        """Bytes of inputs that no earlier block of this forward has kept already."""
        new = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in inputs if _storage(tensor) not in self._seen}
        self._seen.update(new)
        return sum(new.values())


def automatic_budget(device: torch.device, still_to_come: int) -> int:
    """Bytes for activations: what is free on the GPU, less gradients and optimizer state `still_to_come` and the reserve."""
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, int(free - still_to_come - RESERVE * total))


def set_checkpointing(transformer: Any, config: Config, device: torch.device, still_to_come: int) -> ActivationBudget | None:
    """Apply `gradient_checkpointing` and `activation_memory_gb`; None where nothing is recomputed."""
    if not config.gradient_checkpointing:
        return None
    budget = config.activation_memory_gb
    if budget == "auto":  # a CPU's memory is not this program's alone; blocks that come and go are always recomputed
        chosen = device.type == "cuda" and not config.offload
        return ActivationBudget(transformer, automatic_budget(device, still_to_come) if chosen else None)
    return ActivationBudget(transformer, None if budget is None else int(budget * 1e9))
