"""Names of Ovis-Image's layers in diffusers and in the original repository (of AIDC-AI), which ComfyUI reads."""

from __future__ import annotations

import torch
from torch import Tensor

from OpenSciDraw.errors import UserError

# diffusers name -> original name, layers that are one in both
_SAME = {
    "transformer_blocks": {
        "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.net.2": "img_mlp.down_proj",
        "ff_context.net.2": "txt_mlp.down_proj", "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
    },
    "single_transformer_blocks": {"proj_out": "linear2", "norm.linear": "modulation.lin"},
}  # fmt: skip
# original layer -> its parts from top to bottom: diffusers name and rows, as multiples of the width
_FUSED = {
    "transformer_blocks": {
        "img_attn.qkv": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1},
        "txt_attn.qkv": {"attn.add_q_proj": 1, "attn.add_k_proj": 1, "attn.add_v_proj": 1},
    },
    "single_transformer_blocks": {"linear1": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "proj_mlp": 8}},
}
_OUTER = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "timestep_embedder.linear_1": "time_in.in_layer", "timestep_embedder.linear_2": "time_in.out_layer",
}  # fmt: skip
_BLOCKS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}


def original_lora(layers: dict[str, Tensor], alpha: float, rank: int) -> dict[str, Tensor]:
    """Names `diffusion_model.<module>.{lora_down,lora_up}.weight` and `.alpha`, as ComfyUI reads them.

    The original fuses q, k, v (and in single blocks the MLP's input): the adapters that were trained become one of their ranks'
    sum, A stacked, each B in its own rows, alpha in proportion, which is exactly the same update.

    Raises:
        UserError: a layer that is not one, or part of one, there: `ff.net.0.proj` of the double blocks is two in the original.
    """
    out: dict[str, Tensor] = {}
    fused: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}

    def put(name: str, down: Tensor, up: Tensor) -> None:
        key = f"diffusion_model.{name}"
        out[f"{key}.lora_down.weight"], out[f"{key}.lora_up.weight"] = down.contiguous(), up.contiguous()
        out[f"{key}.alpha"] = torch.tensor(alpha * len(down) / rank, dtype=torch.float32)

    for module in sorted({name.rsplit(".lora_", 1)[0] for name in layers}):
        kind, _, rest = module.partition(".")
        index, _, layer = rest.partition(".")
        down, up = layers[f"{module}.lora_A.weight"], layers[f"{module}.lora_B.weight"]
        whole = next((name for name, parts in _FUSED.get(kind, {}).items() if layer in parts), None)
        if kind in _SAME and layer in _SAME[kind]:
            put(f"{_BLOCKS[kind]}.{index}.{_SAME[kind][layer]}", down, up)
        elif whole is not None:
            fused.setdefault(f"{kind}.{index}.{whole}", {})[layer] = down, up
        elif module in _OUTER:
            put(_OUTER[module], down, up)
        else:
            raise UserError(f"LoRA on {module!r} has no counterpart in the original names; export --format diffusers.")
    for place, pairs in fused.items():
        kind, index, whole = place.split(".", 2)
        put(f"{_BLOCKS[kind]}.{index}.{whole}", *_stacked(_FUSED[kind][whole], pairs))
    return out


def _stacked(parts: dict[str, int], pairs: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One (down, up) of the trained parts of a fused layer; rows of parts that were not trained stay zero."""
    trained = [part for part in parts if part in pairs]
    down = torch.cat([pairs[part][0] for part in trained])
    width, column, row = down.shape[1], 0, 0
    rows = torch.zeros(width * sum(parts.values()), len(down), dtype=pairs[trained[0]][1].dtype)
    for part, times in parts.items():
        if part in pairs:
            up = pairs[part][1]
            rows[row : row + len(up), column : column + up.shape[1]] = up
            column += up.shape[1]
        row += width * times
    return down, rows
