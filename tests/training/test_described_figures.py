"""Several captions, masks and weights of figures, from the source to the loss."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BASE, make_model, train_and_resume
from PIL import Image

from OpenSciDraw import flow
from OpenSciDraw.config import Config, EncodeConfig
from OpenSciDraw.datasets.arxiv_parquet import ArXiVParquetDatasetV2
from OpenSciDraw.datasets.batch import Sample, collate
from OpenSciDraw.datasets.caption_choice import Turn, chosen_caption
from OpenSciDraw.datasets.figure_dataset import FigureDataset
from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.encode import run as encode
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.fitting import prepare
from OpenSciDraw.figures.listing import RejectedFigure, list_figures
from OpenSciDraw.train_iteration_funcs.flow_matching import Place, flow_matching_loss, token_weights

CONFIG = {"pretrained_model_name_or_path": "embedded:flux2_klein_tiny_random", "dataset": {"base_dir": "."}}


def write_source(folder: Path, count: int = 6) -> Path:
    """Drawn figures with two captions each; every second has a mask of its left half and the weight 3."""
    folder.mkdir(parents=True)
    for at in range(count):
        drawn = draw_figure(0, at, 128, style="small")
        drawn.image.save(folder / f"{at}.png")
        (folder / f"{at}.json").write_text(json.dumps({"captions": [f"short {at}", drawn.caption], "w": 3 if at % 2 else None}))
        if at % 2:
            mask = np.zeros((64, 64), np.uint8)
            mask[:, :32] = 255
            Image.fromarray(mask).save(folder / f"{at}.mask.bmp")
    return folder


def values_for(folder: Path) -> dict:
    source = write_source(folder / "figures")
    return {
        **BASE, "dataset": {"type": "ArXiVParquetDatasetV2", "base_dir": str(folder), "parquet_base_path": "store"},
        "encode": {"figures": str(source), "resolution": 128, "num_workers": 0, "batch_size": 8, "weight_column": "w"},
        "held_out_examples": 0, "max_train_steps": 3, "checkpointing_steps": 2, "model_output_dir": str(folder / "run"),
        "train_batch_size": 4,
    }  # fmt: skip


def test_each_caption_comes_as_often_as_its_weight_says_over_the_epochs() -> None:
    for weights in ([0.5, 0.5], [0.1, 0.6, 0.3]):
        counts = Counter(chosen_caption(weights, Turn(1, epoch), "a") for epoch in range(100))
        assert all(abs(counts[at] - 100 * weight) <= 3 for at, weight in enumerate(weights)), counts  # chance alone: 5 on average
    chosen = np.array([[chosen_caption([0.5, 0.5], Turn(1, epoch), str(name)) for name in range(500)] for epoch in range(8)])
    assert all(200 < row.sum() < 300 for row in chosen)  # figures are independent within an epoch
    assert len({tuple(column) for column in chosen.T}) > 4 and (chosen[0] != chosen[1]).any()
    other = [chosen_caption([0.5, 0.5], Turn(2, 0), str(name)) for name in range(500)]
    assert (np.array(other) != chosen[0]).any()


def test_a_store_gives_the_caption_of_the_turn_with_its_embedding_mask_and_weight(tmp_path: Path) -> None:
    values = values_for(tmp_path)
    assert encode.main(Config.model_validate(values)) == 0
    dataset = ArXiVParquetDatasetV2(base_dir=str(tmp_path / "store"))
    model = make_model()
    model.load_text_encoder()
    online = FigureDataset(encode=EncodeConfig.model_validate(values["encode"]))
    for row in range(len(dataset)):
        main, at = dataset.read(row), int(dataset.rows.sample_id(row).split(".")[0])
        assert isinstance(main, Sample) and main.caption == f"short {at}"
        assert main.weight == (3 if at % 2 else 1) and (main.mask is not None) == bool(at % 2)
        seen = set()
        for epoch in range(3):
            batch = dataset.batch([row], turn=Turn(7, epoch))
            seen.add(batch.captions[0])
            if row > 1:
                continue
            assert torch.equal(batch.text[0].float(), model.encode_prompts(batch.captions)[0].bfloat16().float())
            same = next(r for r in range(len(online)) if online.rows.sample_id(r) == main.id)
            other = online.batch([same], turn=Turn(7, epoch))
            assert other.captions == batch.captions and torch.equal(other.weights, batch.weights)
            assert (other.masks[0] is None) == (main.mask is None)
        assert len(seen) == 2
    held = dataset.read(0)
    assert isinstance(held, Sample) and held.caption.startswith("short")  # what is not training has one caption for good


def test_a_run_with_two_captions_resumes_to_the_bit(tmp_path: Path, fresh_accelerate) -> None:  # type: ignore[no-untyped-def]
    first, again = train_and_resume(values_for(tmp_path), tmp_path / "run")
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_encoding_again_after_a_mask_or_a_second_caption_changed(tmp_path: Path) -> None:
    values = values_for(tmp_path)
    encode.main(Config.model_validate(values))
    before = (tmp_path / "store/figures/00000.parquet").stat().st_mtime_ns
    encode.main(Config.model_validate(values))
    assert (tmp_path / "store/figures/00000.parquet").stat().st_mtime_ns == before
    mask = tmp_path / "figures/1.mask.bmp"
    size = mask.stat().st_size
    Image.fromarray(np.flip(np.asarray(Image.open(mask)), 1)).save(mask)
    assert mask.stat().st_size == size  # of the same size: only its content tells
    encode.main(Config.model_validate(values))
    changed = (tmp_path / "store/figures/00000.parquet").stat().st_mtime_ns
    assert changed != before
    (tmp_path / "figures/0.json").write_text(json.dumps({"captions": ["short 0", "another"]}))
    encode.main(Config.model_validate(values))
    dataset = ArXiVParquetDatasetV2(base_dir=str(tmp_path / "store"))
    row = next(row for row in range(len(dataset)) if dataset.rows.sample_id(row) == "0.png")
    assert {dataset.batch([row], turn=Turn(0, epoch)).captions[0] for epoch in range(6)} == {"short 0", "another"}


def test_plain_shards_beside_described_ones_count_in_full(tmp_path: Path) -> None:
    values = values_for(tmp_path)
    for at in (0, 1):  # the first shard is plain, as those of older stores are
        (tmp_path / f"figures/{at}.json").write_text(json.dumps({"caption": "plain"}))
    (tmp_path / "figures/1.mask.bmp").unlink()
    values["encode"] |= {"samples_per_shard": 2}
    encode.main(Config.model_validate(values))
    dataset = ArXiVParquetDatasetV2(base_dir=str(tmp_path / "store"))
    found = {s.id: (s.weight, s.mask is None) for row in range(len(dataset)) if isinstance(s := dataset.read(row), Sample)}
    assert found["0.png"] == (1.0, True) and found["1.png"] == (1.0, True) and found["3.png"] == (3.0, False)
    assert dataset.batch([0], turn=Turn(0, 1)).captions == ["plain"]


def test_the_loss_is_the_weighted_mean_over_what_the_mask_leaves() -> None:
    """Against a float64 formula: weight * sum(m e) / sum(m), m the mask's mean over each token's area."""
    model = make_model()
    torch.manual_seed(0)
    latents, text = torch.randn(2, *model.latent_shape(128, 128)), torch.randn(2, *model.text_shape())
    mask = torch.zeros(16, 16, dtype=torch.uint8)
    mask[:, :7] = 255
    mask[3, 3] = 100
    masked = Sample("a", "", latents=latents[0], text=text[0], mask=mask, weight=2.5)
    batch, place = collate([masked, Sample("b", "", latents=latents[1], text=text[1])]), Place(0, 0, 0, 1)
    for outside in (0.0, 0.25):
        config = Config.model_validate({**CONFIG, "caption_dropout": 0.0, "mask_outside_weight": outside, "train_batch_size": 2})
        with torch.no_grad():
            output = flow_matching_loss(model, batch, place, config, text[0])
            clean = model.normalize(latents)
            noise = flow.keyed_noise(0, 0, ["a", "b"], clean.shape[1:])
            predicted = model.velocity(flow.interpolate(clean, noise, output.sigma), output.sigma, model.collate_text(list(text)))
        error = (predicted.double() - (noise - clean).double()).pow(2)
        m = mask.double() / 255  # a token of this model has 8 px
        m = outside + (1 - outside) * m
        first, second = (m * error[0]).sum() / (m.sum() * error.shape[1]), error[1].mean()
        torch.testing.assert_close(output.loss.double(), (2.5 * first + second) / 2, rtol=1e-5, atol=0)
        torch.testing.assert_close(output.per_sample.double(), error.flatten(1).mean(1), rtol=1e-5, atol=0)  # logged unweighted


def test_token_weights_have_the_mean_one() -> None:
    config = Config.model_validate(CONFIG)
    mask = torch.randint(0, 256, (16, 24), dtype=torch.uint8)
    batch = collate([Sample("a", "", mask=mask), Sample("b", "")])
    weights = token_weights(batch, 8, 12, config, edits=False)
    assert weights is not None and weights.shape == (2, 1, 8, 12)
    torch.testing.assert_close(weights.mean((1, 2, 3)), torch.ones(2))
    of_areas = mask.double().view(8, 2, 12, 2).mean((1, 3))
    torch.testing.assert_close(weights[0, 0].double(), of_areas / of_areas.mean(), rtol=1e-5, atol=1e-6)
    assert (weights[1] == 1).all() and token_weights(collate([Sample("b", "")]), 8, 12, config, edits=False) is None


def test_a_mask_is_laid_over_the_figure_and_not_over_its_padding(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), "white").save(tmp_path / "a.png")  # its bucket is not of this aspect ratio
    (tmp_path / "a.txt").write_text("c")
    Image.new("L", (100, 50), 255).save(tmp_path / "a.mask.png")
    settings = EncodeConfig(resolution=128)
    (ref,) = list_figures(tmp_path)[0]
    item = prepare(ref, settings)
    x0, y0, x1, y1 = item.placement
    wanted = torch.zeros(item.bucket.height, item.bucket.width)
    wanted[y0:y1, x0:x1] = 255
    cells = wanted.view(item.bucket.height // 8, 8, item.bucket.width // 8, 8).mean((1, 3))
    assert item.mask is not None and (item.mask.float() - cells).abs().max() <= 1
    for picture, reason in ((Image.new("L", (50, 100), 255), "of another shape"), (Image.new("L", (100, 50), 0), "it is black")):
        picture.save(tmp_path / "a.mask.png")
        with pytest.raises(RejectedFigure, match=f"mask: a.mask.png: {reason}"):
            prepare(list_figures(tmp_path)[0][0], settings)


def test_a_key_for_masks_is_refused_where_there_are_none(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="mask_outside_weight = 0.5, and no figure"):
        run(mask_outside_weight=0.5, model_output_dir=str(tmp_path / "run"))
