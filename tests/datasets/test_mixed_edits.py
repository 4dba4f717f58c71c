"""ArXiVParquetDatasetV4: published figures and edits in two folders, read as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import BASE, write_config

from OpenSciDraw.config import Config, load_config
from OpenSciDraw.datasets.arxiv_parquet import ArXiVParquetDatasetV2
from OpenSciDraw.datasets.mixed_edits import ArXiVParquetDatasetV4
from OpenSciDraw.encode import run as encode
from OpenSciDraw.encode.repack_source import open_legacy
from OpenSciDraw.errors import UserError

SIDE, CHANNELS = 64, 8
draw = np.random.default_rng(0)


def posterior(height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return draw.standard_normal((2 * CHANNELS, height // 8, width // 8)).astype(np.float32)


def text() -> dict[str, np.ndarray]:
    return {"prompt_embeds": draw.standard_normal((6, 12)).astype(np.float16), "text_ids": np.zeros((6, 4))}


Arrays = dict[str, np.ndarray]


def publish(folder: Path, edits: bool, grades: list[str], source: tuple[int, int] = (SIDE, SIDE)) -> dict[str, Arrays]:
    """Rows as the published programs write them; their arrays by id."""
    (folder / "2301").mkdir(parents=True)
    rows, arrays = [], {}
    for at, grade in enumerate(grades):
        name = f"npz/{at}.npz"
        parts = {"source_vae_h": posterior(*source), "target_vae_h": posterior()} if edits else {"vae_h": posterior()}
        (folder / "npz").mkdir(exist_ok=True)
        np.savez(folder / name, **parts, **text(), attention_mask=np.ones(6, np.int8))  # type: ignore[arg-type]
        row = {"caption": f"row {at}", "cache_path": name, "prompt_embeds_shape": [6, 12], "bucket_w": SIDE, "bucket_h": SIDE,
               "aspect_ratio": 1.0}  # fmt: skip
        if edits:
            boxes = json.dumps([[0, 16, 32, 64]]) if at else None
            row |= {"source_vae_h_shape": [2 * CHANNELS, source[0] // 8, source[1] // 8],
                    "target_vae_h_shape": [2 * CHANNELS, 8, 8], "edit_bboxes": boxes}  # fmt: skip
        else:
            row |= {"vae_h_shape": [2 * CHANNELS, 8, 8], "quality_grade": grade}
        rows.append(row)
        arrays[name] = parts
    pq.write_table(pa.Table.from_pylist(rows), folder / "2301" / "part_train.parquet")
    pq.write_table(pa.Table.from_pylist(rows), folder / "2301" / "part.parquet")  # of which the training file is a part
    return arrays


def test_rows_are_figures_and_edits_with_the_means_of_their_posteriors(tmp_path: Path) -> None:
    figures, edits = publish(tmp_path / "gen", False, ["HIGH", "MEDIUM"]), publish(tmp_path / "edit", True, ["", "", ""])
    dataset = ArXiVParquetDatasetV4(base_dir=str(tmp_path), gen_parquet_path="gen", edit_parquet_path="edit")
    assert len(dataset) == 5 and dataset.has_edits
    for row, sample in ((row, dataset.read(row)) for row in range(5)):
        parts = (figures if row < 2 else edits)[f"npz/{row if row < 2 else row - 2}.npz"]
        wanted = parts["vae_h"] if row < 2 else parts["target_vae_h"]
        assert torch.equal(sample.latents, torch.from_numpy(wanted[:CHANNELS]))
        assert len(sample.references) == int(row >= 2)
        if row >= 2:
            assert torch.equal(sample.references[0], torch.from_numpy(parts["source_vae_h"][:CHANNELS]))
    assert dataset.read(2).edit_boxes is None
    assert torch.equal(dataset.read(3).edit_boxes, torch.tensor([[0, 0.25, 0.5, 1.0]]))


def test_a_batch_is_of_figures_or_of_edits_with_sources_of_one_size(tmp_path: Path) -> None:
    publish(tmp_path / "gen", False, ["HIGH"] * 3)
    publish(tmp_path / "edit", True, [""] * 3, source=(SIDE, 2 * SIDE))
    dataset = ArXiVParquetDatasetV4(base_dir=str(tmp_path), gen_parquet_path="gen", edit_parquet_path="edit")
    assert [len(set(part)) for part in (dataset.bucket_of[:3], dataset.bucket_of[3:], dataset.bucket_of)] == [1, 1, 2]
    batch = dataset.batch([3, 4, 5])
    assert [tuple(part.shape) for part in batch.references] == [(3, CHANNELS, 8, 16)]


@pytest.mark.parametrize(("given", "rows"), [("high", 1), ("high+medium", 2), ("high_medium", 2), ("all", 3), (None, 3)])
def test_the_quality_filter_chooses_among_figures_alone(given: str | None, rows: int, tmp_path: Path) -> None:
    publish(tmp_path / "gen", False, ["HIGH", "Medium", "LOW"])
    publish(tmp_path / "edit", True, [""] * 2)
    dataset = ArXiVParquetDatasetV4(base_dir=str(tmp_path), gen_parquet_path="gen", edit_parquet_path="edit", quality_filter=given)
    assert len(dataset) == rows + 2
    assert [len(dataset.read(row).references) for row in range(len(dataset))] == [0] * rows + [1, 1]


def test_one_kind_alone_and_no_kind(tmp_path: Path) -> None:
    publish(tmp_path / "edit", True, [""] * 2)
    assert len(ArXiVParquetDatasetV4(base_dir=str(tmp_path), edit_parquet_path="edit")) == 2
    assert ArXiVParquetDatasetV2(base_dir=str(tmp_path), parquet_base_path="edit").has_edits
    with pytest.raises(UserError, match="needs dataset.gen_parquet_path"):
        ArXiVParquetDatasetV4(base_dir=str(tmp_path))
    with pytest.raises(UserError, match="no folder .*gone"):
        ArXiVParquetDatasetV4(base_dir=str(tmp_path), gen_parquet_path="gone")


def test_a_wrong_row_is_a_bad_row_that_says_why(tmp_path: Path) -> None:
    publish(tmp_path / "edit", True, [""] * 2)
    np.savez(tmp_path / "edit" / "npz" / "0.npz", target_vae_h=posterior(), **text())  # type: ignore[arg-type]
    dataset = ArXiVParquetDatasetV4(base_dir=str(tmp_path), edit_parquet_path="edit")
    assert "lacks source_vae_h" in dataset.read(0).reason


STAGE_2 = """
model_type = 'Flux2Klein'
pretrained_model_name_or_path = 'black-forest-labs/FLUX.2-klein-base-9B'
huggingface_token = None
transformer_cfg = dict(type='Flux2Transformer2DModel')
use_parquet_dataset = True
dataset_cfg = dict(type='ArXiVParquetDatasetV4', base_dir='/data', gen_parquet_path='gen', edit_parquet_path='edit',
                   quality_filter='high', num_workers=8, num_train_examples=None)
