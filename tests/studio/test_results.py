"""Illustrations, benches and editable figures on the page: what is queued, what is refused, what is shown of a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from OpenSciDraw.cli import build_parser
from OpenSciDraw.drawn.folders import write_drawn_figures

EVIL = "<img src=x onerror=alert(1)>"
ENDPOINT = "http://localhost:9/v1"


@pytest.fixture
def bench_files(studio: Any) -> Path:
    """Two prompts with rubrics in the studio's folder."""
    root: Path = studio.places.root
    rubric = {"components": [{"name": "a"}], "arrows": [], "text_labels": []}
    for name, value in {
        "prompts/simple.json": {"validation_prompts": ["A 'box'.", "Another 'box'."], "resolution_list": [[128, 128]] * 2},
        "rubrics/simple.json": {"entries": [{"index": at, "stage1_abstraction": rubric} for at in range(2)]},
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(value))
    return root


def illustration(folder: Path, text: str = "A red box.") -> None:
    """What `scienceflow illustrate` leaves behind."""
    (folder / "pictures").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(folder / "pictures" / "a.png")
    picture = {"id": "a", "file": "a.png", "seed": 2**62 + 1, "metric": "text", "score": 0.5, "scores": {}, "findings": [text],
               "failure": None, "model": "m", "prompt": text}  # fmt: skip
    candidate = {"id": "text-1", "text": text, "by": "the paper", "checklist": {}, "round": 0, "parent": None, "instruction": None,
                 "edited": None, "width": 32, "height": 32, "kept": True, "score": 0.5, "pictures": [picture]}  # fmt: skip
    subject = {"id": "text", "caption": "", "context": text, "label": "", "candidates": [candidate]}
    found = {"what": "run", "source": text, "settings": {"model": "m", "steps": 4}, "remarks": [text], "subjects": [subject]}
    (folder / "illustrate.json").write_text(json.dumps(found))
    (folder / "illustrate.html").write_text(f"<script>alert(1)</script>{text}")


def bench(folder: Path, value: float, name: str = "simple") -> None:
    folder.mkdir(parents=True)
    score = {"value": value, "low": value - 0.1, "high": value + 0.1, "examples": 2, "failures": 0, "higher_is_better": True}
    row = {"difficulty": name, "pictures": 2, "failures": 1, "scores": {"arrows": score, "components": score, "overall": score}}
    failure = {"id": "simple-0000", "metric": "judge", "reason": EVIL}
    found = {"name": "n", "created": "2026", "run": "r", "weights": None, "step": 5, "what": EVIL,
             "settings": {"model": "m"}, "versions": {}, "seconds_per_picture": 1.0, "failures": [failure],
             "bench": {"prompts": "p.json"}, "remarks": [],
             "scores": {"judge": {"model": "gpt", "rows": [row]}}}  # fmt: skip
    (folder / "bench.json").write_text(json.dumps(found))
    (folder / "bench.html").write_text("<script>alert(1)</script>")


def test_an_illustration_of_a_paragraph_is_queued_as_the_command_would_be_typed(studio: Any, client: Any) -> None:
    asked = {"text": "A red box beside a blue one.", "target": "recipe:tiny", "candidates": "3", "pictures": "2", "refine": "1",
             "refine_by": "text", "writer": ENDPOINT, "writer_model": "qwen", "judge": ENDPOINT, "judge_model": "vl", "steps": "4",
             "guidance": "3.5", "seed": "9", "width": "128", "height": "64", "reader": "tesseract", "name": "mine"}  # fmt: skip
    assert client.post("/api/illustrate/start", json=asked).json() == {"folder": "illustrations/mine", "job": 1}
    folder = studio.places.root / "illustrations" / "mine"
    assert (folder / "text.txt").read_text() == "A red box beside a blue one.\n"
    job = studio.queue.job(1)
    assert (job.command, job.run) == ("illustrate", "illustrations/mine")
    assert job.arguments == [
        str(folder / "text.txt"), "--from", str(folder / "from.py"), "--candidates", "3", "--pictures", "2", "--refine", "1",
        "--width", "128", "--height", "64", "--writer", ENDPOINT, "--writer_model", "qwen", "--judge", ENDPOINT,
        "--judge_model", "vl", "--refine_by", "text", "--steps", "4", "--seed", "9", "--guidance", "3.5",
        "--reader", "tesseract", "--out", str(folder),
    ]  # fmt: skip
    assert build_parser().parse_args([job.command, *job.arguments]).refine == 1
    assert studio.places.config("illustrations/mine/from.py").pretrained_model_name_or_path == "embedded:flux2_klein_tiny"
    row = client.get("/api/illustrate/one", params={"folder": "illustrations/mine"}).json()
    assert row["state"]["name"] == "waiting" and row["command"].startswith("scienceflow illustrate /") and row["drawn"] == 0
    assert client.post("/api/illustrate/start", json=asked).status_code == 400  # never into an earlier one's folder
    studio.queue.stop(1)
    assert client.post("/api/illustrate/go_on", json={"folder": "illustrations/mine"}).json()["job"] == 2
    assert studio.queue.job(2).arguments == job.arguments


