"""Exported LoRA files give, in other programs, the picture that training showed."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import merged
from diffusers import Flux2KleinPipeline
from PIL import Image
from safetensors import safe_open

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.buckets import best_bucket
from OpenSciDraw.inference.export import export
from OpenSciDraw.training.run import Training
from train_OpenSciDraw_loop import train

PROMPT = "The figure illustrates a flowchart with a blue box labelled 'Encoder'."


@pytest.fixture(scope="module")
def trained(store_config, tmp_path_factory):  # type: ignore[no-untyped-def]
    """A finished run with strong weights, so that a lost adapter would be seen."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    folder = tmp_path_factory.mktemp("run")
    values = merged(
        store_config, model_output_dir=str(folder), learning_rate=2e-2, max_train_steps=6, num_inference_steps=4, lora_dropout=0.5,
        validation_prompts=[PROMPT], resolution_list=[[96, 64]], guidance_scale=2.0, validation_seed=7,
    )  # fmt: skip
    assert train(Training(Config.model_validate(values))) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return folder


def draw(folder: Path, lora: Path | None) -> np.ndarray:
    """The prompt by diffusers alone: from_pretrained, load_lora_weights, the pipeline's call."""
    pipe = Flux2KleinPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    image = pipe(
        prompt=PROMPT, width=96, height=64, num_inference_steps=4, guidance_scale=2.0, max_sequence_length=64,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]  # fmt: skip
    return np.asarray(image).astype(int)


def shown(run: Path, step: int) -> np.ndarray:
    return np.asarray(Image.open(run / "validation_images" / f"step_{step:06d}" / "00.png")).astype(int)


def test_validation_before_training_is_the_base_models_own_picture(trained: Path, tiny_folder: Path) -> None:
    assert np.abs(draw(tiny_folder, None) - shown(trained, 0)).max() <= 1


@pytest.mark.parametrize("kind", ["diffusers", "comfyui"])
def test_the_exported_lora_gives_the_picture_that_training_showed(kind, trained, tiny_folder, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The ComfyUI file goes through diffusers' own reader of that naming: fused q, k, v must come apart exactly."""
    (file,) = export(str(trained), tmp_path, (kind,), "fp32")
    picture = draw(tiny_folder, file)
    assert np.abs(picture - shown(trained, 6)).max() <= 1
    assert np.abs(picture - draw(tiny_folder, None)).max() > 16  # the adapter matters


def test_both_files_carry_alpha_rank_and_modelspec(trained: Path, tmp_path: Path) -> None:
    diffusers, comfyui = export(str(trained), tmp_path, ("diffusers", "comfyui"), "bf16")
    for file in (diffusers, comfyui):
        with safe_open(file, "pt") as handle:
            metadata = handle.metadata()
            assert metadata["ss_network_dim"] == "4" and metadata["ss_network_alpha"] == "8"
            assert metadata["modelspec.sai_model_spec"] == "1.0.1" and metadata["modelspec.architecture"]
            alphas = [k for k in handle.keys() if k.endswith(".alpha")]
            assert all(handle.get_tensor(k).dtype == torch.bfloat16 for k in handle.keys() if "lora_" in k and k not in alphas)
            if file == comfyui:
                keys = set(handle.keys())
                assert handle.get_tensor("lora_unet_single_blocks_0_linear1.alpha").item() == 8
                assert handle.get_tensor("lora_unet_double_blocks_0_img_attn_qkv.alpha").item() == 24  # three of rank 4
                assert "lora_unet_double_blocks_1_txt_mlp_2.lora_down.weight" in keys


def test_export_of_a_folder_without_a_run_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pytorch_lora_weights.safetensors"):
        export(str(tmp_path), None, ("diffusers",), "fp32")


def test_sample_draws_files_of_the_trained_run(trained: Path, tmp_path: Path) -> None:
    from OpenSciDraw.inference import sample

    arguments = Namespace(
        lora=[], image=[], run=str(trained), prompt=[PROMPT], negative_prompt=None, width=None, height=None, steps=None,
        guidance=None, seed=7, num=1, out=str(tmp_path), ema=False, base=None,
    )  # fmt: skip
    assert sample.main(arguments) == 0
    drawn = np.asarray(Image.open(tmp_path / "00_seed7.png")).astype(int)
    assert np.abs(drawn - shown(trained, 6)).max() <= 1
    arguments.width = 100
    with pytest.raises(UserError, match="multiples of 8"):
        sample.main(arguments)


def test_sample_edits_a_picture_at_its_buckets_size(trained: Path, tmp_path: Path) -> None:
    from OpenSciDraw.drawn.figure import draw_figure
    from OpenSciDraw.inference import sample
    from OpenSciDraw.models.flux2_klein import Flux2Klein

    draw_figure(3, 0, width=256, height=96).image.save(tmp_path / "before.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    arguments = Namespace(
        lora=[], image=[str(tmp_path / "before.png")], run=str(trained), prompt=["Make it red."], negative_prompt=None, width=None,
        height=None, steps=2, guidance=None, seed=7, num=1, out=str(tmp_path / "one"), ema=False, base=None,
    )  # fmt: skip
    assert sample.main(arguments) == 0
    edited = Image.open(tmp_path / "one" / "00_seed7.png")
    bucket = best_bucket(256, 96, 128)
    assert edited.size == (bucket.width, bucket.height)
    arguments.image, arguments.out, arguments.width, arguments.height = [], str(tmp_path / "two"), bucket.width, bucket.height
    assert sample.main(arguments) == 0
    assert Image.open(tmp_path / "two" / "00_seed7.png").tobytes() != edited.tobytes()  # the picture decides too
    for file in ("broken.png", "gone.png"):
        arguments.image = [str(tmp_path / file)]
        with pytest.raises(UserError, match=f"--image: .*{file}"):
            sample.main(arguments)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="Flux2Klein takes no pictures to edit"):
        patch.setattr(Flux2Klein, "edits", False)
        sample.main(arguments)


