"""`scienceflow bench`: the published files as they are, drawn once, judged once, set out by difficulty and axis."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import re
import signal
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from conftest import BASE, merged, write_config
from PIL import Image
from scripted_server import Scripted, fails, says

from OpenSciDraw.bench.files import read_bench
from OpenSciDraw.bench.run import progress
from OpenSciDraw.cli import main
from OpenSciDraw.config import EvaluateConfig
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.examples import Example
from OpenSciDraw.evaluation.instructions import own_instructions, read_instructions
from OpenSciDraw.evaluation.published import Judged, PublishedJudge, parse_errors, scores_of
from OpenSciDraw.utils.endpoint import BadAnswer

RUBRIC = {
    "components": [{"name": "Encoder", "description": "blue box", "importance": "primary"}, {"name": "Decoder"}],
    "arrows": [{"source": "Encoder", "target": "Decoder", "label": None, "importance": "primary"}],
    "text_labels": [{"text": "Enc", "location": "in the box", "importance": "secondary"}],
}
SIZES = {"simple": [[64, 48], [64, 48]], "hard": [[48, 64]]}
FAULTLESS = {"components": [], "arrows": [], "text": []}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Folders prompts/, rubrics/ and figures/, written as the published ones are."""
    for difficulty, sizes in SIZES.items():
        figures = [{"year": "2019", "image_path": f"19{n}/{difficulty}.png", "old_local_idx": n + 1} for n in range(len(sizes))]
        prompts = {
            "validation_prompts": [f"An encoder and a decoder, {difficulty} {n}." for n in range(len(sizes))],
            "resolution_list": sizes, "gt_images": figures,
        }  # fmt: skip
        entries = [{"index": n, "image_path": figures[n]["image_path"], "stage1_abstraction": RUBRIC} for n in range(len(sizes))]
        rubrics = {"total": len(sizes), "successful": len(sizes), "entries": entries}
        for folder, content in (("prompts", prompts), ("rubrics", rubrics)):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{difficulty}.json").write_text(json.dumps(content))
        for figure in figures:
            file = tmp_path / "figures" / figure["year"] / figure["image_path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), "green").save(file)
    return tmp_path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    values = merged(BASE, evaluate={"batch_size": 2, "judge_requests": 2}, model_output_dir=str(tmp_path / "run"),
                    dataset={"type": "ArXiVParquetDatasetV2", "base_dir": str(tmp_path)})  # fmt: skip
    return write_config(tmp_path / "config.py", values)


def bench(published: Path, config: Path, server: Scripted, out: Path, *options: str) -> int:
    judge = ["--judge", server.url, "--judge_model", "eye"]
    where = [str(published / "prompts"), str(published / "rubrics")]
    return main(["bench", *where, "--from", str(config), "--out", str(out), *judge, *options])


def as_asked(handler: Any, body: dict) -> None:
    """Finds one thing wrong on the axis that a call is about; of hard prompts two."""
    content = body["messages"][1]["content"]
    text = next(part["text"] for part in content if part["type"] == "text")
    axis = re.search(r'"(component|arrow|text)_errors"', text)
    errors = [{"d": "Missing: one", "s": "critical"}] * (2 if "hard" in text else 1)
    if axis is None:
        bent = {"item": 1, "severity": "moderate", "reason": "the encoder is bent"}
        return says({**FAULTLESS, "components": [bent]})(handler, body)
    says({axis[0].strip('"'): errors if axis[1] == "component" else [], "aesthetic": "usable"})(handler, body)


def test_the_published_files_are_read_as_they_are(published: Path) -> None:
    found = read_bench(published / "prompts", published / "rubrics", published / "figures")
    assert found.difficulties == ["simple", "hard"] and found.ids("simple") == ["simple-0000", "simple-0001"]
    assert found.rows[2]["width"] == 48 and found.rows[2]["height"] == 64 and found.rows[2]["rubric"] == RUBRIC
    assert found.rows[2]["reference"].endswith("figures/2019/190/hard.png") and not found.remarks
    assert read_bench(published / "prompts", published / "rubrics", limit=1).ids() == ["simple-0000", "hard-0000"]
    for name, kind in (("prompts/hard.json", ""), ("rubrics/hard.json", "_rubrics")):  # their earlier names, in one folder
        (published / f"benchmark_hard{kind}.json").write_bytes((published / name).read_bytes())
    assert read_bench(published, published).ids() == ["hard-0000"]


@pytest.mark.parametrize(("file", "change", "words"), [
    ("prompts/hard.json", {"resolution_list": []}, "lists of one length"),
    ("prompts/hard.json", {"resolution_list": [[48, "64"]]}, "must be [width, height]"),
    ("prompts/hard.json", {"validation_prompts": [3]}, "validation_prompts[0] is no text"),
    ("prompts/hard.json", {"gt_images": [{"year": "2019", "image_path": "../../../etc/passwd"}]}, "leads out of"),
    ("prompts/hard.json", {"gt_images": [{"year": "2019", "image_path": "no.png"}]}, "is there"),
    ("rubrics/hard.json", {"entries": [{"index": 1, "stage1_abstraction": RUBRIC}]}, "entries[0]: index = 1"),
])  # fmt: skip
def test_what_is_written_otherwise_is_refused_by_file_and_place(published: Path, file: str, change: dict, words: str) -> None:
    path = published / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=re.escape(words)):
        read_bench(published / "prompts", published / "rubrics", published / "figures")


