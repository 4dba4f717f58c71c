"""Adapters of any program: files built from each format's definition do what their own program would make of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import BASE, make_model
from safetensors.torch import save_file
from torch import Tensor, nn

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import TextBatch, build_model
from OpenSciDraw.weights import trainable
from OpenSciDraw.weights.adapter_files import adapter_path, read_adapter_file
from OpenSciDraw.weights.start import add_to_base, load_pretrained_adapter

Q, K, V = (f"transformer_blocks.0.attn.to_{part}" for part in "qkv")
OUT, MLP = "transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.ff.linear_in"
SINGLE = "single_transformer_blocks.1.attn.to_qkv_mlp_proj"
BFL = {OUT: "double_blocks.0.img_attn.proj", SINGLE: "single_blocks.1.linear1", MLP: "double_blocks.1.img_mlp.0"}
QKV, RANK = "double_blocks.0.img_attn.qkv", 3


@pytest.fixture(scope="module")
def layers(tiny) -> dict[str, nn.Linear]:  # type: ignore[no-untyped-def]
    return {name: module for name, module in tiny.transformer.named_modules() if isinstance(module, nn.Linear)}


def noise(*shape: int, key: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(key + sum(shape))) * 0.3


def factors(layer: nn.Linear, key: int) -> tuple[Tensor, Tensor]:
    return noise(RANK, layer.in_features, key=key), noise(layer.out_features, RANK, key=key + 1)


Made = tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor]]  # a file's tensors, its metadata, what it adds to each layer


def plain(layers: dict[str, nn.Linear], name: Callable[[str], str], down: str, up: str, alpha: float | None) -> Made:
    """One LoRA for each layer, none fused; alpha in the file, or 1.0 by the rank."""
    tensors, wanted = {}, {}
    for at, layer in enumerate((Q, K, V, OUT, SINGLE, MLP)):
        a, b = factors(layers[layer], 10 * at)
        tensors |= {f"{name(layer)}.{down}.weight": a, f"{name(layer)}.{up}.weight": b}
        if alpha is not None:
            tensors[f"{name(layer)}.alpha"] = torch.tensor(alpha)
        wanted[layer] = (1.0 if alpha is None else alpha / RANK) * (b.double() @ a.double())
    return tensors, {}, wanted


def fused(layers: dict[str, nn.Linear], prefix: str, flat: bool, down: str, up: str, alpha: float | None) -> Made:
    """The original's names: q, k and v of a block have one A, and one B of three times the rows."""
    tensors, wanted = {}, {}
    width, out = layers[Q].in_features, layers[Q].out_features
    scale = 1.0 if alpha is None else alpha / RANK

    def put(name: str, a: Tensor, b: Tensor) -> Tensor:
        key = prefix + (name.replace(".", "_") if flat else name)
        tensors.update({f"{key}.{down}.weight": a, f"{key}.{up}.weight": b})
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        return scale * (b.double() @ a.double())

    whole = put(QKV, noise(RANK, width, key=5), noise(3 * out, RANK, key=6))
    wanted |= dict(zip((Q, K, V), whole.split(out), strict=True))
    for at, (layer, name) in enumerate(BFL.items()):
        wanted[layer] = put(name, *factors(layers[layer], 10 * at))
    return tensors, {}, wanted


def stated(layers: dict[str, nn.Linear]) -> Made:
    tensors, _, wanted = plain(layers, lambda name: f"transformer.{name}", "lora_A", "lora_B", None)
    config = {"r": RANK, "lora_alpha": 12, "use_rslora": True, "alpha_pattern": {OUT: 1.5}}
    config = {f"transformer.{key}": value for key, value in config.items()}
    scales = {name: (1.5 if name == OUT else 12) / RANK**0.5 for name in wanted}
    return tensors, {"lora_adapter_metadata": json.dumps(config)}, {name: scales[name] * delta for name, delta in wanted.items()}


def loha(layers: dict[str, nn.Linear]) -> Made:
    tensors, wanted = {}, {}
    for at, (layer, name) in enumerate(BFL.items()):
        (d1, u1), (d2, u2) = factors(layers[layer], 10 * at), factors(layers[layer], 10 * at + 4)
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.hada_w1_a": u1, f"{key}.hada_w1_b": d1, f"{key}.hada_w2_a": u2, f"{key}.hada_w2_b": d2}
        tensors[f"{key}.alpha"] = torch.tensor(1.5)
        wanted[layer] = 1.5 / RANK * (u1.double() @ d1.double()) * (u2.double() @ d2.double())
    width, out = layers[Q].in_features, 3 * layers[Q].out_features
    parts = [noise(out, 2, key=1), noise(2, width, key=2), noise(out, 2, key=3), noise(2, width, key=4)]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors |= {f"lora_unet_{QKV.replace('.', '_')}.{name}": part for name, part in zip(names, parts, strict=True)}
    a, b, c, d = (part.double() for part in parts)
    return tensors, {}, wanted | dict(zip((Q, K, V), ((a @ b) * (c @ d)).chunk(3), strict=True))


