"""Groups of preferences: the rules by which they are made, what is left out and why, and both layouts that hold them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from OpenSciDraw.config import PreferenceConfig
from OpenSciDraw.datasets.batch import AXES, BadRow, Sample, collate
from OpenSciDraw.datasets.group_making import NOBODY, Groups, make_groups
from OpenSciDraw.datasets.preference_groups import PreferenceGroups
from OpenSciDraw.errors import UserError

TOKENS, WIDTH = 6, 8
WINNER = (0.9, 0.9, 0.9, 0.9)  # reward; component, arrow, text
GOOD = (0.8, 0.8, 0.8, 0.8)  # no loser: its reward is too near


def made(*prompts: list[tuple[float, ...]], size: list[int] | None = None, counted=(True,) * 3, **rules: Any) -> Groups:  # type: ignore[no-untyped-def]
    """Groups of prompts "0", "1", … whose pictures are (reward, component, arrow, text)."""
    names = [str(number) for number, pictures in enumerate(prompts) for _ in pictures]
    rows = np.array([picture for pictures in prompts for picture in pictures], dtype=np.float64)
    sizes = np.zeros(len(rows), dtype=np.int64) if size is None else np.array(size)
    return make_groups(names, rows[:, 0], rows[:, 1:], sizes, counted, PreferenceConfig(**rules))


# -- the rules ---------------------------------------------------------------------------------------------
def test_the_winner_has_the_highest_reward_and_each_axis_the_loser_that_fails_there_and_nearly_there_alone() -> None:
    found = made([GOOD, (0.6, 0.5, 0.8, 0.8), (0.6, 0.9, 0.3, 0.9), WINNER, (0.6, 0.3, 0.9, 0.7), (0.5, 0.8, 0.8, 0.4)])
    assert found.ids == ["0"] and found.winners.tolist() == [3] and found.left_out == []
    assert found.losers.tolist() == [[4, 2, 5]]  # of the two that lack components the one with the larger gap


def test_a_loser_ranks_by_its_gap_less_half_the_mean_of_the_others() -> None:
    two = [(0.6, 0.35, 0.65, 0.65), (0.6, 0.45, 0.9, 0.9)]  # 0.55 - 0.5 * 0.25 against 0.45
    assert made([WINNER, *two, *[GOOD] * 3]).losers.tolist() == [[2, NOBODY, NOBODY]]
    assert made([WINNER, *two, *[GOOD] * 3], other_gap_weight=0.1).losers[0, 0] == 1


def test_no_picture_loses_twice_and_the_axis_with_the_fewest_chooses_first() -> None:
    better, other = (0.5, 0.4, 0.55, 0.9), (0.6, 0.55, 0.9, 0.9)  # the first is the better one on components, and alone on arrows
    found = made([WINNER, better, other, *[GOOD] * 3])
    assert found.losers.tolist() == [[2, 1, NOBODY]]


@pytest.mark.parametrize(
    ("picture", "rule"),
    [
        ((0.6, 0.5, 0.9, 0.9), {"min_pictures": 7}),
        ((0.6, 0.5, 0.9, 0.9), {"min_reward": 0.91}),
        ((0.69, 0.5, 0.9, 0.9), {"min_total_gap": 0.22}),
        ((0.6, 0.61, 0.9, 0.9), {"min_gap": 0.29}),
        ((0.6, 0.5, 0.95, 0.9), {"other_gap_low": -0.05}),
        ((0.6, 0.5, 0.35, 0.9), {"other_gap_high": 0.55, "counted": (True, False, True)}),
    ],
)  # fmt: skip
def test_each_rule_is_a_key(picture: tuple[float, ...], rule: dict[str, Any]) -> None:
    """The picture just misses the rule, by default or with the given limit, and is a loser on the other side of it."""
    pictures = [WINNER, picture, *[GOOD] * 4]
    counted = {"counted": rule.pop("counted")} if "counted" in rule else {}
    outcomes = {bool(made(pictures, **counted).ids), bool(made(pictures, **counted, **rule).ids)}
    assert outcomes == {True, False}


def test_scores_are_decimals() -> None:
    """In floating point 0.7 - 0.4 is less than 0.3, and 0.9 - 0.7 less than 0.2."""
    assert 0.7 - 0.4 < 0.3
    found = made([(0.7, 0.7, 0.7, 0.7), (0.5, 0.4, 0.7, 0.7), *[(0.6, 0.6, 0.6, 0.6)] * 4])
    assert found.losers.tolist() == [[1, NOBODY, NOBODY]]


@pytest.mark.parametrize(
    ("pictures", "reason"),
    [
        ([WINNER, (0.5, 0.4, 0.9, 0.9), *[GOOD] * 3], "fewer than 6 scored pictures"),
        ([WINNER, (0.5, 0.4, 0.9, 0.9), *[GOOD] * 3, (float("nan"), 0.1, 0.1, 0.1)], "fewer than 6 scored pictures"),
        ([(0.69, 0.9, 0.9, 0.9), (0.4, 0.4, 0.9, 0.9), *[(0.6, 0.9, 0.9, 0.9)] * 4], "no picture with a reward of 0.7 or more"),
        ([WINNER, *[GOOD] * 5], "no picture that loses by the rules"),
    ],
)  # fmt: skip
def test_a_prompt_is_left_out_with_the_reason(pictures: list[tuple[float, ...]], reason: str) -> None:
    good = [WINNER, (0.5, 0.4, 0.9, 0.9), *[GOOD] * 4]
    found = made(pictures, good)
    assert found.left_out == [("0", reason)] and found.ids == ["1"] and found.winners.tolist() == [len(pictures)]


def test_a_picture_of_another_size_than_the_winner_is_no_loser() -> None:
    pictures = [WINNER, (0.5, 0.4, 0.9, 0.9), (0.6, 0.6, 0.9, 0.9), *[GOOD] * 3]
    assert made(pictures).losers[0, 0] == 1
    assert made(pictures, size=[0, 7, 0, 0, 0, 0]).losers[0, 0] == 2


def test_an_axis_without_a_score_is_not_compared() -> None:
    nan = float("nan")
    found = made([(0.9, 0.9, nan, 0.9), (0.5, 0.4, 0.0, 0.9), (0.5, 0.9, 0.1, 0.5), *[GOOD] * 3])
    assert found.losers.tolist() == [[1, NOBODY, 2]]


def test_an_axis_that_does_not_count_gets_no_losers() -> None:
    pictures = [WINNER, (0.5, 0.4, 0.9, 0.9), (0.5, 0.9, 0.4, 0.9), *[GOOD] * 3]
    assert made(pictures, counted=(False, True, True)).losers.tolist() == [[NOBODY, 2, NOBODY]]


def test_hundreds_of_thousands_of_pictures_take_seconds() -> None:
    import time

    random = np.random.default_rng(0)
    scores = random.uniform(0.2, 1.0, (300_000, 3)).round(2)
    prompts = pa.array(np.repeat(np.arange(30_000), 10).astype(str))
    start = time.perf_counter()
    found = make_groups(prompts, scores.mean(1), scores, np.zeros(len(scores), int), (True,) * 3, PreferenceConfig())
    assert time.perf_counter() - start < 10
    assert len(found.ids) + len(found.left_out) == 30_000 and len(found.ids) > 10_000
    for winner, losers in zip(found.winners[:500].tolist(), found.losers[:500].tolist(), strict=True):
        there = [loser for loser in losers if loser != NOBODY]
        assert winner not in there and len(set(there)) == len(there) > 0
        assert {loser // 10 for loser in there} == {winner // 10}


# -- the published parquet ------------------------------------------------------------------------------------
def picture_row(folder: Path, group: str, number: int, scores: tuple[float, ...], side: int = 64, layout: str = "V2") -> dict:
    """A row as published, with an npz of latents and one of text."""
    name = f"cache/{group}/{number}.npz"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(hash((group, number)) % 2**32)
    latents = random.standard_normal((64 if layout == "V3" else 32, side // 8, 64 // 8)).astype(np.float32)
    np.savez(folder / name, **{"vae_h" if layout == "V3" else "latents": latents})
    text = f"cache/{group}/text.npz"
    embeds = np.full((TOKENS, WIDTH), len(group), np.float16)
    np.savez(folder / text, prompt_embeds=embeds, attention_mask=(np.arange(TOKENS) < 4).astype(np.int64))
    reward, component, arrow, words = scores
    return {
        "group_id": group, "caption": f"caption of {group}", "cache_path": name, "bucket_h": side, "bucket_w": 64, "reward": reward,
        "component_score": component, "text_score": words, "arrow_score": arrow, "aspect_ratio": side / 64,
        "text_cache_path": text, "shard": 3,
    }  # fmt: skip


SCORED = [WINNER, (0.5, 0.4, 0.9, 0.9), (0.5, 0.9, 0.9, 0.4), *[GOOD] * 3]


def published(folder: Path, groups: dict[str, list[tuple[float, ...]]], **options: Any) -> Path:
    rows = [picture_row(folder, name, n, scores, **options) for name, all_ in groups.items() for n, scores in enumerate(all_)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "scored.parquet")
    return folder


def opened(folder: Path, **options: Any) -> PreferenceGroups:
    return PreferenceGroups(base_dir=str(folder.parent), parquet_base_path=folder.name, **options)


def read(dataset: PreferenceGroups, row: int) -> Sample:
    sample = dataset.read(row)
    assert isinstance(sample, Sample), sample
    return sample


@pytest.mark.parametrize("layout", ["V2", "V3"])
def test_the_published_parquet_is_read_as_it_is(tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = published(tmp_path, {"one": SCORED, "few": SCORED[:5], "two": SCORED}, layout=layout)
    with caplog.at_level(logging.INFO, "OpenSciDraw"):
        dataset = opened(folder)
    assert list(dataset.rows.ids()) == ["one", "two"] and dataset.contract is None
    assert dataset.left_out == [BadRow("few", "fewer than 6 scored pictures")]
    assert "2 groups (losers by axis: component 2, arrow 0, text 2); 1 left out: 1 for fewer than 6" in caplog.text
    sample = read(dataset, 1)
    channel = "vae_h" if layout == "V3" else "latents"
    for number, latents in ((0, sample.latents), (1, sample.losers[0]), (2, sample.losers[2])):  # type: ignore[index]
        stored = np.load(folder / f"cache/two/{number}.npz")[channel][:32]
        assert torch.equal(latents, torch.from_numpy(stored))
    assert sample.axes.tolist() == [True, False, True] and sample.id == "two" and sample.caption == "caption of two"  # type: ignore[union-attr]
    assert sample.text.shape == (4, WIDTH) and (sample.text == 3).all()  # type: ignore[union-attr]
    assert dataset.buckets.tolist() == [[64, 64], [64, 64]]
    batch = dataset.batch([0, 1])
    assert batch.losers.shape == (2, len(AXES), 32, 8, 8) and batch.axes.dtype == torch.bool  # type: ignore[union-attr]
    assert opened(folder, with_text=False).batch([0]).text is None


def test_text_may_lie_with_the_latents(tmp_path: Path) -> None:
    rows = [picture_row(tmp_path, "one", n, scores) for n, scores in enumerate(SCORED)]
    for row in rows:
        both = dict(np.load(tmp_path / row["cache_path"])) | dict(np.load(tmp_path / row["text_cache_path"]))
        np.savez(tmp_path / row["cache_path"], **both)
        row["text_cache_path"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "scored.parquet")
    assert read(opened(tmp_path), 0).text.shape == (4, WIDTH)  # type: ignore[union-attr]


def test_absolute_paths_of_another_machine_are_remapped_and_stay_below_base_dir(tmp_path: Path) -> None:
    folder = tmp_path / "groups"
    folder.mkdir()
    rows = [picture_row(folder, "one", n, scores) for n, scores in enumerate(SCORED)]
    for row in rows:
        for name in ("cache_path", "text_cache_path"):
            row[name] = f"/mnt/data/groups/{row[name]}"
    pq.write_table(pa.Table.from_pylist(rows), folder / "scored.parquet")
    dataset = opened(folder, path_remapping={"/mnt/data/": f"{tmp_path}/"})
    assert read(dataset, 0).latents is not None and read(dataset, 0).text is not None
    assert "leads out of" in opened(folder).read(0).reason  # type: ignore[union-attr]
    outside = opened(folder, path_remapping={"/mnt/data/groups/": "/etc/"}).read(0)
    assert "leads out of" in outside.reason  # type: ignore[union-attr]


def test_pictures_of_unequal_sizes_in_the_published_parquet_never_meet(tmp_path: Path) -> None:
    rows = [picture_row(tmp_path, "one", n, scores, side=64 if n != 1 else 96) for n, scores in enumerate(SCORED)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "scored.parquet")
    sample = read(opened(tmp_path), 0)
    assert sample.axes.tolist() == [False, False, True] and sample.losers.shape[1:] == sample.latents.shape  # type: ignore[union-attr]


def test_what_cannot_be_read_names_the_group_and_the_file(tmp_path: Path) -> None:
    folder = published(tmp_path, {"one": SCORED, "two": SCORED, "three": SCORED})
    (folder / "cache/one/1.npz").write_bytes(b"no npz")
    np.savez(folder / "cache/two/2.npz", latents=np.zeros((32, 9, 8), np.float32))
    np.savez(folder / "cache/three/0.npz", other=np.zeros(3, np.float32))
    dataset = opened(folder)
    reasons = [dataset.read(row) for row in range(3)]
    assert all(isinstance(row, BadRow) for row in reasons)
    for row, name, said in zip(reasons, ("one", "two", "three"), ("1.npz", "(32, 9, 8)", "lacks latents or vae_h"), strict=True):
        assert row.id == name and said in row.reason


def test_rows_without_a_prompt_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [picture_row(tmp_path, "one", n, scores) for n, scores in enumerate(SCORED)]
    rows += [{**rows[0], "group_id": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "scored.parquet")
    assert len(opened(tmp_path)) == 1 and "1 scored pictures without a group_id left out" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "scored.parquet").unlink(), "neither a store"),
        (lambda folder: (folder / "scored.parquet").write_bytes(b"x"), "not a readable Parquet file"),
        (lambda folder: pq.write_table(pa.table({"group_id": ["a"]}), folder / "scored.parquet"), "lacks the columns caption"),
        (lambda folder: published(folder, {"few": SCORED[:3]}), "no group to train on, 1 left out: 1 for fewer than 6 scored"),
    ],
)  # fmt: skip
def test_what_is_no_data_of_this_kind_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    change(published(tmp_path, {"one": SCORED}))
    with pytest.raises(UserError, match=said):
        opened(tmp_path)


# -- our store -------------------------------------------------------------------------------------------------
@pytest.fixture
def store(group_config: dict, tmp_path: Path) -> Path:
    """A copy of the session's store of groups, to change."""
    folder = tmp_path / "store"
    shutil.copytree(Path(group_config["dataset"]["base_dir"]) / "store", folder)
    return folder