def test_everything_that_draws_with_a_run_draws_without_dropout(trained: Path, store_config: dict, tmp_path: Path) -> None:  # type: ignore[type-arg]
    """A run with lora_dropout = 0.5: sample, evaluate, a fused base, and diffusers with files that still state a dropout."""
    from safetensors.torch import load_file, save_file

    from OpenSciDraw.evaluation.drawing import Artist
    from OpenSciDraw.inference.sample import find_trained
    from OpenSciDraw.models.base import build_model
    from OpenSciDraw.weights.start import attach_adapter, load_pretrained

    file = trained / "pytorch_lora_weights.safetensors"
    with safe_open(file, framework="pt") as handle:
        stated = json.loads(handle.metadata()["lora_adapter_metadata"])
    assert stated["transformer.lora_dropout"] == 0
    older = tmp_path / "pytorch_lora_weights.safetensors"
    stated["transformer.lora_dropout"] = 0.5
    save_file(load_file(file), older, {"lora_adapter_metadata": json.dumps(stated), "format": "pt"})
    model = build_model(Config.model_validate(store_config))
    for part in (model.load_text_encoder, model.load_vae, model.load_transformer):
        part()
    pipe = model.pipeline(model.transformer)
    attach_adapter(model, pipe, older)
    assert any(isinstance(module, torch.nn.Dropout) for module in pipe.transformer.modules())
    config = Config.model_validate(merged(store_config, pretrained_lora_ckpt_path=str(older), fuse_pretrained_lora=True))
    fused = build_model(config)
    fused.load_transformer()
    load_pretrained(fused, config)
    found = find_trained(str(trained), False)
    artist = Artist(found.config, found, tmp_path)
    artist.load([PROMPT])
    for transformer in (pipe.transformer, fused.transformer, artist.pipe.transformer):
        assert not [name for name, module in transformer.named_modules() if module.training]
    export(str(trained), tmp_path / "exported", ("diffusers",), "fp32")
    for path in (tmp_path / "exported").rglob("*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            assert json.loads(handle.metadata()["lora_adapter_metadata"])["transformer.lora_dropout"] == 0


@pytest.mark.parametrize("place", [".", "..", "../.."])
def test_the_config_of_a_run_folder_is_read_and_never_run(place: str, trained: Path, tmp_path: Path) -> None:
    """Whoever made the folder, or one above it, runs no code here: neither by sample and export nor by evaluate."""
    from OpenSciDraw.evaluation.run import find_target
    from OpenSciDraw.inference.sample import find_trained

    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "pytorch_lora_weights.safetensors").write_bytes((trained / "pytorch_lora_weights.safetensors").read_bytes())
    file = inner / place / "config.py"
    values = (trained / "config.py").read_text()
    file.write_text(values)
    assert find_trained(str(inner)).config.rank == 4
    bad = tmp_path / "ran"
    for line in (f"open({str(bad)!r}, 'w')", f"rank = open({str(bad)!r}, 'w') and 4", f"import os; os.mkdir({str(bad)!r})"):
        file.write_text(f"{values}{line}\n")
        at = len(values.splitlines()) + 1
        for find in (find_trained, lambda folder: find_target(folder, (), False)):
            with pytest.raises(UserError, match=f"config.py: line {at}\\b.*code in it is not run"):
                find(str(inner))
    assert not bad.exists()
    file.write_text("x = " + "(" * 100_000)
    with pytest.raises(UserError, match="is not Python"):
        find_trained(str(inner))
