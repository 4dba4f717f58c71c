"""Golden tests: our Ovis-Image is what diffusers' OvisImagePipeline computes, ingredient by ingredient.

The pipeline is diffusers' own, loaded by `from_pretrained` from the embedded folder with its text encoder; its transformer's calls
are recorded. Each ingredient is also broken once on purpose, and the comparison must notice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BASE, merged, train_and_resume
from diffusers import OvisImagePipeline, OvisImageTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.sample import sample_normalized
from OpenSciDraw.models.base import TextBatch
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.models.ovis_image import DROPPED, SYSTEM, OvisImage
from OpenSciDraw.models.source import ModelSource
from OpenSciDraw.weights.trainable import resolve_lora_layers

PROMPTS = ["A flowchart with a box labelled 'Encoder'.", "The plot shows the loss over 10 epochs in blue."]
LENGTH, STEPS, GUIDANCE = 128, 4, 3.0
WIDTH, HEIGHT = 64, 96
SOURCE = "embedded:ovis_image_tiny"
ATTENTION = "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out"
LAYERS = f"{ATTENTION},ff.net.2,ff_context.net.2,proj_mlp,proj_out"


def make(dtype: torch.dtype = torch.float32) -> OvisImage:
    model = OvisImage(ModelSource(SOURCE), LENGTH, dtype)
    model.load_vae()
    model.load_text_encoder()
    model.load_transformer()
    return model


@pytest.fixture(scope="module")
def model() -> OvisImage:
    return make()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def golden(request):  # type: ignore[no-untyped-def]
    """(our model, the pipeline, calls of its transformer with answers, its pictures, its last latents, the noise of both)."""
    pipe = OvisImagePipeline.from_pretrained(embedded_folder("ovis_image_tiny"), torch_dtype=request.param)
    pipe.set_progress_bar_config(disable=True)
    calls: list[tuple[dict, torch.Tensor]] = []
    last: dict[str, torch.Tensor] = {}
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0].clone())), with_kwargs=True
    )
    noise = torch.randn(2, 64, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0)).to(request.param)
    pictures = pipe(
        prompt=list(PROMPTS), width=WIDTH, height=HEIGHT, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        latents=tokens(noise), max_sequence_length=LENGTH, output_type="np",
        callback_on_step_end=lambda pipe, step, t, values: last.update(values) or {},
    ).images  # fmt: skip
    return make(request.param), pipe, calls, pictures, last["latents"], noise


def tokens(latents: torch.Tensor) -> torch.Tensor:
    return latents.flatten(2).transpose(1, 2)


def pixels(count: int = 2) -> torch.Tensor:
    images = [draw_figure(seed=3, index=i, size=128).image.resize((WIDTH, HEIGHT), Image.LANCZOS) for i in range(count)]
    return torch.stack([torch.from_numpy(np.asarray(i).copy()).permute(2, 0, 1).float() / 127.5 - 1 for i in images])


# -- ours is the pipeline's ----------------------------------------------------------------------
def test_the_template_and_the_dropped_tokens_are_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    _, pipe, _, _, _, _ = golden
    assert (pipe.system_prompt, pipe.user_prompt_begin_id) == (SYSTEM, DROPPED)


def test_prompt_embeddings_are_the_pipelines_with_its_zeros_put_back_in_a_batch(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, calls, _, _, _ = golden
    rows = model.encode_prompts(PROMPTS)
    assert len(rows[0]) != len(rows[1]) and max(map(len, rows)) < LENGTH  # what is stored has no pads
    for which, prompts in enumerate((PROMPTS, ["", ""])):
        batch = model.collate_text(model.encode_prompts(prompts))
        assert batch.mask is None and torch.equal(batch.embeds, calls[which][0]["encoder_hidden_states"])


def test_a_long_prompt_is_cut_where_the_pipeline_cuts_it_and_counted(golden) -> None:  # type: ignore[no-untyped-def]
    model, pipe, _, _, _, _ = golden
    long = "The figure shows a box. " * 60
    theirs, before = pipe.encode_prompt(long, max_sequence_length=LENGTH)[0][0], model.truncated_prompts
    ours = model.encode_prompts([long])[0]
    assert len(ours) == LENGTH and torch.equal(ours, theirs) and model.truncated_prompts == before + 1


def test_every_input_and_the_velocity_equal_the_pipelines_at_every_step(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, calls, _, _, _ = golden
    recorded: list[dict] = []
    hook = model.transformer.register_forward_hook(
        lambda module, args, kwargs, output: recorded.append(kwargs), with_kwargs=True
    )
    assert len(calls) == 2 * STEPS
    for theirs, out in calls:
        noisy = theirs["hidden_states"].transpose(1, 2).unflatten(2, (HEIGHT // 8, WIDTH // 8))
        with torch.no_grad():
            velocity = model.velocity(noisy, theirs["timestep"], TextBatch(theirs["encoder_hidden_states"]))
        ours = recorded.pop()
        for name in ("hidden_states", "timestep", "encoder_hidden_states", "txt_ids", "img_ids"):
            assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name
        assert torch.equal(tokens(velocity), out)
    hook.remove()


def test_noise_levels_equal_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, pipe, calls, _, _, noise = golden
    ours = model.inference_sigmas(noise.shape[-2] * noise.shape[-1], STEPS)
    assert torch.equal(ours, pipe.scheduler.sigmas)
    levels = torch.stack([inputs["timestep"][0] for inputs, _ in calls[::2]]).float()
    assert torch.allclose(ours[:-1].float(), levels, atol=1e-6 if model.weight_dtype == torch.float32 else 4e-3)


def test_a_picture_sampled_by_our_path_with_guidance_equals_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, calls, pictures, last, noise = golden
    exact = model.weight_dtype == torch.float32
    texts = (TextBatch(calls[which][0]["encoder_hidden_states"]) for which in (0, 1))
    latents = sample_normalized(model, *texts, noise, STEPS, GUIDANCE)
    assert torch.equal(tokens(latents), last)
    ours = (model.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - pictures).max() <= (1e-4 if exact else 0.05)


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_images_of_the_run_equal_the_pipelines_own(golden, guidance: float) -> None:  # type: ignore[no-untyped-def]
    model, pipe, _, _, _, _ = golden
    common = dict(width=WIDTH, height=HEIGHT, num_inference_steps=STEPS, guidance_scale=guidance)
    theirs = pipe(
        prompt=list(PROMPTS), negative_prompt="a photo", max_sequence_length=LENGTH, **common,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)],
    ).images  # fmt: skip
    negative = model.encode_prompts(["a photo", "a photo"])[0]
    ours = model.sample(
        model.pipeline(model.transformer), model.encode_prompts(PROMPTS), negative, width=WIDTH, height=HEIGHT, steps=STEPS,
        guidance=guidance, seeds=[5, 6],
    )  # fmt: skip
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs, strict=True))


def test_latents_are_the_mode_scaled_as_the_pipeline_undoes_it(model) -> None:  # type: ignore[no-untyped-def]
    raw = model.encode_images(pixels())
    assert raw.shape == (2, *model.latent_shape(HEIGHT, WIDTH)) == (2, 16, HEIGHT // 4, WIDTH // 4)
    normalized, config = model.normalize(raw), model.vae.config
    unpacked = OvisImagePipeline._unpack_latents(tokens(normalized), HEIGHT, WIDTH, 4)
    undone = unpacked / config.scaling_factor + config.shift_factor
    assert torch.allclose(undone, raw, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(model.decode(normalized), model.vae.decode(undone).sample, atol=1e-5)
        assert torch.equal(raw, model.vae.encode(pixels()).latent_dist.mode())


# -- each ingredient broken once -----------------------------------------------------------------
def test_the_number_of_pads_matters_and_too_long_rows_are_refused(model) -> None:  # type: ignore[no-untyped-def]
    rows = model.encode_prompts(PROMPTS)
    text, noisy = model.collate_text(rows), torch.randn(2, 64, 12, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        right, fewer, other = (
            model.velocity(noisy, torch.full((2,), 0.7), TextBatch(embeds))
            for embeds in (text.embeds, text.embeds[:, : max(map(len, rows))], text.embeds.roll(1, 1))
        )
    assert not torch.allclose(fewer, right, atol=1e-3) and not torch.allclose(other, right, atol=1e-3)
    with pytest.raises(UserError, match="129 tokens.*max_sequence_length = 128"):
        model.collate_text([torch.zeros(LENGTH + 1, 48)])


# -- real shapes on `meta` -----------------------------------------------------------------------
def test_the_released_shapes_have_7370_million_parameters_and_their_lora_layers_are_counted() -> None:
    with torch.device("meta"):  # the class's defaults are the released model's
        transformer = OvisImageTransformer2DModel()
    assert round(sum(p.numel() for p in transformer.parameters()) / 1e6) == 7370
    assert len(resolve_lora_layers(transformer, ATTENTION)) == 6 * 8 + 27 * 3
    assert len(resolve_lora_layers(transformer, LAYERS)) == 6 * 10 + 27 * 5 + 1  # and the transformer's own proj_out
    assert len(resolve_lora_layers(transformer, OvisImage.block_layers)) == 6 * 14 + 27 * 6 + 1


# -- the whole way -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):  # type: ignore[no-untyped-def]
    """Run folder after three strong steps of LoRA, and the weights after the third was trained again from a checkpoint."""
    data, run = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    values = merged(
        BASE, model_type="OvisImage", pretrained_model_name_or_path=SOURCE, lora_layers=LAYERS, learning_rate=5e-2,
        max_train_steps=3, checkpointing_steps=2, validation_prompts=PROMPTS[:1], resolution_list=[[96, 64]], guidance_scale=2.0,
        validation_seed=7, max_sequence_length=256, num_inference_steps=4, model_output_dir=str(run),
        dataset={"type": "ArXiVParquetDatasetV2", "base_dir": str(data), "parquet_base_path": "store"},
        encode={"figures": "drawn:16", "resolution": 128, "samples_per_shard": 16, "num_workers": 0, "batch_size": 8},
    )  # fmt: skip
    return run, *train_and_resume(values, run)


def test_a_resumed_run_ends_with_the_same_weights(trained) -> None:  # type: ignore[no-untyped-def]
    _, first, again = trained
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert len(first) == 2 * (2 * 10 + 3 * 5 + 1)


def test_the_exported_lora_gives_the_picture_that_training_showed(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.inference.export import export

    run = trained[0]
    (file,) = export(str(run), tmp_path, ("diffusers",), "fp32")
    pipe = OvisImagePipeline.from_pretrained(embedded_folder("ovis_image_tiny"))
    pipe.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        return np.asarray(pipe(
            prompt=PROMPTS[0], width=96, height=64, num_inference_steps=4, guidance_scale=2.0,
            generator=torch.Generator("cpu").manual_seed(7),
        ).images[0]).astype(int)  # fmt: skip

    def shown(step: int) -> np.ndarray:
        return np.asarray(Image.open(run / "validation_images" / f"step_{step:06d}" / "00.png")).astype(int)

    base = draw()
    pipe.transformer.load_lora_adapter(str(file.parent), weight_name=file.name)  # the pipeline has no loader of its own
    picture = draw()
    assert np.abs(base - shown(0)).max() <= 1 and np.abs(picture - shown(3)).max() <= 1
    assert np.abs(picture - base).max() > 8  # the adapter matters


def test_sample_draws_with_the_runs_adapter_what_training_showed(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.cli import main

    run = trained[0]
    prompt = ["--prompt", PROMPTS[0], "--width", "96", "--height", "64", "--steps", "4", "--guidance", "2.0", "--seed", "7"]
    assert main(["sample", str(run), *prompt, "--num", "1", "--out", str(tmp_path)]) == 0
    (drawn,) = (path for path in tmp_path.rglob("*.png") if "grid" not in path.name)
    shown = Image.open(run / "validation_images" / "step_000003" / "00.png")
    assert np.abs(np.asarray(Image.open(drawn)).astype(int) - np.asarray(shown)).max() <= 1


def test_the_lora_in_the_originals_names_is_the_same_update_and_is_read_back(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Rows of `linear1` as the original splits them (`SingleStreamBlock` of AIDC-AI/Ovis-Image): q, k, v, the MLP and its gate."""
    from OpenSciDraw.inference.export import export, find_trained, read_adapter
    from OpenSciDraw.weights.adapter_files import read_adapter_file

    run, mine, _ = trained
    (file,) = export(str(run), tmp_path, ("comfyui",), "fp32")
    there, scale = load_file(file), read_adapter(find_trained(str(run))).updates["proj_out"].scale

    def original(name: str) -> torch.Tensor:
        down, up, alpha = (there[f"diffusion_model.{name}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        return up @ down * (alpha / len(down))

    def ours(*names: str) -> torch.Tensor:
        prefix = next(key for key in mine if key.endswith(f"{names[0]}.lora_A.weight")).removesuffix(f"{names[0]}.lora_A.weight")
        root = prefix.split("transformer_blocks")[0].removesuffix("single_")
        return torch.cat([scale * mine[f"{root}{n}.lora_B.weight"] @ mine[f"{root}{n}.lora_A.weight"] for n in names])

    single, double = "single_transformer_blocks.1", "transformer_blocks.0"
    for name, parts in {
        "single_blocks.1.linear1": [f"{single}.attn.{n}" for n in ("to_q", "to_k", "to_v")] + [f"{single}.proj_mlp"],
        "single_blocks.1.linear2": [f"{single}.proj_out"],
        "double_blocks.0.img_attn.qkv": [f"{double}.attn.{n}" for n in ("to_q", "to_k", "to_v")],
        "double_blocks.0.txt_attn.qkv": [f"{double}.attn.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj")],
        "double_blocks.0.txt_mlp.down_proj": [f"{double}.ff_context.net.2"],
    }.items():
        assert torch.allclose(original(name), ours(*parts), atol=1e-5), name
    back = read_adapter_file(file, make())
    assert len(back.updates) == 2 * 10 + 3 * 5 + 1


def test_a_layer_that_is_two_in_the_original_is_refused_there(model) -> None:  # type: ignore[no-untyped-def]
    name = "transformer_blocks.0.ff.net.0.proj"
    layers = {f"{name}.lora_A.weight": torch.zeros(2, 96), f"{name}.lora_B.weight": torch.zeros(768, 2)}
    with pytest.raises(UserError, match="ff.net.0.proj.*--format diffusers"):
        model.original_lora(layers, 2.0, 2)
