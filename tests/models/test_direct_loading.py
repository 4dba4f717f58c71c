"""Weights read straight onto the device are those of diffusers' `from_pretrained`, and a damaged folder says what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.models.flux2_klein import Flux2Klein
from OpenSciDraw.models.qwen_image import QwenImage
from OpenSciDraw.models.source import ModelSource

FAMILIES = {"flux2_klein_tiny_random": Flux2Klein, "qwen_image_tiny": QwenImage}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def build(
    folder: Path, dtype: torch.dtype = torch.float32, variant: str | None = None, name: str = "flux2_klein_tiny_random"
) -> FigureModel:
    return FAMILIES[name](ModelSource(str(folder), variant=variant), 64, dtype)


def copied(name: str, to: Path) -> Path:
    """A model folder with the transformer's files alone."""
    source = embedded_folder(name)
    shutil.copytree(source / "transformer", to / "transformer")
    shutil.copy(source / "model_index.json", to)
    return to


@pytest.fixture
def no_other_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' loader must not be what loads."""
    from OpenSciDraw.models import components

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("loaded by from_pretrained")

    monkeypatch.setattr(components, "load_component", refuse)


def assert_same(model: FigureModel, reference: torch.nn.Module) -> None:
    ours = model.transformer
    assert type(ours) is type(reference) and not ours.training and ours.config == reference.config
    for kind in ("named_parameters", "named_buffers"):
        own, other = dict(getattr(ours, kind)()), dict(getattr(reference, kind)())
        assert own.keys() == other.keys()
        for name, tensor in own.items():
            assert tensor.dtype == other[name].dtype and tensor.device == other[name].device, name
            assert torch.equal(tensor, other[name]), name
            assert not tensor.requires_grad
    plain, other = vars(ours), vars(reference)
    assert plain.keys() == other.keys()
    for (path, own), (_, theirs) in zip(ours.named_modules(), reference.named_modules(), strict=True):  # tables that are no buffers
        for name, value in vars(own).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, vars(theirs)[name]), (path, name)


def released(model: FigureModel, dtype: torch.dtype, **how: object) -> torch.nn.Module:
    return model.transformer_type.from_pretrained(model.source.name, subfolder="transformer", torch_dtype=dtype, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_weights_are_those_of_from_pretrained_to_the_bit(name: str, dtype: torch.dtype, no_other_loader: None) -> None:
    model = build(embedded_folder(name), dtype, name=name)
    model.load_transformer()
    assert_same(model, released(model, dtype))


def test_a_device_with_a_number_is_a_device(no_other_loader: None) -> None:
    model = build(embedded_folder("flux2_klein_tiny_random"))
    model.load_transformer(device=torch.device("cpu", 0))  # as a launcher with several processes gives it
    assert_same(model, released(model, torch.float32).to(torch.device("cpu", 0)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_read_onto_a_gpu_are_those_that_from_pretrained_moves_there(dtype: torch.dtype, no_other_loader: None) -> None:
    model = build(embedded_folder("flux2_klein_tiny_random"), dtype)
    device = torch.device("cuda", 0)
    model.load_transformer(device=device)
    assert_same(model, released(model, dtype).to(device))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["10GB", "100KB"])
def test_one_file_or_many_of_a_variant_or_not_are_read(
    size: str, variant: str | None, tmp_path: Path, no_other_loader: None
) -> None:
    whole = build(embedded_folder("flux2_klein_tiny_random"))
    whole.load_transformer()
    shutil.copy(embedded_folder("flux2_klein_tiny_random") / "model_index.json", tmp_path)
    whole.transformer.save_pretrained(tmp_path / "transformer", max_shard_size=size, variant=variant)
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (size == "100KB")
    model = build(tmp_path, torch.bfloat16, variant)
    model.load_transformer()
    assert_same(model, released(model, torch.bfloat16, variant=variant))


def test_modules_that_the_class_keeps_in_fp32_stay_so(monkeypatch: pytest.MonkeyPatch, no_other_loader: None) -> None:
    model = build(embedded_folder("flux2_klein_tiny_random"), torch.bfloat16)
    monkeypatch.setattr(model.transformer_type, "_keep_in_fp32_modules", ["proj_out"])
    model.load_transformer()
    assert model.transformer.proj_out.weight.dtype == torch.float32
    assert model.transformer.x_embedder.weight.dtype == torch.bfloat16
    assert_same(model, released(model, torch.bfloat16))


def test_files_that_are_not_safetensors_are_left_to_diffusers(tmp_path: Path) -> None:
    folder = copied("flux2_klein_tiny_random", tmp_path)
    weights = load_file(folder / "transformer" / WEIGHTS)
    (folder / "transformer" / WEIGHTS).unlink()
    torch.save(weights, folder / "transformer" / "diffusion_pytorch_model.bin")
    model = build(folder)
    model.load_transformer()
    assert all(torch.equal(p, weights[name]) for name, p in model.transformer.named_parameters())


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    file = copied("flux2_klein_tiny_random", tmp_path) / "transformer" / WEIGHTS
    weights = load_file(file)
    del weights["proj_out.weight"]
    save_file(weights, file)
    with pytest.raises(UserError, match="missing: proj_out.weight"):
        build(tmp_path).load_transformer()


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    file = copied("flux2_klein_tiny_random", tmp_path) / "transformer" / WEIGHTS
    weights = load_file(file)
    weights["proj_out.weight"] = weights["proj_out.weight"][1:].clone()
    save_file(weights, file)
    with pytest.raises(UserError, match="another shape: proj_out.weight"):
        build(tmp_path).load_transformer()


def test_a_file_that_was_cut_is_named(tmp_path: Path) -> None:
    file = copied("flux2_klein_tiny_random", tmp_path) / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{WEIGHTS}: cannot be read"):
        build(tmp_path).load_transformer()


def test_a_tensor_that_the_model_does_not_know_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = copied("flux2_klein_tiny_random", tmp_path) / "transformer" / WEIGHTS
    save_file(load_file(file) | {"proj_out.twin": torch.zeros(1)}, file)
    model = build(tmp_path)
    model.load_transformer()
    assert "proj_out.twin" in caplog.text
    assert "proj_out.twin" not in model.transformer.state_dict()
