"""Edit training: figures and edits in one store and one run, references in every forward, exact resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import BASE, merged
from test_training import EXACT, assert_same_run

from OpenSciDraw.config import Config
from OpenSciDraw.datasets.arxiv_parquet import ArXiVParquetDatasetV2
from OpenSciDraw.drawn.folders import write_drawn_edits, write_drawn_figures
from OpenSciDraw.encode import run as encode
from OpenSciDraw.encode import verify
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.fitting import to_model_range
from OpenSciDraw.figures.listing import list_figures, load_figure
from OpenSciDraw.store.shard import index_path, rebuild_index
from OpenSciDraw.train_iteration_funcs.flow_matching import edit_weights

SPLIT = 8


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Config values with a store of 14 figures and 22 edits behind them, one with two sources of other sizes."""
    folder = tmp_path_factory.mktemp("mixed")
    write_drawn_edits(folder / "figures" / "edits", 21, 3)
    write_drawn_figures(folder / "figures" / "plain", 14, 0, 128, "small")
    two = folder / "figures" / "two"
    write_drawn_edits(two, 1, 9)
    (picture,) = [path for path in two.glob("*.png") if ".source" not in path.name]
    shutil.copy(sorted((folder / "figures" / "plain").glob("*.png"))[0], picture.with_name(f"{picture.stem}.source2.png"))
    values = {
        **BASE,
        "dataset": {"type": "ArXiVParquetDatasetV2", "base_dir": str(folder), "parquet_base_path": "store"},
        "encode": {"figures": str(folder / "figures"), "resolution": 128, "samples_per_shard": SPLIT, "num_workers": 0},
    }
    assert encode.main(Config.model_validate(values)) == 0
    return values


@pytest.fixture
def go(fresh_accelerate, mixed):  # type: ignore[no-untyped-def]
    def run(**changes):  # type: ignore[no-untyped-def]
        from OpenSciDraw.training.run import Training
        from train_OpenSciDraw_loop import train

        fresh_accelerate()
        training = Training(Config.model_validate(merged(mixed, **changes)))
        assert train(training) == 0
        return training

    return run


def store_of(values: dict) -> ArXiVParquetDatasetV2:
    return ArXiVParquetDatasetV2(base_dir=values["dataset"]["base_dir"], parquet_base_path="store")


def test_a_row_has_the_latents_of_its_sources_and_its_boxes(mixed: dict, tiny) -> None:  # type: ignore[no-untyped-def]
    dataset, refs = store_of(mixed), {ref.id: ref for ref in list_figures(mixed["encode"]["figures"])[0]}
    assert len(dataset) == len(refs) == 36
    for row in range(len(dataset)):
        sample = dataset.read(row)
        ref = refs[sample.id]
        assert len(sample.references) == len(ref.references)
        for latents, made_of in zip(sample.references, ref.references, strict=True):
            pixels = torch.from_numpy(np.asarray(load_figure(made_of)).copy()).permute(2, 0, 1)[None]
            assert torch.equal(latents, tiny.encode_images(to_model_range(pixels))[0].bfloat16())
        expected = torch.tensor(ref.edit_boxes) / 128 if ref.edit_boxes else None
        assert sample.edit_boxes is None if expected is None else torch.allclose(sample.edit_boxes, expected, atol=1e-6)


def test_a_source_that_several_edits_share_is_encoded_once(tmp_path: Path, mixed: dict) -> None:
    write_drawn_figures(tmp_path / "figures", 3, 0, 128, "small")
    names = sorted(path.name for path in (tmp_path / "figures").glob("*.png"))
    rows = [{"image": name, "caption": f"Edit {at}.", "source_image": names[0]} for at, name in enumerate(names[1:])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "figures" / "list.parquet")
    values = merged(mixed, dataset={"base_dir": str(tmp_path)}, encode={"figures": str(tmp_path / "figures" / "list.parquet")})
    assert encode.main(Config.model_validate(values)) == 0
    store = store_of(values).rows.store
    assert len(store.figures) == 2 and len(store.references) == 1
    assert store.references_of(0) == store.references_of(1) == [0]


def test_a_batch_is_of_one_kind_and_of_references_of_one_size(mixed: dict) -> None:
    dataset = store_of(mixed)
    assert dataset.has_edits
    kinds: dict[int, set] = {}
    for row, bucket in enumerate(dataset.bucket_of.tolist()):
        kinds.setdefault(bucket, set()).add(tuple(tuple(part.shape) for part in dataset.read(row).references))
    assert all(len(kind) == 1 for kind in kinds.values()) and len(kinds) == 3
    batch = dataset.batch([row for row in range(36) if len(dataset.read(row).references) == 1][:3])
    assert [tuple(part.shape) for part in batch.references] == [(3, *dataset.read(0).latents.shape)] and len(batch.edit_boxes) == 3


