"""Adapters and whole weights in the names that ComfyUI loads: those of a family's original repository."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.models.original_names import Place, to_original
from OpenSciDraw.utils.files import unfinished
from OpenSciDraw.weights.adapter_names import LayerNames, Part, layer_names
from OpenSciDraw.weights.updates import Update

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


# -- adapters --------------------------------------------------------------------------------------
def adapter_tensors(model: FigureModel, updates: Mapping[str, Update], names: LayerNames | None = None) -> dict[str, Tensor]:
    """An adapter's tensors in the original's names, with alpha: `lora_up`, `hada_w1_a`, `lokr_w1`, `dora_scale`, `diff`.

    Layers that the original fuses (q, k, v) become one: LoRA and LoHa exactly, with three times the rank; a Kronecker product,
    which the fused layer does not have, as the whole difference (`diff`).

    Raises:
        UserError: rotations (OFT), a DoRA that lacks a part of a fused layer, or a layer that the original does not have.
    """
    names = names or layer_names(model)
    known = {part.layer for parts in names.originals.values() for part in parts}
    if lost := sorted(updates.keys() - known):
        raise UserError(f"the original of {model.family} has no layer for {', '.join(lost[:3])}; use --format diffusers.")
    out: dict[str, Tensor] = {}
    for stem, parts in names.originals.items():
        there = [part for part in parts if part.layer in updates]
        if there:
            kinds = {updates[part.layer].kind for part in there}
            if len(kinds) > 1 or kinds & {"oft", "oft_rows"}:
                raise UserError(
                    "ComfyUI has no form for an OFT that rotates a layer's inputs, as PEFT trains it. Merge it into the base: "
                    "scienceflow merge RUN --format comfyui; or use --format diffusers."
                )
            out |= {f"{stem}.{name}": t.contiguous() for name, t in _fused(parts, there, updates, names, kinds.pop()).items()}
    return out


def _fused(
    parts: tuple[Part, ...], there: list[Part], updates: Mapping[str, Update], names: LayerNames, kind: str
) -> dict[str, Tensor]:
    rows = sum(names.shapes[part.layer][0] for part in parts)
    own = [updates[part.layer] for part in there]
    places = [torch.arange(rows) if part.rows is None else part.rows for part in there]
    same = own[0].scale if len({update.scale for update in own}) == 1 else 1.0  # in alpha; another one goes into the tensors
    if kind == "lora":
        up, down = _blocks(rows, places, [(u.tensors["up"] * (u.scale / same), u.tensors["down"]) for u in own])
        found = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(same * len(down))}
    elif kind == "loha":
        first = _blocks(rows, places, [(u.tensors["hada_w1_a"] * (u.scale / same), u.tensors["hada_w1_b"]) for u in own])
        second = _blocks(rows, places, [(u.tensors["hada_w2_a"], u.tensors["hada_w2_b"]) for u in own])
        found = dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), (*first, *second), strict=True))
        found["alpha"] = torch.tensor(same * len(first[1]))
    elif kind == "lokr" and len(parts) == 1 and parts[0].rows is None and own[0].rows is None:
        found = {n: t * own[0].scale if n in ("lokr_w1", "lokr_w1_a") else t for n, t in own[0].tensors.items()}
        ranks = [found[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in found]
        found["alpha"] = torch.tensor(float(ranks[0] if ranks else 1))
    else:
        whole = torch.zeros(rows, own[0].shape()[1])
        for update, place in zip(own, places, strict=True):
            whole[place] = update.difference()
        found = {"diff": whole}
    if any(update.magnitude is not None for update in own):
        if len(there) < len(parts) or any(update.magnitude is None for update in own):
            lost = sorted({part.layer for part in parts} - {part.layer for part in there})
            raise UserError(f"ComfyUI's DoRA scales whole layers, and {', '.join(lost)} did not train. Use --format diffusers.")
        lengths = torch.zeros(rows, 1)
        for update, place in zip(own, places, strict=True):
            assert update.magnitude is not None
            lengths[place] = update.magnitude.float().reshape(-1, 1)
        found["dora_scale"] = lengths
    return found


def _blocks(rows: int, places: list[Tensor], pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Products (up, down) that write to different rows as one: down stacked, up zero where a row is not a product's own."""
    down = torch.cat([down for _, down in pairs])
    up = torch.zeros(rows, len(down), dtype=down.dtype)
    first = 0
    for place, (own, part) in zip(places, pairs, strict=True):
        up[place, first : first + len(part)] = own.to(down.dtype)
        first += len(part)
    return up, down


# -- all weights -----------------------------------------------------------------------------------
def original_places(model: FigureModel, names: Iterable[str]) -> dict[str, Place]:
    """Where each parameter lies in the original's file. Raises UserError where the family does not say, for all or for one."""
    places = {name: model.original_place(name) for name in names}
    missing = [name for name, place in places.items() if place is None]
    if missing:
        raise UserError(
            f"all weights of {model.family} cannot be written as one file for ComfyUI: no name there is known for "
            f"{len(missing)} of {len(places)} tensors ({', '.join(missing[:3])}). Use --format diffusers."
        )
    return {name: place for name, place in places.items() if place is not None}


def write_original(
    path: Path, places: Mapping[str, Place], shape_of: Callable[[str], tuple[int, ...]], read: Callable[[str], Tensor],
    dtype: torch.dtype, metadata: Mapping[str, str],
) -> None:  # fmt: skip
    """One safetensors file of all weights in `dtype`, written one by one: never more than a layer lies in memory."""
    shapes: dict[str, list[int]] = {}
    for parameter, place in places.items():
        first, *rest = shape_of(parameter)
        shapes[place.name] = [shapes.get(place.name, [0])[0] + first, *rest]
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, shape in shapes.items():
        size = int(torch.Size(shape).numel()) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8 bytes
    with unfinished(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        written = []
        for name, tensor in to_original(places, read):
            file.write(tensor.to(dtype).cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            written.append(name)
        assert written == list(shapes)  # the order of the header