sampler_cfg = dict(type='DistributedBucketSamplerV3', dataset=None, batch_size=1, num_replicas=1, rank=0, drop_last=True)
train_iteration_func = 'Flux2Klein_mixed_edit_train_iteration'
use_lora = False
train_batch_size = 1
max_train_steps = 120000
gen_loss_weight = 1.0
edit_loss_weight = 1.0
edit_loss_mode = "uniform"
dataloader_num_workers = 8
validation_func = 'Flux2Klein_fulltune_validation_func_parquet'
"""


@pytest.mark.parametrize("said", ["use_lora = False\n", ""])
def test_the_published_config_of_mixed_training_loads_as_it_is(said: str, tmp_path: Path) -> None:
    (tmp_path / "stage2.py").write_text(STAGE_2.replace("use_lora = False\n", said))
    config = load_config(tmp_path / "stage2.py")
    arguments = config.dataset_arguments()
    assert {name: arguments[name] for name in ("gen_parquet_path", "edit_parquet_path", "quality_filter")} == {
        "gen_parquet_path": "gen", "edit_parquet_path": "edit", "quality_filter": "high",
    }  # fmt: skip
    assert config.train_iteration_func_name == "Flux2Klein_mixed_edit_train_iteration" and not config.use_lora


@pytest.mark.parametrize(("dataset", "said"), [
    ({"base_dir": ".", "quality_filter": "high"}, "only for ArXiVParquetDatasetV4"),
    ({"base_dir": ".", "type": "ArXiVParquetDatasetV4"}, "needs gen_parquet_path, edit_parquet_path, or both"),
    ({"base_dir": "abfs://a/b", "type": "ArXiVParquetDatasetV4", "gen_parquet_path": "x"}, "reads folders of this machine"),
])  # fmt: skip
def test_keys_that_do_not_go_together_are_refused(dataset: dict, said: str, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.py", {**BASE, "dataset": dataset})
    with pytest.raises(UserError, match=said):
        load_config(path)
    assert Config.model_validate({**BASE, "dataset": {"base_dir": "."}})


def test_repack_refuses_published_edits_instead_of_losing_what_they_start_from(tmp_path: Path) -> None:
    publish(tmp_path / "edit", True, ["", ""])
    config = load_config("configs/tiny/flux2klein_edit_copy.py")
    with pytest.raises(UserError, match="edits with what they start from .layout V4.*edit_parquet_path"):
        open_legacy(tmp_path / "edit", config)


def test_encode_refuses_the_data_set_of_two_folders(tmp_path: Path) -> None:
    publish(tmp_path / "edit", True, [""])
    config = load_config("configs/tiny/flux2klein_edit_copy.py", [
        "dataset.type='ArXiVParquetDatasetV4'", f"dataset.base_dir={str(tmp_path)!r}", "dataset.edit_parquet_path='edit'",
    ])  # fmt: skip
    with pytest.raises(UserError, match="reads several folders of rows that are encoded already"):
        encode.main(config)
