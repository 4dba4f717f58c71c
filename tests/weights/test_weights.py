"""Weights to start from: each way of keeping them gives the same model, and what is none of them is refused."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import BASE
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import build_model
from OpenSciDraw.weights.other_programs import open_weights
from OpenSciDraw.weights.start import load_pretrained


@pytest.fixture
def trained(tiny) -> tuple[Mapping[str, Tensor], EMAModel]:  # type: ignore[no-untyped-def]
    """A model's parameters, and the average of others of its shapes."""
    parameters = dict(tiny.transformer.named_parameters())
    average = EMAModel(tiny.transformer.parameters())
    for number, tensor in enumerate(average.shadow_params):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    return parameters, average


def as_path(kind: str, folder: Path, tiny, names: list[str], average: EMAModel) -> Path:  # type: ignore[no-untyped-def]
    state = {name: tensor.clone() for name, tensor in zip(names, average.shadow_params, strict=True)}
    path = folder / {"list": "ema_weights.pt", "state": "w.pth", "nested": "w.bin", "file": "w.safetensors", "folder": "w"}[kind]
    if kind == "list":
        torch.save(average.state_dict(), path)
    elif kind == "state":
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    elif kind == "nested":
        torch.save({"state_dict": state, "step": 3}, path)
    elif kind == "file":
        save_file(state, path)
    else:
        (path / "transformer").mkdir(parents=True)
        save_file(state, path / "transformer" / "diffusion_pytorch_model.safetensors")
        tiny.transformer.save_config(path / "transformer")
    return path


@pytest.mark.parametrize("kind", ["list", "state", "nested", "file", "folder"])
def test_a_model_starts_from_the_same_weights_however_they_are_kept(  # type: ignore[no-untyped-def]
    kind: str, trained, tiny, tmp_path: Path
) -> None:
    parameters, average = trained
    given = as_path(kind, tmp_path, tiny, list(parameters), average)
    values = {**BASE, "dataset": {"base_dir": "x"}, "use_lora": False, "pretrained_full_ckpt_path": str(given)}
    config = Config.model_validate(values)
    model = build_model(config)
    model.load_transformer()
    load_pretrained(model, config)
    for (name, own), wanted in zip(model.transformer.named_parameters(), average.shadow_params, strict=True):
        assert torch.equal(own, wanted), name


def test_a_list_of_another_length_or_other_shapes_is_refused(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    parameters, average = trained
    path = tmp_path / "ema_weights.pt"
    state = average.state_dict()
    torch.save({**state, "shadow_params": state["shadow_params"][:-1]}, path)
    with pytest.raises(UserError, match=rf"list of {len(parameters) - 1} tensors .*, and this model has {len(parameters)}"):
        open_weights(str(path), parameters)
    wrong = list(state["shadow_params"])
    wrong[1] = torch.zeros(7)
    torch.save({**state, "shadow_params": wrong}, path)
    with pytest.raises(UserError, match=rf"tensor 1 of shadow_params is \(7,\), the parameter .*{list(parameters)[1]}, is"):
        open_weights(str(path), parameters)


class Program:
    """What a pickle can do to whoever loads it."""

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (Path.touch, (Path(PLACE),))


PLACE = ""


def test_code_in_a_file_of_weights_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PLACE", str(tmp_path / "ran"))
    torch.save({"shadow_params": [Program()]}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="weights-only loader refuses it"):
        open_weights(str(tmp_path / "w.pt"), {})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"noise" * 100, None])
def test_what_holds_no_weights_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    if content is None:
        torch.save({"step": 3}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="weights-only loader refuses it|holds no weights"):
        open_weights(str(path), {})
    with pytest.raises(UserError, match="no such folder"):
        open_weights(str(tmp_path / "nowhere" / "deep"), {})


def test_a_hub_repository_with_a_transformer_alone_is_fetched(  # type: ignore[no-untyped-def]
    trained, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As published: `transformer/` and nothing else; the rest comes from the base."""
    parameters, average = trained
    folder = as_path("folder", tmp_path, tiny, list(parameters), average)
    asked = list[object]()

    def download(repository: str, **options: object) -> str:
        asked.append((repository, options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    weights = open_weights("someone/Figures-9B", parameters)
    assert weights.names == sorted(parameters) and asked == [("someone/Figures-9B", ["transformer/*"])]
    shutil.rmtree(folder / "transformer")
    with pytest.raises(UserError, match="has no transformer/"):
        open_weights("someone/Figures-9B", parameters)
