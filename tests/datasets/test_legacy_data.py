"""Data that were encoded before the store existed load as they are: V1, V2, V3; what is wrong with a row is said."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import BASE, merged

from OpenSciDraw.config import Config
from OpenSciDraw.datasets.arxiv_parquet import ArXiVParquetDatasetV2
from OpenSciDraw.datasets.batch import BadRow, Sample
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.buckets import buckets

BUCKETS = [(64, 64), (64, 32), (32, 64)]  # height, width in pixels
TOKENS, WIDTH = 6, 8


def random(seed: int, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def write_table(path: Path, rows: list[dict], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)


def sides(number: int) -> tuple[int, int, dict[str, Any]]:
    height, width = BUCKETS[number % 3]
    return height, width, {"bucket_w": width, "bucket_h": height, "aspect_ratio": height / width}


def v1_row(number: int) -> dict:
    """Qwen-Image: tensors in the row, (16, 1, h, w) as its film VAE gives them; text with a mask."""
    height, width, bucket = sides(number)
    shape = (16, 1, height // 8, width // 8)
    return {
        "image_path": f"2015/{number}.png", "caption": f"caption {number}", "latents": random(number, shape).tobytes(),
        "latent_shape": list(shape), "text_embeds": random(100 + number, (TOKENS, WIDTH), np.float16).tobytes(),
        "text_embeds_shape": [TOKENS, WIDTH], "text_mask": (np.arange(TOKENS) <= number % TOKENS).astype(np.int8).tobytes(),
        **bucket,
    }  # fmt: skip


def v2_row(folder: Path, number: int, latents: np.ndarray, text: np.ndarray, bucket: dict[str, Any], year: str = "2015") -> dict:
    """FLUX: an npz beside the Parquet, text with position ids."""
    name = f"{year}/paper{number}/paper{number}_0_flux_latents.npz"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    ids = np.zeros((len(text), 4), np.int64)
    np.savez(folder / name, latents=latents, prompt_embeds=text, text_ids=ids)
    return {
        "paper_id": f"paper{number}", "image_path": f"{number}.png", "caption": f"caption {number}", "cache_path": name,
        "latent_shape": list(latents.shape), "prompt_embeds_shape": list(text.shape), **bucket,
    }  # fmt: skip


def v2_rows(folder: Path, count: int) -> list[dict]:
    rows = []
    for number in range(count):
        height, width, bucket = sides(number)
        latents, text = random(number, (32, height // 8, width // 8)), random(100 + number, (TOKENS, WIDTH), np.float16)
        rows.append(v2_row(folder, number, latents, text, bucket))
    return rows


def v3_row(folder: Path, number: int, year: str) -> dict:
    height, width, bucket = sides(number)
    name = f"{year}/paper{number}/paper{number}_vae_h.npz"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / name, vae_h=random(number, (64, height // 8, width // 8)),
        prompt_embeds=random(100 + number, (TOKENS, WIDTH), np.float16),
        attention_mask=(np.arange(TOKENS) < 2).astype(np.int64), text_ids=np.zeros((TOKENS, 3), np.int64),
    )  # fmt: skip
    shapes = {"vae_h_shape": [64, height // 8, width // 8], "prompt_embeds_shape": [TOKENS, WIDTH]}
    return {"caption": f"caption {number}", "cache_path": name, **shapes, **bucket}


def opened(folder: Path) -> ArXiVParquetDatasetV2:
    return ArXiVParquetDatasetV2(base_dir=str(folder.parent), parquet_base_path=folder.name)


def read(dataset: ArXiVParquetDatasetV2, row: int) -> Sample:
    sample = dataset.read(row)
    assert isinstance(sample, Sample), sample
    return sample


def assert_bad(dataset: ArXiVParquetDatasetV2, row: int, *reasons: str) -> None:
    bad = dataset.read(row)
    assert isinstance(bad, BadRow)
    assert all(reason in bad.reason for reason in reasons), bad.reason


# -- right values ----------------------------------------------------------------------------------
@pytest.mark.parametrize("rows_per_group", [1, 3])
def test_v1_tensors_in_the_row(tmp_path: Path, rows_per_group: int) -> None:
    folder = tmp_path / "qwen"
    write_table(folder / "2015" / "a.parquet", [v1_row(n) for n in range(4)], row_group_size=rows_per_group)
    write_table(folder / "2016" / "b.parquet", [v1_row(n) for n in range(4, 7)], row_group_size=rows_per_group)
    dataset = opened(folder)
    assert len(dataset) == 7 and dataset.contract is None and dataset.empty_text() is None
    assert dataset.buckets.tolist() == [list(BUCKETS[n % 3]) for n in range(7)]
    for n in (0, 3, 4, 6, 2):
        sample, (height, width) = read(dataset, n), BUCKETS[n % 3]
        assert (sample.id, sample.caption) == (f"2015/{n}.png", f"caption {n}")
        assert sample.latents is not None and sample.text is not None
        assert np.array_equal(sample.latents.numpy(), random(n, (16, 1, height // 8, width // 8))[:, 0])
        real = n % TOKENS + 1  # tokens under the mask; pads are no part of a text that has a mask
        assert np.array_equal(sample.text.numpy(), random(100 + n, (TOKENS, WIDTH), np.float16)[:real])


def test_v2_npz_of_flux_keeps_its_pad_rows(tmp_path: Path) -> None:
    folder = tmp_path / "flux"
    write_table(folder / "2015" / "a.parquet", v2_rows(folder, 6))
    dataset = opened(folder)
    assert dataset.buckets.tolist() == [list(BUCKETS[n % 3]) for n in range(6)]
    for n in range(6):
        sample, (height, width) = read(dataset, n), BUCKETS[n % 3]
        assert sample.id == f"2015/paper{n}/paper{n}_0_flux_latents.npz" and sample.caption == f"caption {n}"
        assert sample.latents is not None and sample.text is not None
        assert np.array_equal(sample.latents.numpy(), random(n, (32, height // 8, width // 8)))
        assert np.array_equal(sample.text.numpy(), random(100 + n, (TOKENS, WIDTH), np.float16))
    batch = dataset.batch([0, 3])
    assert batch.latents is not None and batch.latents.shape == (2, 32, 8, 8) and batch.latents.dtype == torch.float32
    assert batch.bad == []


def test_v2_npz_of_qwen_is_trimmed_to_its_mask(tmp_path: Path) -> None:
    folder = tmp_path / "qwen"
    text, bucket = random(7, (TOKENS, WIDTH), np.float16), sides(0)[2]
    row = v2_row(folder, 0, random(0, (16, 1, 8, 8)), text, bucket)
    row["text_embeds_shape"] = row.pop("prompt_embeds_shape")
    np.savez(folder / row["cache_path"], latents=random(0, (16, 1, 8, 8)), text_embeds=text,
             text_mask=np.array([1, 1, 1, 0, 0, 0], np.int8))  # fmt: skip
    write_table(folder / "2015" / "a.parquet", [row])
    sample = read(opened(folder), 0)
    assert sample.text is not None and np.array_equal(sample.text.numpy(), text[:3])
    assert sample.latents is not None and sample.latents.shape == (16, 8, 8)


def test_v3_takes_the_mean_and_the_training_files_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "vae_h"
    for year, numbers in (("2015", range(3)), ("2016", range(3, 5))):
        write_table(folder / year / f"{year}_train.parquet", [v3_row(folder, n, year) for n in numbers])
    write_table(folder / "2016" / "2016_test.parquet", [v3_row(folder, 5, "2016")])
    with caplog.at_level("INFO", "OpenSciDraw"):
        dataset = opened(folder)
    assert len(dataset) == 5 and "1 file(s) that are not *_train.parquet left out" in caplog.text
    for n in range(5):
        sample, (height, width) = read(dataset, n), BUCKETS[n % 3]
        assert sample.latents is not None and sample.text is not None
        assert np.array_equal(sample.latents.numpy(), random(n, (64, height // 8, width // 8))[:32])
        assert sample.text.shape == (TOKENS, WIDTH)  # text_ids are wrong there, and say that this is FLUX's text
    assert not any(path.endswith("paper5_vae_h.npz") for path in dataset.rows.ids())
    for path in folder.glob("*/*_train.parquet"):
        path.unlink()
    with pytest.raises(UserError, match="V3 without a .*_train.parquet"):
        opened(folder)


# -- bad rows --------------------------------------------------------------------------------------
class Bomb:
    """Unpickling this would leave a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


