"""Repacking makes a store with the same numbers of every layout that loads, names what it left out, goes on where it stopped."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import BASE, merged, write_config
from test_legacy_data import as_lists, random, write_table

from OpenSciDraw.config import Config
from OpenSciDraw.datasets.arxiv_parquet import ArXiVParquetDatasetV2, StoreRows
from OpenSciDraw.datasets.batch import Sample
from OpenSciDraw.datasets.legacy import LegacyRows
from OpenSciDraw.encode.repack import main, repack
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.buckets import buckets
from OpenSciDraw.store.encoded import EncodedStore
from OpenSciDraw.store.shard import index_path, read_shard_info

SIZES = [(bucket.height, bucket.width) for bucket in buckets(128)[4:7]]
CAPTIONS = [f"caption {n % 5}" for n in range(11)]  # 6 of 11 occur before


@pytest.fixture(scope="module")
def texts(tiny) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    """Embeddings (L, D) of the captions as the older programs stored them: fp16."""
    wanted = ["", *dict.fromkeys(CAPTIONS)]
    return {caption: row.numpy().astype(np.float16) for caption, row in zip(wanted, tiny.encode_prompts(wanted), strict=True)}


@pytest.fixture(scope="module")
def latent_shape(tiny) -> Callable[[int], tuple[int, ...]]:  # type: ignore[no-untyped-def]
    return lambda number: tiny.latent_shape(*SIZES[number % 3])


@pytest.fixture
def rows(texts: dict[str, np.ndarray], latent_shape: Callable[[int], tuple[int, ...]]) -> list[dict[str, Any]]:
    """V1 rows of the embedded klein."""
    out = []
    for n, caption in enumerate(CAPTIONS):
        (height, width), shape = SIZES[n % 3], latent_shape(n)
        out.append({
            "image_path": f"2015/{n}.png", "caption": caption, "latents": random(n, shape).tobytes(), "latent_shape": list(shape),
            "text_embeds": texts[caption].tobytes(), "text_embeds_shape": list(texts[caption].shape), "bucket_w": width,
            "bucket_h": height, "aspect_ratio": height / width,
        })  # fmt: skip
    return out


def write_npz(folder: Path, rows: list[dict[str, Any]], layout: str) -> None:
    """The same rows as V2 or V3, without the ids that V1 has."""
    table = []
    for n, row in enumerate(rows):
        latents = np.frombuffer(row["latents"], np.float32).reshape(row["latent_shape"])
        text = np.frombuffer(row["text_embeds"], np.float16).reshape(row["text_embeds_shape"])
        ids = {"text_ids": np.zeros((len(text), 4), np.int64)}
        small = {key: row[key] for key in ("caption", "bucket_w", "bucket_h", "aspect_ratio")}
        small |= {"cache_path": f"2015/{n}.npz", "prompt_embeds_shape": row["text_embeds_shape"]}
        (folder / "2015").mkdir(parents=True, exist_ok=True)
        if layout == "V2":
            np.savez(folder / "2015" / f"{n}.npz", latents=latents, prompt_embeds=text, **ids)
            table.append({**small, "latent_shape": row["latent_shape"]})
        else:
            stacked = np.concatenate([latents, np.zeros_like(latents)])
            np.savez(folder / "2015" / f"{n}.npz", vae_h=stacked, prompt_embeds=text, **ids)
            table.append({**small, "vae_h_shape": list(stacked.shape)})
    write_table(folder / "2015" / "2015_train.parquet", table)


def write_layout(folder: Path, rows: list[dict[str, Any]], layout: str) -> None:
    if layout in ("V2", "V3"):
        write_npz(folder, rows, layout)
    elif layout == "V1, lists":
        write_table(folder / "2015" / "a.parquet", [as_lists(row, np.float32) for row in rows])
    else:
        write_table(folder / "2015" / "a.parquet", rows, row_group_size=1 if layout == "V1" else 100)


def config(**changes: object) -> Config:
    return Config.model_validate(merged({**BASE, "dataset": {"type": "ArXiVParquetDatasetV2", "base_dir": "."}}, **changes))


def opened(folder: Path) -> ArXiVParquetDatasetV2:
    return ArXiVParquetDatasetV2(base_dir=str(folder.parent), parquet_base_path=folder.name)


def samples(rows: LegacyRows | StoreRows) -> dict[str, Sample]:
    return {sample.id: sample for sample in map(rows.sample, range(len(rows)))}


def assert_same(source: LegacyRows | StoreRows, out: Path) -> None:
    """Every row has the bits that bf16 gives the source's numbers, its caption and its bucket."""
    repacked, expected = samples(StoreRows(out, with_text=True)), samples(source)
    assert repacked.keys() == expected.keys()
    for name, sample in expected.items():
        found = repacked[name]
        assert found.caption == sample.caption
        for ours, theirs in ((found.latents, sample.latents), (found.text, sample.text)):
            assert ours is not None and theirs is not None and torch.equal(ours, theirs.bfloat16())
    sizes = {tuple(row) for row in opened(out).buckets.tolist()}
    assert sizes == {tuple(row) for row in source.buckets().tolist()}


