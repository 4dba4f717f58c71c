"""`scienceflow encode` and `verify`: the store is what the model makes of each figure, whatever happens meanwhile."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BASE, REPO, merged, write_config
from PIL import Image

from OpenSciDraw.config import Config
from OpenSciDraw.datasets.arxiv_parquet import ArXiVParquetDatasetV2
from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.encode import run as encode
from OpenSciDraw.encode import shards as encode_shards
from OpenSciDraw.encode import verify
from OpenSciDraw.encode import work as encode_work
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.buckets import best_bucket, fit
from OpenSciDraw.figures.listing import list_figures, load_figure
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.models.flux2_klein import Flux2Klein
from OpenSciDraw.store.encoded import EncodedStore
from OpenSciDraw.store.shard import index_path

DRAWN = {"figures": "drawn:20", "resolution": 128, "samples_per_shard": 6, "num_workers": 0, "batch_size": 4}


def values_for(folder: Path, **changes: object) -> dict:
    """Config values for a store at folder/store."""
    dataset = {"type": "ArXiVParquetDatasetV2", "base_dir": str(folder), "parquet_base_path": "store"}
    return merged({**BASE, "dataset": dataset, "encode": DRAWN}, **changes)


def run_encode(folder: Path, **changes: object) -> Path:
    assert encode.main(Config.model_validate(values_for(folder, **changes))) == 0
    return folder / "store"


def contents(store: Path) -> dict[str, str]:
    """sha256 of every file, temporary ones as well."""
    files = [path for path in store.rglob("*") if path.is_file()]
    return {path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def finished(store: Path) -> dict[Path, tuple[int, int]]:
    """Inode and time of every shard that has an index."""
    shards = [shard for shard in store.glob("*/*.parquet") if index_path(shard).exists()]
    return {shard: (shard.stat().st_ino, shard.stat().st_mtime_ns) for shard in shards}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that one process makes, undisturbed. Not to be changed."""
    return run_encode(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A store to harm; its config values are those of `values_for(tmp_path)`."""
    return Path(shutil.copytree(whole, tmp_path / "store"))


# -- what is stored --------------------------------------------------------------------------------
def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is that large; little more of it is there."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(b"\0" * 1000)
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, pixels, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Figures as users have them: many modes and sizes, two with one caption, and eleven of no use."""
    folder = tmp_path_factory.mktemp("figures")
    good = draw_figure(seed=5, index=0, size=160).image
    pictures = {
        "rgb.png": good, "photo.jpg": good.resize((200, 90)), "deep/er.webp": good.resize((90, 200)),
        "alpha.png": good.convert("RGBA"), "palette.gif": good.convert("P"), "cmyk.tif": good.convert("CMYK"),
        "sixteen.png": Image.fromarray(np.asarray(good.convert("L")).astype(np.uint16) * 257),
        "line.png": Image.new("RGB", (1, 400)), "long.png": Image.new("RGB", (2000, 40)), "small.png": Image.new("RGB", (16, 16)),
        "silent.png": good, "blank.png": good, "latin.png": good,
    }  # fmt: skip
    for name, picture in pictures.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        path.with_suffix(".txt").write_text("the same" if name in ("rgb.png", "alpha.png") else f"caption of {name}")
    (folder / "silent.txt").unlink()
    (folder / "blank.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    whole_file = (folder / "rgb.png").read_bytes()
    for name, data in {
        "cut.png": whole_file[: len(whole_file) // 2], "nothing.png": b"", "words.png": b"no picture at all",
        "bomb.png": png_header(20_000, 20_000), "vector.pdf": b"%PDF-1.4",
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    return folder


REASONS = {
    "blank.png": "empty caption", "bomb.png": "too large", "cut.png": "truncated", "latin.png": "caption not UTF-8",
    "line.png": "too small", "long.png": "too long", "nothing.png": "empty file", "silent.png": "no caption",
    "small.png": "too small", "vector.pdf": "vector format", "words.png": "not an image",
}  # fmt: skip


def assert_close_to_a_bf16(stored: torch.Tensor, direct: torch.Tensor) -> None:
    """Equal but for rounding: in a batch sums are taken in another order, so the neighbouring bf16 may be nearest."""
    torch.testing.assert_close(stored.float(), direct, rtol=2**-8, atol=1e-5)
    assert (stored == direct.to(torch.bfloat16)).float().mean() > 0.95


def assert_rows_are_direct_encodings(store: EncodedStore, source: str, model) -> None:  # type: ignore[no-untyped-def]
    refs = {ref.id: ref for ref in list_figures(source)[0]}
    for row in range(len(store.figures)):
        ref = refs[store.figures.value("id", row)]
        image = load_figure(ref)
        bucket = best_bucket(image.width, image.height, 128)
        fitted, box = fit(image, bucket)
        assert (store.figures.value("bucket_h", row), store.figures.value("bucket_w", row)) == (bucket.height, bucket.width)
        assert store.figures.value("placement", row) == list(box)
        assert store.figures.value("aspect_ratio", row) == pytest.approx(image.height / image.width)
        assert store.figures.value("caption", row) == ref.caption
        pixels = torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        assert_close_to_a_bf16(store.figures.tensor(row), model.encode_images(pixels)[0])


def assert_text_is_direct_encoding(store: EncodedStore, model) -> None:  # type: ignore[no-untyped-def]
    assert store.text is not None
    for row in range(len(store.text)):
        assert_close_to_a_bf16(store.text.tensor(row), model.encode_prompts([store.text.value("caption", row)])[0])
    for row in range(len(store.figures)):
        assert store.text.value("caption", int(store.text_row[row])) == store.figures.value("caption", row)
    assert torch.equal(store.empty_text(), store.text.tensor(0)) and store.text.value("caption", 0) == ""


def test_rows_of_drawn_figures_are_what_the_model_makes_of_them(whole: Path, tiny) -> None:  # type: ignore[no-untyped-def]
    store = EncodedStore(whole, with_text=True)
    refs, _ = list_figures("drawn:20")
    assert sorted(store.figures.table.column("id").to_pylist()) == sorted(ref.id for ref in refs)
    assert store.text is not None and len(store.text) == len({ref.caption for ref in refs}) + 1
    assert_rows_are_direct_encodings(store, "drawn:20", tiny)
    assert_text_is_direct_encoding(store, tiny)
    assert (whole / "rejected.jsonl").read_text() == ""


def test_text_is_bit_for_bit_that_of_the_same_batches(whole: Path, tiny) -> None:  # type: ignore[no-untyped-def]
    store = EncodedStore(whole, with_text=True)
    assert store.text is not None
    captions = store.text.table.column("caption").to_pylist()
    for start in range(0, 6, 4):  # the first shard
        batch = captions[start : min(start + 4, 6)]
        for row, direct in enumerate(tiny.encode_prompts(batch), start):
            assert torch.equal(store.text.tensor(row), direct.to(torch.bfloat16))


def test_a_folder_of_good_and_hostile_figures(mixed_folder: Path, tmp_path: Path, tiny) -> None:  # type: ignore[no-untyped-def]
    folder = run_encode(tmp_path, encode={"figures": str(mixed_folder), "num_workers": 2})
    store = EncodedStore(folder, with_text=True)
    good = {"rgb.png", "photo.jpg", "deep/er.webp", "alpha.png", "palette.gif", "cmyk.tif", "sixteen.png"}
    assert set(store.figures.table.column("id").to_pylist()) == good and len(store.figures) == len(good)
    assert_rows_are_direct_encodings(store, str(mixed_folder), tiny)
    assert_text_is_direct_encoding(store, tiny)
    captions = store.text.table.column("caption").to_pylist() if store.text else []
    assert captions.count("the same") == 1 and len(set(captions)) == len(captions)

    lines = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert Counter(line["id"] for line in lines) == Counter(REASONS.keys())  # each of them once
    for line in lines:
        assert line["reason"].startswith(REASONS[line["id"]]), line
        assert line["source"] == str(mixed_folder / line["id"])

    before = finished(folder)
    run_encode(tmp_path, encode={"figures": str(mixed_folder)})  # nothing to do; the rejected are still listed
    assert finished(folder) == before
    assert [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()] == lines
    run_encode(tmp_path, encode={"figures": str(mixed_folder), "min_side": 16, "max_upscale": 8})  # other limits
    assert "small.png" not in (folder / "rejected.jsonl").read_text()
    assert "small.png" in EncodedStore(folder, with_text=True).figures.table.column("id").to_pylist()


def test_rows_of_a_shard_lie_bucket_by_bucket(whole: Path) -> None:
    store = EncodedStore(whole, with_text=False)
    for shard in range(len(store.figures.shards)):
        rows = np.flatnonzero(store.figures._shard_of == shard)
        sides = [(store.figures.value("bucket_h", row), store.figures.value("bucket_w", row)) for row in rows.tolist()]
        assert sides == sorted(sides)


def test_online_text_writes_no_text_and_stored_text_can_follow(whole: Path, tmp_path: Path) -> None:
    folder = run_encode(tmp_path, text="online")
    assert not (folder / "text").exists()
    assert ArXiVParquetDatasetV2(base_dir=str(folder), with_text=False).batch([0]).text is None
    before = finished(folder)
    run_encode(tmp_path)
    assert contents(folder) == contents(whole)
    assert before.items() <= finished(folder).items()
    run_encode(tmp_path, text="online")  # text that is there is no stranger
    assert contents(folder) == contents(whole)


# -- killed and resumed ----------------------------------------------------------------------------
def encode_and_die(values: dict, at: int, before: bool) -> None:
    """Encode, and SIGKILL this process just before or after its `at`-th file gets its final name."""
    replace, count = os.replace, 0

    def counted(source, target) -> None:  # type: ignore[no-untyped-def]
        nonlocal count
        count += 1
        if not before:
            replace(source, target)
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        if before:
            replace(source, target)

    os.replace = counted  # type: ignore[assignment]
    encode.main(Config.model_validate(values))


def forked(target: Callable[..., None], *arguments: object) -> int | None:
    """Exit code of a function run in a process of its own (which has everything imported already)."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def test_killed_again_and_again_nothing_is_encoded_twice_but_the_shard_in_flight(whole: Path, tmp_path: Path) -> None:
    """Files get their names in the order: shard, its index, next shard, …, rejected.jsonl."""
    values, store = values_for(tmp_path), tmp_path / "store"
    kept: dict[Path, tuple[int, int]] = {}
    unfinished = 0
    for at, before in ((1, True), (1, False), (2, True), (4, False), (3, False), (2, False), (5, True)):
        assert forked(encode_and_die, values, at, before) == -signal.SIGKILL
        now = finished(store)
        assert kept.items() <= now.items()  # finished shards are those of before, not written again
        assert len(now) <= len(kept) + at // 2
        kept = now
        unfinished += any(not index_path(shard).exists() for shard in store.glob("*/*.parquet"))
    assert unfinished >= 2  # it was also killed between shard and index
    assert 6 <= len(kept) < 8 and not (store / "rejected.jsonl").exists()
    run_encode(tmp_path)
    assert kept.items() <= finished(store).items()
    assert contents(store) == contents(whole)


@pytest.mark.slow
def test_killed_by_the_clock_in_the_middle_of_shards(whole: Path, tmp_path: Path) -> None:
    """The real command; then processes killed while the temporary file of a shard grows."""
    values, store = values_for(tmp_path), tmp_path / "store"
    config = write_config(tmp_path / "c.py", values)
    command = [sys.executable, "-m", "OpenSciDraw.cli", "encode", str(config)]
    process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.DEVNULL)
    wait_and_kill(process.pid, store / "text" / ".00001.parquet.tmp", lambda: process.poll() is None)
    process.wait()
    assert not (store / "figures").exists()
    kept = finished(store)
    for name in ("text/.00003.parquet.tmp", "figures/.00001.parquet.tmp"):
        child = multiprocessing.get_context("fork").Process(target=encode.main, args=(Config.model_validate(values),))
        child.start()
        wait_and_kill(child.pid or 0, store / name, child.is_alive)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert kept.items() <= finished(store).items()
        kept = finished(store)
    run_encode(tmp_path)
    assert kept.items() <= finished(store).items()
    assert contents(store) == contents(whole)


def wait_and_kill(pid: int, file: Path, alive: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not file.exists():
        assert alive() and time.monotonic() < end, f"{file.name} never came"
        time.sleep(0.0002)
    os.kill(pid, signal.SIGKILL)


def test_a_shard_that_is_written_anew_is_never_left_with_its_old_index(copy: Path, tmp_path: Path) -> None:
    """Killed between the new shard and its index: training refuses it, and the next run mends it."""
    changed = values_for(tmp_path, encode={"min_side": 33})  # a limit that rejects nothing here
    assert forked(encode_and_die, changed, 1, False) == -signal.SIGKILL
    with pytest.raises(UserError, match="00000.parquet.*interrupted"):
        EncodedStore(copy, with_text=True)
    run_encode(tmp_path)
    EncodedStore(copy, with_text=True).figures.verify_shard(0)


def test_an_unfinished_store_is_said_to_be_one(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    ArXiVParquetDatasetV2(base_dir=str(copy))
    assert "not finished" not in caplog.text
    (copy / "rejected.jsonl").unlink()
    for shard in ("00002", "00003"):
        (copy / "figures" / f"{shard}.parquet").unlink()
        (copy / "figures" / f"{shard}.index.arrow").unlink()
    assert len(ArXiVParquetDatasetV2(base_dir=str(copy))) == 12
    assert "not finished: only the 12 figures" in caplog.text


# -- several processes -----------------------------------------------------------------------------
def encode_as(rank: int, world_size: int, values: dict) -> None:
    """With the environment that torchrun and `accelerate launch` set."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    encode.main(Config.model_validate(values))


def test_two_processes_at_once_make_the_store_that_one_makes(whole: Path, tmp_path: Path) -> None:
    """There is nobody to rendezvous with: a collective would fail."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=encode_as, args=(rank, 2, values_for(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert contents(tmp_path / "store") == contents(whole)


def test_each_process_has_its_own_shards_and_the_last_one_closes_the_store(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, mine in ((2, {"00002"}), (0, {"00000", "00003"}), (1, {"00001"})):
        monkeypatch.setenv("RANK", str(rank))
        assert not (tmp_path / "store" / "rejected.jsonl").exists()
        before = finished(tmp_path / "store")
        store = run_encode(tmp_path)
        assert {path.stem for path in finished(store).keys() - before.keys()} == mine
    assert contents(store) == contents(whole)


# -- changes and refusals --------------------------------------------------------------------------
def test_a_changed_caption_encodes_its_shard_alone(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for number in range(12):
        (pictures / f"{number:02d}.txt").parent.mkdir(exist_ok=True)
        draw_figure(seed=1, index=number, size=96).image.save(pictures / f"{number:02d}.png")
        (pictures / f"{number:02d}.txt").write_text(f"Figure number {number}.")
    changes = {"figures": str(pictures), "samples_per_shard": 4}
    store = run_encode(tmp_path, encode=changes)
    before = finished(store)
    (pictures / "06.txt").write_text("Another caption.")
    run_encode(tmp_path, encode=changes)
    after = finished(store)
    assert {path.relative_to(store).as_posix() for path in before if before[path] != after[path]} == {
        "figures/00001.parquet", "text/00001.parquet",
    }  # fmt: skip
    fresh = run_encode(tmp_path / "fresh", encode=changes)
    assert contents(fresh) == contents(store)


def test_a_damaged_index_is_made_anew_and_a_damaged_shard_encoded_again(whole: Path, copy: Path, tmp_path: Path) -> None:
    """One flipped bit in a key of text/ once sent the user in a circle: "run encode", "nothing is missing"."""
    before = finished(copy)
    for index in ("text/00001.index.arrow", "figures/00002.index.arrow"):
        flip(copy / index, (copy / index).stat().st_size // 2)
    flip(copy / "figures/00002.parquet", 5000)
    with pytest.raises(UserError, match="damaged.*made anew"):
        EncodedStore(copy, with_text=True)
    run_encode(tmp_path)
    assert contents(copy) == contents(whole)
    assert [path for path in before if finished(copy)[path] != before[path]] == [copy / "figures/00002.parquet"]


def test_a_caption_whose_embedding_is_not_finite_ends_encoding_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a text encoder does that overflows in fp16."""
    encode_prompts = Flux2Klein.encode_prompts

    def overflowing(model: Flux2Klein, prompts: list[str]) -> list[torch.Tensor]:
        found = encode_prompts(model, prompts)
        return [torch.where(torch.arange(len(row))[:, None] < 2, torch.nan, row) if prompt else row
                for prompt, row in zip(prompts, found, strict=True)]  # fmt: skip

    monkeypatch.setattr(Flux2Klein, "encode_prompts", overflowing)
    with pytest.raises(UserError, match=r"in torch.float32, gives numbers that are not finite \(\d+ of \d+\) for the caption"):
        run_encode(tmp_path)
    assert not finished(tmp_path / "store")


def test_a_figure_whose_latents_are_not_finite_is_rejected_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_images = Flux2Klein.encode_images

    def overflowing(model: Flux2Klein, pixels: torch.Tensor) -> torch.Tensor:
        latents = encode_images(model, pixels)
        latents[0, 0, 0, :3] = torch.inf
        return latents

    monkeypatch.setattr(Flux2Klein, "encode_images", overflowing)
    store = run_encode(tmp_path)
    rejected = [json.loads(line) for line in (store / "rejected.jsonl").read_text().splitlines()]
    assert rejected and {entry["reason"].rsplit(":")[0] for entry in rejected} == {"latents that are not finite"}
    assert rejected[0]["reason"].startswith("latents that are not finite: 3 of ")
    assert len(rejected) + len(EncodedStore(store, with_text=True).figures) == 20


def test_a_picture_that_was_replaced_by_one_of_the_same_size_is_encoded_again_and_a_touched_one_is_not(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(8):
        draw_figure(seed=1, index=number, size=96).image.save(pictures / f"{number}.bmp")  # all of one size in bytes
        (pictures / f"{number}.txt").write_text(f"Figure number {number}.")
    (pictures / "7.bmp").write_bytes(b"BM" + bytes((pictures / "6.bmp").stat().st_size - 2))  # rejected
    changes = {"figures": str(pictures), "samples_per_shard": 4}
    store = run_encode(tmp_path, encode=changes)
    before = finished(store)
    (pictures / "1.bmp").touch()
    run_encode(tmp_path, encode=changes)
    assert finished(store) == before
    shutil.copy2(pictures / "3.bmp", pictures / "1.bmp")  # with the time of its last writing
    run_encode(tmp_path, encode=changes)
    assert [path.name for path in before if finished(store)[path] != before[path]] == ["00000.parquet"]
    shutil.copy2(pictures / "6.bmp", pictures / "7.bmp")
    run_encode(tmp_path, encode=changes)
    assert len(EncodedStore(store, with_text=True).figures) == 8
    assert contents(run_encode(tmp_path / "fresh", encode=changes)) == contents(store)


def test_a_store_of_an_earlier_version_goes_on(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shards know no max_upscale and no hash of a picture."""
    plan = encode_work.plan_shards

    def earlier(folder, items, size, identity, before=None, first=0):  # type: ignore[no-untyped-def]
        return plan(folder, items, size, before or identity, first=first)

    shutil.rmtree(copy / "figures")
    with monkeypatch.context() as patched:
        patched.setattr(encode_work, "plan_shards", earlier)
        run_encode(tmp_path)
    before = finished(copy)
    run_encode(tmp_path)
    assert finished(copy) == before


def test_a_text_stage_that_goes_on_compares_its_tokenizer(copy: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(embedded_folder("flux2_klein_tiny_random"), tmp_path / "model"))
    (copy / "text" / "00001.index.arrow").unlink()
    settings = model / "tokenizer" / "chat_template.jinja"
    settings.write_text(settings.read_text() + "{# another #}")
    with pytest.raises(UserError, match="text.tokenizer: '[0-9a-f]{16}' here, '[0-9a-f]{16}' there"):
        run_encode(tmp_path, pretrained_model_name_or_path=str(model))


def test_a_store_made_in_another_way_is_refused_and_the_field_named(copy: Path, tmp_path: Path) -> None:
    before = contents(copy)
    with pytest.raises(UserError, match=r"(?s)text/00000.parquet.*text.max_sequence_length: 32 here, 64 there"):
        run_encode(tmp_path, max_sequence_length=32)
    with pytest.raises(UserError, match=r"(?s)figures/00000.parquet.*picture.resolution: 256 here, 128 there"):
        run_encode(tmp_path, encode={"resolution": 256})
    with pytest.raises(UserError, match="do not belong to this list.*figures/00002.parquet"):
        run_encode(tmp_path, encode={"max_figures": 12})
    assert contents(copy) == before


def test_the_size_is_printed_and_a_small_disk_refused_before_anything_is_written(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=written * 9 // 10))
        with caplog.at_level("INFO", "OpenSciDraw"), pytest.raises(UserError, match="Encoding needs about .* GB are free"):
            run_encode(tmp_path)
    assert not (tmp_path / "store").exists()
    found = re.search(r"together ([\d.]+) GB", caplog.text)
    assert found and float(found[1]) * 1e9 == pytest.approx(written, rel=0.05)

    caplog.clear()
    shutil.copytree(whole, tmp_path / "store")
    with caplog.at_level("INFO", "OpenSciDraw"):
        run_encode(tmp_path)
    assert "0 figures x" in caplog.text and "together 0.0000 GB" in caplog.text


def test_what_cannot_be_encoded_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="encode.figures is not set"):
        run_encode(tmp_path, encode={"figures": None})
    with pytest.raises(UserError, match="no figure source"):
        run_encode(tmp_path, encode={"figures": str(tmp_path / "nowhere")})
    online = {**BASE, "dataset": {"type": "FigureDataset", "figures": "drawn:4"}, "encode": DRAWN}
    with pytest.raises(UserError, match="nothing to encode beforehand"):
        encode.main(Config.model_validate(online))
    draw_figure(seed=1, index=0, size=96).image.save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match="lies inside encode.figures"):  # it would list its own shards when it is resumed
        run_encode(tmp_path, encode={"figures": str(tmp_path)})
    assert not (tmp_path / "store").exists()


def test_a_folder_where_every_picture_is_damaged_is_an_error_with_the_list_of_reasons(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"no picture")
    (pictures / "a.txt").write_text("a")
    with pytest.raises(UserError, match="Every figure was rejected"):
        run_encode(tmp_path, encode={"figures": str(pictures)})
    assert "not an image" in (tmp_path / "store" / "rejected.jsonl").read_text()


# -- verify ----------------------------------------------------------------------------------------
def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.square(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean()
    return float(10 * np.log10(255**2 / error))


def test_verify_passes_a_good_store_and_its_pictures_look_like_their_sources(copy: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.py", values_for(tmp_path))
    out = tmp_path / "pictures"
    assert verify.verify_main(str(config), 5, str(out), []) == 0
    assert verify.verify_main(str(copy), 5, None, []) == 0
    refs = {ref.id: ref for ref in list_figures("drawn:20")[0]}
    names = sorted(path.stem for path in out.glob("*.png"))
    assert len(names) == 5
    for name in names:
        identity, caption = (out / f"{name}.txt").read_text().rstrip("\n").split("\n", 1)
        image = load_figure(refs[identity])
        fitted, box = fit(image, best_bucket(image.width, image.height, 128))
        assert caption == refs[identity].caption
        assert psnr(Image.open(out / f"{name}.png"), fitted.crop(box)) > 15


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["figures", "text"])
def test_verify_names_the_shard_with_a_flipped_byte(copy: Path, part: str, tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    shard = copy / part / "00001.parquet"
    flip(shard, shard.stat().st_size // 3)  # inside a tensor
    config = write_config(tmp_path / "c.py", values_for(tmp_path))
    assert verify.verify_main(str(copy), 0, None, []) == 1
    assert str(shard) in caplog.text
    assert verify.verify_main(str(config), 20, str(tmp_path / "pictures"), []) == 1  # the others are still decoded
    assert len(list((tmp_path / "pictures").glob("*.png"))) == (19 if part == "figures" else 20)


def test_verify_finds_what_checksums_of_shards_do_not_show(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = copy / "figures" / "00002.index.arrow"
    caption = EncodedStore(copy, with_text=False).figures.value("caption", 12).encode()
    whole_index = index.read_bytes()
    flip(index, whole_index.index(caption) + 3)
    assert verify.verify_main(str(copy), 0, None, []) == 1
    assert f"{index}: the index of this shard is damaged (its checksum is another one)" in caplog.text
    index.write_bytes(index.read_bytes()[:-16])  # as versions before 0.5.0 wrote it
    assert verify.verify_main(str(copy), 0, None, []) == 1
    assert f"{index}: the index is not that of its shard" in caplog.text
    index.write_bytes(whole_index)
    assert verify.verify_main(str(copy), 0, None, []) == 0
    for remove in (copy / "figures" / "00001.parquet", copy / "figures" / "00001.index.arrow"):
        remove.unlink()
        caplog.clear()
        assert verify.verify_main(str(copy), 0, None, []) == 1
        assert "figures/00001.parquet: the shard is missing" in caplog.text


def test_verify_refuses_a_model_that_the_store_was_not_made_by(copy: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.py", values_for(tmp_path))
    with pytest.raises(UserError, match="text.max_sequence_length: 32 here, 64 there"):
        verify.verify_main(str(config), 1, None, ["max_sequence_length=32"])


@pytest.mark.parametrize("part", ["text", "figures"])
def test_a_disk_that_is_full_ends_encoding_with_its_error_and_what_was_finished_stays(
    part: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread writes; its error is the command's."""
    write_shard, kept = encode_shards.write_shard, {}

    def full(path: Path, *arguments, **options) -> int:  # type: ignore[no-untyped-def]
        if path == tmp_path / "store" / part / "00001.parquet":
            kept.update(finished(tmp_path / "store"))
            raise OSError(28, "No space left on device")
        return write_shard(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(encode_shards, "write_shard", full)
        with pytest.raises(OSError, match="No space left"):
            run_encode(tmp_path)
    assert tmp_path / "store" / part / "00000.parquet" in kept and finished(tmp_path / "store") == kept
    run_encode(tmp_path)
    assert kept.items() <= finished(tmp_path / "store").items() and contents(tmp_path / "store") == contents(whole)
