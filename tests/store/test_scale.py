"""Many rows: what opening, ordering and handing on a store costs, and that it is the same store as ever."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import REPO
from test_store import CONTRACT, figure_row, make_store

from OpenSciDraw.datasets.arxiv_parquet import ArXiVParquetDatasetV2
from OpenSciDraw.datasets.batch import BadRow
from OpenSciDraw.datasets.mix_scale_sampler import ArXiVMixScaleBatchSampler, _covered
from OpenSciDraw.store import shard as shards
from OpenSciDraw.store.encoded import EncodedStore
from OpenSciDraw.store.shard import FIGURE_PARTS, FIGURE_SCHEMA, index_path, write_shard
from OpenSciDraw.store.table import StoreTable

sys.path.insert(0, str(REPO / "benchmarks"))
import run_million  # noqa: E402

ROWS = 60_000


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    run_million.Synthetic(folder, ROWS, 1024, caption_chars=(100, 200)).write()
    return folder


def test_opening_keeps_arrays_and_no_object_for_each_row(many: Path) -> None:
    before, start = run_million.memory(), time.perf_counter()
    dataset = ArXiVParquetDatasetV2(base_dir=str(many))
    assert time.perf_counter() - start < 2.0
    assert run_million.memory()[0] - before[0] < 40  # MB; 400 are allowed for a million rows
    sent = pickle.dumps(dataset)
    assert len(sent) < 160 * ROWS  # what a data worker that is not forked gets: no captions
    again = pickle.loads(sent)
    for row in (0, 1023, 1024, ROWS - 1):
        ours, theirs = dataset.read(row), again.read(row)
        assert not isinstance(ours, BadRow) and not isinstance(theirs, BadRow)
        assert (ours.id, ours.caption) == (theirs.id, theirs.caption) and 100 <= len(ours.caption) < 200


def test_strings_read_by_position_are_those_of_the_index(many: Path, tmp_path: Path) -> None:
    figures = EncodedStore(many, with_text=True).figures
    table = figures.table
    for row in (0, 1, 1023, 1024, 31_111, ROWS - 1):
        for column in ("id", "caption", "placement", "bucket_w"):
            assert figures.value(column, row) == table.column(column)[row].as_py()
    odd = ["", "Größe → 漢字", "\N{MATHEMATICAL BOLD CAPITAL A}" * 3]
    write_shard(tmp_path / "00000.parquet", FIGURE_SCHEMA, [figure_row(n, c) for n, c in enumerate(odd)], CONTRACT, {})
    assert [StoreTable(tmp_path, FIGURE_PARTS).value("caption", row) for row in range(3)] == odd


def test_rows_held_out_and_buckets_are_those_of_earlier_versions(many: Path) -> None:
    """Runs that were begun before must hold out the same rows, and keep their order."""
    dataset = ArXiVParquetDatasetV2(base_dir=str(many))
    ids = EncodedStore(many, with_text=False).figures.table.column("id").to_pylist()
    keys = np.array([int.from_bytes(hashlib.blake2b(i.encode(), digest_size=8).digest(), "big") for i in ids])
    assert dataset.held_out(64).tolist() == np.sort(np.argsort(keys, kind="stable")[:64]).tolist()
    expected = np.unique(dataset.buckets, axis=0, return_inverse=True)[1].reshape(-1)
    assert np.array_equal(dataset.bucket_of, expected)


def test_captions_are_joined_to_their_embeddings_whatever_their_order(many: Path) -> None:
    store = EncodedStore(many, with_text=True)
    assert store.text is not None
    figures = store.figures.table.column("text_key").to_pylist()
    texts = store.text.table.column("key").to_pylist()
    assert all(texts[store.text_row[row]] == figures[row] for row in range(0, ROWS, 97))


def test_the_rows_of_the_first_steps_are_found_without_a_loop() -> None:
    buckets = np.random.default_rng(0).integers(0, 5, 1000)
    plan = ArXiVMixScaleBatchSampler(buckets, batch_size=3, num_replicas=2)._plan()
    order, start, size = plan
    for steps in (0, 1, 17, len(start)):
        expected = {row for at, n in zip(start[:steps].ravel(), size[:steps].ravel(), strict=True) for row in order[at : at + n]}
        assert set(_covered(plan, steps).tolist()) == expected


def test_shards_of_the_first_version_are_read_and_checked_beside_new_ones(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    make_store(tmp_path, rows=8, per_shard=4)
    fields = [pa.field("crc32", pa.uint32(), nullable=False) if f.name == "xxh3" else f for f in FIGURE_SCHEMA]
    monkeypatch.setattr(shards, "_CHECKSUM", "crc32")
    first = shards.Contract(CONTRACT.family, CONTRACT.origin, CONTRACT.latents, CONTRACT.text, schema=1)
    old = tmp_path / "figures" / "00002.parquet"
    write_shard(old, pa.schema(fields), [figure_row(n, "caption 0") for n in range(8, 12)], first, {"work": "w"})
    monkeypatch.undo()
    table = EncodedStore(tmp_path, with_text=True).figures
    assert [json.loads(info.contract.to_json())["schema"] for info in table.infos] == [2, 2, 1]
    for row in range(12):
        assert torch.equal(table.tensor(row), figure_row(row, "").tensor.bfloat16())
    for shard in range(3):
        table.verify_shard(shard)
    data = bytearray(old.read_bytes())
    data[int(table.numbers("offset")[9]) + 1] ^= 1
    old.write_bytes(data)
    table = EncodedStore(tmp_path, with_text=True).figures
    with pytest.raises(ValueError, match="row 9.*checksum"):
        table.tensor(9)
    newer = shards.Contract(CONTRACT.family, CONTRACT.origin, CONTRACT.latents, CONTRACT.text, schema=3)
    assert "schema: 2 here, 3 there" in CONTRACT.differences(newer, ())[0]


def test_a_row_is_checked_the_first_time_it_is_read(tmp_path: Path) -> None:
    table = EncodedStore(make_store(tmp_path), with_text=True).figures
    table.tensor(1, check=False)
    data = bytearray(table.shards[0].read_bytes())
    data[int(table.numbers("offset")[1]) + 1] ^= 1
    table.shards[0].write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        table.tensor(1)
    with pytest.raises(ValueError, match="checksum"):  # and again, until it is right
        table.tensor(1)


def test_a_store_whose_shards_are_all_empty_says_so(tmp_path: Path) -> None:
    from OpenSciDraw.errors import UserError

    write_shard(tmp_path / "figures" / "00000.parquet", FIGURE_SCHEMA, [], CONTRACT, {})
    with pytest.raises(UserError, match="no rows.*rejected.jsonl"):
        EncodedStore(tmp_path, with_text=False)
    assert index_path(tmp_path / "figures" / "00000.parquet").exists()


@pytest.mark.slow
def test_a_million_rows_open_within_three_seconds_and_400_mb(tmp_path: Path) -> None:
    """Captions of 500 to 2000 characters; opened in a process of its own, whose memory is its own."""
    run_million.Synthetic(tmp_path, 1_000_000, 1024).write()
    done = [
        subprocess.run([sys.executable, run_million.__file__, str(tmp_path)], check=True, capture_output=True, text=True)
        for _ in range(3)
    ]
    found = min((json.loads(run.stdout.splitlines()[-1]) for run in done), key=lambda run: run["open_seconds"])
    assert found["rows"] == 1_000_000
    assert found["open_seconds"] < 3 and found["order_seconds"] < 2
    assert found["private_mb"] < 400
    assert found["fork_worker_seconds"] < 2 and found["spawn_worker_seconds"] < found["spawn_of_nothing_seconds"] + 4