def test_prompts_without_a_rubric_are_left_out_and_counted(published: Path) -> None:
    path = published / "rubrics" / "simple.json"
    path.write_text(json.dumps({"entries": json.loads(path.read_text())["entries"][:1]}))
    found = read_bench(published / "prompts", published / "rubrics")
    assert found.ids("simple") == ["simple-0000"] and "1 of 2 prompts have no rubric" in found.remarks[0]


def test_both_protocols_make_tables_by_difficulty_and_a_second_run_draws_and_asks_nothing(
    published: Path, config: Path, serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, out = serve(as_asked), tmp_path / "out"
    options = ("--protocol", "both", "--references", str(published / "figures"))
    assert bench(published, config, server, out, *options) == 0
    assert len(server.bodies) == 3 * (1 + 3)  # a picture costs one call of ours and one for each axis
    said = capsys.readouterr().out
    assert "Our judge (eye)" in said and "our wording of the instructions" in said
    table = json.loads((out / "bench.json").read_text())
    theirs = {row["difficulty"]: row for row in table["scores"]["judge_published"]["rows"]}
    assert list(theirs) == ["simple", "hard", "all"] and theirs["all"]["pictures"] == 3
    values = {name: {axis: found["value"] for axis, found in row["scores"].items()} for name, row in theirs.items()}
    assert values["simple"] == {"components": 0.5, "arrows": 1.0, "text": 1.0, "overall": pytest.approx(2.5 / 3)}
    assert values["hard"] == {"components": 0.0, "arrows": 1.0, "text": 1.0, "overall": pytest.approx(2 / 3)}
    assert values["all"]["components"] == pytest.approx(1 / 3)
    ours = table["scores"]["judge"]["rows"][-1]["scores"]
    assert ours["components"]["value"] == 0.75 and ours["overall"]["value"] == pytest.approx(2.75 / 3)
    assert theirs["simple"]["scores"]["overall"]["low"] is not None
    page = (out / "bench.html").read_text()
    assert "the encoder is bent" in page and page.count('<img src="data:image/webp') == 6
    assert "Made by <code>scienceflow bench" in page
    assert progress(out) == {"pictures": 3, "drawn": 3, "measured": 6}

    monkeypatch.setattr("OpenSciDraw.evaluation.drawing.Artist.load", None)  # nothing is drawn again
    assert bench(published, config, server, out, *options) == 0 and len(server.bodies) == 12
    (out / "results.jsonl").unlink()  # answers are kept for themselves
    assert bench(published, config, server, out, *options) == 0 and len(server.bodies) == 12


def test_killed_it_goes_on_without_drawing_or_asking_twice(published: Path, config: Path, serve: Any, tmp_path: Path) -> None:
    server, out = serve(as_asked), tmp_path / "out"
    options = ("--protocol", "published", "--references", str(published / "figures"))

    def die_at_answer(count: int) -> None:
        move, seen = os.replace, 0

        def counted(source: Any, target: Any) -> None:
            nonlocal seen
            move(source, target)
            seen += Path(target).parent.name == "judge"
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = counted  # type: ignore[assignment]
        bench(published, config, server, out, "--cfg_options", "evaluate.judge_requests=1", *options)

    process = multiprocessing.get_context("fork").Process(target=die_at_answer, args=(4,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and not (out / "bench.json").exists()
    pictures = {path: path.stat().st_mtime_ns for path in (out / "pictures").iterdir()}
    assert len(pictures) == 3 and len(server.bodies) == 4
    assert bench(published, config, server, out, *options) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "pictures").iterdir()} == pictures
    assert len(server.bodies) == 9 and len({json.dumps(body) for _, body in server.bodies}) == 9


def test_a_call_that_fails_counts_as_wrong_and_is_asked_again(published: Path, config: Path, serve: Any, tmp_path: Path) -> None:
    server, out = serve(fails(400)), tmp_path / "out"
    options = ("--protocol", "published", "--references", str(published / "figures"), "--limit", "1")
    assert bench(published, config, server, out, *options) == 0
    row = json.loads((out / "bench.json").read_text())["scores"]["judge_published"]["rows"][-1]
    assert row["failures"] == 2 and row["scores"]["overall"]["value"] == 0.0
    server.script[:] = [as_asked]
    assert bench(published, config, server, out, *options) == 0
    row = json.loads((out / "bench.json").read_text())["scores"]["judge_published"]["rows"][-1]
    assert row["failures"] == 0 and row["scores"]["arrows"]["value"] == 1.0


def test_what_does_not_act_or_is_missing_is_refused(published: Path, config: Path, serve: Any, tmp_path: Path, capsys: Any) -> None:
    server = serve(as_asked)
    for options, words in (
        (("--rounds", "2"), "--rounds: for the published protocol alone"),
        (("--protocol", "published"), "--references DIR"),
        (("--protocol", "published", "--references", str(tmp_path / "no")), "is there"),
    ):
        assert bench(published, config, server, tmp_path / "out", *options) == 2
        assert words in capsys.readouterr().err
    where = [str(published / "prompts"), str(published / "rubrics"), "--from", str(config)]
    assert main(["bench", *where, "--protocol", "published"]) == 2 and "needs a judge" in capsys.readouterr().err
    assert server.bodies == [] and not (tmp_path / "out").exists()


# -- the published protocol ------------------------------------------------------------------------
def example(reference: Path, **changes: Any) -> Example:
    given = {"id": "e", "prompt": "p" * 400, "width": 64, "height": 64, "rubric": RUBRIC, "reference": reference, **changes}
    return Example(**given)


def judge(server: Scripted, folder: Path, **settings: Any) -> PublishedJudge:
    values = {"judge_url": server.url, "judge_model": "eye", "judge_retries": 1, **settings}
    return PublishedJudge(EvaluateConfig.model_validate(values), folder)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    Image.new("RGB", (3000, 300), "green").save(tmp_path / "reference.png")
    return tmp_path / "reference.png"


def test_reference_and_picture_are_sent_in_this_order_with_the_published_lists(serve: Any, tmp_path: Path, reference: Path) -> None:
    server = serve(as_asked)
    judge(server, tmp_path).score(Image.new("RGB", (64, 48), "red"), example(reference))
    axes = [re.findall(r"(\w+)_errors", json.dumps(body)) for _, body in server.bodies]
    assert axes == [["component"], ["arrow"], ["text"]]
    first, second, text = server.bodies[0][1]["messages"][1]["content"]
    sent = [Image.open(BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1]))) for part in (first, second)]
    assert [picture.size for picture in sent] == [(1024, 102), (64, 48)] and sent[0].format == "JPEG"
    assert "  1. Encoder — blue box\n  2. Decoder\n" in text["text"] and "p" * 300 + '"' in text["text"]
    lists = [body["messages"][1]["content"][2]["text"] for _, body in server.bodies]
    assert "  1. Encoder → Decoder\n" in lists[1] and '  1. "Enc" at in the box\n' in lists[2]


