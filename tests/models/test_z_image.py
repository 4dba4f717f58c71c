"""Golden tests: our Z-Image is what diffusers' ZImagePipeline computes, ingredient by ingredient.

The pipeline is diffusers' own, loaded by `from_pretrained` from the embedded folder with its text encoder; its transformer's calls
are recorded. Each ingredient is also broken once on purpose, and the comparison must notice.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BASE, merged, train_and_resume
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from PIL import Image

from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.sample import sample_normalized
from OpenSciDraw.models.base import TextBatch
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.models.source import ModelSource
from OpenSciDraw.models.z_image import ZImage
from OpenSciDraw.weights.trainable import resolve_lora_layers

PROMPTS = ["A flowchart with a box labelled 'Encoder'.", "The plot shows the loss over 10 epochs in blue."]
LENGTH, STEPS, GUIDANCE = 64, 4, 3.0
WIDTH, HEIGHT = 64, 96
SOURCE = "embedded:z_image_tiny"
LAYERS = "to_q,to_k,to_v,to_out.0,feed_forward.w1,feed_forward.w2,feed_forward.w3"


def make(dtype: torch.dtype = torch.float32, source: str = SOURCE) -> ZImage:
    model = ZImage(ModelSource(source), LENGTH, dtype)
    model.load_vae()
    model.load_text_encoder()
    model.load_transformer()
    return model


@pytest.fixture(scope="module")
def model() -> ZImage:
    return make()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def golden(request):  # type: ignore[no-untyped-def]
    """(our model, the pipeline, calls of its transformer with answers, its pictures, its last latents, the noise of both)."""
    pipe = ZImagePipeline.from_pretrained(embedded_folder("z_image_tiny"), torch_dtype=request.param)
    pipe.set_progress_bar_config(disable=True)
    calls: list[tuple[tuple, list]] = []
    last: dict[str, torch.Tensor] = {}
    pipe.transformer.register_forward_hook(lambda module, args, output: calls.append((args, [o.clone() for o in output[0]])))
    noise = torch.randn(2, 16, HEIGHT // 4, WIDTH // 4, generator=torch.Generator().manual_seed(0))
    pictures = pipe(
        prompt=list(PROMPTS), width=WIDTH, height=HEIGHT, num_inference_steps=STEPS, guidance_scale=GUIDANCE - 1, latents=noise,
        max_sequence_length=LENGTH, output_type="np", callback_on_step_end=lambda pipe, step, t, values: last.update(values) or {},
    ).images  # fmt: skip
    return make(request.param), pipe, calls, pictures, last["latents"], noise


def packed(latents: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pixel_unshuffle(latents, 2)


def collated(model: ZImage, prompts: list[str]) -> TextBatch:
    return model.collate_text(model.encode_prompts(prompts))


def pixels(count: int = 2) -> torch.Tensor:
    images = [draw_figure(seed=3, index=i, size=128).image.resize((WIDTH, HEIGHT), Image.LANCZOS) for i in range(count)]
    return torch.stack([torch.from_numpy(np.asarray(i).copy()).permute(2, 0, 1).float() / 127.5 - 1 for i in images])


# -- ours is the pipeline's ----------------------------------------------------------------------
def test_prompt_embeddings_are_the_pipelines_without_the_work_on_pads(golden) -> None:  # type: ignore[no-untyped-def]
    model, pipe, calls, _, _, _ = golden
    ours, theirs = model.encode_prompts([*PROMPTS, "", ""]), calls[0][0][2]
    assert [len(row) for row in ours] == [len(row) for row in theirs] and len(ours[0]) < LENGTH
    for mine, their in zip(ours, theirs, strict=True):  # of another batch shape: equal but for rounding
        assert torch.allclose(mine, their, atol=1e-5 if model.weight_dtype == torch.float32 else 0.06)
    assert model.prompt_lengths([*PROMPTS, ""]) == [len(row) for row in ours[:3]]


def test_a_long_prompt_is_cut_where_the_pipeline_cuts_it_and_counted(golden) -> None:  # type: ignore[no-untyped-def]
    model, pipe, _, _, _, _ = golden
    long = "The figure shows a box. " * 30
    theirs, before = pipe.encode_prompt([long], max_sequence_length=LENGTH)[0][0], model.truncated_prompts
    ours = model.encode_prompts([long])[0]
    assert len(ours) == len(theirs) == LENGTH and model.truncated_prompts == before + 1
    assert torch.allclose(ours, theirs, atol=1e-5 if model.weight_dtype == torch.float32 else 0.06)


def test_every_input_and_the_velocity_equal_the_pipelines_at_every_step(golden) -> None:  # type: ignore[no-untyped-def]
    """In the order of the pipeline's call: first the rows with the prompt, then those without; to the bit."""
    model, pipe, calls, _, _, _ = golden
    text = model.collate_text(calls[0][0][2])
    assert text.mask is not None and len(calls) == STEPS
    recorded: list[tuple] = []
    hook = model.transformer.register_forward_hook(lambda module, args, output: recorded.append(args))
    for step, ((latents, time, rows), out) in enumerate(calls):
        noisy = packed(torch.stack(list(latents)).squeeze(2))
        with torch.no_grad():
            velocity = model.velocity(noisy, pipe.scheduler.sigmas[step].expand(4), text)
        ours = recorded.pop()
        assert torch.equal(ours[1], time)
        for mine, theirs in ((ours[0], latents), (ours[2], rows)):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert torch.equal(velocity, -packed(torch.stack(out).squeeze(2).float()))
    hook.remove()


