"""The VAE and the text encoder train by the same loop, and what it saves is what diffusers and transformers load."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from OpenSciDraw.config import Config
from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.figures.fitting import to_model_range
from OpenSciDraw.flow import keyed_generator
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.models.flux2_klein_parts import Flux2KleinText, Flux2KleinVAE
from OpenSciDraw.models.source import ModelSource
from OpenSciDraw.train_iteration_funcs.flow_matching import Place
from OpenSciDraw.train_iteration_funcs.pretraining import (
    caption_language_model_loss,
    number_names,
    vae_decoder_reconstruction_loss,
)
from OpenSciDraw.training.run import Training
from train_OpenSciDraw_loop import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
START = "embedded:flux2_klein_tiny_start"
VALIDATIONS = {
    "Flux2KleinVAE": "vae_reconstruction_validation_func", "Flux2KleinText": "caption_language_model_validation_func",
}  # fmt: skip


def part(folder: Path, name: str, objective: str, **changes: object) -> Config:
    values = {
        "model_type": name, "pretrained_model_name_or_path": START, "max_sequence_length": 84, "use_lora": False,
        "train_iteration_func_name": objective, "validation_func_name": VALIDATIONS[name],
        "dataset": {"type": "FigureDataset", "figures": "drawn:16:style=small", "resolution": 128},
        "train_batch_size": 4, "max_train_steps": 6, "learning_rate": 2e-3, "lr_warmup_steps": 0, "mixed_precision": "no",
        "upcast_before_saving": True, "held_out_examples": 0, "validation_steps": 6, "logging_steps": 1,
        "checkpointing_steps": 6, "use_ema": True, "ema_steps": 1, "ema_decay": 0.5, "dataloader_num_workers": 0,
        "gradient_checkpointing": False, "report_to": "none", "model_output_dir": str(folder), **changes,
    }  # fmt: skip
    return Config.model_validate(values)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_vae_learns_to_rebuild_figures_and_loads_as_a_diffusers_vae(tmp_path: Path) -> None:
    training = Training(part(tmp_path, "Flux2KleinVAE", "vae_reconstruction"))
    assert train(training) == 0
    psnr = [line["psnr"] for line in metrics(tmp_path) if "psnr" in line]
    assert len(psnr) == 2 and psnr[1] > psnr[0] + 1
    assert (tmp_path / "validation_images" / "step_000006" / "grid.png").exists()
    vae = AutoencoderKLFlux2.from_pretrained(tmp_path / "transformer")
    trained = training.model.transformer.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in vae.state_dict().items())
    assert (tmp_path / "ema" / "transformer" / "config.json").exists()


def test_the_decoder_learns_alone_and_latents_keep_their_meaning(tmp_path: Path, fresh_accelerate: Any) -> None:
    """It starts from a run that trained all of the VAE; to the bit, nothing before the decoder is another afterwards."""
    first, second = tmp_path / "vae", tmp_path / "decoder"
    assert train(Training(part(first, "Flux2KleinVAE", "vae_reconstruction"))) == 0
    fresh_accelerate()
    changes = {"pretrained_full_ckpt_path": str(first), "adam_weight_decay": 0.1}
    assert train(Training(part(second, "Flux2KleinVAE", "vae_decoder_reconstruction", **changes))) == 0
    before, after = (load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors") for folder in (first, second))
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert {name for name in before if name.startswith(("encoder.", "quant_conv."))} <= same
    assert not {name for name in before if name.startswith("decoder.") and name.endswith(".weight")} & same
    psnr = [line["psnr"] for line in metrics(second) if "psnr" in line]
    assert psnr[1] > psnr[0]


def test_the_decoders_loss_is_the_vaes_with_strokes_weighing_more_and_no_divergence() -> None:
    model = Flux2KleinVAE(ModelSource(START), 84, torch.float32)
    model.load_transformer()
    figures = [np.asarray(draw_figure(5, index, 128, style="small").image) for index in range(2)]
    x = to_model_range(torch.from_numpy(np.stack(figures)).permute(0, 3, 1, 2))
    batch = replace(Batch(["a", "b"], ["", ""], None, None, None, []), pixels=x)
    config = part(Path("unused"), "Flux2KleinVAE", "vae_decoder_reconstruction")
    found = vae_decoder_reconstruction_loss(model, batch, Place(0, 0, 0, 1), config, torch.zeros(1))
    with torch.no_grad():
        posterior = model.transformer.encode(x).latent_dist
        drawn = torch.randn(posterior.mean.shape, generator=keyed_generator("posterior", 0, 0, 0))
        e = (model.transformer.decode(posterior.mean + posterior.std * drawn).sample - x).double().numpy()
    pixels, by_hand = x.double().numpy(), []
    for error, picture in zip(e, pixels, strict=True):
        padded = np.pad(picture, ((0, 0), (2, 2), (2, 2)), constant_values=np.nan)
        around = np.nanmean(np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2)), axis=(3, 4))
        strokes = np.abs(picture - around).max(0)
        red, green, blue = error.reshape(3, 32, 4, 32, 4).mean((2, 4))
        colour = (np.abs(red - green).mean() + np.abs(blue - (red + green) / 2).mean()) / 2
        by_hand.append(np.abs(error).mean() + 8 * (error**2).mean() + 4 * colour + 40 * (strokes * error**2).mean())
    np.testing.assert_allclose(found.per_sample.numpy(), by_hand, rtol=1e-4)


def test_the_text_encoder_learns_captions_and_loads_as_a_transformers_model(tmp_path: Path) -> None:
    training = Training(part(tmp_path, "Flux2KleinText", "caption_language_model"))
    assert train(training) == 0
    loss = [line["unseen_loss"] for line in metrics(tmp_path) if "unseen_loss" in line]
    assert loss[1] < loss[0] - 0.5
    loaded = Qwen3ForCausalLM(Qwen3Config.from_pretrained(tmp_path / "transformer"))
    file = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert loaded.load_state_dict(file).missing_keys == []
    assert all(torch.equal(file[name], value) for name, value in training.model.transformer.state_dict().items())


def test_the_language_model_loss_is_that_of_transformers_without_pads() -> None:
    model = Flux2KleinText(ModelSource(START), 84, torch.float32)
    model.load_text_encoder()
    model.load_transformer()
    captions = [draw_figure(5, index, 128, style="small").caption for index in range(3)]
    batch = Batch(["a", "b", "c"], captions, None, None, None, [])
    config = part(Path("unused"), "Flux2KleinText", "caption_language_model")
    ours = caption_language_model_loss(model, batch, Place(0, 0, 0, 1), config, torch.zeros(1))
    chance = random.Random("names:0:0:0")
    numbered = [number_names(caption, chance) for caption in captions]
    assert numbered != captions
    ids, mask = model.tokenize(numbered)
    theirs = model.transformer(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    torch.testing.assert_close(ours.loss, theirs)


def test_no_caption_of_the_small_styles_is_cut_at_84_tokens() -> None:
    model = Flux2KleinText(ModelSource(START), 84, torch.float32)
    model.load_text_encoder()
    for style in ("small", "house"):
        model.tokenize([draw_figure(6, index, 128, style=style).caption for index in range(400)])
    assert model.truncated_prompts == 0


def test_the_start_is_the_same_on_every_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_file(embedded_folder("flux2_klein_tiny_start") / "vae" / "diffusion_pytorch_model.safetensors")
    torch.rand(7)  # the state of the caller's generator does not matter
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    second = load_file(embedded_folder("flux2_klein_tiny_start") / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_names_said_again_carry_the_number_of_their_first_mention() -> None:
    caption = "Top: a red box labelled 'G'. Bottom: 'Sum' and 'A'. Arrows point from 'A' to 'Sum' and 'G' to 'A'."
    forms = {number_names(caption, random.Random(seed)) for seed in range(200)}
    assert {caption, caption.replace("from 'A' to 'Sum' and 'G' to 'A'", "from 'A3' to 'Sum2' and 'G1' to 'A3'")} <= forms
    assert len(forms) == 2**4  # each of the four on its own
    assert all(form.startswith(caption[:53]) for form in forms)
