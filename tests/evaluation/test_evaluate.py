"""`scienceflow evaluate`: pictures are drawn once, measured once, and compared fairly; what is wrong is said first."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BASE, REPO, merged, write_config
from PIL import Image

from OpenSciDraw.cli import main
from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.base import NotScored, PictureMetric, SetMetric
from OpenSciDraw.evaluation.examples import Example, find_picture, load_examples, picture_name
from OpenSciDraw.registry import METRICS

SPEC = "drawn:4:seed=9:style=small"
STEPS = ("--steps", "2", "--batch_size", "3")


class Ink(PictureMetric):
    """Dark pixels that are dark in the reference too; `asked` counts what was really measured."""

    asked: list[str] = []
    method = 1
    silent: set[str] = set()

    def identity(self) -> dict[str, Any]:
        return {"version": self.method}

    def score(self, picture, example):  # type: ignore[no-untyped-def]
        Ink.asked.append(example.id)
        reference = example.reference_image()
        if reference is None:
            return {}
        wanted = np.asarray(reference.convert("L")) < 128
        total = float(wanted.sum())
        if picture is None:
            return {"dark": (0.0, total)}
        if example.id in Ink.silent:
            raise NotScored("no answer", {"dark": (0.0, total)})
        found = np.asarray(picture.convert("L").resize(reference.size)) < 128
        return {"dark": (float((wanted & found).sum()), total)}


class Brightness(SetMetric):
    def score_set(self, pictures, references):  # type: ignore[no-untyped-def]
        value = abs(float(np.mean([np.mean(p) for p in pictures]) - np.mean([np.mean(r) for r in references])))
        return {"grey": (value, value - 1, value + 1)}


@pytest.fixture(autouse=True)
def own_metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(METRICS._objects, "ink", Ink)
    monkeypatch.setitem(METRICS._objects, "brightness", Brightness)
    Ink.asked, Ink.silent, Ink.method = [], set(), 1
    yield


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """What a perfect artist would draw for SPEC."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for example in load_examples(SPEC):
        image = example.reference_image()
        assert image is not None
        image.save(folder / picture_name(example.id))
    return folder