def test_stopped_and_resumed_edits_and_figures_train_to_the_same_bits(go, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    options = {**EXACT, "edit_loss_mode": "weighted", "edit_loss_weight": 2.0}
    go(**options, model_output_dir=str(tmp_path / "whole"))
    go(**options, model_output_dir=str(tmp_path / "parts"))
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    go(**options, model_output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 6)


def test_the_references_are_what_is_learnt_from(go, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The same rows without their references train to other weights, and cost fewer tokens."""
    calls: list[int] = []

    def count(training) -> None:  # type: ignore[no-untyped-def]
        training.model.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
        )

    from OpenSciDraw.training.run import Training

    made, original = [], Training.__init__

    def counted(self, config) -> None:  # type: ignore[no-untyped-def]
        original(self, config)
        count(self)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "__init__", counted)
        go(max_train_steps=12, validation_steps=1000, model_output_dir=str(tmp_path), held_out_examples=0)
    tokens = (128 // 8) ** 2
    assert {tokens, 2 * tokens} <= set(calls)


@pytest.mark.parametrize("mode", ["weighted", "balanced"])
def test_weights_of_an_edits_loss_have_mean_one_and_follow_the_boxes(mode: str, mixed: dict) -> None:
    config = Config.model_validate({**mixed, "edit_loss_mode": mode, "edit_region_weight": 5.0, "edit_loss_ratio": 0.75})
    boxes = torch.tensor([[0.3, 0.0, 0.5, 0.26]])  # of 4 x 8 tokens: columns 2 and 3, rows 0 and 1
    weights = edit_weights([boxes, None, torch.tensor([[0.0, 0.0, 1.0, 1.0]])], 4, 8, config)
    assert weights.shape == (3, 1, 4, 8) and torch.allclose(weights.flatten(1).mean(1), torch.ones(3))
    assert torch.equal(weights[1:], torch.ones(2, 1, 4, 8))
    edited = torch.zeros(4, 8, dtype=torch.bool)
    edited[0:2, 2:4] = True
    if mode == "weighted":
        mean = 1 + 4 * 4 / 32
        assert torch.allclose(weights[0, 0][edited], torch.tensor(5 / mean))
        assert torch.allclose(weights[0, 0][~edited], torch.tensor(1 / mean))
    else:
        assert torch.allclose(weights[0, 0][edited].sum() / 32, torch.tensor(0.75))


def test_weights_of_the_two_kinds_scale_the_loss_of_whole_batches(mixed: dict, tiny) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.train_iteration_funcs.flow_matching import Place, flow_matching_loss

    dataset, place = store_of(mixed), Place(1, 0, 0, 1)
    rows = {len(dataset.read(row).references): row for row in range(36)}

    def loss(row: int, **changes: object) -> float:
        config = Config.model_validate({**mixed, **changes, "caption_dropout": 0.0})
        with torch.no_grad():
            return flow_matching_loss(tiny, dataset.batch([row]), place, config, dataset.empty_text()).loss.item()

    for row, key in ((rows[0], "gen_loss_weight"), (rows[1], "edit_loss_weight")):
        other = {"gen_loss_weight": "edit_loss_weight", "edit_loss_weight": "gen_loss_weight"}[key]
        assert loss(row, **{key: 3.0}) == pytest.approx(3 * loss(row)) and loss(row, **{other: 3.0}) == loss(row)


def test_a_model_that_does_not_edit_refuses_edits(go, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.models.flux2_klein import Flux2Klein

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flux2Klein, "edits", False)
        with pytest.raises(UserError, match="holds edits, and the pipeline of Flux2Klein takes no pictures to edit"):
            go(model_output_dir=str(tmp_path))


def test_figures_encoded_while_training_have_the_same_references(go, mixed: dict, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    online = {"type": "FigureDataset", "figures": mixed["encode"]["figures"], "resolution": 128}
    values = {key: value for key, value in mixed.items() if key not in ("dataset", "encode")} | {"dataset": online}
    from OpenSciDraw.datasets.figure_dataset import FigureDataset

    config = Config.model_validate({**values, "encode": {"resolution": 128}})
    dataset, stored = FigureDataset(**config.dataset_arguments()), store_of(mixed)
    by_id = {stored.rows.sample_id(row): stored.read(row) for row in range(len(stored))}
    assert dataset.has_edits and len(np.unique(dataset.bucket_of)) == 3
    for row in range(0, len(dataset), 5):
        sample = dataset.read(row)
        assert len(sample.references) == len(by_id[sample.id].references)
        assert all(part.shape == (3, 128, 128) for part in sample.references)


def test_verify_looks_at_references_too(mixed: dict, tmp_path: Path) -> None:
    store = shutil.copytree(Path(mixed["dataset"]["base_dir"]) / "store", tmp_path / "store")
    assert verify.verify_main(str(store), 0, None, []) == 0
    shard = store / "references" / "00000.parquet"
    before = index_path(shard).read_bytes()
    index_path(shard).write_bytes(before[:-9] + b"x" + before[-8:])
    assert rebuild_index(shard) and index_path(shard).read_bytes() == before  # made anew, byte for byte
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert verify.verify_main(str(store), 0, None, []) == 1


def test_an_edit_that_joins_figures_encodes_its_shard_again_and_no_other(mixed: dict, tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    write_drawn_figures(figures, 2 * SPLIT, 0, 128, "small")
    values = merged(mixed, dataset={"base_dir": str(tmp_path)}, encode={"figures": str(figures)})
    assert encode.main(Config.model_validate(values)) == 0 and not store_of(values).has_edits
    shards = sorted((tmp_path / "store" / "figures").glob("*.parquet"))
    before = [shard.stat().st_mtime_ns for shard in shards]
    last = sorted(figures.glob("*.png"))[-1]
    shutil.copy(sorted(figures.glob("*.png"))[0], last.with_name(f"{last.stem}.source.png"))
    assert encode.main(Config.model_validate(values)) == 0
    after = [shard.stat().st_mtime_ns for shard in shards]
    assert after[0] == before[0] and after[1] != before[1]
    dataset = store_of(values)
    assert dataset.has_edits and sum(len(dataset.read(row).references) for row in range(len(dataset))) == 1
