"""Golden tests: our Qwen-Image is what diffusers' QwenImagePipeline computes, ingredient by ingredient.

The pipeline below is diffusers' own, loaded by `from_pretrained` from the embedded folder with its full
text encoder; a hook on its transformer records what it really feeds and gets. Each ingredient is also
broken once on purpose, and the comparison must notice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BASE, merged, train_and_resume
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from PIL import Image
from safetensors import safe_open
from torch.nn import functional

from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.sample import sample_normalized
from OpenSciDraw.models import qwen_image
from OpenSciDraw.models.base import FigureModel, TextBatch
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.models.qwen_image import QwenImage
from OpenSciDraw.models.source import ModelSource
from OpenSciDraw.weights.trainable import resolve_lora_layers

PROMPTS = ["A flowchart with a box labelled 'Encoder'.", "The plot shows the loss over 10 epochs in blue."]
LENGTH, STEPS, GUIDANCE = 64, 4, 3.0
WIDTH, HEIGHT = 64, 96
SOURCE = "embedded:qwen_image_tiny"


class Recorder:
    """What the pipeline's transformer was called with, and what it answered, call by call."""

    def __init__(self, transformer: torch.nn.Module):
        self.inputs: list[dict] = []
        self.outputs: list[torch.Tensor] = []
        transformer.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, output) -> None:  # type: ignore[no-untyped-def]
        self.inputs.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()})
        self.outputs.append(output[0].clone())


def make_qwen(dtype: torch.dtype = torch.float32, length: int = LENGTH) -> QwenImage:
    model = QwenImage(ModelSource(SOURCE), length, dtype)
    model.load_vae()
    model.load_text_encoder()
    model.load_transformer()
    return model


@pytest.fixture(scope="module")
def qwen_folder() -> Path:
    return embedded_folder("qwen_image_tiny")


@pytest.fixture(scope="module")
def qwen() -> QwenImage:
    return make_qwen()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def golden(request, qwen_folder):  # type: ignore[no-untyped-def]
    """(our model, the pipeline, its recorded calls, its pictures, its last latents, the noise that both start from)."""
    pipe = QwenImagePipeline.from_pretrained(qwen_folder, torch_dtype=request.param)
    pipe.set_progress_bar_config(disable=True)
    recorder, last = Recorder(pipe.transformer), {}
    noise = torch.randn(2, 64, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0)).to(request.param)
    pictures = pipe(
        prompt=PROMPTS, negative_prompt=["", ""], width=WIDTH, height=HEIGHT, num_inference_steps=STEPS,
        true_cfg_scale=GUIDANCE, max_sequence_length=LENGTH, latents=noise.flatten(2).transpose(1, 2), output_type="np",
        callback_on_step_end=lambda pipe, step, t, values: last.update(values) or {},
    ).images  # fmt: skip
    return make_qwen(request.param), pipe, recorder, pictures, unpack(last["latents"]), noise


def our_call(model, noisy, sigma, text):  # type: ignore[no-untyped-def]
    """Inputs and output of the transformer in our velocity."""
    recorder = Recorder(model.transformer)
    with torch.no_grad():
        velocity = model.velocity(noisy, sigma, text)
    return recorder.inputs[-1], velocity


