"""Golden tests: our Krea 2 is what diffusers' Krea2Pipeline computes, ingredient by ingredient.

The pipeline is diffusers' own, loaded by `from_pretrained` from the embedded folder with its text encoder; its transformer's calls
are recorded. Each ingredient is also broken once on purpose, and the comparison must notice.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BASE, merged, train_and_resume
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from PIL import Image

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.sample import sample_normalized
from OpenSciDraw.models.base import TextBatch
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.models.krea2 import DROPPED, PREFIX, SUFFIX, SUFFIX_TOKENS, Krea2
from OpenSciDraw.models.source import ModelSource
from OpenSciDraw.weights import trainable
from OpenSciDraw.weights.precision import compute_throughout
from OpenSciDraw.weights.trainable import resolve_lora_layers

PROMPTS = ["A flowchart with a box labelled 'Encoder'.", "The plot shows the loss over 10 epochs in blue."]
LENGTH, STEPS, GUIDANCE = 64, 4, 3.0
WIDTH, HEIGHT = 64, 96
SOURCE = "embedded:krea2_tiny"
LAYERS = "to_q,to_k,to_v,to_gate,to_out.0,ff.gate,ff.up,ff.down"
STATES, TEXT_WIDTH = 3, 48


def make(dtype: torch.dtype = torch.float32, source: str = SOURCE) -> Krea2:
    model = Krea2(ModelSource(source), LENGTH, dtype)
    model.load_vae()
    model.load_text_encoder()
    model.load_transformer()
    return model


@pytest.fixture(scope="module")
def model() -> Krea2:
    return make()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def golden(request):  # type: ignore[no-untyped-def]
    """(our model, the pipeline, calls of its transformer with answers, its pictures, its last latents, the noise of both)."""
    pipe = Krea2Pipeline.from_pretrained(embedded_folder("krea2_tiny"), torch_dtype=request.param)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False)  # as ours: torch multiplies by a weight that needs a gradient in another order
    calls: list[tuple[dict, torch.Tensor]] = []
    last: dict[str, torch.Tensor] = {}
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0].clone())), with_kwargs=True
    )
    noise = torch.randn(2, 64, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0))
    pictures = pipe(
        prompt=list(PROMPTS), width=WIDTH, height=HEIGHT, num_inference_steps=STEPS, guidance_scale=GUIDANCE - 1,
        latents=noise.flatten(2).transpose(1, 2).to(request.param), max_sequence_length=LENGTH, output_type="np",
        callback_on_step_end=lambda pipe, step, t, values: last.update(values) or {},
    ).images  # fmt: skip
    return make(request.param), pipe, calls, pictures, last["latents"], noise


def grid(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.transpose(1, 2).unflatten(2, (HEIGHT // 8, WIDTH // 8))


def batch(kwargs: dict) -> TextBatch:
    """The pipeline's text with its pads in the middle, as a batch of ours."""
    return TextBatch(kwargs["encoder_hidden_states"].flatten(2), kwargs["encoder_attention_mask"])


def trimmed(kwargs: dict) -> list[torch.Tensor]:
    text = batch(kwargs)
    return [row[valid] for row, valid in zip(text.embeds, text.mask, strict=True)]


def tolerance(model: Krea2) -> float:
    return 1e-4 if model.weight_dtype == torch.float32 else 0.1


# -- ours is the pipeline's ----------------------------------------------------------------------
def test_the_template_is_the_pipelines(model) -> None:  # type: ignore[no-untyped-def]
    pipe = Krea2Pipeline.from_pretrained(embedded_folder("krea2_tiny"))
    assert (PREFIX, SUFFIX) == (pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_suffix)
    assert DROPPED == pipe.prompt_template_encode_start_idx == len(pipe.tokenizer(PREFIX).input_ids)
    assert SUFFIX_TOKENS == pipe.prompt_template_encode_num_suffix_tokens == len(pipe.tokenizer(SUFFIX).input_ids)
    assert model.text_shape() == (LENGTH, STATES * TEXT_WIDTH)


