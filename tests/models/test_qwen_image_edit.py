"""Golden tests: our Qwen-Image-Edit-2511 is what diffusers' QwenImageEditPlusPipeline computes, ingredient by ingredient.

The pipeline below is diffusers' own with the whole text encoder. Its processor is the released class without the part for films,
which needs torchvision. From transformers 5 on diffusers 0.42 gives its text encoder no token types, so that pictures lose their
rows and columns (diffusers issue 14194); a hook gives them. It edits two pictures, whose area stands in for the 1024 x 1024 px to
which it resizes pictures.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BASE, merged, train_and_resume
from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as released
from PIL import Image
from test_qwen_image import Recorder
from transformers import Qwen2_5_VLForConditionalGeneration

from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.fitting import pixels_of, to_model_range
from OpenSciDraw.models import qwen_image_edit
from OpenSciDraw.models.base import TextBatch
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.models.qwen_image_edit import QwenImageEdit
from OpenSciDraw.models.source import ModelSource, load_component
from OpenSciDraw.weights.trainable import resolve_lora_layers

SOURCE = "embedded:qwen_image_edit_tiny"
PROMPTS = ["Make 'CNN' red.", ""]
LENGTH, STEPS, GUIDANCE, WIDTH, HEIGHT = 128, 4, 3.0, 64, 96
EDITED = (96, 64)  # width and height of the two pictures that are edited: others than the result's
TOKENS = WIDTH * HEIGHT // 256
LAYERS = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,img_mlp.net.0.proj,img_mlp.net.2,txt_mlp.net.0.proj,"
    "txt_mlp.net.2"
)


def make(dtype: torch.dtype = torch.float32) -> QwenImageEdit:
    model = QwenImageEdit(ModelSource(SOURCE), LENGTH, dtype)
    model.load_vae()
    model.load_text_encoder()
    model.load_transformer()
    return model


def with_token_types(encoder, args, inputs):  # type: ignore[no-untyped-def]
    return args, {**inputs, "mm_token_type_ids": (inputs["input_ids"] == encoder.config.image_token_id).int()}


def make_pipeline(model: QwenImageEdit) -> QwenImageEditPlusPipeline:
    encoder = load_component(Qwen2_5_VLForConditionalGeneration, model.source, "text_encoder", dtype=model.weight_dtype)
    transformer = load_component(QwenImageTransformer2DModel, model.source, "transformer", torch_dtype=model.weight_dtype)
    encoder.register_forward_pre_hook(with_token_types, with_kwargs=True)
    pipe = QwenImageEditPlusPipeline(
        model._scheduler(), model.pipeline_vae(), encoder.eval(), model._tokenizer, model._processor, transformer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sources() -> list[Image.Image]:
    return [draw_figure(seed=3, index=at, size=128).image.resize(EDITED, Image.LANCZOS) for at in range(2)]


def pixels() -> list[torch.Tensor]:
    return [to_model_range(pixels_of(picture)) for picture in sources()]


def noise(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, 64, HEIGHT // 16, WIDTH // 16, generator=torch.Generator().manual_seed(0)).to(dtype)


def unpack(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, :TOKENS].transpose(1, 2).unflatten(2, (HEIGHT // 16, WIDTH // 16))


def texts(model: QwenImageEdit) -> list[TextBatch]:
    """With the prompt, and with the empty one."""
    return [model.collate_text([row]) for row in model.encode_instructions(PROMPTS, [pixels()] * 2)]


def references(model: QwenImageEdit) -> list[torch.Tensor]:
    return model.normalize_references([part[None] for part in pixels()], are_pixels=True)


@pytest.fixture(scope="module")
def area():  # type: ignore[no-untyped-def]
    """The pipeline with the area of our small pictures in place of 1024 x 1024 px."""
    usual, released.VAE_IMAGE_SIZE = released.VAE_IMAGE_SIZE, EDITED[0] * EDITED[1]
    yield
    released.VAE_IMAGE_SIZE = usual


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def golden(request, area):  # type: ignore[no-untyped-def]
    """(our model, the pipeline, its recorded calls, its picture)."""
    model = make(request.param)
    pipe = make_pipeline(model)
    recorder = Recorder(pipe.transformer)
    picture = pipe(
        prompt=PROMPTS[:1], negative_prompt=PROMPTS[1:], image=sources(), width=WIDTH, height=HEIGHT, num_inference_steps=STEPS,
        true_cfg_scale=GUIDANCE, latents=noise(request.param).flatten(2).transpose(1, 2), output_type="np",
    ).images[0]  # fmt: skip
    return model, pipe, recorder, picture


@pytest.fixture(scope="module")
def model() -> QwenImageEdit:
    return make()


# -- ours is the pipeline's ----------------------------------------------------------------------
def test_every_input_and_the_velocity_equal_the_pipelines_at_every_step(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, recorder, _ = golden
    text, clean, ours = texts(model), references(model), Recorder(model.transformer)
    assert len(recorder.inputs) == 2 * STEPS
    for call, theirs in enumerate(recorder.inputs):
        with torch.no_grad():
            velocity = model.velocity(unpack(theirs["hidden_states"]), theirs["timestep"], text[call % 2], clean)
        mine = ours.inputs[-1]
        assert mine["img_shapes"] == theirs["img_shapes"] == [[(1, 6, 4), (1, 4, 6), (1, 4, 6)]]
        assert torch.equal(mine["encoder_hidden_states"], theirs["encoder_hidden_states"])
        assert torch.equal(mine["timestep"], theirs["timestep"])
        assert mine["encoder_hidden_states_mask"] is theirs["encoder_hidden_states_mask"] is theirs["guidance"] is None
        assert mine.keys() == theirs.keys() - {"attention_kwargs", "guidance"}
        if model.weight_dtype == torch.float32:
            assert torch.equal(mine["hidden_states"], theirs["hidden_states"])
            assert torch.equal(velocity, unpack(recorder.outputs[call])), f"call {call}"
        else:  # the pipeline encodes and normalises references in bf16, we in fp32, as all that is trained on
            assert torch.equal(mine["hidden_states"][:, :TOKENS], theirs["hidden_states"][:, :TOKENS])
            torch.testing.assert_close(mine["hidden_states"], theirs["hidden_states"], rtol=2**-5, atol=2**-4)
            torch.testing.assert_close(velocity, unpack(recorder.outputs[call]), rtol=0.05, atol=0.1)


def test_velocity_equals_the_pipelines_to_the_bit_with_the_references_that_it_encoded(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, recorder, _ = golden
    text = texts(model)
    for call, theirs in enumerate(recorder.inputs):
        parts = theirs["hidden_states"][:, TOKENS:].chunk(2, dim=1)
        clean = [part.transpose(1, 2).unflatten(2, (EDITED[1] // 16, EDITED[0] // 16)) for part in parts]
        with torch.no_grad():
            velocity = model.velocity(unpack(theirs["hidden_states"]), theirs["timestep"], text[call % 2], clean)
        assert torch.equal(velocity, unpack(recorder.outputs[call]))


def test_noise_levels_equal_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, recorder, _ = golden
    theirs = torch.stack([call["timestep"][0] for call in recorder.inputs[::2]])
    ours = model.inference_sigmas(TOKENS, STEPS)
    assert torch.allclose(ours[:-1].float(), theirs.float(), rtol=1e-6 if theirs.dtype == torch.float32 else 2**-8)


def test_a_picture_by_our_velocity_and_guidance_equals_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, recorder, picture = golden
    text, clean, latents = texts(model), references(model), noise(model.weight_dtype)
    sigmas = model.inference_sigmas(TOKENS, STEPS)
    for step in range(STEPS):
        level = recorder.inputs[2 * step]["timestep"]
        with torch.no_grad():
            wanted, unwanted = (model.velocity(latents, level, given, clean) for given in text)
        combined = model.guide(wanted, unwanted, GUIDANCE)
        latents = (latents.float() + (sigmas[step + 1] - sigmas[step]) * combined.float()).to(latents.dtype)
    ours = (model.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)[0].numpy()
    off, exact = np.abs(ours - picture), model.weight_dtype == torch.float32
    assert off.max() <= (2e-5 if exact else 0.1) and off.mean() <= (2e-6 if exact else 0.01) and picture.std() > 0.02


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_images_of_the_run_equal_the_pipelines_own(golden, guidance: float) -> None:  # type: ignore[no-untyped-def]
    """FigureModel.sample (validation, `scienceflow sample`) is the pipeline with its own noise, shift and guidance."""
    model, pipe, _, _ = golden
    theirs = [pipe(
        prompt=PROMPTS[0], negative_prompt="" if guidance > 1 else None, image=sources(), width=WIDTH, height=HEIGHT,
        num_inference_steps=STEPS, true_cfg_scale=guidance, generator=torch.Generator("cpu").manual_seed(seed),
    ).images[0] for seed in (5, 6)]  # fmt: skip
    wanted, unwanted = model.encode_instructions(PROMPTS, [pixels()] * 2)
    ours = model.sample(
        model.pipeline(model.transformer), [wanted] * 2, unwanted, width=WIDTH, height=HEIGHT, steps=STEPS, guidance=guidance,
        seeds=[5, 6], images=sources(),
    )  # fmt: skip
    assert [picture.tobytes() for picture in ours] == [picture.tobytes() for picture in theirs]


def test_latents_are_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, pipe, _, _ = golden
    if model.weight_dtype == torch.float32:
        prepared = pipe.image_processor.preprocess(sources()[0], EDITED[1], EDITED[0]).unsqueeze(2)
        raw = model.encode_images(pixels()[0][None])
        theirs = torch.nn.functional.pixel_unshuffle(pipe._encode_vae_image(prepared, None).squeeze(2), 2)
        assert raw.shape[1:] == model.latent_shape(EDITED[1], EDITED[0]) and torch.equal(model.normalize(raw), theirs)


def test_template_and_dropped_tokens_are_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    pipe = golden[1]
    assert pipe.prompt_template_encode == qwen_image_edit.TEMPLATE
    assert pipe.prompt_template_encode_start_idx == qwen_image_edit.DROPPED


# -- limits, and each ingredient broken once -----------------------------------------------------
def test_a_long_prompt_is_cut_at_the_limit_of_its_own_tokens_and_counted(model) -> None:  # type: ignore[no-untyped-def]
    long, before = "The figure shows a box. " * 60, model.truncated_prompts
    plain, seen = model.encode_prompts([long])[0], model.encode_instructions([long], [pixels()])[0]
    whole = model.prompt_lengths([long])[0]
    assert len(plain) == LENGTH < whole and model.truncated_prompts == before + 2
    assert len(seen) == LENGTH + 2 * 17 * 11  # each 96 x 64 px is seen as 480 x 320, resized to 476 x 308: of 28 px a token


@pytest.mark.parametrize("what", ["time", "shapes", "order", "pictures", "area"])
def test_an_ingredient_that_is_wrong_changes_what_is_computed(model, monkeypatch, what: str) -> None:  # type: ignore[no-untyped-def]
    def velocity(turned: bool = False) -> torch.Tensor:
        seen = pixels()[::-1] if what == "pictures" and turned else pixels()
        text = model.collate_text(model.encode_instructions(PROMPTS[:1], [seen]))
        clean = references(model)[::-1] if what == "order" and turned else references(model)
        with torch.no_grad():
            return model.velocity(noise(), torch.tensor([0.6]), text, clean)

    right, exact = velocity(), model.transformer

    def other(**inputs):  # type: ignore[no-untyped-def]
        if what == "time":
            inputs["timestep"] = inputs["timestep"] / 2
        if what == "shapes":
            inputs["img_shapes"] = [[(1, 4, 6), *shapes[1:]] for shapes in inputs["img_shapes"]]
        return exact(**inputs)

    monkeypatch.setattr(model, "_transformer", other)
    if what == "area":
        monkeypatch.setattr(released, "CONDITION_IMAGE_SIZE", 128 * 128)
    assert not torch.allclose(velocity(turned=True), right, atol=1e-4)


def test_pictures_have_rows_and_columns_in_the_text_which_the_pipeline_alone_loses(model) -> None:  # type: ignore[no-untyped-def]
    seen = [qwen_image_edit._condition(picture) for picture in sources()]
    pipe = make_pipeline(model)
    ours = model.encode_instructions(PROMPTS[:1], [pixels()])[0]
    assert torch.equal(pipe.encode_prompt(PROMPTS[0], seen)[0][0], ours)
    pipe.text_encoder._forward_pre_hooks.clear()
    assert not torch.allclose(pipe.encode_prompt(PROMPTS[0], seen)[0][0], ours, atol=1e-2)


def test_the_final_norm_is_read(model) -> None:  # type: ignore[no-untyped-def]
    language_model, right = model.text_encoder.language_model, texts(model)[0].embeds
    norm, language_model.norm = language_model.norm, torch.nn.Identity()
    without = texts(model)[0].embeds
    language_model.norm = norm
    assert not torch.allclose(without, right, atol=0.1)


def test_without_a_picture_nothing_is_drawn_trained_or_encoded(model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.config import Config
    from OpenSciDraw.encode import run as encode

    values = merged(
        BASE, model_type="QwenImageEdit", pretrained_model_name_or_path=SOURCE, lora_layers=LAYERS,
        dataset={"type": "ArXiVParquetDatasetV2", "base_dir": str(tmp_path), "parquet_base_path": "store"},
        encode={"figures": "drawn:4", "resolution": 128},
    )  # fmt: skip
    with pytest.raises(UserError, match="has no reference, and QwenImageEdit draws nothing without"):
        encode.main(Config.model_validate(values))
    row = model.encode_prompts([""])[0]
    with pytest.raises(UserError, match="Give each figure a reference"):
        model.velocity(noise(), torch.tensor([0.6]), model.collate_text([row]))
    with pytest.raises(UserError, match="Set validation_images"):
        model.sample(model.pipeline(model.transformer), [row], row, width=64, height=64, steps=2, guidance=1.0, seeds=[0])


def test_pictures_that_the_pipeline_would_resize_are_refused_and_its_area_is_put_back(model) -> None:  # type: ignore[no-untyped-def]
    usual = released.VAE_IMAGE_SIZE
    images = [Image.new("RGB", size) for size in ((96, 64), (192, 192))]
    with pytest.raises(UserError, match="96 x 64, 192 x 192 px.*one shape"), qwen_image_edit._shown_as_they_are(images):
        pass
    with qwen_image_edit._shown_as_they_are(images[:1]):
        assert released.VAE_IMAGE_SIZE == 96 * 64
    assert released.VAE_IMAGE_SIZE == usual


def test_plan_counts_a_reference_beside_each_figure_where_there_are_no_data_yet() -> None:
    from OpenSciDraw.config import load_config
    from OpenSciDraw.planning.shapes import shapes
    from OpenSciDraw.planning.step_cost import planned_model

    config = load_config("configs/examples/qwenimage_edit_lora.py")
    with planned_model(config) as (model, _):
        planned = shapes(model, config)
    assert planned and all(shape.references == ((shape.height, shape.width),) for shape in planned)


# -- real shapes on `meta`, and sister models ----------------------------------------------------
def test_the_released_config_has_20430_million_parameters_and_its_lora_layers_are_counted() -> None:
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(zero_cond_t=True)
    assert round(sum(p.numel() for p in transformer.parameters()) / 1e6, 1) == 20430.4
    assert len(resolve_lora_layers(transformer, LAYERS)) == 60 * 12
    assert len(resolve_lora_layers(transformer, QwenImageEdit.block_layers)) == 60 * 14


@pytest.mark.parametrize("change", [{"zero_cond_t": False}, {"guidance_embeds": True}, {"use_layer3d_rope": True}])
def test_sister_models_are_refused_before_they_are_read(tmp_path: Path, change: dict) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    config = json.loads((embedded_folder("qwen_image_edit_tiny") / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=f"{next(iter(change))}.*Train on Qwen/Qwen-Image-Edit-2511"):
        QwenImageEdit(ModelSource(str(tmp_path)), LENGTH, torch.float32).load_transformer()


# -- the whole way -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):  # type: ignore[no-untyped-def]
    """Run folder after three strong steps of LoRA on edits, both final weights, and the picture that validation edits."""
    from OpenSciDraw.drawn.folders import write_drawn_edits

    data, run = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    write_drawn_edits(data / "figures", 3, 3)
    source = data / "source.png"
    sources()[0].resize((128, 128)).save(source)
    values = merged(
        BASE, model_type="QwenImageEdit", pretrained_model_name_or_path=SOURCE, lora_layers=LAYERS, learning_rate=5e-2,
        max_train_steps=3, checkpointing_steps=2, held_out_examples=0, validation_steps=3, validation_prompts=PROMPTS[:1],
        validation_images=[str(source)], resolution_list=[[96, 64]], guidance_scale=2.0, validation_seed=7, num_inference_steps=4,
        max_sequence_length=256, caption_dropout=0.5, model_output_dir=str(run),
        dataset={"type": "ArXiVParquetDatasetV2", "base_dir": str(data), "parquet_base_path": "store"},
        encode={"figures": str(data / "figures"), "resolution": 128, "samples_per_shard": 16, "num_workers": 0},
    )  # fmt: skip
    return run, *train_and_resume(values, run), source


def test_edits_train_and_a_resumed_run_ends_with_the_same_weights(trained) -> None:  # type: ignore[no-untyped-def]
    _, first, again, _ = trained
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert len(first) == 3 * 12 * 2


@pytest.mark.parametrize("kind", ["diffusers", "comfyui"])
def test_the_exported_lora_gives_the_picture_that_training_showed(kind: str, trained, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.inference.export import export

    run, _, _, source = trained
    (file,) = export(str(run), tmp_path, (kind,), "fp32")
    monkeypatch.setattr(released, "VAE_IMAGE_SIZE", 128 * 128)
    pipe = make_pipeline(make())
    with Image.open(source) as opened:
        picture = opened.convert("RGB")

    def draw() -> np.ndarray:
        return np.asarray(pipe(
            image=[picture], prompt=PROMPTS[0], negative_prompt="", width=96, height=64, num_inference_steps=4, true_cfg_scale=2.0,
            generator=torch.Generator("cpu").manual_seed(7),
        ).images[0]).astype(int)  # fmt: skip

    def shown(step: int) -> np.ndarray:
        return np.asarray(Image.open(run / "validation_images" / f"step_{step:06d}" / "00.png")).astype(int)

    base = draw()
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    assert np.abs(base - shown(0)).max() <= 1 and np.abs(draw() - shown(3)).max() <= 1
    assert np.abs(draw() - base).max() > 4  # the adapter matters