def change_groups(folder: Path, **columns: Any) -> None:
    """Replace values of the first rows: winner=[…]."""
    rows = pq.read_table(folder / "groups.parquet").to_pylist()
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=False):
            row[name] = value
    pq.write_table(pa.Table.from_pylist(rows), folder / "groups.parquet")


def test_a_store_with_groups_gives_winners_and_their_losers(store: Path) -> None:
    rows = pq.read_table(store / "groups.parquet").to_pylist()
    change_groups(store, loser_arrow=[None])
    dataset = opened(store)
    figures = {dataset.rows.pictures.sample_id(row): row for row in range(len(dataset.rows.pictures))}
    assert len(dataset) == len(rows) and dataset.contract is not None
    sample, group = read(dataset, 0), rows[0]
    pictures = dataset.rows.pictures
    assert sample.id == group["group_id"] and sample.caption == group["caption"]
    assert torch.equal(sample.latents, pictures.latents(figures[group["winner"]]))  # type: ignore[arg-type]
    assert torch.equal(sample.losers[2], pictures.latents(figures[group["loser_text"]]))  # type: ignore[index]
    assert sample.axes.tolist() == [True, False, True]  # type: ignore[union-attr]
    assert torch.equal(sample.text, pictures.sample(figures[group["winner"]]).text)  # type: ignore[arg-type]
    assert dataset.text_lengths().tolist() == [64] * len(rows)  # type: ignore[union-attr]