def test_what_is_wrong_with_a_row_is_said_and_nothing_takes_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "flux"
    rows = v2_rows(folder, 24)
    good, text = random(0, (32, 8, 8)), random(1, (TOKENS, WIDTH), np.float16)
    np.savez(tmp_path / "outside.npz", latents=good, prompt_embeds=text)
    reasons: dict[int, tuple[str, ...]] = {}

    def replace(row: int, *reason: str, data: bytes | None = None, **arrays: Any) -> None:
        reasons[row] = reason
        if data is not None:
            (folder / rows[row]["cache_path"]).write_bytes(data)
        elif arrays:
            np.savez(folder / rows[row]["cache_path"], **arrays)

    for row, name in ((0, "../outside.npz"), (1, str(tmp_path / "outside.npz")), (2, "2015/../../outside.npz"), (3, None)):
        rows[row]["cache_path"] = name
        replace(row, "leads out of")
    (folder / rows[4]["cache_path"]).unlink()
    replace(4, "FileNotFoundError")
    whole = (folder / rows[5]["cache_path"]).read_bytes()
    replace(5, "damaged npz", data=whole[: len(whole) // 2])
    replace(6, "paper6_0_flux_latents.npz", data=b"")
    replace(7, "pickled", data=pickle.dumps({"latents": good}))
    bomb = np.array([Bomb(tmp_path / "unpickled")], dtype=object)
    replace(8, "allow_pickle=False", latents=bomb, prompt_embeds=text, text_ids=text)
    harmed = bytearray((folder / rows[9]["cache_path"]).read_bytes())
    harmed[300] ^= 255  # in the latents' values: the zip's checksum tells
    replace(9, "damaged npz", data=bytes(harmed))
    replace(10, "latents are (32, 4, 8)", latents=random(0, (32, 4, 8)), prompt_embeds=text, text_ids=text)
    replace(11, "latents are (16, 4, 8)", latents=random(0, (16, 4, 8)), prompt_embeds=text, text_ids=text)
    replace(12, "lacks text_embeds or prompt_embeds", latents=good, text_ids=text)
    replace(13, "lacks latents", prompt_embeds=text, text_ids=text)
    replace(14, "text are (5, 8)", latents=random(0, (32, 4, 8)), prompt_embeds=text[:5], text_ids=text)
    replace(15, "not floating-point", latents=np.zeros((32, 8, 8), np.int32), prompt_embeds=text, text_ids=text)
    rows[16]["latent_shape"] = [32, 4, 4]  # whole, of another bucket than the row says
    replace(16, "the bucket (64, 32)", latents=random(0, (32, 4, 4)), prompt_embeds=text, text_ids=text)
    replace(17, "mask is (3,)", latents=random(0, (32, 4, 8)), prompt_embeds=text, text_mask=np.ones(3, np.int8))
    replace(18, "with 0 tokens", latents=good, prompt_embeds=text, text_mask=np.zeros(TOKENS, np.int8))
    rows[19]["cache_path"] = "2015"
    replace(19, "IsADirectoryError")
    rows[20]["bucket_h"] = None
    replace(20, "the bucket (0, 64)")
    rows[21]["latent_shape"] = [32, 16, 8]  # another VAE's stride than the other rows'
    replace(21, "1/8", latents=random(0, (32, 16, 8)), prompt_embeds=text, text_ids=text)
    np.save(tmp_path / "array.npy", good)
    replace(22, "not an npz", data=(tmp_path / "array.npy").read_bytes())
    write_table(folder / "2015" / "a.parquet", rows)

    dataset = opened(folder)
    for row, reason in reasons.items():
        assert_bad(dataset, row, *reason)
    assert read(dataset, 23).caption == "caption 23"
    assert not (tmp_path / "unpickled").exists()
    batch = dataset.batch([23, 17])  # one bucket; the bad row has no readable one in its bucket left but 23 itself
    assert len(batch.sample_ids) == 1 and batch.bad[0].id == rows[17]["cache_path"]


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    """A year that was moved to another disk."""
    folder = tmp_path / "flux"
    write_table(folder / "2015" / "a.parquet", v2_rows(folder, 2))
    (folder / "2015" / "paper1").rename(tmp_path / "elsewhere")
    (folder / "2015" / "paper1").symlink_to(tmp_path / "elsewhere")
    assert read(opened(folder), 1).caption == "caption 1"


def test_v1_rows_of_another_size_than_they_say_are_bad(tmp_path: Path) -> None:
    rows = [v1_row(n) for n in range(6)]
    rows[0]["latents"] = rows[0]["latents"][:-4]
    rows[1]["text_embeds"] = None
    rows[2]["text_mask"] = b"\1"
    rows[3]["latent_shape"] = None
    write_table(tmp_path / "qwen" / "2015" / "a.parquet", rows)
    dataset = opened(tmp_path / "qwen")
    assert_bad(dataset, 0, "reshape")
    assert_bad(dataset, 1, "text_embeds or its shape is empty")
    assert_bad(dataset, 2, "mask is (1,)")
    assert_bad(dataset, 3, "latents or its shape is empty")
    assert read(dataset, 4).id == "2015/4.png"


def test_a_bad_row_is_replaced_once_and_never_by_a_held_out_row(tmp_path: Path) -> None:
    folder = tmp_path / "flux"
    rows = []
    for n in range(40):
        rows.append(v2_row(folder, n, random(n, (32, 8, 8)), random(n, (TOKENS, WIDTH), np.float16), sides(0)[2]))
    write_table(folder / "2015" / "a.parquet", rows)
    dataset = opened(folder)
    held_out = dataset.held_out(4)
    before = [(int(row) - 1) % 40 for row in held_out]  # rows whose next one is held out
    for row in before:
        (folder / rows[row]["cache_path"]).unlink()
    held_out_ids = {rows[row]["cache_path"] for row in held_out}
    for row in set(before) - set(held_out.tolist()):
        assert not held_out_ids & set(dataset.batch([row]).sample_ids)
    (folder / rows[20]["cache_path"]).unlink(missing_ok=True)
    (folder / rows[21]["cache_path"]).unlink(missing_ok=True)
    batch = dataset.batch([20, 21])
    assert len(set(batch.sample_ids)) == len(batch.sample_ids) == 2
    assert len({bad.id for bad in batch.bad}) == len(batch.bad)


# -- warnings and refusals -------------------------------------------------------------------------
def test_fat_row_groups_and_lists_warn_with_their_cost_on_that_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_table(tmp_path / "thin" / "a.parquet", [v1_row(n) for n in range(8)], row_group_size=1)
    opened(tmp_path / "thin")
    assert "row group" not in caplog.text and "repack" not in caplog.text
    write_table(tmp_path / "fat" / "a.parquet", [v1_row(n) for n in range(32)], compression="none", use_dictionary=False)
    opened(tmp_path / "fat")
    row = np.mean([len(r["latents"]) + len(r["text_embeds"]) for r in map(v1_row, range(32))])
    said = re.search(r"32 rows in a row group: one row of \S+ MB takes \S+ ms at random, (\d+) times .* over (\S+) MB", caplog.text)
    assert said is not None and int(said[1]) > 1
    assert 0.9 < float(said[2]) * 1e6 / (row * 33 / 2) < 1.2  # half of the group's rows, on average
    assert f"scienceflow repack {tmp_path / 'fat'} OUT" in caplog.text
    caplog.clear()
    write_table(tmp_path / "lists" / "a.parquet", [as_lists(v1_row(n), np.float32) for n in range(3)], row_group_size=1)
    opened(tmp_path / "lists")
    assert "has latents and text_embeds as lists of numbers: one row" in caplog.text


def as_lists(row: dict, latents: Any, text: Any = np.float16) -> dict:
    """A V1 row whose tensors are lists of numbers; 16-bit integers hold the upper halves of fp32, which are bf16."""

    def numbers(name: str, dtype: Any, target: Any) -> list:
        values = np.frombuffer(row[name], dtype)
        if target == np.uint16:
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tolist()
        return values.astype(target).tolist()

    return {**row, "latents": numbers("latents", np.float32, latents), "text_embeds": numbers("text_embeds", np.float16, text)}


LISTS = {
    "list<float>": (pa.list_(pa.float32()), np.float32), "large_list<double>": (pa.large_list(pa.float64()), np.float64),
    "list<halffloat>": (pa.list_(pa.float16()), np.float16), "list<uint16>": (pa.list_(pa.uint16()), np.uint16),
    "fixed_size_list<float>": (pa.list_(pa.float32(), 16 * 64), np.float32),
}  # fmt: skip


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("rows_per_group", [1, 8])
def test_tensors_as_lists_are_read(tmp_path: Path, kind: str, rows_per_group: int) -> None:
    arrow, dtype = LISTS[kind]
    rows = [as_lists(v1_row(3 * n), dtype, dtype) for n in range(8)]  # one bucket: fixed sizes need one
    schema = pa.Table.from_pylist(rows).schema
    text = pa.list_(arrow.value_type, TOKENS * WIDTH) if "fixed" in kind else arrow
    for name, column in (("latents", arrow), ("text_embeds", text)):
        schema = schema.set(schema.get_field_index(name), pa.field(name, column))
    (tmp_path / "lists").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "lists" / "a.parquet", row_group_size=rows_per_group)
    dataset = opened(tmp_path / "lists")
    for n in (0, 5, 2, 7, 7):
        sample, expected = read(dataset, n), random(3 * n, (16, 8, 8))
        assert sample.latents is not None and sample.text is not None
        if dtype == np.uint16:
            expected = (expected.view(np.uint32) & 0xFFFF0000).view(np.float32)
        elif dtype == np.float16:
            expected = expected.astype(np.float16).astype(np.float32)
        assert np.array_equal(sample.latents.numpy(), expected)
        text = random(100 + 3 * n, (TOKENS, WIDTH), np.float16)[: len(sample.text)].astype(np.float32)
        assert np.abs(sample.text.float().numpy() - text).max() <= (0.02 if dtype == np.uint16 else 0)


def test_nested_lists_are_read_and_other_lists_are_bad_rows(tmp_path: Path) -> None:
    rows = [as_lists(v1_row(3 * n), np.float32) for n in range(2)]
    for row in rows:
        row["latents"] = np.array(row["latents"]).reshape(row["latent_shape"]).tolist()
    write_table(tmp_path / "nested" / "a.parquet", rows)
    sample = read(opened(tmp_path / "nested"), 1)
    assert sample.latents is not None and np.array_equal(sample.latents.numpy(), random(3, (16, 8, 8)))
    rows[0]["latents"][0][0][0][0] = None
    write_table(tmp_path / "nulls" / "a.parquet", rows)
    assert_bad(opened(tmp_path / "nulls"), 0, "latents has 1 empty numbers")
    whole = [{**as_lists(v1_row(0), np.float32), "latents": [1] * 1024}]
    write_table(tmp_path / "whole" / "a.parquet", whole)
    assert_bad(opened(tmp_path / "whole"), 0, "not floating-point")


def test_sixteen_bit_integers_that_are_no_bf16_are_refused(tmp_path: Path) -> None:
    rows = [as_lists(v1_row(n), np.float32) for n in range(2)]
    for row in rows:
        row["latents"] = np.array(row["latents"]).astype(np.float16).view(np.uint16)
    (tmp_path / "halves").mkdir()
    schema = pa.Table.from_pylist(rows).schema
    schema = schema.set(schema.get_field_index("latents"), pa.field("latents", pa.list_(pa.uint16())))
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "halves" / "a.parquet")
    with pytest.raises(UserError, match="latents are 16-bit integers that are not the bits of bfloat16"):
        opened(tmp_path / "halves")


