"""Golden tests: our Qwen-Image-2.1 is what diffusers' QwenImage21Pipeline computes, drawing and editing, ingredient by ingredient.

The pipeline below is diffusers' own with the whole text encoder. Its processor is Qwen3-VL's class without the part for films,
which needs torchvision. A hook on the transformer records what the pipeline really feeds and gets.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BASE, merged
from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel
from PIL import Image
from safetensors.torch import load_file
from test_qwen_image import Recorder
from transformers import Qwen3VLForConditionalGeneration
from transformers.image_utils import SizeDict

from OpenSciDraw.config import Config
from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.fitting import pixels_of, to_model_range
from OpenSciDraw.inference.sample import sample_normalized
from OpenSciDraw.models import qwen_image_21
from OpenSciDraw.models.base import FigureModel, TextBatch, build_model
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.models.qwen_image_21 import QwenImage21
from OpenSciDraw.models.source import ModelSource, load_component
from OpenSciDraw.weights.trainable import resolve_lora_layers

SOURCE = "embedded:qwen_image_21_tiny"
PROMPTS = ["Make 'CNN' red.", "The plot shows the loss over 10 epochs in blue."]
LENGTH, STEPS, GUIDANCE, CHANNELS = 64, 4, 3.0, 16
WIDTH, HEIGHT = 64, 96
EDITED = (96, 64)  # width and height of the two pictures that are edited: others than the result's


def make_model(dtype: torch.dtype = torch.float32) -> QwenImage21:
    model = QwenImage21(ModelSource(SOURCE), LENGTH, dtype)
    model.load_vae()
    model.load_text_encoder()
    model.load_transformer()
    return model


def make_pipeline(model: QwenImage21) -> QwenImage21Pipeline:
    encoder = load_component(Qwen3VLForConditionalGeneration, model.source, "text_encoder", dtype=model.weight_dtype)
    transformer = load_component(QwenImage21Transformer2DModel, model.source, "transformer", torch_dtype=model.weight_dtype)
    pipe = QwenImage21Pipeline(model._scheduler(), model.pipeline_vae(), encoder.eval(), model._processor, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def model21() -> QwenImage21:
    return make_model()


def sources() -> list[Image.Image]:
    return [draw_figure(seed=3, index=at, size=128).image.resize(EDITED, Image.LANCZOS) for at in range(2)]


def pixels() -> list[torch.Tensor]:
    return [to_model_range(pixels_of(picture)) for picture in sources()]


def noise(dtype: torch.dtype, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, HEIGHT // 16, WIDTH // 16, generator=torch.Generator().manual_seed(0)).to(dtype)


def unpack(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, -HEIGHT * WIDTH // 256 :].transpose(1, 2).reshape(len(tokens), -1, HEIGHT // 16, WIDTH // 16)


def texts(model: QwenImage21, edits: bool) -> tuple[TextBatch, TextBatch]:
    """With the prompts, and with empty ones; of edits one: the pipeline encodes a batch at once, which changes the last bits."""

    def of(prompts: list[str]) -> TextBatch:
        rows = model.encode_instructions(prompts[:1], [pixels()]) if edits else model.encode_prompts(prompts)
        return model.collate_text(rows)

    return of(PROMPTS), of(["", ""])


def references(model: QwenImage21, edits: bool) -> list[torch.Tensor]:
    return model.normalize_references([part[None] for part in pixels()], are_pixels=True) if edits else []


@pytest.fixture(
    scope="module", params=[(dtype, edits) for dtype in (torch.float32, torch.bfloat16) for edits in (False, True)],
    ids=["fp32-draw", "fp32-edit", "bf16-draw", "bf16-edit"],
)  # fmt: skip
def golden(request):  # type: ignore[no-untyped-def]
    """(our model, whether it edits, the pipeline, its recorded calls, its pictures)."""
    dtype, edits = request.param
    model = make_model(dtype)
    pipe = make_pipeline(model)
    recorder, count = Recorder(pipe.transformer), 1 if edits else 2
    pictures = pipe(
        prompt=PROMPTS[:count], negative_prompt=["", ""][:count], image=sources() if edits else None, width=WIDTH, height=HEIGHT,
        num_inference_steps=STEPS, true_cfg_scale=GUIDANCE, latents=noise(dtype, count).flatten(2).transpose(1, 2),
        output_type="np", output_resolution=(EDITED[0] * EDITED[1]) ** 0.5, use_kv_cache=False,
    ).images  # fmt: skip
    return model, edits, pipe, recorder, pictures


def test_every_input_of_the_denoising_step_equals_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, edits, _, recorder, _ = golden
    text, clean, ours = texts(model, edits), references(model, edits), Recorder(model.transformer)
    exact = model.weight_dtype == torch.float32
    for call, theirs in enumerate(recorder.inputs):
        with torch.no_grad():
            velocity = model.velocity(unpack(theirs["hidden_states"]), theirs["timestep"], text[call % 2], clean)
        mine = ours.inputs[-1]
        assert mine["img_shapes"] == theirs["img_shapes"]
        given, length = mine["encoder_hidden_states"], theirs["encoder_hidden_states"].shape[1]
        places = [6 if slot else 1 for slot in mine["img_mask"]]  # a picture of 96 x 64 px has 6 tokens in the text, the result too
        slots = torch.tensor([mine["img_mask"]] * len(given)).repeat_interleave(torch.tensor(places), 1)
        assert torch.equal(slots, theirs["img_mask"][:, :length]) and theirs["img_mask"][:, length:].all()
        assert theirs["img_mask"].shape[1] == length + 6
        of_text = ~torch.tensor([mine["img_mask"]] * len(given))  # what stands in a slot is not read: see below
        assert torch.equal(given[of_text], theirs["encoder_hidden_states"][~slots])
        assert torch.equal(mine["timestep"], theirs["timestep"])
        mask = theirs["encoder_hidden_states_mask"]
        assert mine["encoder_hidden_states_mask"] is mask is None or torch.equal(mine["encoder_hidden_states_mask"], mask.bool())
        assert mine.keys() == theirs.keys() - {"attention_kwargs", "kv_cache", "kv_cache_mode"}
        if exact or not edits:
            assert torch.equal(mine["hidden_states"], theirs["hidden_states"])
            assert torch.equal(velocity, unpack(recorder.outputs[call])), f"call {call}"
        else:  # the pipeline encodes and normalises references in bf16, we in fp32, as all that is trained on
            torch.testing.assert_close(mine["hidden_states"], theirs["hidden_states"], rtol=2**-5, atol=2**-4)
            torch.testing.assert_close(velocity, unpack(recorder.outputs[call]), rtol=0.05, atol=0.1)


def test_what_stands_in_the_slots_of_pictures_is_never_read(model21: QwenImage21) -> None:
    text, clean = texts(model21, True)[0], references(model21, True)
    assert text.slots is not None and sum(text.slots) == 2
    filled = text.embeds.masked_fill(torch.tensor(text.slots)[:, None], 3.0)
    start, sigma = noise(torch.float32, 1), torch.tensor([0.6])
    with torch.no_grad():
        right, other, turned = (
            model21.velocity(start, sigma, given, parts)
            for given, parts in ((text, clean), (TextBatch(filled, text.mask, text.slots), clean), (text, clean[::-1]))
        )
    assert torch.equal(right, other) and not torch.equal(right, turned)


def test_noise_levels_equal_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, _, recorder, _ = golden
    theirs = torch.stack([call["timestep"][0] for call in recorder.inputs[::2]])
    ours = model.inference_sigmas(HEIGHT * WIDTH // 256, STEPS)
    tolerance = 1e-6 if theirs.dtype == torch.float32 else 2**-8
    assert torch.allclose(ours[:-1].float(), theirs.float(), rtol=tolerance) and ours[-1] == 0


def test_a_picture_sampled_by_our_path_equals_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, edits, _, _, pictures = golden
    if edits:
        pytest.skip("`sample_normalized` draws; edits are held to the pipeline below")
    exact = model.weight_dtype == torch.float32
    latents = sample_normalized(model, *texts(model, False), noise(model.weight_dtype), STEPS, GUIDANCE)
    ours = (model.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    over_white = 1 + (pictures[..., :3] - 1) * pictures[..., 3:]
    assert np.abs(ours - over_white).max() <= (2e-5 if exact else 0.05) and over_white.std() > 0.05


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_images_of_the_run_equal_the_pipelines_own(golden, guidance: float) -> None:  # type: ignore[no-untyped-def]
    """FigureModel.sample (validation, `scienceflow sample`) is the pipeline with its own noise, shift and resizing."""
    model, edits, pipe, _, _ = golden
    pipe.encode_prompt = type(pipe).encode_prompt.__get__(pipe)
    theirs = pipe(
        prompt=PROMPTS[:1], negative_prompt=[""] if guidance > 1 else None, image=sources() if edits else None, width=WIDTH,
        height=HEIGHT, num_inference_steps=STEPS, true_cfg_scale=guidance, generator=[torch.Generator("cpu").manual_seed(5)],
        output_resolution=(EDITED[0] * EDITED[1]) ** 0.5,
    ).images  # fmt: skip
    seen = [pixels() if edits else []]
    ours = model.sample(
        model.pipeline(model.transformer), model.encode_instructions(PROMPTS[:1], seen), model.encode_instructions([""], seen)[0],
        width=WIDTH, height=HEIGHT, steps=STEPS, guidance=guidance, seeds=[5], **({"images": sources()} if edits else {}),
    )  # fmt: skip
    white = Image.new("RGBA", theirs[0].size, "white")
    assert np.array_equal(np.asarray(ours[0]), np.asarray(Image.alpha_composite(white, theirs[0]).convert("RGB")))


def test_latents_are_the_pipelines_for_opaque_pictures(golden) -> None:  # type: ignore[no-untyped-def]
    model, edits, pipe, _, _ = golden
    if model.weight_dtype != torch.float32 or not edits:
        pytest.skip("the VAE is the same")
    picture = sources()[0].convert("RGBA")
    prepared = pipe.image_processor.preprocess(picture, width=EDITED[0], height=EDITED[1]).unsqueeze(2)
    theirs = pipe._encode_vae_image(prepared, generator=None).squeeze(2)
    raw = model.encode_images(pixels()[0][None])
    assert raw.shape[1:] == model.latent_shape(EDITED[1], EDITED[0])
    assert torch.equal(model.normalize(raw), theirs)


def test_template_and_dropped_tokens_are_the_pipelines(golden) -> None:  # type: ignore[no-untyped-def]
    model, _, pipe, _, _ = golden
    assert pipe.prompt_template_t2i == qwen_image_21.TEMPLATE and pipe._drop_idx == model._dropped
    assert pipe.prompt_template_ti2i == qwen_image_21.TEMPLATE.format(qwen_image_21.PICTURE.format(1) + "{}")


def test_a_long_prompt_is_cut_at_the_limit_of_its_own_tokens_and_counted(model21: QwenImage21) -> None:
    long, before = "The figure shows a box. " * 30, model21.truncated_prompts
    plain = model21.encode_prompts([long])[0]
    seen = model21.encode_instructions([long], [pixels()])[0]
    slots = int(model21._slots(seen).sum())
    assert len(plain) == LENGTH and len(seen) == LENGTH + slots and slots == 2 and model21.truncated_prompts == before + 2
    lengths = model21.prompt_lengths(PROMPTS)
    assert [length - model21._dropped for length in lengths] == [len(row) for row in model21.encode_prompts(PROMPTS)]


def test_ingredients_that_are_wrong_are_noticed(model21: QwenImage21) -> None:
    right, language_model = model21.encode_prompts(PROMPTS[:1])[0], model21.text_encoder.language_model
    none = language_model.norm
    language_model.norm = load_component(Qwen3VLForConditionalGeneration, model21.source, "text_encoder").model.language_model.norm
    assert not torch.allclose(model21.encode_prompts(PROMPTS[:1])[0], right, atol=0.05)
    language_model.norm = none
    text, start, sigma = model21.collate_text([right]), noise(torch.float32, 1), torch.tensor([0.6])
    guided = [guide(model21, start, start.flip(1), GUIDANCE) for guide in (QwenImage21.guide, qwen_image_21.QwenImage.guide)]
    assert not torch.allclose(*guided)  # Qwen-Image's norm is not rescaled here
    with torch.no_grad():
        velocity = model21.velocity(start, sigma, text)
        assert not torch.allclose(model21.velocity(start, sigma / 1000, text), velocity, atol=1e-3)


def test_pictures_that_would_be_resized_are_refused(model21: QwenImage21, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [Image.new("RGB", size) for size in ((96, 64), (192, 192))]
    row = model21.encode_prompts([""])[0]
    with pytest.raises(UserError, match="96 x 64, 192 x 192 px together.*one shape"):
        model21.sample(
            model21.pipeline(model21.transformer), [row], row, width=64, height=64, steps=2, guidance=1.0, seeds=[0],
            images=pictures,
        )  # fmt: skip
    with monkeypatch.context() as patched:
        limits = SizeDict(shortest_edge=256 * 256, longest_edge=4096 * 4096)
        patched.setattr(model21._processor.image_processor, "size", limits)
        with pytest.raises(UserError, match="resizes pictures of 96 x 64 px"):
            model21.encode_instructions([""], [pixels()[:1]])


def test_the_distilled_sister_is_refused_by_its_noise_levels(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded_folder("qwen_image_21_tiny"), tmp_path / "turbo"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "sample_sigmas": [1.0, 0.75, 0.5, 0.25]}))
    with pytest.raises(UserError, match="distilled \\(sample_sigmas.*Train on Qwen/Qwen-Image-2.1"):
        QwenImage21(ModelSource(str(folder)), LENGTH, torch.float32).load_transformer()


def test_guidance_for_the_transformer_is_refused_where_it_has_no_such_input() -> None:
    values = merged(
        BASE, model_type="QwenImage21", pretrained_model_name_or_path=SOURCE, lora_layers=ATTENTION, embedded_guidance=3.5,
        dataset={"type": "FigureDataset", "figures": "drawn:4"},
    )  # fmt: skip
    with pytest.raises(UserError, match="embedded_guidance = 3.5: the transformer of QwenImage21 has no input for guidance"):
        build_model(Config.model_validate(values))


# -- real shapes on `meta` -----------------------------------------------------------------------
ATTENTION = "to_k,to_q,to_v,to_out.0"
RECOMMENDED = ATTENTION + ",img_mlp.proj,img_mlp.gate_layer,img_mlp.out"


def on_meta() -> torch.nn.Module:
    with torch.device("meta"):
        return QwenImage21Transformer2DModel()  # the class's defaults are the released model's


def test_the_released_config_has_7_billion_parameters() -> None:
    assert round(sum(p.numel() for p in on_meta().parameters()) / 1e6, 2) == 7115.12


@pytest.mark.parametrize(("targets", "layers"), [(ATTENTION, 32 * 4), (RECOMMENDED, 32 * 7)])
def test_lora_targets_resolve_to_the_layers_that_peft_creates(targets: str, layers: int) -> None:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    transformer = on_meta()
    names = resolve_lora_layers(transformer, targets)
    assert len(names) == layers and QwenImage21.block_layers == RECOMMENDED
    with torch.device("meta"):
        transformer.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=names))
    assert [name for name, module in transformer.named_modules() if isinstance(module, LoraLayer)] == names


def test_names_for_comfyui_are_read_back_by_diffusers_own_converter(model21: QwenImage21) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_qwen_lora_to_diffusers

    names = resolve_lora_layers(model21.transformer, RECOMMENDED)
    layers = {f"{name}.lora_{part}.weight": torch.randn(4, 4) for name in names for part in "AB"}
    back = _convert_non_diffusers_qwen_lora_to_diffusers(model21.original_lora(layers, alpha=4.0, rank=4))
    assert {name.removeprefix("transformer."): part for name, part in back.items()}.keys() == layers.keys()
    assert all(torch.equal(back[f"transformer.{name}"], part) for name, part in layers.items())


# -- the whole product on the embedded model -----------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):  # type: ignore[no-untyped-def]
    """(values, run, weights, weights after a resume): figures and edits in one store, four steps, the last two trained again."""
    from accelerate.state import AcceleratorState, GradientState

    from OpenSciDraw.drawn.folders import write_drawn_edits, write_drawn_figures
    from OpenSciDraw.encode import run as encode
    from OpenSciDraw.training.run import Training
    from train_OpenSciDraw_loop import train

    def go(values: dict) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        assert train(Training(Config.model_validate(values))) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    data, run = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    write_drawn_edits(data / "figures" / "edits", 3, 3)
    write_drawn_figures(data / "figures" / "plain", 3, 0, 128, "small")
    source = sorted((data / "figures" / "plain").glob("*.png"))[0]
    values = merged(
        BASE, model_type="QwenImage21", pretrained_model_name_or_path=SOURCE, lora_layers=RECOMMENDED, learning_rate=5e-2,
        max_train_steps=4, checkpointing_steps=2, held_out_examples=0, validation_steps=4, validation_prompts=["Make 'A' red."],
        validation_images=[str(source)], resolution_list=[[96, 64]], true_cfg_scale=2.0, max_sequence_length=256,
        caption_dropout=0.5, model_output_dir=str(run),
        dataset={"type": "ArXiVParquetDatasetV2", "base_dir": str(data), "parquet_base_path": "store"},
        encode={"figures": str(data / "figures"), "resolution": 512, "samples_per_shard": 16, "num_workers": 0},
    )  # fmt: skip
    assert encode.main(Config.model_validate(values)) == 0
    go(values)
    first = load_file(run / "pytorch_lora_weights.safetensors")
    shutil.rmtree(run / "checkpoint-4")
    (run / "pytorch_lora_weights.safetensors").unlink()
    go({**values, "resume_from_checkpoint": "latest"})
    return values, run, first, load_file(run / "pytorch_lora_weights.safetensors")


def test_figures_and_edits_train_and_a_resumed_run_ends_with_the_same_weights(trained) -> None:  # type: ignore[no-untyped-def]
    _, run, first, again = trained
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert len(first) == 3 * 7 * 2 and (run / "validation_images" / "step_000004" / "00.png").is_file()


def test_the_text_of_an_edit_is_stored_with_its_pictures_and_has_an_empty_prompt_of_its_own(trained, model21) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.datasets.arxiv_parquet import ArXiVParquetDatasetV2
    from OpenSciDraw.figures.buckets import Bucket, fit
    from OpenSciDraw.figures.listing import list_figures, load_figure

    values = trained[0]
    dataset = ArXiVParquetDatasetV2(base_dir=values["dataset"]["base_dir"], parquet_base_path="store")
    refs = {ref.id: ref for ref in list_figures(values["encode"]["figures"])[0]}
    edits = 0
    for row in range(len(dataset)):
        sample = dataset.read(row)
        fitted = [fit(load_figure(part), Bucket(512, 512))[0] for part in refs[sample.id].references]
        seen = [to_model_range(pixels_of(picture)) for picture in fitted]
        expected = model21.encode_instructions([sample.caption, ""], [seen, seen])
        assert torch.allclose(sample.text.float(), expected[0], rtol=2**-7, atol=2**-7)  # captions are encoded in batches
        assert not seen or torch.equal(sample.text, expected[0].bfloat16())
        assert sample.unprompted is None if not seen else torch.equal(sample.unprompted, expected[1].bfloat16())
        edits += bool(seen)
    assert edits == 3 and dataset.empty_text() is not None
    places = {int(model21._slots(dataset.read(row).text).sum()) for row in range(len(dataset))}
    assert places == {0, 1}


def test_a_picture_that_is_another_one_now_has_its_instruction_encoded_again(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.encode import run as encode

    values = trained[0]
    shutil.copytree(values["dataset"]["base_dir"], tmp_path, dirs_exist_ok=True)
    figures = tmp_path / "figures"
    values = merged(values, dataset={"base_dir": str(tmp_path)}, encode={"figures": str(figures)})
    shards = sorted((tmp_path / "store" / "text").glob("*.parquet"))
    before = [shard.read_bytes() for shard in shards]
    assert encode.main(Config.model_validate(values)) == 0 and [shard.read_bytes() for shard in shards] == before
    source = sorted(figures.rglob("*.source.png"))[0]
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    size = source.stat().st_size
    picture.putpixel((0, 0), (1, 2, 3))
    picture.save(source)
    source.write_bytes(source.read_bytes().ljust(size, b"\0")[: max(size, source.stat().st_size)])
    assert source.stat().st_size == size, "as many bytes, another picture"
    assert encode.main(Config.model_validate(values)) == 0
    after = [shard.read_bytes() for shard in shards]
    assert after[0] == before[0] and after[1:] != before[1:]


def test_text_of_edits_cannot_be_encoded_beside_stored_latents(trained, fresh_accelerate) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.training.run import Training

    fresh_accelerate()
    with pytest.raises(UserError, match="does not keep as pixels. Set text = 'stored'"):
        Training(Config.model_validate(merged(trained[0], text="online", model_output_dir=trained[0]["model_output_dir"] + "x")))


def test_edits_are_encoded_while_training_with_the_pictures_of_each(trained, model21) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.datasets.figure_dataset import FigureDataset
    from OpenSciDraw.train_iteration_funcs.flow_matching import text_rows

    config = Config.model_validate(trained[0])
    dataset = FigureDataset(encode=config.encode)
    rows = [row for row in range(len(dataset)) if dataset.read(row).references][:2]
    batch = dataset.batch(rows)
    kept, dropped = text_rows(model21, batch, [False, True], model21.encode_prompts([""])[0])
    expected = model21.encode_instructions([batch.captions[0], ""], batch.pictures())
    assert torch.equal(kept, expected[0]) and torch.equal(dropped, expected[1])


def test_its_contract_says_that_text_depends_on_pictures(model21: QwenImage21) -> None:
    text = model21.contract().text
    assert text["pictures"] == "those that an edit starts from" and text["tokenizer"]
    assert isinstance(model21, FigureModel) and model21.edits
