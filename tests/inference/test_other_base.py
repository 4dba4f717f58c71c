"""An adapter that was trained on a base model, drawn, validated, evaluated and exported with its distilled sibling."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import merged
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from OpenSciDraw.cli import main
from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.other_base import base_name, layer_shapes
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.reporting.run import write_report
from OpenSciDraw.training.run import Training
from train_OpenSciDraw_loop import train

PROMPT, SEED = "A red box and a blue circle.", 42
ASKED = ["--prompt", PROMPT, "--seed", str(SEED)]
PICTURE = f"00_seed{SEED}.png"


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and its distilled sibling: other weights of the same shapes, and the mark in model_index.json."""
    folder = tmp_path_factory.mktemp("siblings")
    base, distilled = folder / "klein-base", folder / "klein"
    for place in (base, distilled):
        shutil.copytree(embedded_folder("flux2_klein_tiny_random"), place)
    index = json.loads((distilled / "model_index.json").read_text())
    (distilled / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    (file,) = (distilled / "transformer").glob("*.safetensors")
    torch.manual_seed(1)
    weights = {name: t + 0.1 * t.float().std() * torch.randn_like(t) if t.ndim > 1 else t for name, t in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    return base, distilled


@pytest.fixture
def trained(siblings: tuple[Path, Path], store_config: dict, tmp_path: Path, fresh_accelerate: Any) -> Path:
    """One step of a LoRA on the base, with an average of the weights, drawn on both at steps 0 and 1."""
    base, distilled = siblings
    values = {
        "pretrained_model_name_or_path": str(base), "validation_model": str(distilled), "validation_prompts": [PROMPT],
        "resolution_list": [[64, 64]], "validation_steps": 1, "validation_seed": SEED, "max_train_steps": 1, "learning_rate": 0.01,
        "lora_alpha": 32, "guidance_scale": 3.0, "held_out_examples": 0, "model_output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    assert train(Training(Config.model_validate(merged(store_config, **values)))) == 0
    return tmp_path / "run"


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def test_the_adapter_is_drawn_on_the_distilled_sibling_as_its_own_pipeline_draws(
    trained: Path, siblings: tuple[Path, Path], tmp_path: Path, caplog: Any
) -> None:
    """`sample --base`, the validation pictures and diffusers give one picture: 4 steps, no guidance, the sibling's weights."""
    from diffusers import Flux2KleinPipeline

    caplog.set_level(logging.INFO, "OpenSciDraw")
    _, distilled = siblings
    assert main(["sample", str(trained), "--base", str(distilled), *ASKED]) == 0
    assert "klein is distilled: drawing in 4 steps without guidance" in caplog.text
    drawn = pixels(trained / "samples" / "on_klein" / PICTURE)
    pipe = Flux2KleinPipeline.from_pretrained(distilled)
    pipe.load_lora_weights(str(trained))
    generator = torch.Generator("cpu").manual_seed(SEED)
    expected = pipe(prompt=PROMPT, width=64, height=64, num_inference_steps=4, guidance_scale=1.0, generator=[generator],
                    max_sequence_length=64).images[0]  # fmt: skip
    assert np.abs(drawn - np.asarray(expected).astype(int)).max() <= 1
    step = trained / "validation_images" / "step_000001"
    assert np.abs(drawn - pixels(step / "validation_model" / "00.png")).max() <= 1
    assert np.abs(pixels(step / "00.png") - drawn).mean() > 2, "the run's own picture is another"
    before = trained / "validation_images" / "step_000000" / "validation_model" / "00.png"
    assert np.abs(pixels(before) - drawn).max() > 2, "the adapter has an effect there"
    both = Image.open(step / "both.png")
    assert both.width > both.height > 64
    caplog.clear()
    assert main(["sample", str(trained), "--base", str(distilled), *ASKED, "--guidance", "5", "--out", str(tmp_path)]) == 0
    assert "guidance 5 has no effect" in caplog.text and np.array_equal(pixels(tmp_path / PICTURE), drawn)
    page = write_report(trained).read_text()
    assert page.count(f"on {distilled}</figcaption>") == 2 and page.count(f"on {siblings[0]}</figcaption>") == 2


def test_evaluation_and_export_know_the_sibling(trained: Path, siblings: tuple[Path, Path], tmp_path: Path) -> None:
    distilled = str(siblings[1])
    evaluated = ["evaluate", str(trained), "--base", distilled, "--figures", "drawn:1:seed=9:style=small"]
    assert main(evaluated) == 0
    (file,) = (trained / "evaluations").glob("*on-klein*/evaluation.json")
    settings = json.loads(file.read_text())["settings"]
    assert (settings["steps"], settings["guidance"], settings["model"]) == (4, 1.0, distilled)
    assert main(["export", str(trained), "--base", distilled]) == 0
    for name in ("pytorch_lora_weights.safetensors", "run_comfyui.safetensors"):
        with safe_open(trained / "export" / "on_klein" / name, "pt") as exported:
            said = exported.metadata()
        assert said["modelspec.usage_hint"] == "num_inference_steps = 4, guidance_scale = 1.0"
        assert said["ss_base_model_version"] == "klein"


def test_a_base_of_other_shapes_is_refused_with_what_differs(
    trained: Path, store_config: dict, fresh_accelerate: Any, capsys: Any
) -> None:
    fresh_accelerate()
    assert main(["sample", str(trained), "--base", "embedded:flux2_klein_tiny", *ASKED]) == 2
    said = capsys.readouterr().err
    wanted = ("flux2_klein_tiny has other shapes than", " in the adapter; ", "num_attention_heads = 8 there, 6 here")
    assert not [part for part in wanted if part not in said], said
    other = trained / "other"
    values = {"validation_model": "embedded:flux2_klein_tiny", "validation_prompts": [PROMPT], "model_output_dir": str(other)}
    with pytest.raises(UserError, match="validation_model = 'embedded:flux2_klein_tiny'.* in the adapter; "):
        Training(Config.model_validate(merged(store_config, **values)))


def test_a_distilled_model_is_not_trained(
    siblings: tuple[Path, Path], store_config: dict, tmp_path: Path, fresh_accelerate: Any
) -> None:
    values = {"pretrained_model_name_or_path": str(siblings[1]), "model_output_dir": str(tmp_path)}
    with pytest.raises(UserError, match="is distilled .* see validation_model"):
        Training(Config.model_validate(merged(store_config, **values)))


def test_another_base_is_for_adapters(
    store_config: dict, siblings: tuple[Path, Path], tmp_path: Path, fresh_accelerate: Any, capsys: Any
) -> None:
    values = {"use_lora": False, "max_train_steps": 1, "held_out_examples": 0, "model_output_dir": str(tmp_path)}
    assert train(Training(Config.model_validate(merged(store_config, **values)))) == 0
    assert main(["sample", str(tmp_path), "--base", str(siblings[1]), *ASKED]) == 2
    assert "holds all weights, which are a base" in capsys.readouterr().err


def test_names_and_shapes() -> None:
    names = {"embedded:flux2_klein": "flux2-klein", "a/FLUX.2-klein-4B": "FLUX.2-klein-4B", "/x/y z/": "y-z"}
    assert {name: base_name(name) for name in names} == names
    assert layer_shapes({"a.lora_A.weight": (4, 7), "a.lora_B.weight": (9, 4)}) == {"a": (9, 7)}
    assert layer_shapes({"a.lora_A.default.weight": (4, 7), "a.lora_B.default.weight": (9, 4)}) == {"a": (9, 7)}