def unpack(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, HEIGHT // 8, WIDTH // 8)


def collated(model: QwenImage, prompts: list[str]) -> TextBatch:
    return model.collate_text(model.encode_prompts(prompts))


# -- ours is the pipeline's ----------------------------------------------------------------------
def test_prompt_embeddings_and_mask_equal_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, recorder, _, _, _ = golden
    text, theirs = collated(model, PROMPTS), recorder.inputs[0]
    assert torch.equal(text.embeds, theirs["encoder_hidden_states"])
    assert text.mask is not None and torch.equal(text.mask, theirs["encoder_hidden_states_mask"].bool())
    empty, theirs = collated(model, ["", ""]), recorder.inputs[1]  # the branch without a prompt: every row is full
    assert torch.equal(empty.embeds, theirs["encoder_hidden_states"])
    assert empty.mask is None and theirs["encoder_hidden_states_mask"] is None


def test_a_long_prompt_is_cut_where_the_pipeline_cuts_it_and_counted(golden, caplog) -> None:  # type: ignore[no-untyped-def]
    model, pipe, _, _, _, _ = golden
    long = "The figure shows a box. " * 30
    theirs, mask = pipe.encode_prompt(long, max_sequence_length=LENGTH)
    before = model.truncated_prompts
    ours = model.encode_prompts([long, ""])
    assert [len(row) for row in ours] == [LENGTH, 5] and mask is None  # 5: the template's tail
    tolerance = 1e-5 if model.weight_dtype == torch.float32 else 0.05
    assert torch.allclose(ours[0], theirs[0], atol=tolerance)
    assert model.truncated_prompts == before + 1


def test_every_input_of_the_denoising_step_equals_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, recorder, _, _, _ = golden
    text = collated(model, PROMPTS)
    for step in range(STEPS):
        theirs = recorder.inputs[2 * step]
        ours, _ = our_call(model, unpack(theirs["hidden_states"]), theirs["timestep"], text)
        for name in ("hidden_states", "encoder_hidden_states", "timestep"):
            assert torch.equal(ours[name], theirs[name]), name
        assert torch.equal(ours["encoder_hidden_states_mask"], theirs["encoder_hidden_states_mask"].bool())
        assert ours["img_shapes"] == theirs["img_shapes"] == [[(1, HEIGHT // 8, WIDTH // 8)]] * 2
        assert theirs["guidance"] is None and not theirs["attention_kwargs"]
        assert ours.keys() == theirs.keys() - {"guidance", "attention_kwargs"}


def test_velocity_equals_the_pipelines_at_every_step_with_and_without_prompt(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, recorder, _, _, _ = golden
    texts = collated(model, PROMPTS), collated(model, ["", ""])
    for call, (theirs, out) in enumerate(zip(recorder.inputs, recorder.outputs, strict=True)):
        _, velocity = our_call(model, unpack(theirs["hidden_states"]), theirs["timestep"], texts[call % 2])
        assert torch.equal(velocity, unpack(out)), f"call {call}"


def test_noise_levels_equal_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, recorder, _, _, noise = golden
    theirs = torch.stack([recorder.inputs[2 * step]["timestep"][0] for step in range(STEPS)])
    ours = model.inference_sigmas(noise.shape[-2] * noise.shape[-1], STEPS)
    tolerance = 1e-6 if theirs.dtype == torch.float32 else 2**-8
    assert torch.allclose(ours[:-1].float(), theirs.float(), rtol=tolerance) and ours[-1] == 0
    assert ours[-2] == pytest.approx(0.02, abs=1e-6)  # shift_terminal of the released scheduler


def test_a_picture_sampled_by_our_path_with_guidance_and_its_norm_equals_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, _, pictures, last, noise = golden
    latents = sample_normalized(model, collated(model, PROMPTS), collated(model, ["", ""]), noise, STEPS, GUIDANCE)
    exact = model.weight_dtype == torch.float32
    assert torch.allclose(latents, last, atol=2e-5 if exact else 0.05)
    ours = ((model.decode(latents) / 2 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - pictures).max() <= (2e-5 if exact else 0.05)  # the pipeline decodes in bf16, we in fp32


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_images_of_the_run_equal_the_pipelines_own(golden, guidance: float) -> None:  # type: ignore[no-untyped-def]
    """FigureModel.sample (validation, `scienceflow sample`) is the pipeline with its own noise and shift."""
    model, pipe, _, _, _, _ = golden
    theirs = pipe(
        prompt=PROMPTS, negative_prompt=["", ""] if guidance > 1 else None, width=WIDTH, height=HEIGHT,
        num_inference_steps=STEPS, true_cfg_scale=guidance, max_sequence_length=LENGTH,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)],
    ).images  # fmt: skip
    ours = model.sample(
        model.pipeline(model.transformer), model.encode_prompts(PROMPTS), model.encode_prompts([""])[0],
        width=WIDTH, height=HEIGHT, steps=STEPS, guidance=guidance, seeds=[5, 6],
    )  # fmt: skip
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs, strict=True))


def test_a_prompt_longer_than_the_pipelines_default_is_not_cut_when_sampled(qwen_folder) -> None:  # type: ignore[no-untyped-def]
    model = make_qwen(length=700)
    row = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    recorder = Recorder(model.transformer)
    model.sample(model.pipeline(model.transformer), [row], row[:5], width=64, height=64, steps=2, guidance=1.0, seeds=[0])
    assert recorder.inputs[0]["encoder_hidden_states"].shape[1] == 600


def pixels(count: int = 2) -> torch.Tensor:
    images = [draw_figure(seed=3, index=i, size=128).image.resize((WIDTH, HEIGHT), Image.LANCZOS) for i in range(count)]
    return torch.stack([torch.from_numpy(np.asarray(i).copy()).permute(2, 0, 1).float() / 127.5 - 1 for i in images])


def their_latents(model: QwenImage, pipe: QwenImagePipeline, x: torch.Tensor) -> torch.Tensor:
    """Clean tokens by the pipeline's arithmetic: its packing of what its decoding step undoes."""
    config = model.vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    latents = (model.vae.encode(x.unsqueeze(2)).latent_dist.mode() - mean) / std
    return unpack(pipe._pack_latents(latents, len(x), config.z_dim, HEIGHT // 4, WIDTH // 4))


def test_latents_equal_the_pipelines_image_path(golden) -> None:  # type: ignore[no-untyped-def]
    model, pipe, _, _, _, _ = golden
    raw = model.encode_images(pixels())
    assert raw.shape == (2, *model.latent_shape(HEIGHT, WIDTH)) == (2, 16, HEIGHT // 4, WIDTH // 4)
    theirs = their_latents(model, pipe, pixels())
    assert torch.equal(model.normalize(raw), theirs)
    tokens = theirs.flatten(2).transpose(1, 2)
    unpacked = pipe._unpack_latents(tokens, HEIGHT, WIDTH, pipe.vae_scale_factor)  # and back, by the pipeline
    mean, std = model._statistics()
    assert torch.allclose(unpacked.squeeze(2) * std + mean, raw, atol=1e-6)


def test_decode_of_encode_equals_the_vae_and_shows_the_figure(qwen) -> None:  # type: ignore[no-untyped-def]
    x = pixels()
    theirs = qwen.vae.decode(qwen.vae.encode(x.unsqueeze(2)).latent_dist.mode()).sample.squeeze(2)
    ours = qwen.decode(qwen.normalize(qwen.encode_images(x)))
    assert torch.allclose(ours, theirs, atol=2e-5)
    assert (ours - x).pow(2).mean().sqrt() < 0.3  # of a range of 2


def test_latents_are_the_mode_and_do_not_depend_on_the_random_state(qwen) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    first = qwen.encode_images(pixels())
    torch.manual_seed(1)
    assert torch.equal(first, qwen.encode_images(pixels()))


def test_the_templates_head_is_as_long_as_with_qwens_own_tokenizer(qwen) -> None:  # type: ignore[no-untyped-def]
    assert len(qwen._tokenizer(qwen_image.TEMPLATE.split("{}")[0])["input_ids"]) == qwen_image.DROPPED == 34


def test_the_template_and_what_is_dropped_are_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    pipe = golden[1]
    assert pipe.prompt_template_encode == qwen_image.TEMPLATE
    assert pipe.prompt_template_encode_start_idx == qwen_image.DROPPED


def test_neither_vision_tower_nor_vocabulary_projection_stays_in_memory(qwen) -> None:  # type: ignore[no-untyped-def]
    names = [name for name, _ in qwen.text_encoder.named_parameters()]
    assert names and not [name for name in names if "visual" in name or "lm_head" in name]


# -- pads ----------------------------------------------------------------------------------------
def velocity_of(model: FigureModel, text: TextBatch, channels: int = 64) -> torch.Tensor:
    noisy = torch.randn(len(text.embeds), channels, 12, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.velocity(noisy, torch.full((len(noisy),), 0.7), text)


def test_what_stands_in_pads_never_changes_qwens_output_while_kleins_depends_on_it(qwen, tiny) -> None:  # type: ignore[no-untyped-def]
    text = collated(qwen, PROMPTS)
    assert text.mask is not None and not text.mask.all()
    filled = text.embeds.masked_scatter(~text.mask[..., None], 50 * torch.randn(text.embeds.numel()))
    right = velocity_of(qwen, text)
    assert torch.equal(velocity_of(qwen, TextBatch(filled, text.mask)), right)
    assert not torch.allclose(velocity_of(qwen, TextBatch(filled)), right)  # the mask is what does it

    rows = torch.stack(tiny.encode_prompts(PROMPTS))  # klein's, padded to max_sequence_length
    changed = rows.clone()
    changed[:, -5:] = 0
    assert not torch.allclose(velocity_of(tiny, TextBatch(changed), 128), velocity_of(tiny, TextBatch(rows), 128))


def test_a_row_gives_the_same_alone_and_padded_in_a_batch(qwen) -> None:  # type: ignore[no-untyped-def]
    rows = qwen.encode_prompts(PROMPTS)
    assert len(rows[0]) < len(rows[1])
    alone, together = qwen.collate_text(rows[:1]), qwen.collate_text(rows)
    assert alone.mask is None and together.mask is not None
    assert torch.allclose(velocity_of(qwen, together)[:1], velocity_of(qwen, alone), atol=1e-5)


# -- each ingredient broken once: the comparisons above must see it ------------------------------
@pytest.mark.parametrize("what", ["template", "dropped", "norm"])
def test_another_text_path_changes_the_embeddings(qwen, monkeypatch, what: str) -> None:  # type: ignore[no-untyped-def]
    right = qwen.encode_prompts(PROMPTS[:1])[0]
    if what == "template":
        monkeypatch.setattr(qwen_image, "TEMPLATE", qwen_image.TEMPLATE.replace("background", "colour"))
    elif what == "dropped":
        monkeypatch.setattr(qwen_image, "DROPPED", 33)
    else:  # the state before the final norm is another one
        monkeypatch.setitem(qwen.text_encoder._modules, "norm", torch.nn.Identity())
    wrong = qwen.encode_prompts(PROMPTS[:1])[0]
    assert wrong.shape != right.shape or not torch.allclose(wrong, right, atol=1e-3)


@pytest.mark.parametrize("name", ["img_shapes", "timestep", "encoder_hidden_states_mask"])
def test_another_input_of_the_transformer_changes_the_velocity(qwen, monkeypatch, name: str) -> None:  # type: ignore[no-untyped-def]
    text = collated(qwen, PROMPTS)
    right = velocity_of(qwen, text)
    exact = qwen.transformer
    broken = {"img_shapes": [[(1, 8, 12)]] * 2, "timestep": torch.full((2,), 700.0), "encoder_hidden_states_mask": None}
    monkeypatch.setattr(qwen, "_transformer", lambda **kwargs: exact(**{**kwargs, name: broken[name]}))
    assert not torch.allclose(velocity_of(qwen, text), right)


def test_skipped_statistics_and_another_order_in_a_patch_change_the_latents(qwen, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    raw = qwen.encode_images(pixels(1))
    right = qwen.normalize(raw)

    def channels_last(x: torch.Tensor, side: int) -> torch.Tensor:
        patches = functional.unfold(x, side, stride=side).unflatten(1, (16, 4)).transpose(1, 2)
        return patches.flatten(1, 2).unflatten(2, (x.shape[2] // side, x.shape[3] // side))

    with monkeypatch.context() as patch:
        patch.setattr(qwen_image.F, "pixel_unshuffle", channels_last)
        assert qwen.normalize(raw).shape == right.shape and not torch.allclose(qwen.normalize(raw), right, atol=0.05)
    monkeypatch.setattr(qwen, "_statistics", lambda: (torch.zeros(1), torch.ones(1)))
    assert not torch.allclose(qwen.normalize(raw), right, atol=0.05)


@pytest.mark.parametrize("wrong", [{"max_shift": 1.15}, {"max_image_seq_len": 4096}, {"shift_terminal": None}])
def test_another_scheduler_changes_the_noise_levels(qwen, monkeypatch, wrong: dict) -> None:  # type: ignore[no-untyped-def]
    right = qwen.inference_sigmas(1024, STEPS)
    scheduler = type(qwen._scheduler()).from_config({**qwen._scheduler().config, **wrong})
    monkeypatch.setattr(qwen, "_scheduler", lambda: scheduler)
    assert not torch.allclose(qwen.inference_sigmas(1024, STEPS), right, atol=1e-3)


def test_guidance_without_the_norm_rescale_is_another_picture(qwen, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    texts = collated(qwen, PROMPTS), collated(qwen, ["", ""])
    noise = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    right = sample_normalized(qwen, *texts, noise, STEPS, GUIDANCE)
    monkeypatch.setattr(QwenImage, "guide", FigureModel.guide)
    assert not torch.allclose(sample_normalized(qwen, *texts, noise, STEPS, GUIDANCE), right, atol=1e-2)


# -- real shapes on `meta` -----------------------------------------------------------------------
RECOMMENDED = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.0.proj,img_mlp.net.2,txt_mlp.net.0.proj,txt_mlp.net.2"
)
TARGETS = {
    "to_k,to_q,to_v,to_out.0": 60 * 4,
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out": 60 * 8,
    RECOMMENDED: 60 * 12,
    RECOMMENDED + ",img_mod.1,txt_mod.1": 60 * 14,
}


def qwen_image_on_meta() -> torch.nn.Module:
    with torch.device("meta"):  # the class's defaults are the released model's
        return QwenImageTransformer2DModel(
            num_layers=60, num_attention_heads=24, attention_head_dim=128, joint_attention_dim=3584, in_channels=64,
            out_channels=16, patch_size=2,
        )  # fmt: skip


@pytest.fixture(scope="module")
def released() -> torch.nn.Module:
    return qwen_image_on_meta()


def test_the_released_config_has_20430_40_million_parameters(released) -> None:  # type: ignore[no-untyped-def]
    count = sum(p.numel() for p in released.parameters())
    assert round(count / 1e6, 2) == 20430.40


@pytest.mark.parametrize(("targets", "layers"), TARGETS.items(), ids=["minimal", "standard", "recommended", "all"])
def test_lora_targets_resolve_to_the_layers_that_peft_creates(targets: str, layers: int) -> None:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    transformer = qwen_image_on_meta()
    names = resolve_lora_layers(transformer, targets)
    assert len(names) == layers
    with torch.device("meta"):
        transformer.add_adapter(LoraConfig(r=128, lora_alpha=128, target_modules=names))
    made = [name for name, module in transformer.named_modules() if isinstance(module, LoraLayer)]
    assert made == names


@pytest.mark.parametrize("pattern", ["linear_in", "linear_out", "to_qkv_mlp_proj", "attn.to_out", "ff.linear_in"])
def test_kleins_own_targets_are_errors_that_name_qwens_close_ones(released, pattern: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=f"'{pattern}' matches no linear layer of QwenImageTransformer2DModel. Did you mean "):
        resolve_lora_layers(released, pattern)


@pytest.mark.parametrize("switch", ["guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"])
def test_a_transformer_of_a_sister_model_is_refused_before_it_is_read(qwen_folder, tmp_path, switch: str) -> None:  # type: ignore[no-untyped-def]
    import json

    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    config = json.loads((qwen_folder / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**config, switch: True}))
    model = QwenImage(ModelSource(str(tmp_path)), LENGTH, torch.float32)
    with pytest.raises(UserError, match=f"{switch} = True.*Qwen/Qwen-Image-2512"):
        model.load_transformer()


# -- the whole product on the embedded model -----------------------------------------------------
LONG = 256  # tokens: no caption is cut
PROMPT = "The figure illustrates a flowchart with a blue box labelled 'Encoder'."


@pytest.fixture(scope="module")
def trained(tmp_path_factory):  # type: ignore[no-untyped-def]
    """(values, run): 24 drawn figures encoded, three steps of LoRA with strong weights, step 3 trained again after a resume."""
    data, run = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    values = merged(
        BASE, model_type="QwenImage", pretrained_model_name_or_path=SOURCE, lora_layers=RECOMMENDED, learning_rate=5e-2,
        max_train_steps=3, checkpointing_steps=2, validation_prompts=[PROMPT], resolution_list=[[96, 64]],
        true_cfg_scale=2.0, validation_seed=7, max_sequence_length=LONG, num_inference_steps=4, model_output_dir=str(run),
        dataset={"type": "ArXiVParquetDatasetV2", "base_dir": str(data), "parquet_base_path": "store"},
        encode={"figures": "drawn:24", "resolution": 128, "samples_per_shard": 16, "num_workers": 0, "batch_size": 8},
    )  # fmt: skip
    return values, run, *train_and_resume(values, run)


def test_a_resumed_run_ends_with_the_same_weights(trained) -> None:  # type: ignore[no-untyped-def]
    _, _, first, again = trained
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert len(first) == 3 * 12 * 2


def test_stored_rows_are_trimmed_and_batches_of_them_train_with_a_mask(trained, qwen) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.config import Config
    from OpenSciDraw.datasets.arxiv_parquet import RowDataset
    from OpenSciDraw.datasets.batch import Sample
    from OpenSciDraw.registry import DATASETS

    config = Config.model_validate(trained[0])
    dataset: RowDataset = DATASETS.get(config.dataset.type)(**config.dataset_arguments())
    rows = [row.text for row in map(dataset.read, range(3)) if isinstance(row, Sample) and row.text is not None]
    assert len({len(row) for row in rows}) > 1 and max(map(len, rows)) < LONG
    text = qwen.collate_text(rows)
    assert text.mask is not None and text.mask.sum(1).tolist() == [len(row) for row in rows]


@pytest.mark.usefixtures("fresh_accelerate")
def test_older_data_with_a_frame_axis_and_masked_text_train_as_they_are(qwen, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Layout V2 as Qwen-Image's was written: latents (16, 1, h, w), text padded, with its mask."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from OpenSciDraw.config import Config
    from OpenSciDraw.training.run import Training
    from train_OpenSciDraw_loop import train

    text, rows = qwen.encode_prompts(PROMPTS[:1])[0].numpy().astype(np.float16), []
    for n in range(8):
        mask = np.arange(len(text)) < len(text) - n
        latents = np.random.default_rng(n).standard_normal((16, 1, 32, 32)).astype(np.float32)
        np.savez(tmp_path / f"{n}.npz", latents=latents, text_embeds=text, text_mask=mask.astype(np.int8))
        shapes = {"latent_shape": [16, 1, 32, 32], "text_embeds_shape": list(text.shape)}
        sizes = {"bucket_w": 128, "bucket_h": 128, "aspect_ratio": 1.0}
        rows.append({"caption": "a figure", "cache_path": f"{n}.npz", "image_path": f"{n}.png", **shapes, **sizes})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    values = merged(
        BASE, model_type="QwenImage", pretrained_model_name_or_path=SOURCE, lora_layers=RECOMMENDED, max_train_steps=2,
        dataset={"type": "ArXiVParquetDatasetV2", "base_dir": str(tmp_path), "parquet_base_path": ""},
        held_out_examples=0, model_output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    training = Training(Config.model_validate(values))
    batch = training.dataset.batch([0, 3])
    assert batch.latents is not None and batch.latents.shape == (2, 16, 32, 32) and batch.text is not None
    assert [len(row) for row in batch.text] == [len(text), len(text) - 3]
    assert train(training) == 0


def draw(folder: Path, lora: Path | None) -> np.ndarray:
    """The prompt by diffusers alone: from_pretrained, load_lora_weights, the pipeline's call."""
    pipe = QwenImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    image = pipe(
        prompt=PROMPT, negative_prompt="", width=96, height=64, num_inference_steps=4, true_cfg_scale=2.0,
        max_sequence_length=LONG, generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]  # fmt: skip
    return np.asarray(image).astype(int)


def shown(run: Path, step: int) -> np.ndarray:
    return np.asarray(Image.open(run / "validation_images" / f"step_{step:06d}" / "00.png")).astype(int)


@pytest.mark.parametrize("kind", ["diffusers", "comfyui"])
def test_the_exported_lora_gives_the_picture_that_training_showed(kind, trained, qwen_folder, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.inference.export import export

    run = trained[1]
    (file,) = export(str(run), tmp_path, (kind,), "fp32")
    picture, base = draw(qwen_folder, file), draw(qwen_folder, None)
    assert np.abs(base - shown(run, 0)).max() <= 1
    assert np.abs(picture - shown(run, 3)).max() <= 1
    assert np.abs(picture - base).max() > 16  # the adapter matters
    with safe_open(file, "pt") as handle:
        keys = set(handle.keys())
        if kind == "comfyui":
            name = "diffusion_model.transformer_blocks.0.img_mlp.net.0.proj"
            assert {f"{name}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")} <= keys
            assert handle.get_tensor(f"{name}.alpha").item() == 8


def test_sample_draws_what_validation_showed(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.cli import main

    run = trained[1]
    assert main(["sample", str(run), "--prompt", PROMPT, "--seed", "7", "--num", "1", "--out", str(tmp_path)]) == 0
    drawn = np.asarray(Image.open(tmp_path / "00_seed7.png")).astype(int)
    assert np.abs(drawn - shown(run, 3)).max() <= 1


def test_lengths_by_which_captions_are_batched_are_those_that_decide_the_padding(qwen: QwenImage) -> None:
    from OpenSciDraw.models.qwen_image import DROPPED

    prompts = ["A box.", "A long sentence about an arrow from one box to another box. " * 3, ""]
    lengths = qwen.prompt_lengths(prompts)
    assert [length - DROPPED for length in lengths] == [len(row) for row in qwen.encode_prompts(prompts)]
    assert qwen.prompt_lengths(["word " * 5000]) == [DROPPED + qwen.max_sequence_length]


def test_captions_batched_by_length_lie_in_their_order_and_are_those_of_one_row(qwen: QwenImage) -> None:
    from tqdm import tqdm

    from OpenSciDraw.encode.batches import BatchSizes
    from OpenSciDraw.encode.shards import caption_batches

    captions = [f"{number}: " + "a box and an arrow, " * (number * 5 % 7) for number in range(11)]
    encoded = list(caption_batches(qwen, captions, BatchSizes(4, qwen), tqdm(disable=True)))
    assert [caption for caption, _, _ in encoded] == captions
    for caption, copies, place in encoded:
        alone = qwen.encode_prompts([caption])[0]
        torch.testing.assert_close(copies.wait()[place], alone, rtol=1e-4, atol=1e-4)
