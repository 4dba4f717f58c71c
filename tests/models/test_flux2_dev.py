"""Golden tests: our FLUX.2-dev is what diffusers' Flux2Pipeline computes, with and without pictures to edit.

What it shares with FLUX.2-klein (VAE, normalisation, noise levels) is held in test_flux2_klein.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BASE, merged, train_and_resume
from diffusers import Flux2Pipeline, Flux2Transformer2DModel
from PIL import Image
from test_flux2_klein import HEIGHT, PROMPTS, STEPS, WIDTH, Recorder, unpack
from test_flux2_klein_edit import normalized, references

from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.sample import sample_normalized
from OpenSciDraw.models import flux2_dev
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.models.flux2_dev import Flux2Dev
from OpenSciDraw.models.source import ModelSource
from OpenSciDraw.weights.trainable import resolve_lora_layers

LENGTH, GUIDANCE = 224, 3.5
SOURCE = "embedded:flux2_dev_tiny"
LAYERS = "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"


def make(dtype: torch.dtype = torch.float32) -> Flux2Dev:
    model = Flux2Dev(ModelSource(SOURCE), LENGTH, dtype)
    model.load_vae()
    model.load_text_encoder()
    model.load_transformer()
    return model


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def golden(request):  # type: ignore[no-untyped-def]
    """(our model, the pipeline, {with pictures?: (its recorded calls, its pictures)}, the noise of both)."""
    dtype = request.param
    pipe = Flux2Pipeline.from_pretrained(embedded_folder("flux2_dev_tiny"), torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn((len(PROMPTS), 128, HEIGHT // 8, WIDTH // 8), generator=torch.Generator().manual_seed(0)).to(dtype)
    recorder, calls = Recorder(pipe.transformer), {}
    for edit in (False, True):
        recorder.inputs, recorder.outputs = [], []
        pictures = pipe(
            image=references() if edit else None, prompt=PROMPTS, width=WIDTH, height=HEIGHT, num_inference_steps=STEPS,
            guidance_scale=GUIDANCE, max_sequence_length=LENGTH, latents=noise, output_type="np",
        ).images  # fmt: skip
        calls[edit] = (recorder.inputs, recorder.outputs, pictures)
    return make(dtype), pipe, calls, noise


@pytest.mark.parametrize("edit", [False, True], ids=["figure", "edit"])
def test_every_input_and_the_velocity_equal_the_pipelines(golden, edit: bool) -> None:  # type: ignore[no-untyped-def]
    model, _, calls, _ = golden
    clean = normalized(model) if edit else []
    text = model.collate_text(model.encode_prompts(PROMPTS))
    tokens, exact = HEIGHT // 8 * WIDTH // 8, model.weight_dtype == torch.float32 or not edit
    recorder = Recorder(model.transformer)
    for theirs, out in zip(*calls[edit][:2], strict=True):
        with torch.no_grad(), model.at_guidance(GUIDANCE):
            velocity = model.velocity(unpack(theirs["hidden_states"][:, :tokens]), theirs["timestep"], text, clean)
        mine = recorder.inputs[-1]
        for name in ("encoder_hidden_states", "timestep", "img_ids", "txt_ids", "guidance"):
            assert torch.equal(mine[name], theirs[name]), name
        if exact:
            assert torch.equal(mine["hidden_states"], theirs["hidden_states"])
            assert torch.equal(velocity, unpack(out[:, :tokens]))
        else:  # the pipeline encodes and normalises references in bf16, we in fp32, as all that is trained on
            torch.testing.assert_close(velocity, unpack(out[:, :tokens]), rtol=0.05, atol=0.1)


def test_prompts_are_cut_where_the_pipeline_cuts_them_and_counted(golden) -> None:  # type: ignore[no-untyped-def]
    model, pipe, _, _ = golden
    long, before = "A [IMG]box. " * 120, model.truncated_prompts
    theirs = pipe.encode_prompt([long, "A box."], max_sequence_length=LENGTH)[0]
    assert torch.equal(torch.stack(model.encode_prompts([long, "A box."])), theirs)
    assert model.truncated_prompts == before + 1


def test_a_picture_sampled_by_our_path_equals_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, calls, noise = golden
    text = model.collate_text(model.encode_prompts(PROMPTS))
    latents = sample_normalized(model, text, text, noise, STEPS, GUIDANCE)
    ours = (model.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - calls[False][2]).max() <= (2e-5 if model.weight_dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("edit", [False, True], ids=["figure", "edit"])
def test_images_of_the_run_equal_the_pipelines_own(golden, edit: bool) -> None:  # type: ignore[no-untyped-def]
    model, pipe, _, _ = golden
    rows, images = model.encode_prompts(PROMPTS[:1]), references() if edit else []
    theirs = pipe(
        image=images or None, prompt_embeds=rows[0][None], width=WIDTH, height=HEIGHT, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, generator=[torch.Generator("cpu").manual_seed(5)],
    ).images[0]  # fmt: skip
    ours = model.sample(
        model.pipeline(model.transformer), rows, rows[0], width=WIDTH, height=HEIGHT, steps=STEPS, guidance=GUIDANCE, seeds=[5],
        images=images,
    )[0]  # fmt: skip
    assert ours.tobytes() == theirs.tobytes()


def test_guidance_template_and_layers_each_change_what_is_computed(golden, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    model, _, _, noise = golden
    right = model.encode_prompts(PROMPTS[:1])[0]
    text = model.collate_text([right])

    def velocity(guidance: float) -> torch.Tensor:
        with torch.no_grad(), model.at_guidance(guidance):
            return model.velocity(noise[:1], torch.tensor([0.7]), text)

    assert not torch.equal(velocity(1.0), velocity(3.5))
    with monkeypatch.context() as patch:
        patch.setattr(flux2_dev, "format_input", lambda prompts: [[{"role": "user", "content": [{"text": p}]}] for p in prompts])
        assert not torch.allclose(model.encode_prompts(PROMPTS[:1])[0], right, atol=1e-2)
    monkeypatch.setattr(model, "text_layers", (9, 20, 30))
    assert not torch.allclose(model.encode_prompts(PROMPTS[:1])[0], right, atol=1e-2)


def test_the_released_config_has_32_2_billion_parameters_and_its_lora_layers_are_counted() -> None:
    with torch.device("meta"):  # the class's defaults are the released model's
        transformer = Flux2Transformer2DModel()
    assert round(sum(p.numel() for p in transformer.parameters()) / 1e6, 1) == 32223.3
    assert len(resolve_lora_layers(transformer, LAYERS)) == 8 * 12 + 48 * 2


def test_klein_is_refused_with_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    config = json.loads((embedded_folder("flux2_dev_tiny") / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**config, "guidance_embeds": False}))
    with pytest.raises(UserError, match="no guidance embedding.*model_type = 'Flux2Klein'"):
        Flux2Dev(ModelSource(str(tmp_path)), LENGTH, torch.float32).load_transformer()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):  # type: ignore[no-untyped-def]
    data, run = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    values = merged(
        BASE, model_type="Flux2Dev", pretrained_model_name_or_path=SOURCE, lora_layers=LAYERS, learning_rate=5e-2,
        max_train_steps=3, checkpointing_steps=2, validation_prompts=PROMPTS[:1], resolution_list=[[96, 64]], guidance_scale=2.0,
        embedded_guidance=1.5, validation_seed=7, max_sequence_length=256, num_inference_steps=4, model_output_dir=str(run),
        dataset={"type": "ArXiVParquetDatasetV2", "base_dir": str(data), "parquet_base_path": "store"},
        encode={"figures": "drawn:16", "resolution": 128, "samples_per_shard": 16, "num_workers": 0, "batch_size": 8},
    )  # fmt: skip
    return run, *train_and_resume(values, run)


@pytest.mark.slow  # klein's, whose class it is, are not
def test_a_resumed_run_ends_with_the_same_weights(trained) -> None:  # type: ignore[no-untyped-def]
    _, first, again = trained
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert len(first) == (2 * 12 + 2 * 2) * 2


@pytest.mark.slow  # klein's, whose class it is, are not
@pytest.mark.parametrize("kind", ["diffusers", "comfyui"])
def test_the_exported_lora_gives_the_picture_that_training_showed(kind: str, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.inference.export import export

    run = trained[0]
    (file,) = export(str(run), tmp_path, (kind,), "fp32")
    pipe = Flux2Pipeline.from_pretrained(embedded_folder("flux2_dev_tiny"))
    pipe.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        return np.asarray(pipe(
            prompt=PROMPTS[0], width=96, height=64, num_inference_steps=4, guidance_scale=2.0, max_sequence_length=256,
            generator=torch.Generator("cpu").manual_seed(7),
        ).images[0]).astype(int)  # fmt: skip

    def shown(step: int) -> np.ndarray:
        return np.asarray(Image.open(run / "validation_images" / f"step_{step:06d}" / "00.png")).astype(int)

    base = draw()
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    assert np.abs(base - shown(0)).max() <= 1 and np.abs(draw() - shown(3)).max() <= 1
    assert np.abs(draw() - base).max() > 8  # the adapter matters