def lokr(layers: dict[str, nn.Linear]) -> Made:
    """LyCORIS's names of diffusers' layers; the fused one by ai-toolkit, with two whole factors, where alpha does nothing."""
    tensors, wanted = {}, {}
    for at, layer in enumerate((OUT, SINGLE, MLP)):
        out, width = layers[layer].weight.shape
        w1, a, b = noise(4, 2, key=at), noise(out // 4, RANK, key=at + 1), noise(RANK, width // 2, key=at + 2)
        key = f"lycoris_{layer.replace('.', '_')}"
        tensors |= {f"{key}.lokr_w1": w1, f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b, f"{key}.alpha": torch.tensor(1.5)}
        wanted[layer] = 1.5 / RANK * torch.kron(w1.double(), a.double() @ b.double())
    w1, w2 = noise(3, 2, key=8), noise(layers[Q].out_features, layers[Q].in_features // 2, key=9)
    tensors |= {f"diffusion_model.{QKV}.lokr_w1": w1, f"diffusion_model.{QKV}.lokr_w2": w2}
    tensors[f"diffusion_model.{QKV}.alpha"] = torch.tensor(1e10)
    return tensors, {}, wanted | dict(zip((Q, K, V), torch.kron(w1.double(), w2.double()).chunk(3), strict=True))


def dora(layers: dict[str, nn.Linear], of_columns: bool = False) -> Made:
    """kohya's and OneTrainer's names with dora_scale, of rows or of columns."""
    tensors, _, wanted = plain(layers, lambda name: f"lora_transformer_{name.replace('.', '_')}", "lora_down", "lora_up", 6.0)
    axis = 0 if of_columns else 1
    for layer, delta in wanted.items():
        weight = layers[layer].weight.detach().double()
        lengths = noise(*((1, weight.shape[1]) if of_columns else (weight.shape[0], 1)), key=3).abs() + 0.5
        tensors[f"lora_transformer_{layer.replace('.', '_')}.dora_scale"] = lengths
        turned = weight + delta
        wanted[layer] = turned * (lengths.double() / turned.norm(dim=axis, keepdim=True)) - weight
    return tensors, {}, wanted


def diff(layers: dict[str, nn.Linear]) -> Made:
    whole = noise(3 * layers[Q].out_features, layers[Q].in_features)
    return {f"diffusion_model.{QKV}.diff": whole}, {}, dict(zip((Q, K, V), whole.double().chunk(3), strict=True))


def oft_of_outputs(layers: dict[str, nn.Linear]) -> Made:
    """LyCORIS's: blocks of the rows are rotated by (I + Q)(I - Q)^-1, transposed."""
    blocks, wanted = noise(6, layers[Q].out_features // 2, layers[Q].out_features // 2) * 0.1, {}
    skew = blocks.double() - blocks.double().transpose(1, 2)
    identity = torch.eye(blocks.shape[1], dtype=torch.float64)
    turns = [(identity + q) @ torch.linalg.inv(identity - q) for q in skew]
    for at, layer in enumerate((Q, K, V)):
        weight = layers[layer].weight.detach().double()
        turned = torch.block_diag(*turns[2 * at : 2 * at + 2]).T @ weight
        wanted[layer] = turned - weight
    return {f"lora_unet_{QKV.replace('.', '_')}.oft_blocks": blocks}, {}, wanted


FORMATS: dict[str, Callable[[dict[str, nn.Linear]], Made]] = {
    "diffusers": lambda layers: plain(layers, lambda name: f"transformer.{name}", "lora_A", "lora_B", None),
    "diffusers with metadata": stated,
    "PEFT": lambda layers: plain(layers, lambda name: f"base_model.model.{name}", "lora_A", "lora_B", None),
    "PEFT in a pipeline": lambda layers: plain(layers, lambda n: f"transformer.{n}", "lora_A.default", "lora_B.default", None),
    "OneTrainer": lambda layers: plain(layers, lambda name: f"transformer.{name}", "lora_down", "lora_up", 1.5),
    "OneTrainer, flat": lambda layers: plain(
        layers, lambda name: f"lora_transformer_{name.replace('.', '_')}", "lora_down", "lora_up", 6.0
    ),
    "kohya, musubi": lambda layers: fused(layers, "lora_unet_", True, "lora_down", "lora_up", 1.5),
    "ai-toolkit": lambda layers: fused(layers, "diffusion_model.", False, "lora_A", "lora_B", None),
    "original names alone": lambda layers: fused(layers, "", False, "lora_A", "lora_B", None),
    "LoHa": loha, "LoKr": lokr, "DoRA": dora, "DoRA of columns": lambda layers: dora(layers, True), "differences": diff,
    "OFT of outputs": oft_of_outputs,
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_does_to_each_layer_what_its_definition_says(kind: str, layers, tiny, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tensors, metadata, wanted = FORMATS[kind](layers)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors", metadata or None)
    found = read_adapter_file(tmp_path / "a.safetensors", tiny)
    assert found.updates.keys() == wanted.keys()
    for layer, delta in wanted.items():
        weight = layers[layer].weight.detach()
        for strength in (1.0, 0.25):
            expected = weight.double() + strength * delta
            torch.testing.assert_close(found.updates[layer].applied(weight, strength).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_folder_of_peft_is_read_with_the_scale_of_its_config(layers, tiny, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tensors, _, wanted = FORMATS["PEFT"](layers)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 6}))
    found = read_adapter_file(adapter_path(str(tmp_path), "--lora"), tiny)
    weight, applied = layers[SINGLE].weight.detach(), found.updates[SINGLE].applied
    torch.testing.assert_close(applied(weight).double(), weight.double() + 2 * wanted[SINGLE], rtol=1e-4, atol=1e-5)


def test_a_fused_adapter_gives_the_velocity_that_diffusers_gives_with_it(tiny, layers, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The same file through diffusers' own reader of the original names, and through ours, added to the base."""
    tensors, _, _ = FORMATS["ai-toolkit"](layers)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    noisy = noise(1, *tiny.latent_shape(64, 64))
    inputs = (tiny.normalize(noisy), torch.tensor([0.6]), TextBatch(noise(1, *tiny.text_shape())))
    theirs, ours = make_model(), make_model()
    pipe = theirs.pipeline(theirs.transformer)
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    add_to_base(ours.transformer, [(read_adapter_file(tmp_path / "a.safetensors", ours), 1.0)])
    with torch.no_grad():
        before, with_theirs, with_ours = (model.velocity(*inputs) for model in (tiny, theirs, ours))
    torch.testing.assert_close(with_ours, with_theirs, rtol=1e-4, atol=1e-4)
    assert (with_ours - before).abs().max() > 0.01


# -- continuing ------------------------------------------------------------------------------------
def started(file: Path, **changes: object) -> tuple[object, dict[str, Tensor]]:
    """A model with a new adapter that starts from `file`."""
    values = {**BASE, "dataset": {"base_dir": "x"}, "rank": RANK, "pretrained_lora_ckpt_path": str(file), **changes}
    config = Config.model_validate(values)
    model = build_model(config)
    model.load_transformer()
    trainable.make_trainable(model.transformer, config)
    parameters = dict(trainable.trainable_parameters(model.transformer))
    load_pretrained_adapter(model, parameters, config)
    return model, parameters  # type: ignore[return-value]


def added(parameters: dict[str, Tensor], layer: str, scale: float) -> Tensor:
    a, b = (parameters[f"{layer}.lora_{part}.default.weight"].detach().double() for part in "AB")
    return scale * (b @ a)


def test_the_adapter_goes_on_from_another_programs_file_at_its_rank_and_scale(layers, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tensors, _, wanted = FORMATS["kohya, musubi"](layers)
    save_file(tensors, tmp_path / "a.safetensors")
    _, parameters = started(tmp_path / "a.safetensors", lora_alpha=7)
    for layer, delta in wanted.items():
        torch.testing.assert_close(added(parameters, layer, 7 / RANK), delta, rtol=1e-4, atol=1e-5)
    others = [p for name, p in parameters.items() if ".lora_B." in name and name.split(".lora_")[0] not in wanted]
    assert others and all(not p.any() for p in others)  # layers that the file lacks begin as new ones


def test_our_own_comfyui_export_is_continued_to_the_bit(tmp_path: Path) -> None:
    from OpenSciDraw.inference.comfyui import adapter_tensors

    config = Config.model_validate({**BASE, "dataset": {"base_dir": "x"}})
    model = build_model(config)
    model.load_transformer()
    trainable.make_trainable(model.transformer, config)
    state = dict(trainable.trainable_parameters(model.transformer))
    for name, parameter in state.items():
        parameter.data.copy_(noise(*parameter.shape, key=len(name)))
    trainable.save_weights(model, model.transformer, state, tmp_path, config, True)
    saved = read_adapter_file(tmp_path / "pytorch_lora_weights.safetensors", model)
    save_file(adapter_tensors(model, saved.updates), tmp_path / "comfyui.safetensors")
    _, parameters = started(tmp_path / "comfyui.safetensors", rank=4)
    assert parameters.keys() == state.keys()
    assert all(torch.equal(parameters[name], state[name]) for name in state)


def test_a_larger_rank_is_cut_to_the_nearest_product_and_says_what_is_kept(  # type: ignore[no-untyped-def]
    layers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, _, wanted = FORMATS["diffusers"](layers)
    save_file(tensors, tmp_path / "a.safetensors")
    with caplog.at_level(logging.INFO):
        _, parameters = started(tmp_path / "a.safetensors", rank=2, lora_alpha=3)
    kept = []
    for layer, delta in wanted.items():
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        best = left[:, :2] @ torch.diag(values[:2]) @ right[:2]
        torch.testing.assert_close(added(parameters, layer, 1.5), best, rtol=1e-3, atol=1e-4)
        kept.append(float(values[:2].norm() / values.norm()))
    assert f"keeps {sum(kept) / len(kept):.4f} of the norm (least: {min(kept):.4f}" in caplog.text
    _, larger = started(tmp_path / "a.safetensors", rank=5, lora_alpha=3)
    for layer, delta in wanted.items():
        torch.testing.assert_close(added(larger, layer, 0.6), delta, rtol=1e-4, atol=1e-5)
        assert larger[f"{layer}.lora_A.default.weight"][RANK:].any()  # further rows can learn


# -- refusals --------------------------------------------------------------------------------------
def test_a_file_that_fits_nothing_says_what_it_is(tiny, layers, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def pair(name: str, down: str, up: str) -> dict[str, Tensor]:
        return {f"{name}.{down}.weight": noise(2, 8), f"{name}.{up}.weight": noise(8, 2)}

    wide = {f"transformer.{OUT}.lora_A.weight": noise(2, 999), f"transformer.{OUT}.lora_B.weight": noise(999, 2)}
    sdxl = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    flux1 = "transformer.single_transformer_blocks.0.proj_mlp"
    pairs = {
        "sdxl": (pair(sdxl, "lora_down", "lora_up"), "kohya or musubi names, of Stable Diffusion"),
        "flux1": (pair(flux1, "lora_A", "lora_B"), r"FLUX.1 \(diffusers' names\).*proj_mlp"),
        "wide": (wide, "999 x 999, and .*to_out.0 of this model is .*another size of the family"),
        "half": ({f"transformer.{OUT}.lora_A.weight": noise(2, 8)}, "no whole adapter of a linear layer"),
        "model": ({"transformer_blocks.0.attn.to_q.weight": noise(8, 8)}, "holds no adapter: its first tensors are transformer_b"),
    }  # fmt: skip
    for name, (tensors, message) in pairs.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=message):
            read_adapter_file(tmp_path / f"{name}.safetensors", tiny)
    tensors = {f"transformer.{OUT}.lora_A.weight": noise(2, 192), f"transformer.{OUT}.lora_B.weight": noise(192, 2)}
    config = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.rank_pattern": {"(a+)+$": 3}})}
    save_file(tensors, tmp_path / "z.safetensors", config)
    with pytest.raises(UserError, match="only names of layers are read"):
        read_adapter_file(tmp_path / "z.safetensors", tiny)
    (tmp_path / "z.safetensors").unlink()
    with pytest.raises(UserError, match="no such file"):
        adapter_path(str(tmp_path / "gone"), "--lora")
    with pytest.raises(UserError, match="5 .safetensors files"):
        adapter_path(str(tmp_path), "--lora")


class Program:
    """What a pickle can do to whoever loads it."""

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (Path.touch, (Path(PLACE),))


PLACE = ""


def test_tensors_of_a_pickle_are_read_and_its_code_is_not_run(  # type: ignore[no-untyped-def]
    tiny, layers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.PLACE", str(tmp_path / "ran"))
    tensors, _, wanted = FORMATS["PEFT"](layers)
    torch.save(tensors, tmp_path / "adapter_model.bin")
    assert read_adapter_file(tmp_path / "adapter_model.bin", tiny).updates.keys() == wanted.keys()
    torch.save({**tensors, "code": Program()}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="weights-only loader refuses it"):
        read_adapter_file(tmp_path / "adapter_model.bin", tiny)
    assert not (tmp_path / "ran").exists()


def test_layers_that_do_not_train_here_are_named(layers, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tensors, _, _ = FORMATS["diffusers"](layers)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"adapts 3 layers that lora_layers leaves out .*to_qkv_mlp_proj.*fuse_pretrained_lora"):
        started(tmp_path / "a.safetensors", lora_layers="to_q,to_k,to_v")


def test_layers_of_a_text_encoder_are_left_out_and_said(  # type: ignore[no-untyped-def]
    tiny, layers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, _, wanted = FORMATS["kohya, musubi"](layers)
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    save_file({**tensors, f"{key}.lora_down.weight": noise(2, 8), f"{key}.lora_up.weight": noise(8, 2)}, tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING):
        assert read_adapter_file(tmp_path / "a.safetensors", tiny).updates.keys() == wanted.keys()
    assert "1 layers of a text encoder" in caplog.text


