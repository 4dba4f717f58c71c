"""An attached adapter at other strengths than the one that it was trained with."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from OpenSciDraw.errors import UserError


class Strength:
    """The adapter layers of a transformer, whose scale (lora_alpha / rank) `set` multiplies: 0 draws as the base, 1 as trained.

    LoRA, LoKr and LoHa have such a scale. DoRA's magnitudes and OFT's rotations are no multiples of anything.
    """

    def __init__(self, transformer: nn.Module):
        self._layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
        self._trained = [dict(layer.scaling) if "scaling" in vars(layer) else {} for layer in self._layers]
        self._kinds = {type(module).__name__ for module in transformer.modules() if "Dora" in type(module).__name__}

    def set(self, strength: float) -> None:
        """Raises UserError: nothing is attached, or its kind has no strength; 1 is always allowed."""
        if strength != 1 and (not self._layers or self._kinds or not all(self._trained)):
            part = "weights that are part of the base (all weights, an adapter of another program)"
            what = "DoRA and OFT" if self._layers else part
            raise UserError(f"strength = {strength:g}: {what} are drawn at strength 1 alone.")
        for layer, trained in zip(self._layers, self._trained, strict=True):
            for name, scale in trained.items():
                layer.scaling[name] = scale * strength