def rejected(out: Path) -> dict[str, str]:
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}


@pytest.mark.parametrize("layout", ["V1", "V1, one row group", "V1, lists", "V2", "V3"])
def test_every_layout_becomes_a_store_with_the_same_numbers(tmp_path: Path, rows: list[dict], layout: str) -> None:
    write_layout(tmp_path / "old", rows, layout)
    assert repack(tmp_path / "old", tmp_path / "new", config(), samples_per_shard=4) == 0
    assert_same(LegacyRows(tmp_path / "old"), tmp_path / "new")
    assert rejected(tmp_path / "new") == {}
    store = EncodedStore(tmp_path / "new", with_text=True)
    assert store.text is not None and len(store.figures.shards) == 3
    assert store.text.table.column("caption").to_pylist() == ["", *dict.fromkeys(CAPTIONS)]  # once each, the empty prompt first
    heights = [store.figures.value("bucket_h", row) for row in range(4)]
    assert heights == sorted(heights)  # by buckets inside a shard
    assert store.figures.value("aspect_ratio", 0) == pytest.approx(heights[0] / store.figures.value("bucket_w", 0))


def test_what_training_reads_is_unchanged_in_bf16(tmp_path: Path, rows: list[dict], tiny) -> None:  # type: ignore[no-untyped-def]
    """Text is cast to bf16 before the transformer: the stored fp16 gives the same numbers directly and by the store."""
    write_layout(tmp_path / "old", rows, "V1")
    repack(tmp_path / "old", tmp_path / "new", config())
    old, new = samples(LegacyRows(tmp_path / "old")), samples(StoreRows(tmp_path / "new", with_text=True))
    for name, sample in old.items():
        before, after = (tiny.collate_text([s.text]).embeds.to(torch.bfloat16) for s in (sample, new[name]))
        assert sample.text is not None and sample.text.dtype == torch.float16 and torch.equal(before, after)
        clean, rounded = tiny.normalize(sample.latents[None]), tiny.normalize(new[name].latents[None])
        assert 0 < (clean - rounded).norm() / clean.norm() < 2**-8  # one rounding, as of every latent of a store


def test_the_contract_is_the_declared_one_and_says_so(tmp_path: Path, rows: list[dict], tiny) -> None:  # type: ignore[no-untyped-def]
    write_layout(tmp_path / "old", rows, "V2")
    repack(tmp_path / "old", tmp_path / "new", config())
    contract = opened(tmp_path / "new").contract
    assert contract is not None
    tiny.contract().require(contract, ("latents", "text"), tmp_path)  # as training does
    assert contract.origin["repacked"] == f"declared, repacked from {tmp_path / 'old'} (layout V2)"
    assert "text_computed_in" in contract.origin and contract.origin["text_computed_in"] == "not recorded"


