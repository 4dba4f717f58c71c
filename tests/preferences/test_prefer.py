"""`scienceflow prefer`: pictures of a model, scored by our metrics, become groups in a store that `mdpo` trains on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from OpenSciDraw.cli import main
from OpenSciDraw.config import Config, EvaluateConfig, PreferenceConfig, load_config
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation import drawing
from OpenSciDraw.evaluation.examples import Example
from OpenSciDraw.evaluation.results import Result, Results
from OpenSciDraw.preferences.run import repeated, scores_of_axes
from OpenSciDraw.preferences.scored import Scored, counts

BASE = "configs/tiny/flux2klein_demo.py"
RULES = ["preference.pictures=3", "preference.min_pictures=3", "preference.min_reward=0", "preference.min_gap=0.01",
         "preference.min_total_gap=0.001", "preference.other_gap_low=-1", "preference.other_gap_high=1"]  # fmt: skip
SOURCES = {"component": "structure/components", "arrow": "structure/arrows", "text": "structure/labels"}


def command(out: Path) -> list[str]:
    figures = ["--figures", "drawn:2:seed=21:style=small", "--steps", "4", "--batch_size", "3"]
    return ["prefer", BASE, *figures, "--out", str(out), "--cfg_options", *RULES]


def results_of(folder: Path, rows: dict[str, dict[str, tuple[float, float]]], retry: str = "") -> Results:
    results = Results(folder)
    results.add([Result(name, "structure", scores, "", None, "", retry=name == retry) for name, scores in rows.items()])
    return results


def test_scores_become_rewards_and_groups_by_hand(tmp_path: Path) -> None:
    """Three pictures of a prompt: the reward is the mean of the axes that are there, and an unscored picture takes no part."""
    example = Example("p", "A box.", 128, 128)
    rows = {
        "p=0": {"components": (2.0, 2.0), "arrows": (1.0, 1.0), "labels": (1.0, 4.0)},
        "p=1": {"components": (2.0, 2.0), "arrows": (1.0, 1.0), "labels": (4.0, 4.0)},
        "p=2": {"components": (2.0, 2.0), "labels": (3.0, 4.0)},
        "p=3": {"components": (2.0, 2.0), "arrows": (1.0, 1.0), "labels": (4.0, 4.0)},
    }
    pictures = [("p", each, f"drawn/pictures/{each.id}.png") for each in repeated([example], 4)]
    rules = PreferenceConfig(min_pictures=3, axis_weights={"component": 1.0, "arrow": 1.0, "text": 2.0})
    scored = Scored.of(pictures, {"drawn": results_of(tmp_path, rows, retry="p=3")}, SOURCES, rules)
    np.testing.assert_allclose(scored.scores, [[1, 1, 0.25], [1, 1, 1], [1, np.nan, 0.75], [np.nan] * 3])
    np.testing.assert_allclose(scored.reward, [(1 + 1 + 2 * 0.25) / 4, 1, (1 + 2 * 0.75) / 3, np.nan])
    groups = scored.groups(rules)
    assert groups.ids == ["p"] and groups.winners.tolist() == [1] and groups.losers.tolist() == [[-1, -1, 0]]
    assert ["losers on text", "1"] in counts(scored, groups) and ["pictures without a score", "1"] in counts(scored, groups)


def test_axes_come_from_the_metric_or_the_config_and_others_are_refused() -> None:
    def config(**preference: object) -> Config:
        return load_config(BASE).model_copy(update={"preference": PreferenceConfig(**preference)})  # type: ignore[arg-type]

    assert scores_of_axes(config(), EvaluateConfig(metrics=["structure", "text"])) == SOURCES
    own = config(scores={"text": "text/fidelity"})
    assert scores_of_axes(own, EvaluateConfig(metrics=["structure", "text"])) == {**SOURCES, "text": "text/fidelity"}
    with pytest.raises(UserError, match="which scores are the axes"):
        scores_of_axes(config(), EvaluateConfig(metrics=["structure", "judge"]))
    with pytest.raises(UserError, match="'text' is 'text/fidelity'. Give metric/name with one of the metrics structure"):
        scores_of_axes(own, EvaluateConfig(metrics=["structure"]))


@pytest.fixture(scope="module")
def preferred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped after the first batch of pictures, and gone on with."""
    out = tmp_path_factory.mktemp("prefer") / "out"
    patch, draw, calls = pytest.MonkeyPatch(), drawing.draw, []

    def stopping(*given, **named):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*given, **named)

    patch.setattr(drawing, "draw", stopping)
    with pytest.raises(KeyboardInterrupt):
        main(command(out))
    assert len((out / "drawn" / "drawn.jsonl").read_text().splitlines()) == 3
    assert main(command(out)) == 0
    assert len(calls) == 3, "the first batch was not drawn again"
    patch.undo()
    return out


