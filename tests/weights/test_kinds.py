"""DoRA, rsLoRA, LoKr, LoHa and OFT: trained, saved, merged and exported, each as its formula says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BASE
from safetensors.torch import load_file, save_file
from torch import Tensor

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.comfyui import adapter_tensors
from OpenSciDraw.models.base import TextBatch, build_model
from OpenSciDraw.weights import trainable
from OpenSciDraw.weights.adapter_files import read_adapter_file
from OpenSciDraw.weights.kinds import switched_off
from OpenSciDraw.weights.precision import compute_throughout
from OpenSciDraw.weights.start import add_to_base, attach_adapter, load_pretrained_adapter

KINDS: dict[str, dict[str, Any]] = {
    "lora": {}, "rslora": {"use_rslora": True}, "dora": {"adapter_type": "dora"},
    "lokr": {"adapter_type": "lokr", "lokr_factor": 4},
    "lokr both": {"adapter_type": "lokr", "lokr_decompose_both": True, "rank": 2},
    "loha": {"adapter_type": "loha"}, "oft": {"adapter_type": "oft", "oft_block_size": 8},
}  # fmt: skip
TWINS = ("rslora", "lokr both")  # that differ little from another one
FILE = "pytorch_lora_weights.safetensors"


def noise(*shape: int, key: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(key + sum(shape)))


def built(kind: str, **changes: Any) -> tuple[Config, Any, tuple[Any, ...]]:
    config = Config.model_validate({**BASE, "dataset": {"base_dir": "x"}, **KINDS[kind], **changes})
    model = build_model(config)
    model.load_vae()
    model.load_transformer()
    trainable.make_trainable(model.transformer, config)
    noisy = model.normalize(noise(1, *model.latent_shape(64, 64)))
    return config, model, (noisy, torch.tensor([0.6]), TextBatch(noise(1, *model.text_shape()).to(model.weight_dtype)))


def without_adapter() -> Any:
    model = build_model(Config.model_validate({**BASE, "dataset": {"base_dir": "x"}}))
    model.load_vae()
    model.load_transformer()
    return model


def learn(model: Any) -> dict[str, Tensor]:
    """Move every trained tensor, as training would."""
    parameters = dict(trainable.trainable_parameters(model.transformer))
    for at, (name, parameter) in enumerate(parameters.items()):
        step = noise(*parameter.shape, key=at) * (0.3 if ".lokr_" in name else 0.1)
        parameter.data.add_(parameter.data.abs() * step if "magnitude" in name else step)
    return parameters


def velocity(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.velocity(*inputs)
    return out


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_every_tensor_of_it_learns(kind: str, precision: str) -> None:
    config, model, inputs = built(kind, mixed_precision=precision)
    compute_throughout(model, model.transformer, config)
    with switched_off(model.transformer):
        base = velocity(model, inputs)
    close = {"rtol": 1e-4, "atol": 1e-4} if precision == "no" else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(velocity(model, inputs), base, **close)  # type: ignore[arg-type]
    learn(model)
    assert (velocity(model, inputs) - base).abs().max() > 5e-3
    with switched_off(model.transformer):
        assert torch.equal(velocity(model, inputs), base)
    model.velocity(*inputs).float().pow(2).mean().backward()
    for name, parameter in trainable.trainable_parameters(model.transformer).items():
        assert parameter.dtype == torch.float32 and parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in TWINS)) for kind in KINDS])
def test_a_saved_adapter_merged_or_loaded_gives_the_velocity_of_training(kind: str, tmp_path: Path) -> None:
    """By our formulas into the base; beside it as `sample` and `evaluate` do; and by diffusers where it reads the kind."""
    config, model, inputs = built(kind)
    parameters = learn(model)
    trainable.save_weights(model, model.transformer, parameters, tmp_path, config, True)
    wanted = velocity(model, inputs)
    ours, beside, theirs = without_adapter(), without_adapter(), without_adapter()
    add_to_base(ours.transformer, [(read_adapter_file(tmp_path / FILE, ours), 1.0)])
    attach_adapter(beside, beside.pipeline(beside.transformer), tmp_path / FILE)
    for found in (ours, beside):
        torch.testing.assert_close(velocity(found, inputs), wanted, rtol=1e-3, atol=1e-4)
    pipe = theirs.pipeline(theirs.transformer)
    if kind in ("loha", "oft"):
        with pytest.raises(ValueError, match="Invalid adapter checkpoint"):
            pipe.load_lora_weights(str(tmp_path), weight_name=FILE)
    else:
        pipe.load_lora_weights(str(tmp_path), weight_name=FILE)
        torch.testing.assert_close(velocity(theirs, inputs), wanted, rtol=1e-3, atol=1e-4)
    start = built(kind)[1]
    fresh = dict(trainable.trainable_parameters(start.transformer))
    load_pretrained_adapter(start, fresh, config.model_copy(update={"pretrained_lora_ckpt_path": str(tmp_path / FILE)}))
    assert all(torch.equal(fresh[name], parameters[name]) for name in parameters)  # it goes on as it was


# -- ComfyUI ---------------------------------------------------------------------------------------
FUSED = {  # the original's layer -> diffusers' layers, whose rows it stacks
    **{f"double_blocks.{n}.{s}_attn.qkv": [f"transformer_blocks.{n}.attn.{p}" for p in parts]
       for n in range(2) for s, parts in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj")))},
    "double_blocks.1.img_mlp.2": ["transformer_blocks.1.ff.linear_out"],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.attn.to_out"],
}  # fmt: skip


def reconstructed(tensors: dict[str, Tensor], key: str, weight: Tensor) -> Tensor:
    """The weight that ComfyUI's definitions make of a layer's tensors (comfy/weight_adapter), in float64."""
    t = {name.removeprefix(f"{key}."): tensor.double() for name, tensor in tensors.items() if name.startswith(f"{key}.")}
    alpha = float(t.pop("alpha", torch.tensor(0.0)))
    if "lora_up.weight" in t:
        change = t["lora_up.weight"] @ t["lora_down.weight"] * (alpha / len(t["lora_down.weight"]))
    elif "hada_w1_a" in t:
        change = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) * (alpha / len(t["hada_w1_b"]))
    elif "diff" in t:
        change = t["diff"]
    else:
        split = [len(t[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in t]
        w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
        change = torch.kron(w1, w2) * (alpha / split[-1] if split else 1.0)
    if "dora_scale" not in t:
        return weight + change
    assert t["dora_scale"].shape == (len(weight), 1)
    turned = weight + change
    return turned * (t["dora_scale"] / turned.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "oft"])
def test_the_comfyui_file_is_the_trained_weight_by_that_formats_definition(kind: str, tmp_path: Path) -> None:
    config, model, _ = built(kind)
    base = {name.replace(".base_layer.", "."): p.detach().double() for name, p in model.transformer.named_parameters()}
    trainable.save_weights(model, model.transformer, learn(model), tmp_path, config, True)
    updates = read_adapter_file(tmp_path / FILE, model).updates
    tensors = adapter_tensors(model, updates)
    save_file(tensors, tmp_path / "comfyui.safetensors")
    tensors = load_file(tmp_path / "comfyui.safetensors")
    layers = dict(model.transformer.named_modules())
    for original, parts in FUSED.items():
        key = "lora_unet_" + original.replace(".", "_")
        found = reconstructed(tensors, key, torch.cat([base[f"{part}.weight"] for part in parts]))
        for part, rows in zip(parts, found.split([len(base[f"{p}.weight"]) for p in parts]), strict=True):
            layer: Any = layers[part]
            layer.merge()  # PEFT's own
            torch.testing.assert_close(rows, layer.get_base_layer().weight.detach().double(), rtol=1e-3, atol=1e-5)
    ours = read_adapter_file(tmp_path / "comfyui.safetensors", model).updates  # and back
    assert ours.keys() == updates.keys()


def test_what_comfyui_has_no_form_for_is_refused_with_what_to_do(tmp_path: Path) -> None:
    config, model, _ = built("oft")
    trainable.save_weights(model, model.transformer, learn(model), tmp_path, config, True)
    with pytest.raises(UserError, match="rotates a layer's inputs.*scienceflow merge RUN --format comfyui"):
        adapter_tensors(model, read_adapter_file(tmp_path / FILE, model).updates)
    config, model, _ = built("dora", lora_layers="to_q")
    trainable.save_weights(model, model.transformer, learn(model), tmp_path, config, True)
    with pytest.raises(UserError, match="to_k, .*to_v did not train"):
        adapter_tensors(model, read_adapter_file(tmp_path / FILE, model).updates)


# -- a run -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["dora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("lokr", "loha", "oft"))])
def test_a_run_of_each_kind_resumes_to_the_bit_with_its_average(kind: str, run: Any, tmp_path: Path) -> None:
    options = {**KINDS[kind], "lora_layers": "to_q,to_out.0,to_qkv_mlp_proj", "use_ema": True, "ema_steps": 1, "max_train_steps": 2,
               "checkpointing_steps": 1, "mixed_precision": "bf16"}  # fmt: skip
    run(**options, model_output_dir=str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", ignore=shutil.ignore_patterns("checkpoint-2"))
    run(**options, model_output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest")
    for name in (FILE, f"ema/{FILE}", "optimizer.safetensors"):
        a, b = (load_file(tmp_path / part / "checkpoint-2" / name) for part in ("whole", "parts"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.parametrize("kind", KINDS)
def test_plan_counts_what_trains(kind: str, tiny: Any) -> None:
    config, model, _ = built(kind)
    trained = sum(p.numel() for p in trainable.trainable_parameters(model.transformer).values())
    assert trainable.count_trained(model.empty_transformer(), config) == trained


def test_keys_that_would_not_act_are_refused_and_sizes_that_do_not_fit() -> None:
    values = {**BASE, "dataset": {"base_dir": "x"}}
    for changes, said in (
        ({"use_rslora": True, "adapter_type": "lokr"}, "use_rslora: does nothing with adapter_type = 'lokr'"),
        ({"lokr_factor": 8}, "lokr_factor: does nothing with adapter_type = 'lora'"),
        ({"lora_dropout": 0.1, "adapter_type": "loha"}, "lora_dropout: does nothing"),
        ({"quantization": "int8", "adapter_type": "dora"}, "needs the plain weights"),
        ({"use_lora": False, "adapter_type": "oft"}, "trains no adapter"),
    ):
        with pytest.raises(ValueError, match=said):
            Config.model_validate({**values, **changes})
    with pytest.raises(UserError, match="oft_block_size = 7 does not divide .* All of them are divided by 2, 3, 4"):
        built("oft", oft_block_size=7)


def test_a_dora_or_oft_becomes_part_of_the_base_and_not_a_new_lora(tmp_path: Path) -> None:
    config, model, _ = built("dora")
    trainable.save_weights(model, model.transformer, learn(model), tmp_path, config, True)
    for kind, said in (("lora", "fuse_pretrained_lora = True"), ("lokr", "this config trains a lokr")):
        other, start, _ = built(kind)
        given = other.model_copy(update={"pretrained_lora_ckpt_path": str(tmp_path / FILE)})
        with pytest.raises(UserError, match=said):
            load_pretrained_adapter(start, dict(trainable.trainable_parameters(start.transformer)), given)