def test_scores_are_reckoned_as_published() -> None:
    wrong = parse_errors('{"component_errors": [{"d": "Wrong: a lake", "s": "critical"}], "aesthetic": "usable"}', "component")
    assert wrong.weights == [0.0]  # as the released script: such an error weighs nothing
    both = parse_errors('{"text_errors": [{"d": "Garbled: x", "s": "critical"}, {"d": "Duplicated", "s": "moderate"}]}', "text")
    assert both.weights == [1.0, 0.5] and not both.broken
    found = scores_of({"component": wrong, "text": both}, {"component": 4, "text": 60})
    assert found == {"components": 1.0, "text": pytest.approx(1 - 1.5 / 30), "overall": pytest.approx(1 - 0.75 / 30)}
    assert scores_of({"component": Judged([1.0, 1.0], False)}, {"component": 2}) == {"components": 0.0, "overall": 0.01}
    assert scores_of({"component": Judged([], True), "text": Judged([], False)}, {"component": 2, "text": 1}) == {"overall": 0.0}
    assert "text" in scores_of({"component": Judged([], True), "text": Judged([1.0], False)}, {"component": 2, "text": 1})
    for bad in ('{"text_errors": {}}', '{"text_errors": [{"d": "x", "s": "awful"}]}', "[]", "fine"):
        with pytest.raises(BadAnswer):
            parse_errors(bad, "text")