def test_it_goes_on_where_it_stopped_and_does_a_changed_shard_anew(tmp_path: Path, rows: list[dict]) -> None:
    out = tmp_path / "new"
    write_layout(tmp_path / "old", rows, "V2")
    repack(tmp_path / "old", out, config(), samples_per_shard=4)
    shards = sorted(out.glob("*/*.parquet"))
    before = {path: path.stat().st_mtime_ns for path in shards}
    index_path(out / "text" / "00001.parquet").unlink()  # killed while it was written
    (out / "rejected.jsonl").unlink()
    repack(tmp_path / "old", out, config(), samples_per_shard=4)
    again = {path for path in shards if path.stat().st_mtime_ns != before[path]}
    assert again == {out / "figures" / "00001.parquet", out / "text" / "00001.parquet"}
    assert_same(LegacyRows(tmp_path / "old"), out)
    before = {path: path.stat().st_mtime_ns for path in shards}
    latents = np.frombuffer(rows[9]["latents"], np.float32).reshape(rows[9]["latent_shape"])
    text = np.frombuffer(rows[9]["text_embeds"], np.float16).reshape(rows[9]["text_embeds_shape"])
    np.savez(tmp_path / "old" / "2015" / "9.npz", latents=latents + 1, prompt_embeds=text, text_ids=np.zeros((len(text), 3)))
    repack(tmp_path / "old", out, config(), samples_per_shard=4)
    again = {path for path in shards if path.stat().st_mtime_ns != before[path]}
    assert again == {out / "figures" / "00002.parquet", out / "text" / "00002.parquet"}
    assert_same(LegacyRows(tmp_path / "old"), out)


