"""The report: one file, no network, everything from the run escaped, and a page whatever the run lacks."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from OpenSciDraw.cli import main
from OpenSciDraw.errors import UserError
from OpenSciDraw.reporting.charts import Line, chart, smoothed, thinned, ticks
from OpenSciDraw.reporting.page import Pictures
from OpenSciDraw.reporting.run import write_report

EVIL = "<script>alert(1)</script> & 'quotes' \"double\""
SCORE = {"value": 0.9, "low": 0.85, "high": 0.94, "examples": 40, "failures": 1, "higher_is_better": True}


def make_run(folder: Path, steps: int = 60, rate: float = 1e-4, **config: Any) -> Path:
    folder.mkdir(parents=True)
    values = {"pretrained_model_name_or_path": "embedded:x", "learning_rate": rate, "rank": 8, "validation_prompts": [EVIL, "b"],
              "max_train_steps": 100, "dataset": {"type": "ArXiVParquetDatasetV2", "base_dir": "d"}, **config}  # fmt: skip
    (folder / "config.py").write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(0, steps, 10):
            line = {"step": step, "train_loss": 2.0 / (1 + step), "lr": rate, "images_per_second": 5.0, "memory_gb": 1.0}
            if step % 20 == 0:
                line |= {"held_out_loss": 1 - step / 100, "held_out_loss_q0.1": 1.5, "held_out_loss_q0.9": 0.5}
                line |= {"structure/arrows": 0.4}
            file.write(json.dumps(line) + "\n")
    for step in (0, 40):
        pictures = folder / "validation_images" / f"step_{step:06d}"
        pictures.mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (64, 48), (step * 4, 100, index * 99)).save(pictures / f"{index:02d}.png")
    session = {"device": "cpu", "versions": {"torch": "2.x"}, "contract": {"family": "F"}, "trained_parameters": 12345,
               "effective_batch": 6, "set_at": {"learning_rate": "my.py:7"}}  # fmt: skip
    (folder / "run.json").write_text(json.dumps({"sessions": [session]}))
    return folder


def evaluate(folder: Path, name: str, other: str | None = None, created: str = "2026-01-01") -> None:
    place = folder / "evaluations" / name / "pictures"
    place.mkdir(parents=True)
    Image.new("RGB", (32, 32), "blue").save(place / "drawn-small-9-0000000-128px.png")
    compared = {"difference": 0.2, "low": 0.1, "high": 0.3, "p": 0.0002, "better": "this"}
    found = {"name": name, "created": created, "figures": "drawn:4:seed=9:style=small", "metrics": {"structure/arrows": SCORE},
             "failures": [{"id": EVIL, "metric": "structure", "reason": "no such file"}], "not_applicable": {"structure": 3},
             "comparison": other and {"other": other, "metrics": {"structure/arrows": compared}}}  # fmt: skip
    (place.parent / "evaluation.json").write_text(json.dumps(found))


def text_of(folder: Path) -> str:
    return write_report(folder).read_text()


def test_the_page_needs_no_network_and_holds_what_the_run_holds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    evaluate(run, "before")
    evaluate(run, "after", "before", created="2026-01-02")
    (run / "export").mkdir()
    (run / "export" / "adapter.safetensors").write_bytes(b"x" * 1000)
    (run / "quarantine.jsonl").write_text(json.dumps({"id": "row-7", "reason": "broken"}) + "\n")
    html = text_of(run)
    assert not re.findall(r"(?:src|href)\s*=\s*\"(?!data:|#)[^\"]*\"", html) and "@import" not in html and "url(" not in html
    for wanted in ("Training loss", "Held-out loss by noise level", "Learning rate", "Throughput", "Peak memory", "Step 40",
                   "adapter.safetensors", "row-7", "0.850 to 0.940", "+0.200 (+0.100 to +0.300)", "p = 2e-4", "Before and after",
                   "Reference:", "torch", "family", "learning_", "my.py:7", "12,345", "effective batch", "no such file",
                   "does not apply to 3 examples", "Structure of validation pictures"):  # fmt: skip
        assert wanted in html, wanted
    assert "better" in html and html.count("data:image/webp") >= 6


def test_a_run_on_preferences_has_its_curves_by_axis_and_another_run_has_none(tmp_path: Path) -> None:
    plain, run = make_run(tmp_path / "plain"), make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        for step in (70, 80):
            line = {"step": step, "preference_loss": 0.6, "preference_winner_change": 0.01}
            for axis in ("component", "text"):
                line |= {f"preference_{what}_{axis}": step / 100 for what in ("accuracy", "margin", "loser_change")}
            file.write(json.dumps(line) + "\n")
    html = text_of(run)
    section = html.partition("<h2>Preferences</h2>")[2].partition("<h2>")[0] or html
    for wanted in ("share of groups on the right side", "margin before the cap", "winner, and losers by axis", "comparison alone"):
        assert wanted in section, wanted
    losses = section.partition("winner, and losers by axis")[2].partition("</figure>")[0]
    assert all(f">{name}<" in losses for name in ("winner", "component", "text")) and ">arrow<" not in losses
    assert "share of groups" not in text_of(plain)
    assert "winner&#x27;s loss less" in text_of(tmp_path) or "winner's loss less" in text_of(tmp_path)


def test_what_comes_from_the_run_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", run_name=EVIL)
    evaluate(run, "before")
    html = text_of(run)
    assert "<script>alert(1)" not in html and "&lt;script&gt;alert(1)" in html
    assert html.count("<script>") == 1


def test_whatever_stands_in_an_evaluation_or_a_session_is_escaped(tmp_path: Path) -> None:
    """Each value in turn, numbers too, since who made the folder decides what lies there."""

    def evil(value):  # type: ignore[no-untyped-def]
        if isinstance(value, dict):
            yield from ({**value, key: other} for key, item in value.items() for other in evil(item))
            yield from ({**{k: v for k, v in value.items() if k != key}, EVIL: item} for key, item in value.items())
        elif isinstance(value, list):
            yield from (value[:at] + [other] + value[at + 1 :] for at, item in enumerate(value) for other in evil(item))
        yield EVIL

    run = make_run(tmp_path / "run")
    evaluate(run, "before")
    files = [run / "evaluations" / "before" / "evaluation.json", run / "run.json"]
    seen = 0
    for file in files:
        whole = file.read_text()
        for changed in evil(json.loads(whole)):
            file.write_text(json.dumps(changed))
            html = text_of(run)
            assert "<script>alert(1)" not in html
            seen += "&lt;script&gt;alert(1)" in html
        file.write_text(whole)
    assert seen > 20


def test_no_script_and_no_style_runs_but_the_pages_own(tmp_path: Path) -> None:
    html = text_of(make_run(tmp_path / "run"))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None and "default-src 'none'" in policy[1]
    for tag, rule in (("script", "script-src"), ("style", "style-src-elem")):
        (own,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert re.search(rf"{rule} 'sha256-{re.escape(digest)}'", policy[1])
    assert "script-src 'unsafe" not in policy[1]


def test_pictures_outside_of_the_run_are_not_taken_into_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "private").mkdir()
    (run / "validation_images").rename(tmp_path / "private" / "pictures")
    with (run / "config.py").open("a") as file:
        file.write(f"image_output_dir = {str(tmp_path / 'private' / 'pictures')!r}\n")
    html = text_of(run)
    assert "lies outside of the run" in html and "data:image/webp" not in html


def test_a_config_is_read_and_never_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "config.py").open("a") as file:
        file.write(f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()\nrank = __import__('os').getpid()\n")
    assert "config.py cannot be read" in text_of(run) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("gone", ["metrics.jsonl", "validation_images", "run.json", "config values", "held out"])
def test_a_page_is_made_whatever_is_missing(tmp_path: Path, gone: str) -> None:
    run = make_run(tmp_path / "run")
    if gone == "validation_images":
        shutil.rmtree(run / gone)
    elif gone == "config values":
        (run / "config.py").write_text("")
    elif gone == "held out":
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if not k.startswith("held")} for line in lines]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    else:
        (run / gone).unlink()
    html = text_of(run)
    assert "<h1>" in html
    if gone in ("metrics.jsonl", "validation_images"):
        assert 'role="note"' in html


def test_broken_lines_not_a_number_and_broken_pictures_are_remarks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 70, "train_loss": NaN, "images_per_second": NaN}\n{"step": 80, "train_lo')
    (run / "validation_images" / "step_000040" / "01.png").write_bytes(b"no picture")
    html = text_of(run)
    assert "1 line(s) could not be read" in html and "This picture cannot be read" in html and "NaN" not in html
    assert "train_loss is not a finite number at 1 step(s), the first of them 70" in html and "nan<" not in html


def test_a_key_that_has_its_default_is_not_listed_as_changed(tmp_path: Path) -> None:
    dataset = {"type": "ArXiVParquetDatasetV2", "base_dir": "d", "num_workers": None, "stat_data": True}
    changed = text_of(make_run(tmp_path / "run", dataset=dataset)).split("<summary>All keys")[0]
    assert "stat_<wbr>data" in changed and "num_<wbr>workers" not in changed


def test_a_folder_of_runs_is_compared(tmp_path: Path) -> None:
    for name, rate in (("a", 1e-4), ("b", 3e-4)):
        evaluate(make_run(tmp_path / "runs" / name, rate=rate), "test")
    shutil.rmtree(tmp_path / "runs" / "b" / "validation_images")
    html = text_of(tmp_path / "runs")
    assert "b: This run has drawn no validation pictures." in html and "peak memory, GB" in html
    assert "2 runs in" in html and "0.0003" in html and "0.900 (0.850 to 0.940)" in html
    assert "<script>alert(1)" not in html and "&lt;script&gt;alert(1)" in html
    differing = html.split("What their settings differ in")[-1]
    assert "learning_rate" in differing and "<code>rank</code>" not in differing


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nothing")


def test_the_command_writes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out and (tmp_path / "page.html").exists()


def test_many_steps_of_pictures_are_thinned_and_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    for step in range(100, 1000, 100):
        shutil.copytree(run / "validation_images" / "step_000040", run / "validation_images" / f"step_{step:06d}")
    monkeypatch.setattr(Pictures.__init__, "__defaults__", (100,))
    html = text_of(run)
    assert "steps in between are left out" in html and "Step 900" in html and "Step 0<" in html and "Step 500" not in html


def test_charts_keep_the_ends_and_leave_out_what_is_not_finite() -> None:
    many = [(float(i), float(i % 7)) for i in range(5000)]
    assert thinned(many)[0] == many[0] and thinned(many)[-1] == many[-1] and len(thinned(many)) <= 600
    assert thinned([(0.0, float("nan")), (1.0, 2.0)]) == [(1.0, 2.0)]
    assert chart("t", [Line("a", [])], "y") == ""
    assert "(log)" in chart("t", [Line("a", [(0, 1.0), (1, 100.0)])], "y", log=True)
    assert "(log)" not in chart("t", [Line("a", [(0, -1.0), (1, 100.0)])], "y", log=True)
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10] and smoothed([(0, 1.0), (1, 3.0), (2, 5.0)], 1.0)[1] == (1, 3.0)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH")
def test_a_browser_runs_the_page_without_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    file = write_report(run)
    probe = """<script>
      const slider = document.querySelector("input[type=range]");
      slider.value = 0; slider.dispatchEvent(new Event("input"));
      const button = document.querySelector("[data-step]:not(.hidden) button.picture"); button.focus(); button.click();
      const chart = document.querySelector("svg[data-lines]"), box = chart.getBoundingClientRect();
      chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 50}));
      const tip = document.querySelector(".tip:not([hidden])").getBoundingClientRect();
      const open = document.querySelector("dialog").open; document.querySelector("dialog button").click();
      document.title = JSON.stringify([document.querySelector("output").textContent, open, document.activeElement === button,
        tip.top >= box.top && tip.bottom <= box.bottom,
        performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("data:")).length]);
    </script></body>"""
    blocked = file.with_name("blocked.html")
    blocked.write_text(file.read_text().replace("</body>", "<script>document.title = 'ran'</script></body>"))
    own = re.findall(r"<script>(.*?)</script>", probe, re.S)[0]
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    file.write_text(file.read_text().replace("script-src ", f"script-src 'sha256-{digest}' ").replace("</body>", probe))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None and json.loads(title[1].replace("&quot;", '"')) == ["step 0", True, True, True, 0]
    assert "CONSOLE" not in done.stderr, done.stderr
    done = subprocess.run([*command[:-1], blocked.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    assert "<title>ran</title>" not in done.stdout and "Content Security Policy" in done.stderr


def test_rewards_stand_beside_what_is_not_rewarded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", reward={"metrics": {"structure.labels": 1.0, "structure.colour": 0.0, EVIL: 1.0}})
    assert "Rewards of the pictures drawn" not in text_of(run)
    names = ("structure.labels", "structure.colour", "groups_that_differ", "distance_to_start", "distance_to_old", EVIL)
    with (run / "metrics.jsonl").open("a") as file:
        for step in (60, 70):
            file.write(json.dumps({"step": step, **{f"reward_{name}": 0.5 for name in names}}) + "\n")
    html = text_of(run)
    for wanted in ("Rewards of the pictures drawn", "Scores that are not rewarded", "Share of prompts whose pictures differ",
                   "Distance of the velocity", "structure.colour", "from the policy that draws"):  # fmt: skip
        assert wanted in html, wanted
    assert EVIL not in html