def test_rounds_are_asked_apart_and_averaged_and_empty_axes_cost_no_call(serve: Any, tmp_path: Path, reference: Path) -> None:
    faults = {"component_errors": [{"d": "Missing: a", "s": "critical"}], "aesthetic": "usable"}
    server = serve(says(faults), says({"component_errors": [], "aesthetic": "usable"}))
    rubric = {"components": RUBRIC["components"], "arrows": [], "text_labels": []}
    scores = judge(server, tmp_path, judge_rounds=2).score(Image.new("RGB", (9, 9)), example(reference, rubric=rubric))
    assert scores == {"components": (0.75, 1.0), "overall": (0.75, 1.0)} and len(server.bodies) == 2
    again = judge(server, tmp_path).score(Image.new("RGB", (9, 9)), example(reference, rubric=rubric))
    assert again["components"] == (0.5, 1.0) and len(server.bodies) == 2  # the first round was kept


def test_a_missing_picture_counts_as_wrong_and_costs_no_call(serve: Any, tmp_path: Path, reference: Path) -> None:
    server = serve(as_asked)
    assert judge(server, tmp_path).score(None, example(reference))["overall"] == (0.0, 1.0) and server.bodies == []
    with pytest.raises(UserError, match="1 of 1 examples have none"):
        judge(server, tmp_path).check([replace(example(reference), reference=None)])


def test_instructions_come_from_the_released_script_without_running_it(tmp_path: Path) -> None:
    script = tmp_path / "eval_benchmark.py"
    lines = ["raise SystemExit('run')"]
    for short in ("COMP", "ARROW", "TEXT"):
        question = "{prompt}: {n_SHORT}\n{SHORT_list} {{}}".replace("SHORT", short.lower())
        lines += [f'DIM_{short}_SYSTEM = ("look " "at {short}")', f'DIM_{short}_TEMPLATE = """{question}"""']
    script.write_text("\n".join(lines))
    found = read_instructions(script)
    assert found.wording == "eval_benchmark.py"
    assert found.texts("arrow", "A figure", ["a → b"]) == ("look at ARROW", "A figure: 1\n  1. a → b {}")
    assert found.texts("text", "A figure", [])[1] == "A figure: 0\n  (none detected) {}"
    script.write_text(lines[1])
    with pytest.raises(UserError, match="DIM_COMP_TEMPLATE, DIM_ARROW_SYSTEM"):
        read_instructions(script)


@pytest.mark.parametrize("question", ["{prompt.__class__}", "{0}", "{prompt!r}", "{n_text:>900000000}", "{", "{n_arrow}"])
def test_a_question_reaches_nothing_but_its_fields(tmp_path: Path, question: str) -> None:
    own = own_instructions()
    texts = {axis: {"system": own.system[axis], "question": own.question[axis]} for axis in own.system}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(texts))
    assert read_instructions(file).question == own.question
    file.write_text(json.dumps({**texts, "text": {"system": "s", "question": question}}))
    with pytest.raises(UserError, match="question of 'text'"):
        read_instructions(file)