def test_mixed_unknown_and_broken_layouts_are_refused_by_file(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_table(folder / "2015" / "a.parquet", [v1_row(0)])
    write_table(folder / "2016" / "b.parquet", v2_rows(folder, 1))
    with pytest.raises(UserError, match="(?s)different layouts.*V1: .*a.parquet.*V2: .*b.parquet"):
        opened(folder)
    write_table(tmp_path / "other" / "c.parquet", [{"caption": "x", "picture": b""}])
    with pytest.raises(UserError, match="c.parquet: unknown layout with columns caption, picture"):
        opened(tmp_path / "other")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "d.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="d.parquet is not a readable Parquet file"):
        opened(tmp_path / "broken")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a store"):
        opened(tmp_path / "empty")


# -- training --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny_v2(tmp_path_factory: pytest.TempPathFactory, tiny) -> Path:  # type: ignore[no-untyped-def]
    """V2 as FLUX's, of the embedded model: its VAE takes 4 px a latent, its text is 64 tokens."""
    folder = tmp_path_factory.mktemp("legacy") / "flux"
    text = tiny.encode_prompts(["caption"])[0].numpy().astype(np.float16)
    rows = []
    for n in range(24):
        bucket = buckets(128)[4 + n % 3]
        latents = random(n, tiny.latent_shape(bucket.height, bucket.width))
        sizes = {"bucket_w": bucket.width, "bucket_h": bucket.height, "aspect_ratio": bucket.height / bucket.width}
        rows.append(v2_row(folder, n, latents, text, sizes))
    write_table(folder / "2015" / "a.parquet", rows)
    return folder


def train_values(tiny_v2: Path, out: Path, **changes: object) -> dict:
    dataset = {"type": "ArXiVParquetDatasetV2", "base_dir": str(tiny_v2.parent), "parquet_base_path": tiny_v2.name}
    return merged({**BASE, "dataset": dataset, "max_train_steps": 2, "model_output_dir": str(out)}, **changes)


@pytest.mark.usefixtures("fresh_accelerate")
def test_two_steps_on_v2_data_with_a_declared_contract(tiny_v2: Path, tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.training.run import Training
    from train_OpenSciDraw_loop import train

    declared = {"vae": "AutoencoderKLFlux2", "max_sequence_length": 64}
    values = train_values(tiny_v2, tmp_path / "run", dataset={"contract": declared})
    assert train(Training(Config.model_validate(values))) == 0
    assert "carries no contract: nothing but widths and shapes could be checked" in caplog.text
    assert "Taken on the config's word" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("declared", [{"vae": "AutoencoderKL"}, {"max_sequence_length": 512}, {"made_by": "me"}])
def test_a_declared_contract_that_is_not_the_models_is_an_error(tiny_v2: Path, tmp_path: Path, declared: dict) -> None:
    from OpenSciDraw.training.run import Training

    key = next(iter(declared))
    with pytest.raises(UserError, match=f"dataset.contract: {key}"):
        Training(Config.model_validate(train_values(tiny_v2, tmp_path / "run", dataset={"contract": declared})))
