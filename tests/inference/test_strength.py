"""The strength of an attached adapter: 0 is the base, 1 as trained, and a multiple in between."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, OFTConfig, inject_adapter_in_model
from torch import nn

from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.strength import Strength


def test_strength_multiplies_what_the_adapter_adds() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    base = model(x).detach()
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False), model)
    model.eval()
    trained, strength = model(x).detach(), Strength(model)
    for value in (0.0, 0.5, -1.0, 1.0):
        strength.set(value)
        assert torch.allclose(model(x), base + value * (trained - base), atol=1e-5)


def test_kinds_without_a_strength_are_refused_but_for_1() -> None:
    oft, dora = OFTConfig(r=0, oft_block_size=4, target_modules=["0"]), LoraConfig(r=2, target_modules=["0"], use_dora=True)
    for config in (oft, dora, None):
        model = nn.Sequential(nn.Linear(8, 8))
        if config is not None:
            inject_adapter_in_model(config, model)
        Strength(model).set(1.0)
        with pytest.raises(UserError, match="strength 1 alone"):
            Strength(model).set(0.5)
