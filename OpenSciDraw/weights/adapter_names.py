"""Names of a model's layers as programs write them into adapter files, and what a file that fits nothing is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel

PREFIXES = (  # of a layer's name, by program; several may follow one another
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "lora_unet_", "lora_transformer_",
    "lora_unet.", "lora_transformer.", "lycoris_", "lycoris.", "oft_unet_", "oft_diffusion_model_", "unet.",
)  # fmt: skip
TEXT_PREFIXES = ("lora_te", "text_encoder", "lora_text", "te_", "cond_stage_model", "conditioner", "text_model", "bundle_emb")
_FAMILIES = (  # a part of a name -> the models that have it, the more special ones first
    (r"single_transformer_blocks[._]\d+[._]proj_mlp", "FLUX.1 (diffusers' names)"),
    (r"double_blocks[._]\d+[._]img_mod|guidance_in|single_blocks[._]\d+[._]modulation", "FLUX.1 or Chroma (original names)"),
    (r"to_qkv_mlp_proj|ff[._]linear_in", "FLUX.2 (diffusers' names)"),
    (r"(double|single)_blocks[._]\d+", "FLUX (original names)"),
    (r"joint_blocks[._]\d+", "Stable Diffusion 3 (original names)"),
    (r"transformer_blocks[._]\d+[._](img|txt)_m(lp|od)", "Qwen-Image"),
    (r"(noise|context)_refiner[._]\d+|layers[._]\d+[._](attention|feed_forward)", "Z-Image or Lumina"),
    (r"(down|up|mid)_blocks?[._]\d*|input_blocks|output_blocks|middle_block", "Stable Diffusion (a U-Net: 1.5, 2 or XL)"),
    (r"blocks[._]\d+[._](self_attn|cross_attn|ffn)", "Wan"),
    (r"transformer_blocks[._]\d+[._]attn[12]", "PixArt, LTX or another model with cross-attention"),
    (r"single_transformer_blocks[._]\d+|transformer_blocks[._]\d+", "FLUX, SD 3 or a like transformer"),
)


@dataclass(frozen=True)
class Part:
    """A layer of the model and which rows of the file's layer are its own: indices (out,), or None for all of them."""

    layer: str
    rows: Tensor | None = None


@dataclass(frozen=True)
class LayerNames:
    """The model's linear layers, (out, in) by name, and by each normalised spelling the parts that the layer of a file has.

    `originals`: the same by the original's names as `original_lora` writes them.
    """

    shapes: dict[str, tuple[int, int]]
    spellings: dict[str, tuple[Part, ...]]
    originals: dict[str, tuple[Part, ...]]

    def parts(self, name: str) -> tuple[Part, ...]:
        """What the layer `name` of a file is here; empty where the model has no such layer."""
        return self.spellings.get(normalised(name), ())


def normalised(name: str) -> str:
    """A layer's name without prefixes, with _ for every dot: all programs' spellings of it are the same then."""
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name.replace(".", "_")


def layer_names(model: FigureModel) -> LayerNames:
    """The spellings of `model`'s linear layers: diffusers' names, and those that its `original_lora` writes, read backwards.

    For the latter each layer is given a LoRA of rank 1 whose up factor holds row numbers; where they turn up is which rows of
    which original layer belong to it, however the original fuses or reorders them.
    """
    linear = {n: m for n, m in model.empty_transformer().named_modules() if isinstance(m, nn.Linear)}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in linear.items()}
    spellings = {normalised(name): (Part(name),) for name in shapes}
    fused: dict[str, list[Part]] = {}
    for name, (out, width) in shapes.items():
        numbers = torch.arange(1, out + 1, dtype=torch.float64)[:, None]
        try:
            written = model.original_lora({f"{name}.lora_A.weight": torch.ones(1, width), f"{name}.lora_B.weight": numbers}, 1.0, 1)
        except UserError:
            continue  # the family says that the original has no such layer
        for key, tensor in written.items():
            if key.endswith((".lora_up.weight", ".lora_B.weight")):
                found = tensor.double().sum(1)
                rows = torch.empty(out, dtype=torch.long)
                rows[found[found > 0].long() - 1] = found.nonzero().flatten()
                whole = len(found) == out and bool((rows == torch.arange(out)).all())
                fused.setdefault(key.rsplit(".lora_", 1)[0], []).append(Part(name, None if whole else rows))
    originals = {stem: tuple(parts) for stem, parts in fused.items()}
    return LayerNames(shapes, {**{normalised(stem): parts for stem, parts in originals.items()}, **spellings}, originals)


def is_of_text_encoder(name: str) -> bool:
    return name.startswith(TEXT_PREFIXES)


def family_of(names: Iterable[str]) -> str:
    """The models that layers of such names belong to, as far as names tell."""
    names = list(names)
    return next((family for pattern, family in _FAMILIES if any(re.search(pattern, n) for n in names)), "a model not known here")