@pytest.mark.parametrize(("changes", "said"), [
    ({"text": ""}, "one of the two"), ({"source": "paper"}, "one of the two"),
    ({"text": "", "source": "../paper"}, "not in the studio"), ({"text": "", "source": "/etc/passwd"}, "not in the studio"),
    ({"text": "", "source": "none"}, "There is no"), ({"target": "../run"}, "not in the studio"),
    ({"target": "recipe:x"}, "no recipe"), ({"target": "runs"}, "not|no run"), ({"refine": "1"}, "needs a writer"),
    ({"writer": ENDPOINT}, "give both"), ({"writer": "file:///x", "writer_model": "m"}, "address"),
    ({"judge": "http://me:secret@host/v1", "judge_model": "m"}, "without user"),
    ({"judge": ENDPOINT, "judge_model": "--out"}, "give both"), ({"candidates": "0"}, "candidates"),
    ({"name": "../x"}, "no name"), ({"ema": "yes"}, "of a run"), ({"only": "--out"}, "named as"),
])  # fmt: skip
def test_what_cannot_be_illustrated_is_said_at_once(studio: Any, client: Any, changes: dict[str, str], said: str) -> None:
    answer = client.post("/api/illustrate/start", json={"text": "A box.", "target": "recipe:tiny"} | changes)
    assert answer.status_code == 400 and re.search(said, answer.json()["error"]), answer.text
    assert "secret" not in answer.text and studio.queue.jobs() == []
    assert not (studio.places.root / "illustrations" / "x").exists()


def test_a_strangers_config_sends_nothing_to_an_address_that_was_not_entered(studio: Any, client: Any) -> None:
    run = studio.places.root / "run"
    run.mkdir()
    values = {"model_type": "Flux2Klein", "pretrained_model_name_or_path": "embedded:flux2_klein_tiny",
              "evaluate": {"judge_url": "http://localhost:1/v1", "judge_model": "m", "judge_key_variable": "OTHER"}}  # fmt: skip
    recipes = pytest.importorskip("OpenSciDraw.studio.recipes")
    values = recipes.RECIPES["tiny"].values | values | {"model_output_dir": str(run)}
    (run / "config.py").write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
    (run / "run.json").write_text("{}")
    asked = {"text": "A box.", "target": "run"}
    for given in (asked, asked | {"judge": "http://localhost:1/v1", "judge_model": "m"}):
        answer = client.post("/api/illustrate/start", json=given)
        assert answer.status_code == 400 and "names a judge" in answer.json()["error"], answer.text
    values["evaluate"]["judge_key_variable"] = "OPENAI_API_KEY"
    (run / "config.py").write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
    assert client.post("/api/illustrate/start", json=given).json()["job"] == 1
    assert studio.queue.job(1).arguments[1:3] == ["--from", str(run)]


def test_all_illustrations_of_the_folder_are_listed_and_hostile_texts_stay_text(studio: Any, client: Any, tmp_path: Path) -> None:
    root = studio.places.root
    illustration(root / "runs" / "a" / "illustrations" / "base_text", EVIL)  # the command's own default
    illustration(root / "elsewhere")
    (root / "broken").mkdir()
    (root / "broken" / "illustrate.json").write_text('{"subjects": 3}')
    outside = tmp_path / "outside"
    illustration(outside)
    (root / "linked").symlink_to(outside)
    (root / "illustrations").mkdir()
    (root / "illustrations" / "link").symlink_to(outside)
    rows = {row["folder"]: row for row in client.get("/api/illustrate").json()}
    assert set(rows) == {"runs/a/illustrations/base_text", "elsewhere", "broken"}
    assert rows["elsewhere"]["best"] == 0.5 and "was not written by" in rows["broken"]["problem"]
    name = "runs/a/illustrations/base_text"
    answer = client.get("/api/illustrate/one", params={"folder": name})
    assert answer.headers["content-type"] == "application/json" and answer.headers["x-content-type-options"] == "nosniff"
    found = answer.json()
    drawn = found["subjects"][0]["candidates"][0]["pictures"][0]
    assert drawn["findings"] == [EVIL] and drawn["seed"] == str(2**62 + 1)  # a browser's numbers would round it
    assert ["steps", "4"] in found["facts"]
    picture = client.get("/api/illustrate/picture", params={"folder": name, "file": "a.png"})
    assert picture.status_code == 200 and picture.headers["content-type"] == "image/png"
    (root / "elsewhere" / "pictures" / "b.png").symlink_to(outside / "illustrate.json")
    for folder, file in (("elsewhere", "b.png"), (name, "../illustrate.json"), (name, "../pictures/a.png"), ("linked", "a.png"),
                         ("illustrations/link", "a.png"), ("..", "a.png")):  # fmt: skip
        assert client.get("/api/illustrate/picture", params={"folder": folder, "file": file}).status_code == 400, (folder, file)


