"""`scienceflow prefer`: pictures are drawn once and scored once, groups follow the rules, and a kill changes no byte."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import BASE, merged, write_config

from OpenSciDraw.cli import main
from OpenSciDraw.config import PreferConfig, load_config
from OpenSciDraw.datasets.group_making import NOBODY
from OpenSciDraw.datasets.preference_groups import PreferenceGroups
from OpenSciDraw.evaluation.base import NotScored, PictureMetric
from OpenSciDraw.evaluation.examples import Example
from OpenSciDraw.evaluation.results import Result, Results
from OpenSciDraw.preferences.groups import ALIKE, Scored, counts, group_table, groups_of
from OpenSciDraw.preferences.seeds import pictures_of
from OpenSciDraw.registry import METRICS

SPEC = "drawn:3:seed=9:style=small"
OF_ONE_RUN = re.compile(r"drawn.*\.jsonl|results.*\.jsonl|\..*")  # in the order of the work, with times
AXES = {"component": "bands/red", "arrow": "bands/green", "text": "bands/blue"}


class Bands(PictureMetric):
    """The mean of each colour: continuous, so that no two pictures score alike. `asked` counts what was measured."""

    asked: list[str] = []
    silent: set[str] = set()

    def score(self, picture, example):  # type: ignore[no-untyped-def]
        Bands.asked.append(example.id)
        if example.id in Bands.silent:
            raise NotScored("no answer", {name: (0.0, 1.0) for name in ("red", "green", "blue")})
        mean = np.zeros(3) if picture is None else np.asarray(picture, dtype=np.float64).mean((0, 1)) / 255
        return {name: (float(value), 1.0) for name, value in zip(("red", "green", "blue"), mean, strict=True)}


@pytest.fixture(autouse=True)
def own_metric(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(METRICS._objects, "bands", Bands)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    Bands.asked, Bands.silent = [], set()
    yield


@pytest.fixture
def config(tmp_path: Path) -> Path:
    any_gap = dict(min_reward=0.0, min_gap=1e-9, other_gap_low=-1.0, min_total_gap=0.0)
    values = merged(BASE, prefer={"figures": SPEC, "pictures": 3, "axes": AXES, **any_gap}, evaluate={"batch_size": 2},
                    encode={"resolution": 128, "num_workers": 0}, model_output_dir=str(tmp_path / "run"),
                    dataset={"type": "ArXiVParquetDatasetV2", "base_dir": str(tmp_path)})  # fmt: skip
    return write_config(tmp_path / "config.py", values)


def prefer(config: Path, out: Path, *options: str) -> int:
    return main(["prefer", str(config), "--out", str(out), *options])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that must be the same whatever happened on the way."""
    files = (path for path in folder.rglob("*") if path.is_file() and not OF_ONE_RUN.fullmatch(path.name))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def forked(target: Callable[..., None], *arguments: object) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


def prefer_and_die(config: Path, out: Path, at: int) -> None:
    """SIGKILL to this process just after its `at`-th file got its final name."""
    replace, count = os.replace, 0

    def counted(source, target) -> None:  # type: ignore[no-untyped-def]
        nonlocal count
        count += 1
        replace(source, target)
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted  # type: ignore[assignment]
    prefer(config, out)


def as_process(config: Path, out: Path, rank: int, world_size: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    if prefer(config, out):
        os._exit(1)


def test_it_ends_in_a_store_that_training_reads_and_a_second_run_does_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert prefer(config, out) == 0
    said = capsys.readouterr().out
    assert "groups of 3 prompts, 3 pictures each" in said and "parquet_base_path='store'" in said
    assert len(Bands.asked) == 9 == len(list((out / "pictures").iterdir()))
    dataset = PreferenceGroups(base_dir=str(out), parquet_base_path="store")
    group = pq.read_table(out / "store" / "groups.parquet").to_pylist()[0]
    scores = {row["picture"]: row for row in pq.read_table(out / "scores.parquet").to_pylist()}
    assert scores[group["winner"]]["reward"] == max(r["reward"] for r in scores.values() if r["group_id"] == group["group_id"])
    sample = dataset.rows.sample(0)
    assert sample.caption == group["caption"] and sample.losers is not None and sample.axes is not None
    assert sample.axes.tolist() == [group[f"loser_{axis}"] is not None for axis in AXES] and sample.axes.any()
    assert not torch.equal(sample.latents, sample.losers[int(sample.axes.nonzero()[0])])
    page = (out / "contact_sheet.html").read_text()
    assert page.count("<b>winner, reward") == len(dataset.rows) and "<b>loser by" in page

    before = {path: path.stat().st_mtime_ns for path in (out / "pictures").iterdir()}
    monkeypatch.setattr("OpenSciDraw.evaluation.drawing.Artist.load", None)  # nothing is drawn again
    assert prefer(config, out) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "pictures").iterdir()} == before and len(Bands.asked) == 9