def test_noise_levels_equal_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, calls, _, _, noise = golden
    theirs = torch.stack([1 - args[1][0] for args, _ in calls])
    ours = model.inference_sigmas(noise.shape[-2] * noise.shape[-1] // 4, STEPS)
    assert torch.allclose(ours[:-1].float(), theirs, atol=1e-6) and ours[-1] == 0


def test_a_picture_sampled_by_our_path_with_guidance_equals_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, calls, pictures, last, noise = golden
    exact = model.weight_dtype == torch.float32
    rows = calls[0][0][2]
    texts = model.collate_text(rows[:2]), model.collate_text(rows[2:])
    latents = sample_normalized(model, *texts, packed(noise), STEPS, GUIDANCE)
    assert torch.allclose(latents, packed(last), atol=1e-4 if exact else 0.02)
    ours = (model.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - pictures).max() <= (1e-4 if exact else 0.05)


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_images_of_the_run_equal_the_pipelines_own(golden, guidance: float) -> None:  # type: ignore[no-untyped-def]
    model, pipe, calls, _, _, _ = golden
    common = dict(width=WIDTH, height=HEIGHT, num_inference_steps=STEPS)
    rows = calls[0][0][2]
    theirs = pipe(
        prompt_embeds=rows[:2], negative_prompt_embeds=rows[2:], guidance_scale=guidance - 1, **common,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)],
    ).images  # fmt: skip
    ours = model.sample(
        model.pipeline(model.transformer), rows[:2], rows[2], width=WIDTH, height=HEIGHT, steps=STEPS, guidance=guidance,
        seeds=[5, 6],
    )  # fmt: skip
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs, strict=True))