def test_groups_and_their_store_are_what_training_reads(preferred: Path) -> None:
    from OpenSciDraw.datasets.preference_groups import PreferenceGroups

    groups = pq.read_table(preferred / "groups.parquet").to_pylist()
    assert groups and (preferred / "store" / "groups.parquet").read_bytes() == (preferred / "groups.parquet").read_bytes()
    dataset = PreferenceGroups(base_dir=str(preferred), parquet_base_path="store")
    assert [dataset.rows.sample_id(row) for row in range(len(dataset))] == [group["group_id"] for group in groups]
    sample = dataset.read(0)
    captions = {row["group_id"]: row["caption"] for row in pq.read_table(preferred / "scores.parquet").to_pylist()}
    assert sample.caption == captions[groups[0]["group_id"]] and sample.axes.tolist() == [
        groups[0][f"loser_{axis}"] is not None for axis in ("component", "arrow", "text")
    ]


def test_the_sheet_shows_winners_and_losers_and_every_prompt_is_accounted_for(preferred: Path) -> None:
    page = (preferred / "contact_sheet.html").read_text()
    groups = pq.read_table(preferred / "groups.parquet").to_pylist()
    left_out = [json.loads(line) for line in (preferred / "left_out.jsonl").read_text().splitlines()]
    assert page.count("<b>wins: ") == len(groups) and page.count("<b>loses on ") >= len(groups)
    assert len(groups) + len(left_out) == 2 and all(item["reason"] for item in left_out)


def test_the_pictures_of_a_prompt_have_noise_of_their_own(preferred: Path) -> None:
    files = sorted((preferred / "drawn" / "pictures").glob("*.png"))
    assert len(files) == 6 and len({file.read_bytes() for file in files}) == 6


def test_other_settings_or_counts_of_processes_do_not_mix_into_the_folder(preferred: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    assert main(["8" if word == "4" else word for word in command(preferred)]) == 2
    assert "drawn with other settings (steps: 4 there, 8 now)" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(preferred)) == 2
    assert "begun with another number of processes (drawn)" in capsys.readouterr().err


def test_pictures_are_no_model_and_no_group_says_what_to_change(preferred: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert main(["prefer", str(preferred / "drawn" / "pictures"), "--figures", "drawn:2", "--out", str(tmp_path / "x")]) == 2
    assert "`prefer` draws anew" in capsys.readouterr().err
    assert main([*command(preferred), "preference.min_reward=2"]) == 2
    assert "no group by these rules" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_make_the_groups_of_one(preferred: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-m", "OpenSciDraw.cli", *command(out)], env={**environment, "RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(timeout=600) for process in started] == [0, 0]
    one, two = (pq.read_table(folder / "scores.parquet").to_pylist() for folder in (preferred, out))
    kept = ("group_id", "reward", "component_score", "text_score")
    assert [{name: row[name] for name in kept} for row in sorted(two, key=lambda row: row["group_id"])] == [
        {name: row[name] for name in kept} for row in one
    ]