@pytest.mark.slow
def test_killed_anywhere_and_shared_by_processes_it_gives_the_same_bytes(config: Path, tmp_path: Path) -> None:
    assert prefer(config, tmp_path / "whole") == 0
    whole = contents(tmp_path / "whole")
    out = tmp_path / "killed"
    for at in (3, 4, 8, 14, 17):  # within a batch of pictures, between them, at the page, among the figures, in the store
        assert forked(prefer_and_die, config, out, at) == -signal.SIGKILL
    assert not (out / "prefer.json").exists()
    assert prefer(config, out) == 0
    assert {name: data for name, data in contents(out).items() if name != "prefer.json"}.keys() == whole.keys() - {"prefer.json"}
    assert [name for name, data in contents(out).items() if data != whole[name] and "/index" not in name] == []

    shared = tmp_path / "shared"
    assert forked(as_process, config, shared, 1, 2) == 0
    assert not (shared / "prefer.json").exists() and len(list((shared / "pictures").iterdir())) == 3
    assert forked(as_process, config, shared, 0, 2) == 0
    assert contents(shared) == whole
    drawn = [json.loads(line)["id"] for file in shared.glob("drawn*.jsonl") for line in file.read_text().splitlines()]
    assert len(drawn) == len(set(drawn)) == 9


@pytest.mark.slow
def test_other_rules_need_a_store_of_their_own_and_no_new_picture(config: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    assert prefer(config, out) == 0
    one_axis = ("--cfg_options", "prefer.axes.arrow=None", "prefer.axes.text=None")
    assert prefer(config, out, *one_axis) == 2 and "--store NAME" in capsys.readouterr().err
    Bands.asked = []
    assert prefer(config, out, "--store", "one", *one_axis) == 0 and not Bands.asked
    rows = pq.read_table(out / "one" / "groups.parquet").to_pylist()
    assert rows and all(row["loser_arrow"] is row["loser_text"] is None for row in rows)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--cfg_options", "prefer.figures=None"), "Which prompts"),
        (("--figures", "drawn:2:style=small", "--cfg_options", "evaluate.figures='drawn:2:style=small'"), "cannot be measured"),
        (("--cfg_options", "prefer.axes.text='nothing/x'"), "nothing"),
        (("--cfg_options", "prefer.axes.text='distribution/fid'"), "does not score single pictures"),
        (("--cfg_options", *(f"prefer.axes.{axis}=None" for axis in AXES)), "every axis is None"),
        (("--figures", "drawn:2:style=small:edit"), "is an edit"),
        (("--store", "../x"), "not a plain name"),
        (("--judge", "http://localhost:1/v1", "--judge_model", "m"), "no axis of prefer.axes is a score of judge"),
        (("--pictures", "1"), "prefer.pictures"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], wanted: str
) -> None:
    assert prefer(config, tmp_path / "out", *options) == 2
    assert wanted in capsys.readouterr().err and not (tmp_path / "out").exists()


# -- the rules ---------------------------------------------------------------------------------------
def scored(tmp_path: Path, rows: dict[str, list[tuple[float | None, float | None, float | None]]], **rules: object) -> tuple:  # type: ignore[type-arg]
    """Prompts with their pictures' scores as given (None: the metric does not apply)."""
    settings = PreferConfig.model_validate({"pictures": len(next(iter(rows.values()))), "axes": AXES, **rules})
    prompts = [Example(name, f"Prompt {name}", 64, 64) for name in rows]
    results = Results(tmp_path)
    for prompt in prompts:
        for example, values in zip(pictures_of(prompt, settings.pictures), rows[prompt.id], strict=True):
            named = zip(("red", "green", "blue"), values, strict=True)
            scores = {name: (value * 4, 4.0) for name, value in named if value is not None}
            results.add([Result(example.id, "bands", scores, "e", "p", "m", retry=example.id in Bands.silent)])
    found = Scored.of(prompts, results, settings)
    return found, groups_of(found, settings), settings


