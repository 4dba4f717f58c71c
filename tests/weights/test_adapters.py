"""Our LoRA forward against PEFT's, and training's velocity in bf16 against the pipeline's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import merged
from peft.tuners import lora
from torch import Tensor

from OpenSciDraw.config import Config
from OpenSciDraw.models.base import TextBatch, build_model
from OpenSciDraw.parallel.sharding import repeated_blocks
from OpenSciDraw.weights import trainable
from OpenSciDraw.weights.adapters import AdaptedLinear
from OpenSciDraw.weights.precision import compute_throughout

ATTENTION = "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out"
KLEIN = {
    "model_type": "Flux2Klein", "pretrained_model_name_or_path": "embedded:flux2_klein_tiny_random", "max_sequence_length": 16,
    "lora_layers": f"{ATTENTION},linear_in,linear_out,to_qkv_mlp_proj,attn.to_out",
    "rank": 4, "lora_alpha": 6, "dataset": {"type": "ArXiVParquetDatasetV2", "base_dir": "x"},
}  # fmt: skip
QWEN = {
    "model_type": "QwenImage", "pretrained_model_name_or_path": "embedded:qwen_image_tiny",
    "lora_layers": f"{ATTENTION},img_mlp.net.2",
}  # fmt: skip


def built(family: str, **values: Any) -> Any:
    """The embedded model with what trains, an adapter's B not 0, and inputs for `velocity`."""
    config = Config.model_validate(merged(merged(KLEIN, **(QWEN if family == "qwen" else {})), **values))
    model = build_model(config)
    model.load_vae()
    model.load_transformer(None, None, trainable.loading_dtype(config))
    trainable.make_trainable(model.transformer, config)
    torch.manual_seed(1)
    for name, parameter in model.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    width = model.text_shape()[1]
    noisy = model.normalize(torch.randn(2, *model.latent_shape(64, 96)))
    text = TextBatch(torch.randn(2, 16, width).to(model.weight_dtype))
    return config, model, (noisy, torch.tensor([0.3, 0.8]), text)


def gradients(model: Any, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.transformer.zero_grad()
    out = model.velocity(*inputs)
    out.float().pow(2).mean().backward()
    trained = trainable.trainable_parameters(model.transformer)  # Qwen's last block does not use its text stream: no gradient
    return out.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}


@pytest.mark.parametrize("family", ["klein", "qwen"])
def test_in_fp32_outputs_and_gradients_are_those_of_peft(family: str) -> None:
    config, model, inputs = built(family, mixed_precision="no")
    expected, there = gradients(model, inputs)  # without `compute_throughout` the forward is PEFT's own
    adapters = compute_throughout(model, model.transformer, config)
    assert {len(group.layers) for group in adapters.groups} == {1, 3}
    found, here = gradients(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert here.keys() == there.keys()
    for name, gradient in there.items():
        torch.testing.assert_close(here[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max() + 1), msg=name)


@pytest.mark.parametrize("family", ["klein", "qwen"])
def test_bf16_throughout_is_no_further_from_fp32_than_autocast_and_its_gradients_are_fp32(family: str) -> None:
    config, model, inputs = built(family, mixed_precision="bf16")
    _, fp32, same = built(family, mixed_precision="no")
    fp32.transformer.load_state_dict({name: tensor.float() for name, tensor in model.transformer.state_dict().items()})
    _, exact = gradients(fp32, same)
    with torch.autocast("cpu", torch.bfloat16):
        _, by_autocast = gradients(model, inputs)
    compute_throughout(model, model.transformer, config)
    _, ours = gradients(model, inputs)
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    whole, autocast, here = (torch.cat([grads[name].flatten() for name in exact]) for grads in (exact, by_autocast, ours))
    assert (here - whole).norm() < 1.05 * (autocast - whole).norm()


@pytest.mark.parametrize("family", ["klein", "qwen"])
@pytest.mark.parametrize("lora", [True, False])
def test_training_in_bf16_has_the_velocity_of_the_bf16_pipelines_transformer_to_the_bit(family: str, lora: bool) -> None:
    """Training's forward under grad, with a new adapter or with fp32 weights of all layers, against the plain bf16 model."""
    config, model, inputs = built(family, mixed_precision="bf16", use_lora=lora)
    for name, parameter in model.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    compute_throughout(model, model.transformer, config)
    model.transformer.train()
    _, plain, _ = built(family, mixed_precision="bf16")
    plain.load_transformer()
    with torch.no_grad():
        expected = plain.velocity(*inputs)
    found = model.velocity(*inputs)
    assert found.requires_grad and found.dtype == torch.bfloat16 and torch.equal(found.detach(), expected)


def test_micro_steps_accumulate_in_fp32() -> None:
    config, model, inputs = built("klein", mixed_precision="bf16")
    compute_throughout(model, model.transformer, config)
    _, once = gradients(model, inputs)
    once = {name: g.clone() for name, g in once.items()}
    model.velocity(*inputs).float().pow(2).mean().backward()
    for name, parameter in trainable.trainable_parameters(model.transformer).items():
        assert parameter.grad.dtype == torch.float32 and torch.equal(parameter.grad, 2 * once[name])


def test_the_copies_are_of_the_weights_as_they_are_now() -> None:
    config, model, inputs = built("klein", mixed_precision="bf16")
    compute_throughout(model, model.transformer, config)
    before = model.velocity(*inputs).detach()
    with torch.no_grad():
        for name, parameter in trainable.trainable_parameters(model.transformer).items():
            parameter.mul_(2 if "lora_B" in name else 1)
    assert not torch.equal(model.velocity(*inputs).detach(), before)


def test_dropout_takes_the_same_sum_and_none_in_eval_mode() -> None:
    config, model, inputs = built("klein", mixed_precision="no", lora_dropout=0.5)
    layer = next(m for m in model.transformer.modules() if isinstance(m, AdaptedLinear))
    plain = copy.deepcopy(layer)
    compute_throughout(model, model.transformer, config)
    x = torch.randn(2, 5, layer.in_features)
    for training in (True, False):
        layer.train(training)
        plain.train(training)
        torch.manual_seed(0)
        expected = lora.Linear.forward(plain, x)
        torch.manual_seed(0)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_layers_of_a_group_that_get_other_inputs_are_still_right() -> None:
    config, model, _ = built("klein", mixed_precision="no")
    compute_throughout(model, model.transformer, config)
    attention = model.transformer.transformer_blocks[0].attn
    x, y = torch.randn(2, 3, 5, attention.to_q.in_features)
    for layer, value in ((attention.to_q, x), (attention.to_k, y), (attention.to_v, x), (attention.to_q, y)):
        torch.testing.assert_close(layer(value), lora.Linear.forward(layer, value), rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # tracing takes most of a minute
def test_blocks_compile_into_a_graph_for_each_kind_whatever_the_size_and_block() -> None:
    """Without breaks: the outputs that a group keeps between its layers' calls, and the functions of our own, trace through."""
    config, model, inputs = built("klein", mixed_precision="bf16")
    compute_throughout(model, model.transformer, config)
    larger = (model.normalize(torch.randn(2, *model.latent_shape(128, 96))), *inputs[1:])
    eager = [gradients(model, each) for each in (inputs, larger)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in repeated_blocks(model.transformer):
        block.compile(dynamic=True, backend="aot_eager", fullgraph=True)
    for each, (expected, there) in zip((inputs, larger), eager, strict=True):
        found, here = gradients(model, each)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
        assert all((here[name] - there[name]).norm() <= 0.05 * there[name].norm() + 1e-9 for name in there)
    # of a dual block two: the first one's input needs no gradient
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
