"""The store: what is written is read back to the bit, whole or not at all, and never by another contract."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from OpenSciDraw.datasets.arxiv_parquet import ArXiVParquetDatasetV2
from OpenSciDraw.datasets.batch import BadRow
from OpenSciDraw.errors import UserError
from OpenSciDraw.store.contract import Contract
from OpenSciDraw.store.encoded import EncodedStore
from OpenSciDraw.store.shard import (
    FIGURE_PARTS,
    FIGURE_SCHEMA,
    TEXT_PARTS,
    TEXT_SCHEMA,
    Row,
    index_path,
    mended_shard_info,
    require_space,
    text_key,
    what_is_damaged,
    write_shard,
)
from OpenSciDraw.store.table import StoreTable

CONTRACT = Contract("Flux2Klein", {"source": "x"}, {"vae": "V", "fingerprint": "aa"}, {"layers": [9, 18, 27]})


def figure_row(number: int, caption: str, shape: tuple[int, ...] = (4, 6, 8)) -> Row:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(number))
    columns = {
        "id": f"paper{number}/fig.png", "caption": caption, "text_key": text_key(caption), "bucket_w": 64, "bucket_h": 48,
        "aspect_ratio": 0.75, "placement": [0, 0, 64, 48],
    }  # fmt: skip
    return Row(columns, tensor)


def make_store(folder: Path, rows: int = 10, per_shard: int = 4) -> Path:
    captions = [f"caption {n % 3}" for n in range(rows)]
    for shard, start in enumerate(range(0, rows, per_shard)):
        part = [figure_row(n, captions[n]) for n in range(start, min(rows, start + per_shard))]
        write_shard(folder / "figures" / f"{shard:05d}.parquet", FIGURE_SCHEMA, part, CONTRACT, {"work": "w"})
    text = [Row({"key": text_key(c), "caption": c}, torch.full((3, 5), float(len(c)))) for c in ["", *sorted(set(captions))]]
    write_shard(folder / "text" / "00000.parquet", TEXT_SCHEMA, text, CONTRACT, {"work": "w"})
    return folder


def test_tensors_come_back_bit_for_bit_and_any_parquet_reader_sees_the_same(tmp_path: Path) -> None:
    store = EncodedStore(make_store(tmp_path), with_text=True)
    foreign = pa.concat_tables([pq.read_table(p) for p in sorted((tmp_path / "figures").glob("*.parquet"))])
    for row in range(10):
        expected = figure_row(row, "").tensor.to(torch.bfloat16)
        assert torch.equal(store.figures.tensor(row), expected)
        data = foreign.column("tensor")[row].as_py()
        assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(4, 6, 8), expected)


def test_the_layout_is_one_row_per_group_uncompressed_and_carries_contract_and_statistics(tmp_path: Path) -> None:
    make_store(tmp_path)
    metadata = pq.read_metadata(tmp_path / "figures" / "00000.parquet")
    assert metadata.num_row_groups == metadata.num_rows == 4
    column = metadata.row_group(0).column(FIGURE_SCHEMA.get_field_index("tensor"))
    assert column.compression == "UNCOMPRESSED" and set(column.encodings) <= {"PLAIN", "RLE"}
    assert Contract.from_json(metadata.metadata[b"contract"]) == CONTRACT
    assert b'"mean"' in metadata.metadata[b"facts"]


def test_captions_are_stored_once_and_joined_by_content(tmp_path: Path) -> None:
    store = EncodedStore(make_store(tmp_path), with_text=True)
    assert store.text is not None and len(store.text) == 4
    for row in range(10):
        assert store.text.value("caption", int(store.text_row[row])) == store.figures.value("caption", row)
    assert torch.equal(store.empty_text(), torch.zeros(3, 5, dtype=torch.bfloat16))


def test_another_contract_is_refused_and_each_field_named(tmp_path: Path) -> None:
    other = Contract("Flux2Klein", {"source": "y"}, {"vae": "W", "fingerprint": "bb"}, {"layers": [10, 20, 30]})
    with pytest.raises(UserError, match=r"(?s)latents.fingerprint: 'aa' here, 'bb' there.*latents.vae.*text.layers") as error:
        CONTRACT.require(other, ("latents", "text"), tmp_path)
    assert "source" not in str(error.value)  # where a model lies is no difference
    unknown = Contract("Flux2Klein", {}, {"vae": "V", "fingerprint": None}, {"layers": [9, 18, 27]})
    CONTRACT.require(unknown, ("latents", "text"), tmp_path)  # a fingerprint that nobody knows cannot differ


def test_a_shard_of_another_contract_among_the_others_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path)
    other = Contract("Flux2Klein", {}, {"vae": "V", "fingerprint": "bb"})
    write_shard(tmp_path / "figures" / "00009.parquet", FIGURE_SCHEMA, [figure_row(1, "a")], other, {})
    with pytest.raises(UserError, match="(?s)00009.*fingerprint"):
        EncodedStore(tmp_path, with_text=False)


def test_a_shard_without_index_is_unfinished(tmp_path: Path) -> None:
    make_store(tmp_path)
    index_path(tmp_path / "figures" / "00001.parquet").unlink()
    with pytest.raises(UserError, match="00001.*interrupted"):
        StoreTable(tmp_path / "figures", FIGURE_PARTS)


def test_a_failed_write_leaves_no_shard(tmp_path: Path) -> None:
    def rows():  # type: ignore[no-untyped-def]
        yield figure_row(0, "a")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "00000.parquet", FIGURE_SCHEMA, rows(), CONTRACT, {})
    assert not (tmp_path / "00000.parquet").exists() and not index_path(tmp_path / "00000.parquet").exists()


def test_damage_is_found_row_by_row_and_by_verify(tmp_path: Path) -> None:
    store = EncodedStore(make_store(tmp_path), with_text=True)
    path = store.figures.shard_of(2)
    data = bytearray(path.read_bytes())
    data[int(store.figures.numbers("offset")[2]) + 7] ^= 1
    path.write_bytes(data)
    dataset = ArXiVParquetDatasetV2(base_dir=str(tmp_path))
    bad = dataset.read(2)
    assert isinstance(bad, BadRow) and "checksum" in bad.reason and bad.id == "paper2/fig.png"
    with pytest.raises(ValueError, match="sha256"):
        store.figures.verify_shard(0)
    batch = dataset.batch([2, 5])  # the bad row is replaced by another of its bucket, and named
    assert [b.id for b in batch.bad] == ["paper2/fig.png"] and len(batch.sample_ids) == 2
    path.write_bytes(data[: int(store.figures.numbers("offset")[3]) + 9])
    with pytest.raises(ValueError, match="cut short"):
        EncodedStore(tmp_path, with_text=False).figures.tensor(3)


def test_latents_only_needs_text_online(tmp_path: Path) -> None:
    import shutil

    make_store(tmp_path)
    shutil.rmtree(tmp_path / "text")
    with pytest.raises(UserError, match="text = 'online'"):
        EncodedStore(tmp_path, with_text=True)
    assert ArXiVParquetDatasetV2(base_dir=str(tmp_path), with_text=False).batch([0]).text is None


def test_held_out_rows_do_not_depend_on_order_and_are_at_most_a_tenth(tmp_path: Path) -> None:
    dataset = ArXiVParquetDatasetV2(base_dir=str(make_store(tmp_path, rows=40)))
    assert len(dataset.held_out(64)) == 4 and len(dataset.held_out(2)) == 2
    assert set(dataset.held_out(2)) <= set(dataset.held_out(4))


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="text = 'online'"):
        require_space(tmp_path / "not" / "yet", 10**18, ["x"])


def test_an_index_of_100000_rows_opens_within_two_seconds_and_captions_stay_on_disk(tmp_path: Path) -> None:
    """The index files as `encode` leaves them: 400 shards of 256; the tensors are never touched."""
    import resource

    from OpenSciDraw.store.shard import index_schema, write_index

    caption = "The figure illustrates a pipeline. " * 100  # 3.5 kB, as long captions are
    row = {k: v for k, v in figure_row(0, caption).columns.items()} | {"shape": [4, 6, 8], "xxh3": 0, "offset": 0, "nbytes": 1}
    schema = index_schema(FIGURE_SCHEMA, CONTRACT, {"rows": 256})
    for shard in range(391):
        path = tmp_path / "figures" / f"{shard:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        write_index(path, pa.Table.from_pylist([{**row, "id": f"{shard}/{n}"} for n in range(256)], schema=schema))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    table = StoreTable(tmp_path / "figures", FIGURE_PARTS)
    numbers = np.stack([table.numbers("bucket_h"), table.numbers("bucket_w")])
    seconds = time.perf_counter() - start
    assert len(table) == 100_096 and numbers.shape == (2, 100_096)
    assert seconds < 2.0
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 100  # MB; captions are 350 MB


def test_forked_processes_read_side_by_side_from_files_that_were_open_before(store_config: dict) -> None:
    """Data workers inherit open files, and with them one place in each: reads must not depend on it."""
    import multiprocessing
    from pathlib import Path

    from OpenSciDraw.store.shard import FIGURE_PARTS
    from OpenSciDraw.store.table import StoreTable

    table = StoreTable(Path(store_config["dataset"]["base_dir"]) / "store" / "figures", FIGURE_PARTS)
    for row in range(len(table)):
        table.tensor(row)  # every file is open now

    def read(failed) -> None:  # type: ignore[no-untyped-def]
        try:
            for turn in range(2000):
                table.tensor(turn % len(table))
        except ValueError:
            failed.set()

    context = multiprocessing.get_context("fork")
    failed = context.Event()
    workers = [context.Process(target=read, args=(failed,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed.is_set()


# -- the index and its seal ----------------------------------------------------------------------------
def test_every_flipped_bit_of_an_index_is_noticed_before_anything_of_it_is_believed(tmp_path: Path) -> None:
    index = index_path(make_store(tmp_path) / "text" / "00000.parquet")
    whole, unnoticed = index.read_bytes(), []
    table = StoreTable(tmp_path / "text", TEXT_PARTS)
    assert table.numbers("key") is not None
    for bit in np.random.default_rng(0).permutation(8 * len(whole))[:1200].tolist():
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        index.write_bytes(data)
        if not what_is_damaged(index):
            unnoticed.append(bit)
    assert not unnoticed
    with pytest.raises(UserError, match=r"00000.index.arrow: the index of this shard is damaged .*made anew"):
        StoreTable(tmp_path / "text", TEXT_PARTS)
    for size in (0, 5, 7, len(whole) - 1, len(whole) // 2):
        index.write_bytes(whole[:size])
        assert what_is_damaged(index)


def test_an_index_without_a_seal_is_read_as_before(tmp_path: Path) -> None:
    index = index_path(make_store(tmp_path) / "figures" / "00000.parquet")
    index.write_bytes(index.read_bytes()[:-16])
    assert index.read_bytes()[-6:] == b"ARROW1" and len(StoreTable(tmp_path / "figures", FIGURE_PARTS)) == 10


def test_a_damaged_index_is_made_anew_from_its_shard_byte_for_byte(tmp_path: Path) -> None:
    shard = make_store(tmp_path) / "figures" / "00000.parquet"
    index, whole = index_path(shard), index_path(shard).read_bytes()
    index.write_bytes(whole[:100] + b"\0" + whole[101:])
    info = mended_shard_info(shard)
    assert info is not None and info.facts["rows"] == 4 and index.read_bytes() == whole


@pytest.mark.parametrize("where", ["tensor", "caption"])
def test_an_index_is_not_made_from_a_damaged_shard(where: str, tmp_path: Path) -> None:
    shard = make_store(tmp_path) / "figures" / "00000.parquet"
    index, data = index_path(shard), bytearray(shard.read_bytes())
    at = int(StoreTable(tmp_path / "figures", FIGURE_PARTS).numbers("offset")[1]) if where == "tensor" else data.index(b"caption 2")
    data[at + 4] ^= 1
    shard.write_bytes(data)
    index.write_bytes(index.read_bytes()[:-20])
    assert mended_shard_info(shard) is None


# -- numbers that are not finite -----------------------------------------------------------------------
def with_numbers(folder: Path, value: float) -> Path:
    """A store as versions before 0.5.0 wrote it, with one such number in a row's latents."""
    make_store(folder)
    bad = figure_row(2, "caption 2")
    bad.tensor[0, 1, 2] = value
    rows = [bad if number == 2 else figure_row(number, f"caption {number % 3}") for number in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("OpenSciDraw.store.shard.math.isfinite", lambda number: True)
        write_shard(folder / "figures" / "00000.parquet", FIGURE_SCHEMA, rows, CONTRACT, {})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_found_by_reading_and_by_verify(value: float, tmp_path: Path) -> None:
    dataset = ArXiVParquetDatasetV2(base_dir=str(with_numbers(tmp_path, value)))
    bad = dataset.read(2)
    assert isinstance(bad, BadRow) and bad.id == "paper2/fig.png" and "not finite: 1 of 192" in bad.reason
    assert not isinstance(dataset.read(1), BadRow)
    with pytest.raises(ValueError, match="row 2: numbers that are not finite: 1 of 192"):
        StoreTable(tmp_path / "figures", FIGURE_PARTS).verify_shard(0)


def test_a_shard_is_not_written_with_them(tmp_path: Path) -> None:
    bad = figure_row(0, "caption 0")
    bad.tensor[0, 1, 2] = float("nan")
    with pytest.raises(ValueError, match="the figure 'paper0/fig.png' has numbers that are not finite: 1 of 192"):
        write_shard(tmp_path / "00000.parquet", FIGURE_SCHEMA, [bad], CONTRACT, {})