def test_every_prompt_without_a_group_has_the_rule_that_left_it_out(tmp_path: Path) -> None:
    found, groups, _ = scored(tmp_path, {
        "good": [(1, 1, 1), (1, 1, 0.5), (0.5, 0.5, 1)],
        "alike": [(1, 1, 0.75)] * 3,
        "near": [(1, 1, 1), (1, 1, 0.9), (1, 1, 0.9)],
        "even": [(1, 0.5, 1), (0.75, 0.75, 1), (0.75, 0.75, 1)],
        "bad": [(0.5, 0.5, 0.5), (0, 0, 0), (0, 0, 0)],
        "traded": [(1, 0.5, 1), (0.5, 0.75, 1), (0.5, 0.75, 1)],
    })  # fmt: skip
    assert groups.ids == ["good"] and found.ids[groups.winners[0]] == "good-000"
    assert [at if at == NOBODY else found.ids[at] for at in groups.losers[0]] == ["good-002", NOBODY, "good-001"]
    assert dict(groups.left_out) == {
        "alike": ALIKE, "near": "no gap of 0.15 or more on any axis", "even": "no reward lower by 0.05 or more",
        "bad": "no picture with a reward of 0.7 or more", "traded": "gaps on the other axes outside of 0 to 1",
    }  # fmt: skip
    assert counts(groups)["losers"] == {"component": 1, "arrow": 0, "text": 1}
    assert group_table(found, groups).to_pylist() == [
        {"group_id": "good", "caption": "Prompt good", "winner": "good-000.png", "loser_component": "good-002.png",
         "loser_arrow": None, "loser_text": "good-001.png"}
    ]  # fmt: skip


def test_an_axis_that_does_not_apply_counts_in_no_mean_and_an_unscored_picture_makes_no_group(tmp_path: Path) -> None:
    Bands.silent = {"b-001"}
    found, groups, _ = scored(tmp_path, {"a": [(1, None, 0.5), (1, None, 0)], "b": [(1, 1, 1), (0, 0, 0)]})
    assert found.reward[0].tolist() == [0.75, 0.5] and np.isnan(found.reward[1, 1])
    assert groups.ids == ["a"] and groups.left_out == [("b", "fewer than 2 scored pictures")]


def test_a_picture_that_one_of_two_metrics_could_not_score_has_no_reward(tmp_path: Path) -> None:
    settings = PreferConfig.model_validate({"pictures": 2, "axes": {**AXES, "text": "other/words"}})
    prompt, results = Example("a", "A prompt", 64, 64), Results(tmp_path)
    first, second = pictures_of(prompt, 2)
    for example in (first, second):
        results.add([Result(example.id, "bands", {"red": (1.0, 1.0), "green": (1.0, 1.0)}, "e", "p", "m")])
    results.add([Result(first.id, "other", {"words": (1.0, 1.0)}, "e", "p", "m")])
    results.add([Result(second.id, "other", {"words": (0.0, 1.0)}, "e", "p", "m", "no answer", retry=True)])
    reward = Scored.of([prompt], results, settings).reward[0]
    assert reward[0] == 1 and np.isnan(reward[1])


def test_the_rules_of_own_pictures_are_keys_of_a_config(config: Path) -> None:
    read = load_config(config, ["prefer.min_gap=0.25"]).prefer
    assert (read.min_gap, read.pictures, read.min_total_gap) == (0.25, 3, 0.0) and PreferConfig().min_gap == 0.15


def test_the_last_picture_of_a_prompt_can_be_its_own_figure(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixel for pixel; it is not drawn again, and the other pictures are those that are drawn without it."""
    from PIL import Image

    from OpenSciDraw.evaluation.examples import load_examples

    prefer(config, tmp_path / "without", "--pictures", "2")
    asked = "prefer.include_figure=True"
    assert prefer(config, tmp_path / "with", "--cfg_options", asked) == 0
    for example in load_examples(SPEC, None, 128):
        shown = Image.open(tmp_path / "with" / "pictures" / f"{example.id}-002.png")
        assert np.array_equal(np.asarray(shown), np.asarray(example.reference_image()))
        for number in (0, 1):
            name = f"pictures/{example.id}-{number:03d}.png"
            assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    assert prefer(config, tmp_path / "with") == 2  # a folder with figures is not one without


def test_a_prompt_without_a_figure_cannot_include_it(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red box", "width": 128, "height": 128, "id": "a"}\n')
    options = ("--figures", str(prompts), "--cfg_options", "prefer.include_figure=True")
    assert prefer(config, tmp_path / "out", *options) == 2
    assert "the prompt a has no figure" in capsys.readouterr().err
