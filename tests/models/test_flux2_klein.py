"""Golden tests: our klein is what diffusers' Flux2KleinPipeline computes, ingredient by ingredient.

The pipeline below is diffusers' own, loaded by `from_pretrained` from the embedded folder with its full
text encoder; a hook on its transformer records what it really feeds and gets. Each ingredient is also
broken once on purpose, and the comparison must notice.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from diffusers import Flux2KleinPipeline
from PIL import Image

from OpenSciDraw import flow
from OpenSciDraw.config import Config
from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.encode import run as encode
from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.sample import sample_normalized
from OpenSciDraw.models import flux2_klein
from OpenSciDraw.models.base import build_model

PROMPTS = ["A flowchart with a box labelled 'Encoder'.", "The plot shows the loss over 10 epochs in blue."]
LENGTH, STEPS, GUIDANCE = 64, 4, 3.0
WIDTH, HEIGHT = 64, 96


class Recorder:
    """What the pipeline's transformer was called with, and what it answered, call by call."""

    def __init__(self, transformer: torch.nn.Module):
        self.inputs: list[dict] = []
        self.outputs: list[torch.Tensor] = []
        transformer.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, output) -> None:  # type: ignore[no-untyped-def]
        self.inputs.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()})
        self.outputs.append(output[0].clone())


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def golden(request, tiny_folder):  # type: ignore[no-untyped-def]
    """(our model, the pipeline, its recorded calls, its pictures, the noise that both start from)."""
    dtype = request.param
    pipe = Flux2KleinPipeline.from_pretrained(tiny_folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    recorder = Recorder(pipe.transformer)
    tokens = (len(PROMPTS), 128, HEIGHT // 8, WIDTH // 8)
    noise = torch.randn(tokens, generator=torch.Generator().manual_seed(0)).to(dtype)
    pictures = pipe(
        prompt=PROMPTS, width=WIDTH, height=HEIGHT, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        max_sequence_length=LENGTH, latents=noise, output_type="np",
    ).images  # fmt: skip
    model = make_model(dtype, LENGTH)
    return model, pipe, recorder, pictures, noise


def our_call(model, noisy, sigma, rows):  # type: ignore[no-untyped-def]
    """Inputs and output of the transformer in our velocity."""
    recorder = Recorder(model.transformer)
    with torch.no_grad():
        velocity = model.velocity(noisy, sigma, model.collate_text(rows))
    return recorder.inputs[-1], recorder.outputs[-1], velocity


def unpack(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, HEIGHT // 8, WIDTH // 8)


def test_prompt_embeddings_equal_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, recorder, _, _ = golden
    ours = torch.stack(model.encode_prompts(PROMPTS))
    assert torch.equal(ours, recorder.inputs[0]["encoder_hidden_states"])
    empty = torch.stack(model.encode_prompts(["", ""]))
    assert torch.equal(empty, recorder.inputs[1]["encoder_hidden_states"])  # the CFG branch


def test_every_input_of_the_denoising_step_equals_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, recorder, _, noise = golden
    rows = model.encode_prompts(PROMPTS)
    for step in range(STEPS):
        theirs = recorder.inputs[2 * step]
        noisy = unpack(theirs["hidden_states"])
        ours, _, _ = our_call(model, noisy, theirs["timestep"], rows)
        for name in ("hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids"):
            assert torch.equal(ours[name], theirs[name]), name
        assert not ours["img_ids"].is_floating_point() and not ours["txt_ids"].is_floating_point()
        assert ours["guidance"] is None and theirs["guidance"] is None


def test_velocity_equals_the_pipelines_at_every_step_with_and_without_prompt(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, recorder, _, _ = golden
    for call, (theirs, out) in enumerate(zip(recorder.inputs, recorder.outputs, strict=True)):
        rows = model.encode_prompts(PROMPTS if call % 2 == 0 else ["", ""])
        _, _, velocity = our_call(model, unpack(theirs["hidden_states"]), theirs["timestep"], rows)
        assert torch.equal(velocity, unpack(out)), f"call {call}"


def test_noise_levels_equal_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, recorder, _, noise = golden
    theirs = torch.stack([recorder.inputs[2 * step]["timestep"][0] for step in range(STEPS)])
    ours = model.inference_sigmas(noise.shape[-2] * noise.shape[-1], STEPS)
    tolerance = 1e-6 if theirs.dtype == torch.float32 else 2**-8
    assert torch.allclose(ours[:-1].float(), theirs.float(), rtol=tolerance) and ours[-1] == 0


def test_a_picture_sampled_by_our_path_equals_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, pipe, _, pictures, noise = golden
    text, empty = model.collate_text(model.encode_prompts(PROMPTS)), model.collate_text(model.encode_prompts(["", ""]))
    latents = sample_normalized(model, text, empty, noise, STEPS, GUIDANCE)
    decoded = model.decode(latents)
    if model.weight_dtype == torch.bfloat16:  # the pipeline decodes in bf16, we in fp32: here its own arithmetic
        bn = pipe.vae.bn
        std = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps).to(latents.dtype)
        with torch.no_grad():
            raw = pipe._unpatchify_latents(latents * std + bn.running_mean.view(1, -1, 1, 1).to(latents.dtype))
            decoded = pipe.vae.decode(raw).sample
    ours = ((decoded / 2 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1).float().numpy()
    assert np.abs(ours - pictures).max() <= 1e-5


def test_images_of_the_run_equal_the_pipelines_own(golden) -> None:  # type: ignore[no-untyped-def]
    """FigureModel.sample (validation, `scienceflow sample`) is the pipeline with its own noise and shift."""
    model, pipe, _, _, _ = golden
    theirs = pipe(
        prompt=PROMPTS[0], width=WIDTH, height=HEIGHT, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        max_sequence_length=LENGTH, generator=torch.Generator("cpu").manual_seed(5),
    ).images[0]  # fmt: skip
    ours = model.sample(
        model.pipeline(model.transformer), model.encode_prompts(PROMPTS[:1]), model.encode_prompts([""])[0],
        width=WIDTH, height=HEIGHT, steps=STEPS, guidance=GUIDANCE, seeds=[5],
    )[0]  # fmt: skip
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def pixels(count: int = 2) -> torch.Tensor:
    images = [draw_figure(seed=3, index=i, size=128).image.resize((WIDTH, HEIGHT), Image.LANCZOS) for i in range(count)]
    return torch.stack([torch.from_numpy(np.asarray(i).copy()).permute(2, 0, 1).float() / 127.5 - 1 for i in images])


def test_latents_equal_the_pipelines_image_path(golden) -> None:  # type: ignore[no-untyped-def]
    model, pipe, _, _, _ = golden
    vae, pipe.vae = pipe.vae, model.vae  # our encoder works in fp32; the arithmetic compared is the pipeline's
    theirs = pipe._encode_vae_image(pixels(), generator=torch.Generator().manual_seed(1))
    pipe.vae = vae
    assert torch.equal(model.normalize(model.encode_images(pixels())), theirs)


def test_decode_of_encode_equals_the_pipelines_vae_path(golden, tiny_folder) -> None:  # type: ignore[no-untyped-def]
    model, pipe, _, _, _ = golden
    x = pixels()
    theirs = model.vae.decode(model.vae.encode(x).latent_dist.mode()).sample
    ours = model.decode(model.normalize(model.encode_images(x)))
    assert torch.allclose(ours, theirs, atol=2e-5)


def test_latents_are_the_mode_and_do_not_depend_on_the_random_state(tiny) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    first = tiny.encode_images(pixels())
    torch.manual_seed(1)
    assert torch.equal(first, tiny.encode_images(pixels()))


# -- each ingredient broken once: the comparisons above must see it ------------------------------
def reference_velocity(tiny):  # type: ignore[no-untyped-def]
    noisy = torch.randn(1, 128, 12, 8, generator=torch.Generator().manual_seed(2))
    rows = tiny.encode_prompts(PROMPTS[:1])
    _, _, velocity = our_call(tiny, noisy, torch.tensor([0.7]), rows)
    return noisy, rows, velocity


def test_the_wrong_text_layers_change_the_embeddings(tiny, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    right = tiny.encode_prompts(PROMPTS[:1])[0]
    monkeypatch.setattr(tiny, "text_layers", (9, 18, 26))
    assert not torch.equal(tiny.encode_prompts(PROMPTS[:1])[0], right)


def test_no_chat_template_changes_the_embeddings(tiny, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    right = tiny.encode_prompts(PROMPTS[:1])[0]
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    monkeypatch.setattr(tiny._tokenizer, "chat_template", template)
    assert not torch.equal(tiny.encode_prompts(PROMPTS[:1])[0], right)


def test_ids_in_bf16_change_the_velocity_beyond_256_positions(tiny, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    noisy = torch.randn(1, 128, 2, 300, generator=torch.Generator().manual_seed(2))
    rows = tiny.encode_prompts(PROMPTS[:1])
    _, _, right = our_call(tiny, noisy, torch.tensor([0.7]), rows)
    exact = flux2_klein.Flux2KleinPipeline._prepare_latent_ids
    monkeypatch.setattr(
        flux2_klein.Flux2KleinPipeline, "_prepare_latent_ids", staticmethod(lambda x: exact(x).to(torch.bfloat16))
    )
    _, _, wrong = our_call(tiny, noisy, torch.tensor([0.7]), rows)
    assert not torch.allclose(wrong, right)


def test_skipping_the_batch_norm_changes_the_latents(tiny, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    raw = tiny.encode_images(pixels(1))
    right = tiny.normalize(raw)
    monkeypatch.setattr(tiny, "_bn", lambda: (torch.zeros(1), torch.ones(1)))
    assert not torch.allclose(tiny.normalize(raw), right, atol=0.05)


def test_another_shift_changes_the_noise_levels(tiny, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    right = tiny.inference_sigmas(256, STEPS)
    monkeypatch.setattr(flux2_klein, "compute_empirical_mu", lambda tokens, steps: 1.15)
    assert not torch.allclose(tiny.inference_sigmas(256, STEPS), right, atol=1e-2)


def test_pads_are_read_so_trimmed_text_is_refused(tiny) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.errors import UserError

    noisy, rows, right = reference_velocity(tiny)
    padded = rows[0].clone()
    padded[-10:] = 0  # a trimmed embedding padded back with zeros
    _, _, wrong = our_call(tiny, noisy, torch.tensor([0.7]), [padded])
    assert not torch.allclose(wrong, right)
    with pytest.raises(UserError, match="max_sequence_length"):
        tiny.collate_text([rows[0][:-10]])


def test_velocity_is_noise_minus_clean_by_the_samplers_sign() -> None:
    """With the exact velocity of one known picture, our Euler sampler ends at that picture."""
    clean, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    sigmas = torch.linspace(1, 0, 5)
    end = flow.integrate(lambda noisy, sigma: flow.velocity_target(clean, noise), noise, sigmas)
    assert torch.allclose(end, clean, atol=1e-6)
    assert torch.allclose(flow.interpolate(clean, noise, torch.tensor([1.0])), noise)


# -- real shapes on `meta` -----------------------------------------------------------------------
KLEIN_9B = {
    "in_channels": 128, "num_layers": 8, "num_single_layers": 24, "attention_head_dim": 128,
    "num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False,
}  # fmt: skip
README_TARGETS = {
    "to_k,to_q,to_v,to_out.0": 8 * 4,
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out": 8 * 8,
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,linear_in,linear_out,to_qkv_mlp_proj,attn.to_out":
        8 * 12 + 24 * 2,
    "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0,attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,attn.to_add_out,"
    "ff.linear_in,ff.linear_out,ff_context.linear_in,ff_context.linear_out,attn.to_qkv_mlp_proj,attn.to_out":
        8 * 12 + 24 * 2,
}  # fmt: skip


def klein_9b_on_meta() -> torch.nn.Module:
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        return Flux2Transformer2DModel(**KLEIN_9B)


def test_the_9b_config_has_9078_58_million_parameters() -> None:
    count = sum(p.numel() for p in klein_9b_on_meta().parameters())
    assert round(count / 1e6, 2) == 9078.58


@pytest.mark.parametrize(("targets", "layers"), README_TARGETS.items(), ids=["minimal", "standard", "full", "explicit"])
def test_the_readmes_lora_targets_resolve_to_the_layers_that_peft_creates(targets: str, layers: int) -> None:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    from OpenSciDraw.weights.trainable import resolve_lora_layers

    transformer = klein_9b_on_meta()
    names = resolve_lora_layers(transformer, targets)
    assert len(names) == layers
    with torch.device("meta"):
        transformer.add_adapter(LoraConfig(r=128, lora_alpha=128, target_modules=names))
    made = [name for name, module in transformer.named_modules() if isinstance(module, LoraLayer)]
    assert made == names
    trained = sum(p.numel() for name, p in transformer.named_parameters() if "lora_" in name)
    shapes = {n: m for n, m in klein_9b_on_meta().named_modules() if n in set(names)}
    assert trained == sum(128 * (m.in_features + m.out_features) for m in shapes.values())


def test_a_target_that_matches_nothing_names_the_close_ones() -> None:
    from OpenSciDraw.errors import UserError
    from OpenSciDraw.weights.trainable import resolve_lora_layers

    with pytest.raises(UserError, match="to_kk.*Did you mean.*to_k"):
        resolve_lora_layers(klein_9b_on_meta(), "to_kk")


def test_a_gated_repository_says_how_to_log_in() -> None:
    from OpenSciDraw.errors import UserError
    from OpenSciDraw.models.source import ModelSource, load_component

    class Gated:
        @staticmethod
        def from_pretrained(*args: object, **kwargs: object) -> None:
            # what diffusers and transformers raise for a gated repository
            raise OSError("You are trying to access a gated repo. 401 Client Error.")

    with pytest.raises(UserError, match="hf auth login"):
        load_component(Gated, ModelSource("black-forest-labs/FLUX.2-klein-base-9B", token="hf_secret"), "vae")
    assert "hf_secret" not in repr(ModelSource("a/b", token="hf_secret"))


def test_a_distilled_model_is_refused_by_its_mark(tiny_folder, store_config, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """klein's distilled models have no guidance embedding either: only model_index.json says what they are."""
    folder = tmp_path / "distilled"
    shutil.copytree(tiny_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    config = Config.model_validate({**store_config, "pretrained_model_name_or_path": str(folder)})
    model = build_model(config)
    for refusing in (model.transformer_config, model.load_transformer, lambda: encode.main(config)):
        with pytest.raises(UserError, match="is distilled .is_distilled in its model_index.json.*FLUX.2-klein-base-4B"):
            refusing()
    (folder / "model_index.json").write_text(json.dumps(index | {"is_distilled": False}))
    assert model.transformer_config()