def test_prompt_embeddings_are_the_pipelines_without_the_pads_in_the_middle(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, calls, _, _, _ = golden
    ours, theirs = model.encode_prompts([*PROMPTS, ""]), [*trimmed(calls[0][0]), trimmed(calls[1][0])[0]]
    assert [len(row) for row in ours] == [len(row) for row in theirs] and len(ours[0]) < LENGTH
    for mine, their in zip(ours, theirs, strict=True):  # of another batch shape: equal but for rounding
        assert mine.shape[1] == STATES * TEXT_WIDTH and torch.allclose(mine, their, atol=tolerance(model))
    assert [length - DROPPED for length in model.prompt_lengths([*PROMPTS, ""])] == [len(row) for row in ours]


def test_a_long_prompt_is_cut_where_the_pipeline_cuts_it_and_counted(golden) -> None:  # type: ignore[no-untyped-def]
    model, pipe, _, _, _, _ = golden
    long = "The figure shows a box. " * 30
    (theirs, mask), before = pipe.encode_prompt([long], max_sequence_length=LENGTH), model.truncated_prompts
    ours = model.encode_prompts([long])[0]
    assert len(ours) == LENGTH and mask.all() and model.truncated_prompts == before + 1
    assert torch.allclose(ours, theirs[0].flatten(1), atol=tolerance(model))


def test_every_input_and_the_velocity_equal_the_pipelines_at_every_step(golden) -> None:  # type: ignore[no-untyped-def]
    """First with the prompt, then without, in each step; to the bit, with the pipeline's own text."""
    model, pipe, calls, _, _, _ = golden
    assert len(calls) == 2 * STEPS and not batch(calls[0][0]).mask.all()
    recorded: list[dict[str, Any]] = []
    hook = model.transformer.register_forward_hook(
        lambda module, args, kwargs, output: recorded.append(kwargs), with_kwargs=True
    )
    for at, (kwargs, out) in enumerate(calls):
        with torch.no_grad():
            velocity = model.velocity(grid(kwargs["hidden_states"]), pipe.scheduler.sigmas[at // 2].expand(2), batch(kwargs))
        ours = recorded.pop()
        for name in ("hidden_states", "encoder_hidden_states", "timestep", "position_ids", "encoder_attention_mask"):
            assert ours[name].dtype == kwargs[name].dtype and torch.equal(ours[name], kwargs[name]), name
        assert torch.equal(velocity, grid(out))
    hook.remove()


def test_the_velocity_with_trimmed_rows_is_that_with_pads_in_the_middle(golden) -> None:  # type: ignore[no-untyped-def]
    model, pipe, calls, _, _, _ = golden
    kwargs, out = calls[2]
    with torch.no_grad():
        text = model.collate_text(trimmed(kwargs))
        velocity = model.velocity(grid(kwargs["hidden_states"]), pipe.scheduler.sigmas[1].expand(2), text)
    assert text.embeds.shape[1] < LENGTH and torch.allclose(velocity, grid(out), atol=tolerance(model))


def test_noise_levels_equal_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, pipe, _, _, _, noise = golden
    ours = model.inference_sigmas(noise.shape[-2] * noise.shape[-1], STEPS)
    assert torch.equal(ours, pipe.scheduler.sigmas) and ours[-1] == 0


def test_a_picture_sampled_by_our_path_with_guidance_equals_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, calls, pictures, last, noise = golden
    exact = model.weight_dtype == torch.float32
    latents = sample_normalized(model, batch(calls[0][0]), batch(calls[1][0]), noise.to(model.weight_dtype), STEPS, GUIDANCE)
    assert torch.equal(latents, grid(last))
    texts = [model.collate_text(trimmed(calls[at][0])) for at in (0, 1)]
    latents = sample_normalized(model, *texts, noise.to(model.weight_dtype), STEPS, GUIDANCE)
    assert torch.allclose(latents, grid(last), atol=1e-4 if exact else 0.1)
    ours = (model.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - pictures).max() <= (1e-4 if exact else 0.05)


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_images_of_the_run_equal_the_pipelines_own(golden, guidance: float) -> None:  # type: ignore[no-untyped-def]
    """From the same rows, of which the pipeline has its own, with pads in the middle."""
    model, pipe, calls, _, _, _ = golden
    wanted, unwanted = calls[0][0], calls[1][0]
    theirs = pipe(
        prompt_embeds=wanted["encoder_hidden_states"], prompt_embeds_mask=wanted["encoder_attention_mask"],
        negative_prompt_embeds=unwanted["encoder_hidden_states"], negative_prompt_embeds_mask=unwanted["encoder_attention_mask"],
        guidance_scale=guidance - 1, width=WIDTH, height=HEIGHT, num_inference_steps=STEPS,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)],
    ).images  # fmt: skip
    ours = model.sample(
        model.pipeline(model.transformer), trimmed(wanted), trimmed(unwanted)[0], width=WIDTH, height=HEIGHT, steps=STEPS,
        guidance=guidance, seeds=[5, 6],
    )  # fmt: skip
    most = 1 if model.weight_dtype == torch.float32 else 12
    for mine, their in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(mine).astype(int) - np.asarray(their)).max() <= most


