"""8-bit float products: their error, their gradients, and what they are refused with. The kernel itself needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapters import built, gradients
from torch import nn

from OpenSciDraw.errors import UserError
from OpenSciDraw.parallel.sharding import repeated_blocks
from OpenSciDraw.weights import fp8
from OpenSciDraw.weights.adapters import AdaptedLinear
from OpenSciDraw.weights.precision import compute_throughout


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def test_a_product_and_its_gradient_are_right_to_the_three_bits_of_e4m3_whatever_the_rows_sizes() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 384).requires_grad_(False)
    x = (torch.randn(64, 256) * torch.logspace(-6, 6, 64)[:, None]).requires_grad_(True)
    eight = fp8.Fp8Linear(layer)
    grad = torch.randn(64, 384) * torch.logspace(6, -6, 64)[:, None]
    y = eight(x)
    (mine,) = torch.autograd.grad(y, x, grad)
    y, x = y.detach(), x.detach()
    for row in (0, 31, 63):  # each row has a scale of its own, so the smallest is as right as the largest
        assert error(y[row] - layer.bias, (x @ layer.weight.T)[row]) < 0.05
        assert error(mine[row], (grad @ layer.weight)[row]) < 0.05
    assert error(y - layer.bias, x @ layer.weight.T) > 0.005  # not computed in more than 8 bits


def test_rows_of_zeros_and_the_largest_values_stay_finite() -> None:
    x = torch.stack([torch.zeros(32), torch.full((32,), 3e38), torch.full((32,), -1e-30)])
    values, scale = fp8.quantize_rows(x)
    assert torch.isfinite(values.float()).all() and torch.equal(values[0].float(), torch.zeros(32))
    torch.testing.assert_close(values.float()[1:2] * scale[1:2], x[1:2])


@pytest.mark.parametrize("family", ["klein", "qwen"])
def test_the_velocity_and_the_adapters_gradients_stay_near_those_of_bf16(family: str) -> None:
    """Measured on the embedded models of random weights: velocity 0.0026 (klein) and 0.0017 (Qwen-Image)."""
    config, plain, inputs = built(family, mixed_precision="bf16")
    compute_throughout(plain, plain.transformer, config)
    expected, there = gradients(plain, inputs)
    _, model, _ = built(family, mixed_precision="bf16", fp8_products=True)
    count = fp8.use_fp8_products(model.transformer, torch.device("cpu"))
    layers = [m for block in repeated_blocks(model.transformer) for m in block.modules()]
    assert count == sum(isinstance(m, fp8.Fp8Linear) for m in layers)
    assert all(isinstance(m.base_layer, fp8.Fp8Linear) for m in layers if isinstance(m, AdaptedLinear))
    compute_throughout(model, model.transformer, config)
    found, here = gradients(model, inputs)
    assert 0.0005 < error(found, expected) < 0.01
    whole, other = (torch.cat([grads[name].flatten() for name in there]) for grads in (there, here))
    assert torch.nn.functional.cosine_similarity(whole, other, dim=0) > 0.8  # random weights: bf16 itself has 0.98


def test_layers_of_a_group_share_the_8_bit_form_of_their_input(monkeypatch: pytest.MonkeyPatch) -> None:
    config, model, _ = built("klein", mixed_precision="no")
    fp8.use_fp8_products(model.transformer, torch.device("cpu"))
    compute_throughout(model, model.transformer, config)
    attention, made, exact = model.transformer.transformer_blocks[0].attn, [], fp8.quantize_rows
    monkeypatch.setattr("OpenSciDraw.weights.adapters.quantize_rows", lambda x: made.append(1) or exact(x))
    x = torch.randn(2, 5, attention.to_q.in_features)
    together = [layer(x) for layer in (attention.to_q, attention.to_k, attention.to_v)]
    assert len(made) == 1
    for layer, out in zip((attention.to_q, attention.to_k, attention.to_v), together, strict=True):
        torch.testing.assert_close(out, layer._add_to_base(x), rtol=1e-5, atol=1e-6)


def test_a_gpu_without_such_products_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(UserError, match="A100 has no 8-bit float products"):
        fp8.use_fp8_products(nn.Module(), torch.device("cuda"))


def test_a_run_trains_with_them(run: Any, tmp_path: Path) -> None:
    training = run(model_output_dir=str(tmp_path), max_train_steps=2, fp8_products=True, mixed_precision="bf16")
    assert any(isinstance(m, fp8.Fp8Linear) for m in training.model.transformer.modules())
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in training.parameters.values())