def test_the_winner_itself_is_never_a_loser(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Published groups have the winner where no loser was found: its logit of 0 would damp the others."""
    rows = pq.read_table(store / "groups.parquet").to_pylist()
    change_groups(store, loser_component=[rows[0]["winner"], rows[1]["winner"]])
    dataset = opened(store)
    assert read(dataset, 0).axes.tolist() == read(dataset, 1).axes.tolist() == [False, True, True]  # type: ignore[union-attr]
    assert "2 losers are their own group's winner" in caplog.text


def test_groups_that_cannot_be_used_are_left_out_counted_and_listed(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pq.read_table(store / "groups.parquet").to_pylist()
    nobody = {f"loser_{axis}": [None] for axis in AXES}
    other = next(row["winner"] for row in rows[3:] if row["caption"] != rows[2]["caption"])
    change_groups(store, **nobody, winner=[rows[0]["winner"], "gone.png", other])
    with caplog.at_level(logging.INFO, "OpenSciDraw"):
        dataset = opened(store)
    assert len(dataset) == len(rows) - 3
    reasons = {row.id: row.reason for row in dataset.left_out}
    assert reasons == {
        rows[0]["group_id"]: "no loser",
        rows[1]["group_id"]: "pictures that are not in the store: gone.png",
        rows[2]["group_id"]: "pictures with different captions",
    }
    assert "3 left out: 1 for no loser, 1 for pictures that are not in the store, 1 for pictures with diff" in caplog.text


def test_a_group_of_unequal_sizes_is_left_out(tmp_path: Path, group_config: dict) -> None:
    from conftest import merged

    from OpenSciDraw.config import Config
    from OpenSciDraw.drawn.flaws import write_groups
    from OpenSciDraw.encode import run as encode

    write_groups(tmp_path / "figures", tmp_path / "groups.parquet", 2)
    rows = pq.read_table(tmp_path / "groups.parquet").to_pylist()
    from PIL import Image

    picture = tmp_path / "figures" / rows[0]["loser_text"]
    Image.open(picture).crop((0, 0, 128, 64)).save(picture)
    here = merged(group_config, dataset={"base_dir": str(tmp_path)}, encode={"figures": str(tmp_path / "figures")})
    assert encode.main(Config.model_validate(here)) == 0
    (tmp_path / "groups.parquet").rename(tmp_path / "store" / "groups.parquet")
    dataset = opened(tmp_path / "store")
    assert list(dataset.rows.ids()) == [rows[1]["group_id"]]
    assert [(row.id, row.reason) for row in dataset.left_out] == [(rows[0]["group_id"], "pictures of different sizes")]


def test_plain_pairs_have_one_loser(store: Path) -> None:
    rows = pq.read_table(store / "groups.parquet").to_pylist()
    pairs = [{"group_id": row["group_id"], "winner": row["winner"], "loser": row["loser_text"]} for row in rows]
    pq.write_table(pa.Table.from_pylist(pairs), store / "groups.parquet")
    batch = opened(store).batch([0, 1])
    assert batch.losers.shape[:2] == (2, 1) and batch.axes.tolist() == [[True], [True]]  # type: ignore[union-attr]


def test_an_axis_of_weight_0_is_left_out(store: Path) -> None:
    rules = PreferenceConfig.model_validate({"axis_weights": {"arrow": 0.0}})
    assert read(opened(store, preference=rules), 0).axes.tolist() == [True, False, True]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "groups.parquet").unlink(), "is a store without groups.parquet"),
        (lambda folder: (folder / "groups.parquet").write_bytes(b"x"), "not a readable Parquet file"),
        (lambda folder: pq.write_table(pa.table({"group_id": ["a"], "winner": ["b"]}), folder / "groups.parquet"),
         "lacks the columns loser_component, loser_arrow, loser_text"),
    ],
)  # fmt: skip
def test_a_store_without_right_groups_is_refused(store: Path, change: Any, said: str) -> None:
    change(store)
    with pytest.raises(UserError, match=said):
        opened(store)


def test_a_batch_of_groups_is_pinned_with_its_losers(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.data_ptr()) or self)
    latents, losers = torch.randn(2, 3, 3), torch.randn(3, 2, 3, 3)
    batch = collate([Sample("a", "", latents, losers=losers, axes=torch.tensor([True, False, True]))])
    moved = batch.pin_memory()
    assert moved.losers is batch.losers and batch.losers.data_ptr() in pinned  # type: ignore[union-attr]
    assert torch.equal(moved.losers[0], losers) and moved.axes.tolist() == [[True, False, True]]  # type: ignore[index, union-attr]


def test_a_run_lists_what_is_left_out(store: Path, group_config: dict, tmp_path: Path, fresh_accelerate: Any) -> None:
    from conftest import merged

    from OpenSciDraw.config import Config
    from OpenSciDraw.training.run import Training

    rows = pq.read_table(store / "groups.parquet").to_pylist()
    change_groups(store, winner=["gone.png"])
    values = merged(group_config, dataset={"base_dir": str(tmp_path)}, model_output_dir=str(tmp_path / "run"))
    Training(Config.model_validate(values))
    (line,) = (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()
    assert json.loads(line) == {"id": rows[0]["group_id"], "reason": "pictures that are not in the store: gone.png"}