# -- each ingredient broken once -----------------------------------------------------------------
def velocity_of(model: Krea2, text: TextBatch) -> torch.Tensor:
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
    for at in range(2):
        noisy = torch.randn(2, 64, 12, 8, generator=torch.Generator().manual_seed(2))[at : at + 1]
        with torch.no_grad():
            alone = model.velocity(noisy, torch.tensor([0.7]), model.collate_text(rows[at : at + 1]))
        assert torch.allclose(alone[0], right[at], atol=1e-4)


@pytest.mark.parametrize("what", ["timestep", "position_ids", "encoder_hidden_states"])
def test_another_time_position_or_order_of_states_changes_the_velocity(model, monkeypatch, what: str) -> None:  # type: ignore[no-untyped-def]
    text = model.collate_text(model.encode_prompts(PROMPTS))
    right, exact = velocity_of(model, text), model.transformer
    change = {"timestep": lambda t: 1 - t, "position_ids": lambda p: p.flip(0), "encoder_hidden_states": lambda e: e.flip(2)}
    monkeypatch.setattr(model, "_transformer", lambda **kwargs: exact(**{**kwargs, what: change[what](kwargs[what])}))
    assert not torch.allclose(velocity_of(model, text), right, atol=1e-3)


def test_the_layer_after_the_last_state_and_the_final_norm_are_not_kept(model) -> None:  # type: ignore[no-untyped-def]
    assert len(model.text_encoder.layers) == 3 and isinstance(model.text_encoder.norm, torch.nn.Identity)


# -- real shapes on `meta`, names of others, and sister models -----------------------------------
def test_the_default_config_has_12820_million_parameters_its_lora_layers_counted_and_names_that_diffusers_converter_reads() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_krea2_lora_to_diffusers

    with torch.device("meta"):
        transformer = Krea2Transformer2DModel()
    assert round(sum(p.numel() for p in transformer.parameters()) / 1e6) == 12820
    assert len(resolve_lora_layers(transformer, LAYERS)) == 32 * 8  # 28 blocks, 2 + 2 of the text
    assert Krea2.block_layers == LAYERS
    linear = [name for name, part in transformer.named_modules() if isinstance(part, torch.nn.Linear)]
    layers = {f"{name}.lora_{side}.weight": torch.ones(1, 1) for name in linear for side in "AB"}
    written = make_unloaded().original_lora(layers, 4.0, 4)
    assert {key.rsplit(".", 1)[1] for key in written} == {"weight", "alpha"}
    peft = {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for k, v in written.items() if "alpha" not in k}
    back = _convert_non_diffusers_krea2_lora_to_diffusers(peft)  # which knows neither lora_down nor alpha
    assert {key.removeprefix("transformer.") for key in back} == layers.keys()


def make_unloaded(source: str = SOURCE) -> Krea2:
    return Krea2(ModelSource(source), LENGTH, torch.float32)


def test_a_layer_that_the_original_has_not_is_refused() -> None:
    with pytest.raises(UserError, match="no counterpart"):
        make_unloaded().original_lora({"other.lora_A.weight": torch.ones(1, 1), "other.lora_B.weight": torch.ones(1, 1)}, 1.0, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"is_distilled": True}, "is distilled.*krea/Krea-2-Raw"), ({"patch_size": 4}, "patch_size = 4"),
     ({"text_encoder_select_layers": [1, 2]}, "names 2 states")],
)  # fmt: skip
def test_sister_models_are_refused_before_they_are_read(tmp_path: Path, change: dict, said: str) -> None:
    folder = tmp_path / "krea"
    (folder / "transformer").mkdir(parents=True)
    index = json.loads((embedded_folder("krea2_tiny") / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **change}))
    shutil.copy(embedded_folder("krea2_tiny") / "transformer" / "config.json", folder / "transformer" / "config.json")
    with pytest.raises(UserError, match=said):
        make_unloaded(str(folder)).load_transformer()