@pytest.mark.parametrize("kind", ["illustrate", "bench"])
def test_a_stored_page_is_saved_and_never_opened_under_the_studios_address(studio: Any, client: Any, kind: str) -> None:
    folder = studio.places.root / "found"
    illustration(folder) if kind == "illustrate" else bench(folder, 0.5)
    answer = client.get(f"/api/{kind}/page", params={"folder": "found"})
    assert answer.status_code == 200 and b"<script>" in answer.content
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment") and answer.headers["x-content-type-options"] == "nosniff"


def test_a_bench_is_queued_as_the_command_would_be_typed(studio: Any, client: Any, bench_files: Path) -> None:
    root = studio.places.root
    assert client.get("/api/bench/choices").json()["files"] == ["prompts", "rubrics", "prompts/simple.json", "rubrics/simple.json"]
    asked = {"prompts": "prompts", "rubrics": "rubrics", "target": "recipe:tiny", "limit": "1", "steps": "2", "batch_size": "4"}
    said = client.post("/api/bench/start", json=asked).json()
    assert said == {"folder": "benches/recipe-tiny-prompts-1", "job": 1, "pictures": 1, "remarks": []}
    folder = root / said["folder"]
    assert studio.queue.job(1).arguments == [
        str(root / "prompts"), str(root / "rubrics"), "--from", str(folder / "from.py"), "--protocol", "ours", "--limit", "1",
        "--steps", "2", "--batch_size", "4", "--out", str(folder),
    ]  # fmt: skip
    for changes, words in (
        ({"prompts": "../p"}, "not in the studio"), ({"rubrics": "/etc"}, "not in the studio"),
        ({"rubrics": "none"}, "is not there"),
        ({"prompts": "rubrics", "rubrics": "prompts"}, "file of prompts"), ({"protocol": "published"}, "references"),
        ({"references": "prompts"}, "published protocol alone"),
        ({"protocol": "published", "references": "../x"}, "not in the studio"),
        ({"protocol": "x"}, "protocol"), ({"judge_model": "m"}, "give both"),
    ):  # fmt: skip
        answer = client.post("/api/bench/start", json=asked | changes)
        assert answer.status_code == 400 and words in answer.json()["error"], answer.text
    assert len(studio.queue.jobs()) == 1


def test_benches_show_progress_and_tables_with_intervals_beside_each_other(studio: Any, client: Any) -> None:
    root = studio.places.root
    bench(root / "runs" / "a" / "benches" / "base_simple", 0.5)
    bench(root / "b", 0.25)
    (root / "c").mkdir()
    (root / "c" / "bench.json").write_text('{"scores": []}')
    (root / "b" / "bench.jsonl").write_text('{"id": "x"}\n{"id": "y"}\n')
    (root / "b" / "drawn.jsonl").write_text('{"id": "x"}\n')
    rows = {row["folder"]: row for row in client.get("/api/bench").json()}
    assert set(rows) == {"runs/a/benches/base_simple", "b", "c"} and "was not written by" in rows["c"]["problem"]
    assert rows["b"]["progress"] == {"pictures": 2, "drawn": 1, "measured": 0}
    two = client.get("/api/bench/several", params={"folder": ["b", "runs/a/benches/base_simple"]}).json()
    table = two[0]["tables"][0]
    assert table["columns"] == ["difficulty", "pictures", "components", "arrows", "overall", "failures"]
    assert table["rows"] == [["simple", 2, *["25.0 (15.0 to 35.0)"] * 3, 1]] and "judge (gpt)" in table["heading"]
    assert two[1]["tables"][0]["rows"][0][2] == "50.0 (40.0 to 60.0)" and two[1]["what"] == EVIL
    assert client.get("/api/bench/several", params={"folder": ["b", "../b"]}).status_code == 400


def test_a_drawn_picture_becomes_files_that_can_be_edited_in_a_worker(studio: Any, client: Any) -> None:
    for module in ("cv2", "resvg_py", "pptx"):
        pytest.importorskip(module, reason="needs the extra vectorize")
    write_drawn_figures(studio.places.root / "figures", 1, 0, 128, "house")
    image = studio.places.name(next((studio.places.root / "figures").glob("*.png")))
    found = client.post("/api/editable/make", json={"image": image}).json()
    assert "explains" in found["says"] and found["explained"] > 0.8
    for kind, first in (("svg", b"<"), ("tikz", b"\\"), ("pptx", b"PK")):
        answer = client.get("/api/editable/get", params={"id": found["id"], "format": kind})
        assert answer.content.lstrip().startswith(first) or kind == "tikz" and b"tikz" in answer.content
        assert answer.headers["content-disposition"].startswith("attachment")
        assert answer.headers["content-type"] == "application/octet-stream"
    for wrong in ({"id": "../x", "format": "svg"}, {"id": found["id"], "format": "/../x"}, {"id": "a" * 32, "format": "svg"}):
        assert client.get("/api/editable/get", params=wrong).status_code == 400
    (studio.places.root / "no.png").write_bytes(b"<svg>")
    assert "not a picture" in client.post("/api/editable/make", json={"image": "no.png"}).json()["error"]
    assert client.post("/api/editable/make", json={"image": "../x.png"}).status_code == 400
