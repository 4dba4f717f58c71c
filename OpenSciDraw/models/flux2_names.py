"""Names of FLUX.2's layers in diffusers and in the original repository (of Black Forest Labs), which ComfyUI reads."""

from __future__ import annotations

import torch
from torch import Tensor

from OpenSciDraw.errors import UserError
from OpenSciDraw.models.original_names import Place

# diffusers name -> original name (the repository of Black Forest Labs, used by ComfyUI)
_BLOCKS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
_SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
_DOUBLE = {
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
}  # fmt: skip
_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_OUTER = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
}  # fmt: skip
_NORMS = {
    "transformer_blocks": {
        "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
    },
    "single_transformer_blocks": {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"},
}  # fmt: skip
_LAST = ("norm_out.linear", "final_layer.adaLN_modulation.1")  # (scale, shift) in diffusers, (shift, scale) in the original


def halves_swapped(rows: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    return torch.cat(rows.chunk(2, 0)[::-1])


def original_place(parameter: str) -> Place | None:
    """Where a parameter of diffusers' transformer lies in the original file; None where that has none."""
    module, _, kind = parameter.rpartition(".")
    if module in _OUTER or module == _LAST[0]:
        return Place(f"{_OUTER.get(module, _LAST[1])}.{kind}", halves_swapped=module == _LAST[0])
    block, _, rest = module.partition(".")
    index, _, layer = rest.partition(".")
    if norm := _NORMS.get(block, {}).get(layer):
        return Place(f"{_BLOCKS[block]}.{index}.{norm}.scale")
    if block == "transformer_blocks":
        for fused, parts in _FUSED.items():
            if layer in parts:
                return Place(f"double_blocks.{index}.{fused}.{kind}", parts.index(layer), len(parts))
    name = {"transformer_blocks": _DOUBLE, "single_transformer_blocks": _SINGLE}.get(block, {}).get(layer)
    return None if name is None else Place(f"{_BLOCKS[block]}.{index}.{name}.{kind}")


def original_lora(layers: dict[str, Tensor], alpha: float, rank: int) -> dict[str, Tensor]:
    """Names `lora_unet_<module>.{lora_down,lora_up}.weight` and `.alpha`, as ComfyUI reads them.

    The original model fuses q, k, v into one matrix: their three adapters become one of rank 3r,
    A stacked, B block-diagonal, alpha 3 x alpha, which is exactly the same update.
    """
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in layers})
    pairs = {m: (layers[f"{m}.lora_A.weight"], layers[f"{m}.lora_B.weight"]) for m in modules}
    out: dict[str, Tensor] = {}

    def put(name: str, down: Tensor, up: Tensor, scale_alpha: float) -> None:
        key = "lora_unet_" + name.replace(".", "_")
        out[f"{key}.lora_down.weight"], out[f"{key}.lora_up.weight"] = down.contiguous(), up.contiguous()
        out[f"{key}.alpha"] = torch.tensor(scale_alpha, dtype=torch.float32)

    for module, (down, up) in pairs.items():
        kind, _, rest = module.partition(".")
        index, _, layer = rest.partition(".")
        if kind == "single_transformer_blocks":
            put(f"single_blocks.{index}.{_SINGLE[layer]}", down, up, alpha)
        elif kind == "transformer_blocks" and layer in _DOUBLE:
            put(f"double_blocks.{index}.{_DOUBLE[layer]}", down, up, alpha)
        elif module in _OUTER:
            put(_OUTER[module], down, up, alpha)
        elif module == _LAST[0]:
            put(_LAST[1], down, halves_swapped(up), alpha)
        elif kind != "transformer_blocks":
            raise UserError(f"LoRA on {module!r} has no counterpart in the original names; export --format diffusers.")
    for block in sorted({m.split(".")[1] for m in modules if m.startswith("transformer_blocks.")}, key=int):
        for fused, parts in _FUSED.items():
            names = [f"transformer_blocks.{block}.{part}" for part in parts]
            if not any(name in pairs for name in names):
                continue
            width_out, width_in = next((pairs[n][1].shape[0], pairs[n][0].shape[1]) for n in names if n in pairs)
            zero = (torch.zeros(rank, width_in), torch.zeros(width_out, rank))  # a part that was not trained
            three = [pairs.get(n, zero) for n in names]
            down = torch.cat([a.to(three[0][0].dtype) for a, _ in three])
            put(f"double_blocks.{block}.{fused}", down, torch.block_diag(*(b for _, b in three)), 3 * alpha)
    return out