@pytest.mark.parametrize("use_lora", [True, False], ids=["lora", "all weights"])
def test_training_in_bf16_computes_the_pipelines_velocity_with_norms_in_fp32(use_lora: bool) -> None:
    config = Config.model_validate(merged(
        BASE, model_type="Krea2", pretrained_model_name_or_path=SOURCE, lora_layers=LAYERS, use_lora=use_lora,
        mixed_precision="bf16", model_output_dir="unused", dataset={"base_dir": "unused", "parquet_base_path": "unused"},
    ))  # fmt: skip
    right, ours = (Krea2(ModelSource(SOURCE), LENGTH, torch.bfloat16) for _ in range(2))
    right.load_transformer()
    ours.load_transformer(dtype=trainable.loading_dtype(config))
    trainable.make_trainable(ours.transformer, config)
    compute_throughout(ours, ours.transformer, config)
    text = TextBatch(torch.randn(2, 20, STATES * TEXT_WIDTH, dtype=torch.bfloat16))
    expected, found = velocity_of(right, text), velocity_of(ours, text)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    norms = {p.dtype for name, p in right.transformer.named_parameters() if "norm" in name}
    assert norms == {torch.float32}


# -- the whole way -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):  # type: ignore[no-untyped-def]
    """Run folder after three strong steps of LoRA, and the weights after the third was trained again from a checkpoint."""
    data, run = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    values = merged(
        BASE, model_type="Krea2", pretrained_model_name_or_path=SOURCE, lora_layers=LAYERS, learning_rate=5e-2,
        max_train_steps=3, checkpointing_steps=2, validation_prompts=PROMPTS[:1], resolution_list=[[96, 64]], guidance_scale=2.0,
        validation_seed=7, max_sequence_length=256, num_inference_steps=4, model_output_dir=str(run),
        dataset={"type": "ArXiVParquetDatasetV2", "base_dir": str(data), "parquet_base_path": "store"},
        encode={"figures": "drawn:16", "resolution": 128, "samples_per_shard": 16, "num_workers": 0, "batch_size": 8},
    )  # fmt: skip
    return run, *train_and_resume(values, run)


def test_a_resumed_run_ends_with_the_same_weights(trained) -> None:  # type: ignore[no-untyped-def]
    _, first, again = trained
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert len(first) == 5 * 8 * 2


def test_the_exported_lora_gives_the_picture_that_training_showed(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file

    from OpenSciDraw.inference.export import export

    run = trained[0]
    plain, comfy = export(str(run), tmp_path, ("diffusers", "comfyui"), "fp32")
    pipe = Krea2Pipeline.from_pretrained(embedded_folder("krea2_tiny"))
    pipe.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        return np.asarray(pipe(
            prompt=PROMPTS[0], width=96, height=64, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=256,
            generator=torch.Generator("cpu").manual_seed(7),
        ).images[0]).astype(int)  # fmt: skip

    def shown(step: int) -> np.ndarray:
        return np.asarray(Image.open(run / "validation_images" / f"step_{step:06d}" / "00.png")).astype(int)

    base = draw()
    pipe.load_lora_weights(str(plain.parent), weight_name=plain.name)
    picture = draw()
    assert np.abs(base - shown(0)).max() <= 2 and np.abs(picture - shown(3)).max() <= 2
    assert np.abs(picture - base).max() > 8  # the adapter matters
    pipe.unload_lora_weights()
    pipe.load_lora_weights(as_peft(load_file(comfy)))
    assert np.abs(draw() - picture).max() <= 1


def as_peft(file: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ComfyUI's file with alpha in the weights, since diffusers' loader of this family takes no alpha."""
    out: dict[str, torch.Tensor] = {}
    for stem in {key.rsplit(".lora_", 1)[0] for key in file if ".lora_" in key}:
        down = file[f"{stem}.lora_down.weight"]
        out[f"{stem}.lora_A.weight"] = down
        out[f"{stem}.lora_B.weight"] = file[f"{stem}.lora_up.weight"] * (file[f"{stem}.alpha"] / len(down))
    return out