def test_latents_are_the_mode_scaled_as_the_pipeline_undoes_it(model) -> None:  # type: ignore[no-untyped-def]
    raw = model.encode_images(pixels())
    assert raw.shape == (2, *model.latent_shape(HEIGHT, WIDTH)) == (2, 16, HEIGHT // 4, WIDTH // 4)
    normalized = model.normalize(raw)
    config = model.vae.config
    undone = torch.nn.functional.pixel_shuffle(normalized, 2) / config.scaling_factor + config.shift_factor
    assert torch.allclose(undone, raw, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(model.decode(normalized), model.vae.decode(undone).sample, atol=1e-6)
        assert torch.equal(raw, model.vae.encode(pixels()).latent_dist.mode())


# -- each ingredient broken once -----------------------------------------------------------------
def velocity_of(model: ZImage, text: TextBatch) -> torch.Tensor:
    noisy = torch.randn(len(text.embeds), 64, 12, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.velocity(noisy, torch.full((len(noisy),), 0.7), text)


def test_what_stands_in_pads_never_changes_the_output_and_a_row_is_the_same_alone(model) -> None:  # type: ignore[no-untyped-def]
    rows = model.encode_prompts(PROMPTS)
    text = model.collate_text(rows)
    assert text.mask is not None and not text.mask.all()
    filled = text.embeds.masked_scatter(~text.mask[..., None], 50 * torch.randn(text.embeds.numel()))
    right = velocity_of(model, text)
    assert torch.equal(velocity_of(model, TextBatch(filled, text.mask)), right)
    assert not torch.allclose(velocity_of(model, TextBatch(filled)), right)
    assert torch.allclose(velocity_of(model, model.collate_text(rows[:1])), right[:1], atol=1e-5)


@pytest.mark.parametrize("what", ["time", "sign", "text"])
def test_another_time_sign_or_text_changes_the_velocity(model, monkeypatch, what: str) -> None:  # type: ignore[no-untyped-def]
    text = collated(model, PROMPTS)
    right, exact = velocity_of(model, text), model.transformer

    def broken(latents, time, rows, return_dict):  # type: ignore[no-untyped-def]
        time, rows = (1 - time if what == "time" else time), ([row[1:] for row in rows] if what == "text" else rows)
        out = exact(latents, time, rows, return_dict=False)[0]
        return ([-part for part in out] if what == "sign" else out,)

    monkeypatch.setattr(model, "_transformer", broken)
    assert not torch.allclose(velocity_of(model, text), right, atol=1e-3)


def test_the_final_norm_and_the_last_layer_are_not_read(model) -> None:  # type: ignore[no-untyped-def]
    assert len(model.text_encoder.layers) == 2 and isinstance(model.text_encoder.norm, torch.nn.Identity)


# -- real shapes on `meta`, and sister models ----------------------------------------------------
def test_the_released_config_has_6155_million_parameters_and_its_lora_layers_are_counted() -> None:
    with torch.device("meta"):  # the class's defaults are the released model's
        transformer = ZImageTransformer2DModel()
    assert round(sum(p.numel() for p in transformer.parameters()) / 1e6) == 6155
    assert len(resolve_lora_layers(transformer, LAYERS)) == 34 * 7  # 30 blocks, 2 refiners of the picture, 2 of the text
    assert len(resolve_lora_layers(transformer, ZImage.block_layers)) == 34 * 7 + 32  # the text's refiners have no modulation


@pytest.mark.parametrize(("change", "said"), [({"siglip_feat_dim": 1152}, "Z-Image-Omni"), ({}, "distilled by its name")])
def test_sister_models_are_refused_before_they_are_read(tmp_path: Path, change: dict, said: str) -> None:
    folder = tmp_path / ("Z-Image-Omni" if change else "Z-Image-Turbo")
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    config = json.loads((embedded_folder("z_image_tiny") / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=f"{said}.*Tongyi-MAI/Z-Image"):
        ZImage(ModelSource(str(folder)), LENGTH, torch.float32).load_transformer()


# -- the whole way -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):  # type: ignore[no-untyped-def]
    """Run folder after three strong steps of LoRA, and the weights after the third was trained again from a checkpoint."""
    data, run = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    values = merged(
        BASE, model_type="ZImage", pretrained_model_name_or_path=SOURCE, lora_layers=LAYERS, learning_rate=5e-2,
        max_train_steps=3, checkpointing_steps=2, validation_prompts=PROMPTS[:1], resolution_list=[[96, 64]], guidance_scale=2.0,
        validation_seed=7, max_sequence_length=256, num_inference_steps=4, model_output_dir=str(run),
        dataset={"type": "ArXiVParquetDatasetV2", "base_dir": str(data), "parquet_base_path": "store"},
        encode={"figures": "drawn:16", "resolution": 128, "samples_per_shard": 16, "num_workers": 0, "batch_size": 8},
    )  # fmt: skip
    return run, *train_and_resume(values, run)


def test_a_resumed_run_ends_with_the_same_weights(trained) -> None:  # type: ignore[no-untyped-def]
    _, first, again = trained
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert len(first) == 5 * 7 * 2


@pytest.mark.parametrize("kind", ["diffusers", "comfyui"])
def test_the_exported_lora_gives_the_picture_that_training_showed(kind: str, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.inference.export import export

    run = trained[0]
    (file,) = export(str(run), tmp_path, (kind,), "fp32")
    pipe = ZImagePipeline.from_pretrained(embedded_folder("z_image_tiny"))
    pipe.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        return np.asarray(pipe(
            prompt=PROMPTS[0], width=96, height=64, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=256,
            generator=torch.Generator("cpu").manual_seed(7),
        ).images[0]).astype(int)  # fmt: skip

    def shown(step: int) -> np.ndarray:
        return np.asarray(Image.open(run / "validation_images" / f"step_{step:06d}" / "00.png")).astype(int)

    base = draw()
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    picture = draw()
    assert np.abs(base - shown(0)).max() <= 1 and np.abs(picture - shown(3)).max() <= 1
    assert np.abs(picture - base).max() > 8  # the adapter matters