def test_processes_share_the_shards(tmp_path: Path, rows: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    write_layout(tmp_path / "old", rows, "V1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not (tmp_path / "new" / "rejected.jsonl").exists()
        monkeypatch.setenv("RANK", rank)
        repack(tmp_path / "old", tmp_path / "new", config(), samples_per_shard=4)
    assert_same(LegacyRows(tmp_path / "old"), tmp_path / "new")
    assert (tmp_path / "new" / "rejected.jsonl").exists()


def test_bad_rows_are_named_and_their_captions_come_from_the_next_row(tmp_path: Path, rows: list[dict]) -> None:
    texts = np.frombuffer(rows[1]["text_embeds"], np.float16).copy()
    texts[7] = np.inf
    rows[0]["latents"] = rows[0]["latents"][:-4]  # the first with its caption, which rows 5 and 10 have too
    rows[1] |= {"text_embeds": texts.tobytes(), "caption": "nobody else's"}
    rows[2]["text_embeds_shape"] = [len(texts) // 8, 8]  # another model's width
    write_layout(tmp_path / "old", rows, "V1")
    repack(tmp_path / "old", tmp_path / "new", config(), samples_per_shard=4)
    reasons = rejected(tmp_path / "new")
    assert reasons.keys() == {"2015/0.png", "2015/1.png", "2015/2.png"}
    assert "reshape" in reasons["2015/0.png"]
    assert reasons["2015/1.png"] == f"ValueError: text with numbers that are not finite: 1 of {len(texts)}"
    assert "not of the declared model" in reasons["2015/2.png"]
    store = EncodedStore(tmp_path / "new", with_text=True)
    assert store.text is not None and "nobody else's" not in store.text.table.column("caption").to_pylist()
    expected = samples_of(tmp_path / "old", reasons)
    found = samples(StoreRows(tmp_path / "new", with_text=True))
    assert found.keys() == expected.keys()
    for name, sample in expected.items():
        assert sample.text is not None and torch.equal(found[name].text, sample.text.bfloat16())  # type: ignore[arg-type]


def samples_of(folder: Path, without: dict[str, str]) -> dict[str, Sample]:
    rows = LegacyRows(folder)
    return {name: rows.sample(row) for row, name in enumerate(rows.ids()) if name not in without}


def test_the_empty_prompt_is_a_rows_own_or_the_text_encoders(tmp_path: Path, rows: list[dict], texts, tiny, caplog) -> None:  # type: ignore[no-untyped-def]
    with caplog.at_level("INFO", "OpenSciDraw"):
        write_layout(tmp_path / "old", rows, "V1")
        repack(tmp_path / "old", tmp_path / "new", config())
    empty = opened(tmp_path / "new").empty_text()
    assert empty is not None and torch.equal(empty, tiny.encode_prompts([""])[0].bfloat16())
    assert "the declared text encoder gives the text of 2015/0.png with relative error 0.00" in caplog.text
    caplog.clear()
    marked = texts[""] + np.float16(1)
    rows[3] |= {"caption": "", "text_embeds": marked.tobytes()}
    write_layout(tmp_path / "with", rows, "V1")
    repack(tmp_path / "with", tmp_path / "new2", config())
    found = opened(tmp_path / "new2").empty_text()
    assert found is not None and torch.equal(found, torch.from_numpy(marked).bfloat16())
    assert "declared text encoder" not in caplog.text  # nothing was loaded
    for row in rows:
        row["caption"] = row["caption"] and row["caption"] + " with other words"
    rows[3]["caption"] = "also other"
    write_layout(tmp_path / "other", rows, "V1")
    repack(tmp_path / "other", tmp_path / "new3", config())
    assert "the declared text encoder, its layers or its template are not those of the data" in caplog.text


def test_without_a_text_encoder_latents_alone_can_be_repacked(tmp_path: Path, rows: list[dict], tiny_folder: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model, ignore=shutil.ignore_patterns("*.safetensors"))  # configs alone
    write_layout(tmp_path / "old", rows, "V1")
    with pytest.raises(UserError, match="(?s)no embedding of the empty prompt.*text = 'online'"):
        repack(tmp_path / "old", tmp_path / "new", config(pretrained_model_name_or_path=str(model)))
    assert not (tmp_path / "new").exists()
    repack(tmp_path / "old", tmp_path / "new", config(pretrained_model_name_or_path=str(model), text="online"))
    store = StoreRows(tmp_path / "new", with_text=False)
    assert len(store) == len(rows) and not (tmp_path / "new" / "text").exists()


def test_texts_that_differ_under_one_caption_are_counted(tmp_path: Path, rows: list[dict], caplog) -> None:  # type: ignore[no-untyped-def]
    rows[5]["text_embeds"] = rows[1]["text_embeds"]
    write_layout(tmp_path / "old", rows, "V1")
    repack(tmp_path / "old", tmp_path / "new", config(), samples_per_shard=4)
    assert "1 row(s) had a text of their own for a caption that occurs before" in caplog.text


def test_a_store_is_repacked_into_other_shards_with_its_own_contract(tmp_path: Path, store_config: dict) -> None:
    folder = Path(store_config["dataset"]["base_dir"]) / "store"
    assert main(Namespace(source=str(folder), out=str(tmp_path / "new"), config=None, cfg_options=[], samples_per_shard=64)) == 0
    assert_same(StoreRows(folder, with_text=True), tmp_path / "new")
    ours, theirs = opened(tmp_path / "new").contract, opened(folder).contract
    assert ours is not None and theirs is not None and not theirs.differences(ours, ("latents", "text", "picture"))
    store = EncodedStore(tmp_path / "new", with_text=True)
    assert len(store.figures.shards) == 1 and torch.equal(store.empty_text(), EncodedStore(folder, with_text=True).empty_text())
    from OpenSciDraw.encode.verify import verify_main

    assert verify_main(str(tmp_path / "new"), 0, str(tmp_path / "pictures"), []) == 0
    columns = ["id", "placement", "bucket_w", "bucket_h", "aspect_ratio", "text_key"]
    old, new = (
        pa.concat_tables([pq.read_table(shard, columns=columns) for shard in path.glob("figures/*.parquet")]).sort_by("id")
        for path in (folder, tmp_path / "new")
    )
    assert old.to_pylist() == new.to_pylist()


def test_damaged_rows_of_a_store_are_rejected(tmp_path: Path, store_config: dict) -> None:
    import shutil

    shutil.copytree(Path(store_config["dataset"]["base_dir"]) / "store", tmp_path / "old")
    figures = StoreRows(tmp_path / "old", with_text=True).store.figures
    with (tmp_path / "old" / "figures" / "00000.parquet").open("r+b") as file:
        file.seek(int(figures.numbers("offset")[3]))
        file.write(b"\x00\x01\x02\x03")
    repack(tmp_path / "old", tmp_path / "new")
    assert list(rejected(tmp_path / "new")) == [figures.value("id", 3)]
    assert len(opened(tmp_path / "new")) == len(figures) - 1


def test_refusals_say_what_to_do(tmp_path: Path, rows: list[dict], store_config: dict) -> None:
    store = Path(store_config["dataset"]["base_dir"]) / "store"
    write_layout(tmp_path / "old", rows, "V1")
    with pytest.raises(UserError, match="Declare it by a config"):
        repack(tmp_path / "old", tmp_path / "new")
    with pytest.raises(UserError, match="Leave --config out"):
        repack(store, tmp_path / "new", config())
    for out in (tmp_path / "old", tmp_path / "old" / "2015" / "new", tmp_path):
        with pytest.raises(UserError, match="overlap"):
            repack(tmp_path / "old", out, config())
    with pytest.raises(UserError, match="dataset.contract: max_sequence_length = 512"):
        repack(tmp_path / "old", tmp_path / "new", config(dataset={"contract": {"max_sequence_length": 512}}))
    with pytest.raises(UserError, match="not of the declared model.*max_sequence_length = 128"):
        repack(tmp_path / "old", tmp_path / "new", config(max_sequence_length=128))
    assert not (tmp_path / "new").exists()
    repack(tmp_path / "old", tmp_path / "new", config(), samples_per_shard=4)
    with pytest.raises(UserError, match="not of this source"):
        repack(tmp_path / "old", tmp_path / "new", config(), samples_per_shard=8)
    info = read_shard_info(tmp_path / "new" / "figures" / "00000.parquet")
    assert info is not None and info.facts["rows"] == 4


def test_text_is_stored_as_the_config_says_and_not_rounded_twice(tmp_path: Path, rows: list[dict]) -> None:
    from OpenSciDraw.store import codec as text_codec

    write_layout(tmp_path / "old", rows, "V1")
    repack(tmp_path / "old", tmp_path / "new", config(encode={"text_storage": "int8"}))
    old, new = samples(LegacyRows(tmp_path / "old")), samples(StoreRows(tmp_path / "new", with_text=True))
    for name, sample in old.items():
        assert sample.text is not None
        data = bytearray(text_codec.encode(sample.text.bfloat16(), "int8"))
        expected = text_codec.decode(torch.frombuffer(data, dtype=torch.uint8), sample.text.shape, "int8")
        assert torch.equal(new[name].text, expected)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="text stored as int8 would be rounded a second time"):
        repack(tmp_path / "new", tmp_path / "again")


def test_the_command_reads_its_config(tmp_path: Path, rows: list[dict]) -> None:
    write_layout(tmp_path / "old", rows, "V1")
    path = write_config(tmp_path / "c.py", {**BASE, "dataset": {"type": "ArXiVParquetDatasetV2", "base_dir": "."}})
    arguments = Namespace(source=str(tmp_path / "old"), out=str(tmp_path / "new"), config=str(path), samples_per_shard=256,
                          cfg_options=["text=online"])  # fmt: skip
    assert main(arguments) == 0
    assert not (tmp_path / "new" / "text").exists() and len(StoreRows(tmp_path / "new", with_text=False)) == len(rows)