@pytest.fixture(scope="module")
def trained(store_config: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of two steps, by the command line in a process of its own."""
    folder = tmp_path_factory.mktemp("run")
    values = merged(store_config, model_output_dir=str(folder / "run"), max_train_steps=2, held_out_examples=4)
    path = write_config(folder / "config.py", values)
    subprocess.run([sys.executable, "train_OpenSciDraw_loop.py", str(path)], cwd=REPO, check=True, capture_output=True)
    return folder / "run"


def evaluated(*arguments: object) -> None:
    assert main(["evaluate", *map(str, arguments)]) == 0


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def results_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# -- pictures that someone else drew ---------------------------------------------------------------
def test_perfect_pictures_score_one_with_the_interval_of_their_number(pictures: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    evaluated(pictures, "--figures", SPEC, "--metrics", "ink,brightness", "--out", out)
    summary = summary_of(out)
    assert summary["metrics"]["ink/dark"] == {
        "value": 1.0, "low": pytest.approx(0.025**0.25), "high": 1.0, "examples": 4, "failures": 0, "higher_is_better": True,
    }  # fmt: skip
    assert summary["metrics"]["brightness/grey"]["value"] == 0 and not summary["metrics"]["brightness/grey"]["higher_is_better"]
    assert summary["run"] is None and summary["figures"] == SPEC and summary["comparison"] is None
    printed = capsys.readouterr().out
    assert "ink/dark" in printed and "[0.398, 1.000]" in printed and str(out / "evaluation.json") in printed


def test_missing_and_unreadable_pictures_count_as_wrong_and_are_named(pictures: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    first, second = (pictures / picture_name(example.id) for example in load_examples(SPEC, 2))
    first.unlink()
    second.write_bytes(second.read_bytes()[:200])
    out = tmp_path / "out"
    evaluated(pictures, "--figures", SPEC, "--metrics", "ink,brightness", "--out", out)
    summary = summary_of(out)
    found = summary["metrics"]["ink/dark"]
    assert (found["examples"], found["failures"]) == (4, 2)
    rows = [row for row in results_of(out) if row["metric"] == "ink"]
    totals = [sum(row["scores"]["dark"][1] for row in rows if ("failure" not in row) == ok) for ok in (True, False)]
    assert found["value"] == pytest.approx(totals[0] / sum(totals)) and totals[1] > 0
    assert summary["metrics"]["brightness/grey"]["failures"] == 2 and summary["metrics"]["brightness/grey"]["value"] > 0
    reasons = {item["id"]: item["reason"] for item in summary["failures"] if item["metric"] == "ink"}
    assert reasons[first.stem] == "missing" and "damaged" in reasons[second.stem] or "truncated" in reasons[second.stem]
    assert f"{first.stem}: missing" in capsys.readouterr().out


def test_a_second_run_measures_only_what_is_new_or_changed(pictures: Path, tmp_path: Path) -> None:
    out, command = tmp_path / "out", [pictures, "--figures", SPEC, "--metrics", "ink"]
    evaluated(*command, "--out", out, "--limit", 3)
    assert len(Ink.asked) == 3
    evaluated(*command, "--out", out)
    assert len(Ink.asked) == 4  # the fourth alone
    changed = picture_name(Ink.asked[1])
    Image.new("RGB", (128, 128)).save(pictures / changed)
    evaluated(*command, "--out", out)
    assert Ink.asked[4:] == [Path(changed).stem]
    Ink.method = 2  # the metric itself is another one now
    evaluated(*command, "--out", out)
    assert len(Ink.asked) == 9


def test_a_run_that_was_cut_off_goes_on_behind_its_last_whole_line(pictures: Path, tmp_path: Path) -> None:
    out, command = tmp_path / "out", [pictures, "--figures", SPEC, "--metrics", "ink"]
    evaluated(*command, "--out", out)
    whole = (out / "results.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (out / "results.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])
    (out / "evaluation.json").unlink()
    Ink.asked.clear()
    evaluated(*command, "--out", out)
    assert len(Ink.asked) == 2 and (out / "results.jsonl").read_bytes() == whole


def test_a_picture_that_could_not_be_scored_is_a_failure_and_tried_again(pictures: Path, tmp_path: Path) -> None:
    out, command = tmp_path / "out", [pictures, "--figures", SPEC, "--metrics", "ink"]
    Ink.silent = {load_examples(SPEC)[2].id}
    evaluated(*command, "--out", out)
    found = summary_of(out)
    assert found["metrics"]["ink/dark"]["failures"] == 1 and found["metrics"]["ink/dark"]["value"] < 1
    assert found["failures"] == [{"id": load_examples(SPEC)[2].id, "metric": "ink", "reason": "no answer"}]
    Ink.silent, Ink.asked = set(), []
    evaluated(*command, "--out", out)
    assert len(Ink.asked) == 1 and summary_of(out)["metrics"]["ink/dark"]["value"] == 1


def test_a_comparison_is_paired_and_says_of_how_many_pictures(pictures: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    worse = tmp_path / "worse"
    shutil.copytree(pictures, worse)
    for file in sorted(worse.iterdir())[:3]:
        image = Image.open(file).convert("RGB")
        image.paste("white", (0, 0, 64, 128))
        image.save(file)
    evaluated(worse, "--figures", SPEC, "--metrics", "ink", "--out", tmp_path / "b", "--limit", 3)
    evaluated(pictures, "--figures", SPEC, "--metrics", "ink", "--out", tmp_path / "a", "--compare", tmp_path / "b")
    comparison = summary_of(tmp_path / "a")["comparison"]
    found = comparison["metrics"]["ink/dark"]
    assert comparison["other"] == "b" and found["examples"] == 3
    assert found["difference"] > 0 and found["p"] == 0.25 and found["better"] == "neither"  # 2 of 2^3 sign flips
    printed = capsys.readouterr().out
    assert "neither, p = 0.2500" in printed and "other: b" in printed


def test_another_folder_of_pictures_is_measured_for_a_comparison(pictures: Path, tmp_path: Path) -> None:
    blank = tmp_path / "blank"
    blank.mkdir()
    for file in pictures.iterdir():
        Image.new("RGB", (128, 128), "white").save(blank / file.name)
    spec = "drawn:4:seed=9:style=small"
    evaluated(pictures, "--figures", spec, "--metrics", "ink,brightness", "--out", tmp_path / "a", "--compare", blank)
    compared = summary_of(tmp_path / "a")["comparison"]["metrics"]
    assert compared["ink/dark"]["difference"] == 1 and compared["brightness/grey"]["better"] == "this"
    assert compared["brightness/grey"]["p"] is None
    assert (blank / "evaluations" / "blank_drawn-4-seed-9-style-small" / "evaluation.json").is_file()


def test_results_of_another_method_or_of_other_examples_are_not_compared(pictures: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    evaluated(pictures, "--figures", SPEC, "--metrics", "ink", "--out", tmp_path / "b")
    Ink.method = 2
    command = ["evaluate", str(pictures), "--metrics", "ink", "--out", str(tmp_path / "a"), "--compare", str(tmp_path / "b")]
    assert main([*command, "--figures", SPEC]) == 2
    assert "was measured in another way there" in capsys.readouterr().err
    Ink.method = 1
    prompts = tmp_path / "other.jsonl"
    lines = [
        {"id": e.id, "prompt": "another", "width": 128, "height": 128, "reference": f"pictures/{picture_name(e.id)}"}
        for e in load_examples(SPEC)
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([*command[:-3], str(tmp_path / "c"), *command[-2:], "--figures", str(prompts)]) == 2
    assert "was measured on another prompt" in capsys.readouterr().err


def test_a_metric_without_what_it_compares_with_says_of_how_many(tmp_path: Path, pictures: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    rows = [{"id": example.id, "prompt": example.prompt, "width": 128, "height": 128} for example in load_examples(SPEC)]
    rows[0]["reference"] = f"pictures/{rows[0]['id']}.png"
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluated(pictures, "--figures", tmp_path / "bench.jsonl", "--metrics", "ink", "--out", tmp_path / "out")
    summary = summary_of(tmp_path / "out")
    assert summary["metrics"]["ink/dark"]["examples"] == 1 and summary["not_applicable"] == {"ink": 3}
    assert summary["metrics"]["ink/dark"]["low"] == pytest.approx(0.025)
    assert "ink does not apply to 3 examples" in capsys.readouterr().out


def test_the_metric_of_the_documentation_is_one(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file in the package is enough, so its text is run as one here."""
    page = (REPO / "docs" / "evaluate.md").read_text()
    code = next(block for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "METRICS.register" in block)
    monkeypatch.delitem(METRICS._objects, "ink")
    exec(compile(code, "ink.py", "exec"), {"__name__": "ink"})
    evaluated(pictures, "--figures", SPEC, "--metrics", "ink", "--out", tmp_path / "out")
    assert summary_of(tmp_path / "out")["metrics"]["ink/dark"]["value"] == 1


# -- what a model draws ----------------------------------------------------------------------------
def test_a_run_is_drawn_measured_and_not_drawn_again(trained: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    command = (trained, "--figures", SPEC, "--metrics", "ink,held_out", *STEPS)
    evaluated(*command, "--limit", 2)
    out = trained / "evaluations" / "step-2_drawn-4-seed-9-style-small"
    early = {path.name: path.read_bytes() for path in (out / "pictures").iterdir()}
    evaluated(*command)
    summary = summary_of(out)
    assert len(early) == 2 and len(list((out / "pictures").iterdir())) == 4
    assert all((out / "pictures" / name).read_bytes() == raw for name, raw in early.items())
    assert summary["weights"] == "lora" and summary["step"] == 2 and summary["run"] == str(trained)
    assert summary["settings"]["steps"] == 2 and summary["pictures"] == "pictures" and summary["seconds_per_picture"] > 0
    assert set(summary["metrics"]) >= {"ink/dark", "held_out/loss", "held_out/loss_sigma_0.1", "held_out/loss_sigma_0.9"}
    assert not summary["metrics"]["held_out/loss"]["higher_is_better"] and summary["metrics"]["held_out/loss"]["examples"] == 4
    monkeypatch.setattr("OpenSciDraw.evaluation.drawing.Artist.load", lambda *_: pytest.fail("a model was loaded"))
    evaluated(*command)
    assert summary_of(out)["metrics"] == summary["metrics"]


def test_a_picture_depends_on_its_prompt_seed_and_id_alone(trained: Path, tmp_path: Path) -> None:
    """The same pictures from a longer list, in other batches; others from another seed."""
    def drawn(name: str, *extra: object) -> dict[str, np.ndarray]:
        evaluated(trained, "--figures", SPEC, "--metrics", "ink", "--steps", 2, "--out", tmp_path / name, *extra)
        return {path.name: np.asarray(Image.open(path), dtype=int) for path in (tmp_path / name / "pictures").iterdir()}

    four, two, seeded = drawn("four"), drawn("two", "--limit", 2, "--batch_size", 1), drawn("seed", "--limit", 2, "--seed", 1)
    assert len(four) == 4 and len(two) == 2
    for name, picture in two.items():
        assert np.abs(picture - four[name]).max() <= 1  # the sum's order in a larger batch may move a rounding
        assert np.abs(picture - seeded[name]).max() > 10
    lines = [{"id": name, "prompt": "A box.", "width": 128, "height": 128} for name in ("a", "b")]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    same = drawn("same", "--figures", tmp_path / "same.jsonl")
    assert np.abs(same["a.png"] - same["b.png"]).max() > 10  # the ids alone differ


def test_pictures_of_other_settings_are_refused_with_what_differs(trained: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    command = ["evaluate", str(trained), "--figures", SPEC, "--metrics", "ink", "--limit", "1", "--out", str(out), "--steps"]
    assert main([*command, "1"]) == 0
    assert main([*command, "2", "--guidance", "3"]) == 2
    text = capsys.readouterr().err
    assert "steps: 1 there, 2 now" in text and "guidance: 1.0 there, 3.0 now" in text and "Choose another --out" in text
    picture = next((out / "pictures").iterdir())
    weights = trained / "pytorch_lora_weights.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-4] + b"abcd")
        assert main([*command, "1"]) == 2
    finally:
        weights.write_bytes(before)
    assert "trained_weights" in capsys.readouterr().err
    records = out / "drawn.jsonl"
    records.write_text(records.read_text().replace("Top", "Bottom").replace("prompt\": \"", "prompt\": \"x"))
    assert main([*command, "1"]) == 2
    assert "for another prompt or size" in capsys.readouterr().err
    picture.unlink()  # without its picture a record means nothing: it is drawn
    assert main([*command, "1"]) == 0 and picture.is_file()


def test_a_config_is_evaluated_as_it_is_before_training(trained: Path, store_config: dict, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.py", merged(store_config, model_output_dir=str(tmp_path / "none")))
    evaluated(config, "--figures", SPEC, "--metrics", "ink,held_out", "--limit", 2, *STEPS)
    base = tmp_path / "none" / "evaluations" / "base_drawn-4-seed-9-style-small"
    assert summary_of(base)["weights"] == "base"
    evaluated(trained, "--figures", SPEC, "--metrics", "ink,held_out", "--limit", 2, *STEPS, "--compare", config)
    compared = summary_of(trained / "evaluations" / "step-2_drawn-4-seed-9-style-small")["comparison"]["metrics"]
    assert compared["held_out/loss"]["difference"] != 0
    assert compared["held_out/loss"]["examples"] == 2  # the config holds out two of the rows that the run holds out
    after = trained / "evaluations" / "step-2_drawn-4-seed-9-style-small"
    pictures = [sorted((folder / "pictures").iterdir()) for folder in (base, after)]
    assert [path.name for path in pictures[0]] == [path.name for path in pictures[1]][:2]
    assert pictures[0][0].read_bytes() != pictures[1][0].read_bytes()


def test_the_held_out_loss_is_that_of_training(trained: Path, tmp_path: Path) -> None:
    """With a uniform density sigma is its own quantile, so metrics.jsonl has the same numbers."""
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "held_out_loss" in line][-1]
    evaluated(trained, "--metrics", "held_out", "--seed", 42, "--out", tmp_path / "out")
    found = summary_of(tmp_path / "out")["metrics"]
    assert found["held_out/loss"]["value"] == pytest.approx(last["held_out_loss"], rel=1e-5)
    assert found["held_out/loss_sigma_0.3"]["value"] == pytest.approx(last["held_out_loss_q0.3"], rel=1e-5)
    assert not (tmp_path / "out" / "pictures").exists()


def test_all_weights_and_their_average_are_evaluated(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Each from its own files, into a folder of its own: three pictures that differ."""
    folder = tmp_path / "run"
    run(model_output_dir=str(folder), use_lora=False, use_ema=True, ema_steps=1, ema_decay=0.5, max_train_steps=2)
    command = (folder, "--figures", "drawn:1:seed=9:style=small", "--metrics", "ink", "--steps", 2)
    for extra in ((), ("--ema",)):
        evaluated(*command, *extra)
    evaluated(folder / "config.py", *command[1:])
    names = {"step-2": "full", "step-2-ema": "full ema", "base": "base"}
    folders = {name: folder / "evaluations" / f"{name}_drawn-1-seed-9-style-small" for name in names}
    assert {name: summary_of(path)["weights"] for name, path in folders.items()} == names
    assert len({next((path / "pictures").iterdir()).read_bytes() for path in folders.values()}) == 3


def test_the_held_out_loss_needs_no_store(tmp_path: Path) -> None:
    """Figures that are encoded while training: the captions are encoded before the transformer loads."""
    data = {"type": "FigureDataset", "figures": "drawn:20:style=small", "resolution": 128}
    config = write_config(tmp_path / "c.py", {**BASE, "dataset": data, "model_output_dir": str(tmp_path / "run")})
    evaluated(config, "--metrics", "held_out", "--out", tmp_path / "out")
    found = summary_of(tmp_path / "out")["metrics"]["held_out/loss"]
    assert found["examples"] == 2 and found["value"] > 0


# -- while training ----------------------------------------------------------------------------------
EVALUATE = {"figures": "drawn:3:seed=9:style=small", "metrics": ["ink", "brightness"], "steps": 1, "batch_size": 2}


def test_metrics_are_measured_while_training(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    training = run(
        model_output_dir=str(tmp_path / "run"), max_train_steps=2, validation_steps=2, evaluate=EVALUATE,
        validation_func_name="evaluate_validation_func", validation_prompts=["A box."], resolution_list=[[64, 64]],
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "ink/dark" in line]
    assert [line["step"] for line in validated] == [0, 2]
    assert all("brightness/grey" in line and "held_out_loss" in line for line in validated)
    folder = tmp_path / "run" / "validation_images" / "step_000002"
    assert (folder / "00.png").is_file()  # the ordinary pictures are drawn as well
    assert sorted(path.name for path in (folder / "evaluate").glob("*.png")) == [
        f"drawn-small-9-{at:07d}-128px.png" for at in range(3)
    ]
    assert training.model.transformer.training


def test_a_picture_of_validation_is_that_of_evaluate(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run(model_output_dir=str(tmp_path / "run"), max_train_steps=2, validation_steps=2, evaluate={**EVALUATE, "metrics": ["ink"]},
        validation_func_name="evaluate_validation_func")  # fmt: skip
    shown = tmp_path / "run" / "validation_images" / "step_000002" / "evaluate"
    evaluated(tmp_path / "run", "--out", tmp_path / "out")  # figures, metrics and steps are the config's
    for path in shown.glob("*.png"):
        pictures = [np.asarray(Image.open(folder / path.name), dtype=int) for folder in (shown, tmp_path / "out" / "pictures")]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1
    line = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "ink/dark" in line][-1]
    assert summary_of(tmp_path / "out")["metrics"]["ink/dark"]["value"] == pytest.approx(line["ink/dark"], abs=0.01)


TWO_RANKS = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/evaluation", {repo!r}]
from test_evaluate import METRICS, Brightness, Ink
METRICS._objects |= {{"ink": Ink, "brightness": Brightness}}
from train_OpenSciDraw_loop import main
sys.exit(main([{config!r}]))
"""


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(store_config: dict, run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Three batches on two ranks that share the weights (FSDP2): one rank draws a batch once more, and does not count it."""
    changes = {"max_train_steps": 1, "evaluate": {**EVALUATE, "batch_size": 1}, "validation_func_name": "evaluate_validation_func"}
    config = write_config(tmp_path / "c.py", merged(store_config, **changes, model_output_dir=str(tmp_path / "two")))
    script = tmp_path / "train.py"
    script.write_text(TWO_RANKS.format(tests=str(REPO / "tests"), repo=str(REPO), config=str(config)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    done = subprocess.run(launch, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    run(**changes, model_output_dir=str(tmp_path / "one"))
    found = []
    for name in ("one", "two"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found.append(next(line for line in lines if "ink/dark" in line))
        results = results_of(tmp_path / name / "validation_images" / "step_000000" / "evaluate")
        assert sorted(row["id"] for row in results if row["metric"] == "ink") == [e.id for e in load_examples(SPEC, 3)]
    for key in ("ink/dark", "brightness/grey"):
        assert found[0][key] == pytest.approx(found[1][key], abs=0.01)


# -- what is refused -------------------------------------------------------------------------------
def test_a_reference_that_is_no_picture_is_named(pictures: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "bad.png").write_text("no picture")
    line = {"id": load_examples(SPEC)[0].id, "prompt": "A box.", "width": 128, "height": 128, "reference": "bad.png"}
    (tmp_path / "b.jsonl").write_text(json.dumps(line))
    assert main(["evaluate", str(pictures), "--figures", str(tmp_path / "b.jsonl"), "--metrics", "brightness"]) == 2
    assert f"The reference of '{line['id']}' cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is not there. Give a run folder or checkpoint, a config file"),
        (["{empty}"], "holds neither a run (config.py) nor pictures"),
        (["{pictures}", "--figures", SPEC, "--metrics", "inc"], "Unknown metric 'inc'"),
        (["{pictures}", "--figures", SPEC, "--metrics", "held_out"], "held_out is measured with a model"),
        (["{pictures}", "--metrics", "ink"], "Which figures? Give --figures"),
        (["{pictures}", "--figures", "drawn:x", "--metrics", "ink"], "Cannot read the count 'x'"),
        (["{pictures}", "--figures", "none/", "--metrics", "ink"], "There is no figure source none/"),
        (["{pictures}", "--figures", "drawn:2:seed=77", "--metrics", "ink"], "holds no picture of any of the 2 examples"),
        (["{pictures}", "--figures", SPEC, "--metrics", "ink", "--ema"], "--ema is for a run"),
        (["{pictures}", "--figures", SPEC, "--seed", "-1", "--metrics", "ink"], "evaluate.seed: Input should be greater"),
        (["{pictures}", "--figures", SPEC, "--cfg_options", "rank=3"], "only evaluate.KEY=VALUE is possible"),
        (["{pictures}", "--figures", SPEC, "--cfg_options", "evaluate.judge_tries=3"], "evaluate.judge_tries: Extra inputs"),
        (["{pictures}", "--figures", SPEC, "--metrics", "ink", "--compare", "nowhere"], "nowhere is not there"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(  # type: ignore[no-untyped-def]
    arguments: list[str], said: str, pictures: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "empty").mkdir()
    filled = [text.format(pictures=pictures, empty=tmp_path / "empty") for text in arguments]
    assert main(["evaluate", *filled]) == 2
    assert said in capsys.readouterr().err


def test_wrong_arguments_are_refused_without_importing_torch(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.py", {**BASE, "dataset": {"base_dir": str(tmp_path)}})
    code = (
        "import sys; from OpenSciDraw.cli import main\n"
        f"codes = [main(['evaluate', {str(config)!r}, *rest]) for rest in (['--metrics', 'ink'], ['--figures', 'drawn:x'],\n"
        "          ['--figures', 'drawn:2', '--compare', 'nowhere'], ['--figures', 'drawn:2', '--seed', '-3'])]\n"
        "print(codes, [name for name in ('torch', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[2, 2, 2, 2] []", done.stderr


# -- examples ----------------------------------------------------------------------------------------
def test_drawn_examples_carry_caption_size_truth_and_reference() -> None:
    example = load_examples("drawn:2:seed=5:size=160")[1]
    figure = draw_figure(5, 1, 160)
    assert (example.prompt, example.truth, (example.width, example.height)) == (figure.caption, figure.truth, figure.image.size)
    reference = example.reference_image()
    assert reference is not None and reference.tobytes() == figure.image.tobytes()


def test_figures_of_files_are_drawn_at_the_size_of_their_bucket(tmp_path: Path) -> None:
    Image.new("RGB", (300, 150), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("A red field.")
    assert [(e.id, e.width, e.height) for e in load_examples(str(tmp_path))] == [("a.png", 300, 150)]
    example = load_examples(str(tmp_path), resolution=256)[0]
    assert example.width * example.height == pytest.approx(256**2, rel=0.1) and example.width > 1.8 * example.height
    reference = example.reference_image()
    assert reference is not None and reference.size == (300, 150)


def test_figures_of_scienceflow_draw_come_with_their_truth(tmp_path: Path) -> None:
    assert main(["draw", str(tmp_path), "--count", "2", "--seed", "3", "--size", "128"]) == 0
    found = load_examples(str(tmp_path), resolution=128)
    assert [e.truth["kind"] for e in found if e.truth] == [draw_figure(3, at, 128).truth["kind"] for at in range(2)]
    assert [(e.width, e.height) for e in found] == [draw_figure(3, at, 128).image.size for at in range(2)]


def test_lists_of_prompts_are_read_with_what_judges_need(tmp_path: Path) -> None:
    bench = tmp_path / "bench.jsonl"
    rubric = {"components": ["a box"], "arrows": [], "text": ["A"]}
    bench.write_text(
        json.dumps({"id": 7, "prompt": " A box. ", "width": 640, "height": 480, "rubric": rubric, "source": "x"})
        + "\n\n" + json.dumps({"prompt": "Two boxes."}) + "\n"
    )  # fmt: skip
    assert load_examples(str(bench), resolution=256) == [
        Example("7", "A box.", 640, 480, rubric=rubric), Example("00003", "Two boxes.", 256, 256),
    ]  # fmt: skip
    with pytest.raises(UserError, match="bench.jsonl:3: no width and height"):
        load_examples(str(bench))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}", "1: prompt = None"), ("[1]", "1: not JSON: a line must be an object"), ("{", "1: not JSON"),
        ('{"prompt": "a", "width": 10}', "height = None"), ('{"prompt": "a", "width": "10", "height": 10}', "width = '10'"),
        ('{"prompt": "a", "width": 10, "height": 10, "rubric": []}', "rubric = []"),
        ('{"prompt": "a", "width": 10, "height": 10, "reference": "no.png"}', "there is no reference picture"),
        ('{"prompt": "a", "width": 9, "height": 9, "id": 1}\n' * 2, "two lines have the id '1'"),
    ],
)  # fmt: skip
def test_a_wrong_line_of_prompts_is_named(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "b.jsonl").write_text(line + "\n")
    with pytest.raises(UserError) as error:
        load_examples(str(tmp_path / "b.jsonl"))
    assert said in str(error.value)


def test_pictures_are_found_under_ids_that_are_paths(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.jpg").touch()
    (tmp_path / "plots" / "b.png").touch()
    assert find_picture(tmp_path, "plots/a.png") == tmp_path / "plots" / "a.jpg"
    assert find_picture(tmp_path, "plots/b.png") == tmp_path / "plots" / "b.png"
    own = picture_name("plots/c.png")
    assert find_picture(tmp_path, "plots/c.png") == tmp_path / own and "/" not in own and own != picture_name("plots_c.png")
    assert find_picture(tmp_path / "plots", "../b").parent == tmp_path / "plots"


def test_a_wrong_rubric_is_refused_before_anything_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "bench.jsonl"
    prompts.write_text(json.dumps({"id": "p", "prompt": "a box", "width": 64, "height": 64, "rubric": {"colours": []}}) + "\n")
    out = tmp_path / "out"
    config = write_config(tmp_path / "c.py", BASE | {"dataset": {"type": "FigureDataset", "figures": "drawn:4"}})
    judge = ["--judge", "http://127.0.0.1:9/v1", "--judge_model", "m"]
    assert main(["evaluate", str(config), "--figures", str(prompts), "--metrics", "judge", "--out", str(out), *judge]) == 2
    assert "p: rubric['colours']" in capsys.readouterr().err and not (out / "pictures").exists()


def test_rebuilt_shows_the_figures_through_the_vae_and_draws_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from OpenSciDraw.models.flux2_klein import Flux2Klein
    from OpenSciDraw.models.source import ModelSource

    monkeypatch.setattr(Flux2Klein, "load_transformer", lambda *_, **__: pytest.fail("nothing is drawn"))
    config = write_config(tmp_path / "c.py", BASE | {"dataset": {"type": "FigureDataset", "figures": "drawn:4"}})
    asked = ["evaluate", str(config), "--rebuilt", "--figures", "drawn:3:seed=9:style=small", "--out", str(tmp_path / "out")]
    assert main([*asked, "--metrics", "structure"]) == 0
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert "figures rebuilt by its VAE: 3 figures" in capsys.readouterr().out
    assert summary["weights"] == "vae" and summary["metrics"]["structure/components"]["value"] > 0.5
    model = Flux2Klein(ModelSource(BASE["pretrained_model_name_or_path"]), 64, torch.float32)
    model.load_vae()
    for index, example in enumerate(load_examples("drawn:3:seed=9:style=small")):
        figure = draw_figure(9, index, 128, style="small")
        pixels = torch.from_numpy(np.asarray(figure.image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            rebuilt = model.decode(model.normalize(model.encode_images(pixels)))[0].permute(1, 2, 0).numpy()
        there = np.asarray(Image.open(tmp_path / "out" / "pictures" / picture_name(example.id)), dtype=float)
        assert np.abs(there - (rebuilt / 2 + 0.5).clip(0, 1) * 255).max() <= 1
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "p", "prompt": "a box", "width": 64, "height": 64, "truth": {"kind": "diagram"}}) + "\n")
    for wrong, said in (
        (["--metrics", "held_out"], "without drawing"), (["--figures", str(prompts)], "a prompt without one"),
        (["--steps", "4", "--seed", "0"], "--rebuilt draws nothing, so --steps and --seed would do nothing"),
    ):  # fmt: skip
        assert main([*asked, "--metrics", "structure", *wrong, "--out", str(tmp_path / "other")]) == 2
        assert said in capsys.readouterr().err


def test_a_batch_that_a_gpu_cannot_hold_is_made_in_halves() -> None:
    import torch

    from OpenSciDraw.evaluation.drawing import in_halves

    tried: list[int] = []

    def once(part: slice) -> list[int]:
        tried.append(part.stop - part.start)
        if tried[-1] > 2:
            raise torch.OutOfMemoryError
        return list(range(7))[part]

    assert in_halves(once, slice(0, 7)) == list(range(7)) and tried == [7, 3, 1, 2, 4, 2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        in_halves(once, slice(0, 7), may_halve=False)


def test_a_config_that_trains_a_part_of_a_model_says_that_it_draws_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = REPO / "configs" / "tiny" / "pretrain_vae.py"
    assert main(["evaluate", str(config), "--figures", "drawn:1:style=small", "--out", str(tmp_path / "out")]) == 2
    assert "trains the vae of a model" in capsys.readouterr().err
    rebuilt = ["--rebuilt", "--figures", "drawn:1:style=small", "--metrics", "structure", "--out", str(tmp_path / "other")]
    assert main(["evaluate", str(config), *rebuilt]) == 2
    assert "this config trains the vae of one" in capsys.readouterr().err


def test_a_full_disk_ends_the_evaluation_with_an_error_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    example = load_examples("drawn:1:style=small")[0]
    draw_figure(0, 0, 128, style="small").image.save(pictures / picture_name(example.id))

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("OpenSciDraw.evaluation.run.write_json", full)
    assert main(["evaluate", str(pictures), "--figures", "drawn:1:style=small", "--out", str(tmp_path / "out")]) == 2
    assert "The disk is full" in capsys.readouterr().err and (tmp_path / "out" / "results.jsonl").exists()
