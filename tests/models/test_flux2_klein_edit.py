"""Golden tests: with references, our klein is what diffusers' Flux2KleinPipeline computes with `image=`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_model
from diffusers import Flux2KleinPipeline
from PIL import Image
from test_flux2_klein import GUIDANCE, HEIGHT, LENGTH, PROMPTS, STEPS, WIDTH, Recorder, unpack

from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.figures.fitting import to_model_range

SIZES = [(64, 96), (128, 64)]  # width and height of the references: the second is of another size than the picture


def references() -> list[Image.Image]:
    drawn = [draw_figure(3, at, width=2 * width, height=2 * height).image for at, (width, height) in enumerate(SIZES)]
    return [picture.resize(size) for picture, size in zip(drawn, SIZES, strict=True)]


def pixels(picture: Image.Image) -> torch.Tensor:
    return to_model_range(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1))[None]


def normalized(model) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    given = [pixels(picture).expand(len(PROMPTS), -1, -1, -1) for picture in references()]
    return model.normalize_references(given, are_pixels=True)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def golden(request, tiny_folder):  # type: ignore[no-untyped-def]
    dtype = request.param
    pipe = Flux2KleinPipeline.from_pretrained(tiny_folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    recorder = Recorder(pipe.transformer)
    noise = torch.randn((len(PROMPTS), 128, HEIGHT // 8, WIDTH // 8), generator=torch.Generator().manual_seed(0)).to(dtype)
    pictures = pipe(
        image=references(), prompt=PROMPTS, width=WIDTH, height=HEIGHT, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        max_sequence_length=LENGTH, latents=noise, output_type="np",
    ).images  # fmt: skip
    return make_model(dtype, LENGTH), recorder, pictures, noise


def ours(model, theirs, rows):  # type: ignore[no-untyped-def]
    tokens = HEIGHT // 8 * WIDTH // 8
    clean = normalized(model)
    recorder = Recorder(model.transformer)
    with torch.no_grad():
        velocity = model.velocity(unpack(theirs["hidden_states"][:, :tokens]), theirs["timestep"], model.collate_text(rows), clean)
    return recorder.inputs[-1], velocity, tokens


def test_every_input_with_references_equals_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, recorder, _, _ = golden
    rows = model.encode_prompts(PROMPTS)
    for step in range(STEPS):
        theirs = recorder.inputs[2 * step]
        mine, _, _ = ours(model, theirs, rows)
        for name in ("encoder_hidden_states", "timestep", "img_ids", "txt_ids"):
            assert torch.equal(mine[name], theirs[name]), name
        if model.weight_dtype == torch.float32:
            assert torch.equal(mine["hidden_states"], theirs["hidden_states"])
        else:  # the pipeline encodes and normalises references in bf16, we in fp32, as all that is trained on
            torch.testing.assert_close(mine["hidden_states"], theirs["hidden_states"], rtol=2**-6, atol=2**-4)


def test_the_velocity_is_that_of_the_picture_alone_and_equals_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, recorder, _, _ = golden
    for call, (theirs, out) in enumerate(zip(recorder.inputs, recorder.outputs, strict=True)):
        rows = model.encode_prompts(PROMPTS if call % 2 == 0 else ["", ""])
        _, velocity, tokens = ours(model, theirs, rows)
        expected = unpack(out[:, :tokens])
        if model.weight_dtype == torch.float32:
            assert torch.equal(velocity, expected), f"call {call}"
        else:
            torch.testing.assert_close(velocity, expected, rtol=0.05, atol=0.1)


def test_references_change_the_velocity_and_their_order_counts(golden) -> None:  # type: ignore[no-untyped-def]
    model, recorder, _, _ = golden
    theirs, rows = recorder.inputs[0], model.encode_prompts(PROMPTS)
    tokens = HEIGHT // 8 * WIDTH // 8
    noisy, text = unpack(theirs["hidden_states"][:, :tokens]), model.collate_text(rows)
    clean = normalized(model)
    with torch.no_grad():
        without, both, turned = (model.velocity(noisy, theirs["timestep"], text, given) for given in ((), clean, clean[::-1]))
    assert not torch.equal(without, both) and not torch.equal(both, turned)


def test_sample_with_images_gives_the_pipelines_picture(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, _, _ = golden
    pipe = model.pipeline(model.transformer)
    rows, empty = model.encode_prompts(PROMPTS[:1]), model.encode_prompts([""])[0]
    options = {"width": WIDTH, "height": HEIGHT, "steps": 2, "guidance": GUIDANCE, "seeds": [1]}
    drawn = model.sample(pipe, rows, empty, **options, images=references())[0]
    generator = [torch.Generator("cpu").manual_seed(1)]
    given, negative = rows[0][None].to(model.weight_dtype), empty[None].to(model.weight_dtype)
    direct = pipe(
        image=references(), prompt_embeds=given, negative_prompt_embeds=negative,
        width=WIDTH, height=HEIGHT, num_inference_steps=2, guidance_scale=GUIDANCE, generator=generator,
    ).images[0]  # fmt: skip
    plain = model.sample(pipe, rows, empty, **options)[0]
    assert drawn.tobytes() == direct.tobytes() != plain.tobytes()
