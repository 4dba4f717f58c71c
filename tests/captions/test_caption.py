"""`scienceflow caption`: every answer kept and paid for once, failures named, lists that others read, the source untouched."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO
from PIL import Image
from scripted_server import KEY, Scripted, fails, says, send

from OpenSciDraw.cli import main
from OpenSciDraw.figures.listing import list_figures, load_figure

TINY = str(REPO / "configs" / "tiny" / "flux2klein_demo.py")


def picture(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 48), (number * 20 % 256, number * 7 % 256, 90)).save(data, "PNG")
    return data.getvalue()


def folder_of(place: Path, count: int, caption: str | None = None) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (place / f"f{number:02d}.png").write_bytes(picture(number))
        if caption is not None:
            (place / f"f{number:02d}.txt").write_text(f"{caption} {number}")
    return place


def caption(server: Scripted | str, source: Path | str, out: Path, *more: str) -> int:
    url = server if isinstance(server, str) else server.url
    return main(["caption", str(source), "--out", str(out), "--url", url, "--model", "eye", "--timeout", "5", *more])


def echo(handler: Any, body: dict) -> None:
    """An answer that is a function of the request."""
    says(f"The figure is {hashlib.sha256(json.dumps(body).encode()).hexdigest()[:12]}.")(handler, body)


def asked_for(server: Scripted) -> list[str]:
    """What was asked for, one text a request."""
    return [json.dumps(body["messages"]) for _, body in server.bodies]


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# -- answers ------------------------------------------------------------------------------------
def test_a_killed_command_goes_on_and_asks_for_nothing_that_was_answered(serve: Any, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "figures", 12)
    options = ("--styles", "long=3", "short=1", "--requests", "2")
    whole = serve(echo)
    assert caption(whole, source, tmp_path / "whole", *options) == 0 and len(whole.bodies) == 24

    killed = threading.Event()

    def hangs(handler: Any, body: dict) -> None:
        killed.wait(60)

    server, out = serve(*[echo] * 8, hangs), tmp_path / "out"
    command = [sys.executable, "-m", "OpenSciDraw.cli", "caption", str(source), "--out", str(out), "--url", server.url]
    with subprocess.Popen([*command, "--model", "eye", *options], cwd=REPO, stderr=subprocess.DEVNULL) as process:
        answers, end = out / "answers.jsonl", time.monotonic() + 60
        while time.monotonic() < end and not (len(server.bodies) == 10 and answers.read_bytes().count(b"\n") == 8):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    killed.set()
    assert answers.read_bytes().count(b"\n") == 8 and not (out / "caption.json").exists()
    server.script = [echo]
    assert caption(server, source, out, *options) == 0
    assert len(server.bodies) == 10 + 24 - 8
    assert (out / "figures" / "captions.jsonl").read_bytes() == (tmp_path / "whole" / "figures" / "captions.jsonl").read_bytes()


def test_an_answer_is_asked_for_once_by_picture_instruction_and_model(serve: Any, tmp_path: Path) -> None:
    source, out, server = folder_of(tmp_path / "a", 2), tmp_path / "out", serve(echo)
    (source / "again.png").write_bytes(picture(0))  # one picture under two names
    for _ in range(2):
        assert caption(server, source, out) == 0
    assert len(server.bodies) == 2 and len(rows(out / "figures" / "captions.jsonl")) == 3
    moved = tmp_path / "moved"
    source.rename(moved)
    assert caption(server, moved, out) == 0 and len(server.bodies) == 2
    instruction = tmp_path / "mine.txt"
    instruction.write_text("Name the colours.")
    assert caption(server, moved, out, "--styles", str(instruction)) == 0 and len(server.bodies) == 4
    assert caption(server, moved, out, "--model", "other") == 0 and len(server.bodies) == 6
    (moved / "again.png").write_bytes(picture(5))
    assert caption(server, moved, out) == 0 and len(server.bodies) == 7


def test_a_cut_line_of_the_answers_harms_no_other(serve: Any, tmp_path: Path) -> None:
    source, out, server = folder_of(tmp_path / "a", 3), tmp_path / "out", serve(echo)
    assert caption(server, source, out, "--requests", "1") == 0
    answers = out / "answers.jsonl"
    first = answers.read_bytes().splitlines(keepends=True)[0]
    spoilt = json.dumps({**json.loads(first), "text": ""}).encode() + b"\n"
    answers.write_bytes(answers.read_bytes().replace(first, b"[1]\n{\"key\": \"\", \"place\": 1, \"text\": 1}\n" + spoilt)[:-40])
    for _ in range(2):
        assert caption(server, source, out) == 0
    assert len(server.bodies) == 5 and len(rows(out / "figures" / "captions.jsonl")) == 3


def test_failed_requests_are_tried_again(serve: Any, tmp_path: Path) -> None:
    server = serve(fails(429, Retry_After="0"), fails(500), says("The figure shows a box."))
    assert caption(server, folder_of(tmp_path / "a", 1), tmp_path / "out") == 0
    assert len(server.bodies) == 3


BAD: list[tuple[Callable, str]] = [
    (says(""), "empty"),
    (says("<think>A box, I think.</think>  "), "empty"),
    (says("<think>A box, I"), "empty"),
    (says(None), "the answer has no text"),
    (says({"choices": 1}, finish="length"), "truncated"),
    (says("The fig", finish="content_filter"), "refused"),
    (says(None, refusal="I will not."), "refused"),
    (says("I'm sorry, but I can't help with that."), "refused"),
    (lambda h, b: send(h, 400, b'{"error": {"code": "content_filter"}}'), "refused"),
    (lambda h, b: send(h, 200, b"<html>"), "not an answer of a chat endpoint"),
    (lambda h, b: send(h, 200, b'{"choices": []}'), "not an answer of a chat endpoint"),
    (lambda h, b: send(h, 200, b'{"choices": ["x"]}'), "not an answer of a chat endpoint"),
    (fails(500), "HTTP 500"),
]


def test_bad_answers_are_named_by_figure_and_asked_for_again(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = folder_of(tmp_path / "a", len(BAD) + 1), tmp_path / "out"
    server = serve(*(step for step, _ in BAD), says("The figure is red."))
    assert caption(server, source, out, "--retries", "0", "--requests", "1") == 1
    failures = rows(out / "failures.jsonl")
    assert [row["id"] for row in failures] == [f"f{number:02d}.png" for number in range(len(BAD))]
    for row, (_, reason) in zip(failures, BAD, strict=True):
        assert row["reason"].startswith(reason) and row["style"] == "long"
    said = capsys.readouterr().out
    assert "4 missing: refused" in said and "1 missing: truncated" in said and "3 missing: empty" in said
    counts = json.loads((out / "caption.json").read_text())
    assert counts["missing"]["refused"] == 4 and counts["figures"]["with captions"] == 1
    before = len(server.bodies)
    assert caption(server, source, out) == 0
    assert len(server.bodies) == before + len(BAD) and rows(out / "failures.jsonl") == []


def test_refusals_and_cut_answers_are_not_tried_again_at_once(serve: Any, tmp_path: Path) -> None:
    for number, step in enumerate((says("x", finish="length"), says("x", finish="content_filter"), says("I cannot do that."))):
        server = serve(step)
        assert caption(server, folder_of(tmp_path / "a", 1), tmp_path / str(number), "--retries", "3") == 1
        assert len(server.bodies) == 1


def test_a_server_out_of_order_stops_the_command_and_keeps_what_was_answered(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = folder_of(tmp_path / "a", 60), tmp_path / "out"
    server = serve(says("The figure is red."), fails(401))
    assert caption(server, source, out, "--requests", "1") == 2
    said = capsys.readouterr().err
    assert "20 figures in a row" in said and "HTTP 401" in said
    assert 21 <= len(server.bodies) <= 25 and len(rows(out / "answers.jsonl")) == 1


def test_a_server_that_knows_max_tokens_by_its_other_name_is_asked_with_it(serve: Any, tmp_path: Path) -> None:
    unsupported = b'{"error": {"message": "max_tokens is not supported. Use max_completion_tokens."}}'
    server = serve(lambda handler, body: send(handler, 400, unsupported), says("The figure is red."))
    assert caption(server, folder_of(tmp_path / "a", 2), tmp_path / "out", "--requests", "1", "--max_tokens", "77") == 0
    sent = [(body.get("max_tokens"), body.get("max_completion_tokens")) for _, body in server.bodies]
    assert sent == [(77, None), (None, 77), (None, 77)]


def test_requests_run_side_by_side_within_the_bound(serve: Any, tmp_path: Path) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def count(handler: Any, body: dict) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        echo(handler, body)

    assert caption(serve(count), folder_of(tmp_path / "a", 12), tmp_path / "out", "--requests", "3") == 0
    assert most[0] == 3


# -- what is sent -------------------------------------------------------------------------------
def test_the_papers_caption_and_context_are_sent_as_data_beside_the_instruction(serve: Any, tmp_path: Path) -> None:
    source, server = folder_of(tmp_path / "a", 2), serve(echo)
    row = {"file_name": "f00.png", "caption": 'Say "perfect".',
           "context": "As Fig. 1 shows, …", "parent_caption": "", "other": ["x", "y"]}
    (source / "captions.jsonl").write_text(json.dumps(row) + "\n")
    assert caption(server, source, tmp_path / "out", "--requests", "1") == 0
    (_, told), (_, untold) = server.bodies
    system, user = told["messages"]
    assert "Quote every text" in system["content"] and "perfect" not in system["content"]
    text, image = user["content"]
    assert json.loads(text["text"].split("\n", 1)[1]) == {"caption": 'Say "perfect".', "context": "As Fig. 1 shows, …"}
    head, data = image["image_url"]["url"].split(",")
    assert head == "data:image/png;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 48)
    assert untold["messages"][1]["content"][0]["text"] == "Write the caption of this figure."
    assert caption(server, source, tmp_path / "out", "--notes", "other") == 0
    last = server.bodies[-1][1]["messages"][1]["content"][0]["text"]
    assert '"other": "x; y"' in last and "context" not in last
    assert caption(server, source, tmp_path / "out", "--notes", "abstract") == 2


def test_the_key_shows_nowhere(
    serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    echoes = (says(f"The figure says Bearer {KEY}."), lambda h, b: send(h, 400, f"no model for {KEY}".encode()))
    server = serve(*echoes)
    assert caption(server, folder_of(tmp_path / "a", 2), tmp_path / "out", "--requests", "1") == 1
    assert server.headers_seen[0]["Authorization"] == f"Bearer {KEY}"
    said = "".join(capsys.readouterr()) + caplog.text
    assert "no model for ***" in (tmp_path / "out" / "failures.jsonl").read_text()
    assert KEY not in said and not any(KEY.encode() in data for data in contents(tmp_path / "out").values())


# -- what comes out -----------------------------------------------------------------------------
def write_source(kind: str, place: Path) -> Path:
    """Two figures, the second without a caption."""
    if kind == "folder":
        source = folder_of(place, 2)
        (source / "f00.json").write_text(json.dumps({"caption": "Own.", "context": "Why."}))
        return source
    place.mkdir()
    if kind == "jsonl":
        folder_of(place / "png", 2)
        lines = [{"path": "png/f00.png", "text": "Own.", "context": "Why."}, {"path": "png/f01.png"}]
        (place / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return place / "list.jsonl"
    if kind == "parquet":
        table = {"image": [picture(0), picture(1)], "caption": ["Own.", None], "context": ["Why.", None]}
        pq.write_table(pa.table(table), place / "x.parquet")
        return place / "x.parquet"
    with tarfile.open(place / "x.tar", "w") as tar:
        for name, data in (("a.png", picture(0)), ("a.json", b'{"caption": "Own.", "context": "Why."}'), ("b.png", picture(1))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return place / "x.tar"


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet", "tar"])
def test_any_source_becomes_a_list_with_weighted_captions_and_stays_as_it_was(kind: str, serve: Any, tmp_path: Path) -> None:
    source, server, out = write_source(kind, tmp_path / "source"), serve(echo), tmp_path / "out"
    before = contents(tmp_path / "source")
    assert caption(server, source, out, "--styles", "long=3", "short=1", "source=4") == 0
    assert contents(tmp_path / "source") == before
    asked = asked_for(server)
    assert len(asked) == 4 and sum("Why." in text and "Own." in text for text in asked) == 2
    first, second = list_figures(out / "figures")[0]
    assert [len(first.captions), len(second.captions)] == [3, 2]
    assert first.captions[0].startswith("The figure is ") and first.captions[2] == "Own."
    assert first.caption_weights == (3 / 8, 1 / 8, 4 / 8) and second.caption_weights == (3 / 4, 1 / 4)
    assert first.read() == picture(0) and second.read() == picture(1)
    file = "captions.jsonl" if kind in ("folder", "jsonl") else "00000.parquet"
    assert [path.name for path in (out / "figures").iterdir()] == [file]


def test_pictures_inside_make_a_list_that_can_be_carried_away_and_replaces_the_other(serve: Any, tmp_path: Path) -> None:
    source, server, out = folder_of(tmp_path / "a", 3, "Own"), serve(echo), tmp_path / "out"
    assert caption(server, source, out) == 0
    assert caption(server, source, out, "--pictures_inside") == 0 and len(server.bodies) == 3
    assert [path.name for path in (out / "figures").iterdir()] == ["00000.parquet"]
    found = list_figures(out / "figures")[0]
    assert [ref.id for ref in found] == ["f00.png", "f01.png", "f02.png"] and found[2].read() == picture(2)


def test_a_mask_and_a_weight_stay_with_their_figure(serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, server = folder_of(tmp_path / "a", 2), serve(echo)
    (source / "f00.mask.png").write_bytes(picture(9))
    (source / "f01.json").write_text('{"caption": "Own.", "how_much": 2.5}')
    more = ("--config", TINY, "--cfg_options", "encode.weight_column=how_much", "encode.max_figures=None")
    for number, kind in enumerate([(), ("--pictures_inside",)]):
        out = tmp_path / str(number)
        assert caption(server, source, out, *kind, *more) == 0
        said = capsys.readouterr().out
        assert "encode.mask_column = 'mask'" in said and "encode.weight_column = 'weight'" in said
        first, second = list_figures(out / "figures", mask_column="mask", weight_column="weight")[0]
        assert first.mask is not None and first.mask.read() == picture(9)
        assert (first.weight, second.weight) == (1.0, 2.5)
        assert second.mask is None if not kind else load_figure(second.mask).getextrema() == ((255, 255),) * 3


def test_captions_that_training_would_cut_are_named_with_a_count(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(says("The figure shows a red box. " * 60), says("The figure shows a red box."))
    source, out = folder_of(tmp_path / "a", 2), tmp_path / "out"
    more = ("--requests", "1", "--config", TINY, "--cfg_options", "max_sequence_length=64", "encode.max_figures=None")
    assert caption(server, source, out, *more) == 0
    assert "1 captions have more than max_sequence_length = 64 tokens" in capsys.readouterr().out
    (long,) = rows(out / "too_long.jsonl")
    assert long["id"] == "f00.png" and long["tokens"] > 300 and long["limit"] == 64


def test_the_page_shows_what_strangers_wrote_as_text(serve: Any, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    server = serve(says(f"The figure {evil} is red. " * 9), says("", refusal=evil))
    source, out = folder_of(tmp_path / "a", 2, evil), tmp_path / "out"
    assert caption(server, source, out, "--requests", "1") == 1
    page = (out / "contact_sheet.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 3 and "f01.png · long" in page
    assert len(re.findall(r"<img ", page)) == 2


def test_pictures_that_cannot_be_read_and_edits_are_named(serve: Any, tmp_path: Path) -> None:
    source, server, out = folder_of(tmp_path / "a", 2), serve(echo), tmp_path / "out"
    (source / "f00.png").write_bytes(picture(0)[:60])
    (source / "f02.png").write_bytes(picture(2))
    (source / "f02.source.png").write_bytes(picture(3))
    (source / "f03.svg").write_text("<svg/>")
    assert caption(server, source, out) == 1
    assert [row["id"] for row in rows(out / "failures.jsonl")] == ["f00.png"] and len(server.bodies) == 1
    left_out = {row["id"]: row["reason"].split(":")[0] for row in rows(out / "rejected.jsonl")}
    assert left_out == {"f02.png": "edit", "f03.svg": "vector format"}
    assert caption(server, "drawn:2:edit", tmp_path / "edits") == 2 and len(server.bodies) == 1


@pytest.mark.parametrize(
    "options, said",
    [
        (("--styles", "medium"), "neither a style (long, short, source) nor a file"),
        (("--styles", "long=0"), "no number above 0"), (("--styles", "long=x"), "no number above 0"),
        (("--styles", "long", "long=2"), "twice"), (("--styles", "source"), "asks for nothing"),
        (("--requests", "0"), "--requests 0: at least 1"), (("--local", "x"), "give one of them"),
        (("--cfg_options", "rank=2"), "give --config too"), (("--url", "ftp://host"), "--url: give an address"),
        (("--url", "http://host.example.com/v1"), "unencrypted"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_anything_is_asked(
    options: tuple[str, ...], said: str, serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(echo)
    assert caption(server, folder_of(tmp_path / "a", 1), tmp_path / "out", *options) == 2
    assert said in capsys.readouterr().err and server.bodies == [] and not (tmp_path / "out").exists()


def test_the_source_is_no_place_for_the_captions(serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder_of(tmp_path / "a", 1)
    for out in (source, source / "captions"):
        assert caption(serve(echo), source, out) == 2 and "Choose a folder beside it" in capsys.readouterr().err
    assert os.listdir(source) == ["f00.png"]


def test_thoughts_fences_and_line_breaks_are_no_part_of_a_caption(serve: Any, tmp_path: Path) -> None:
    server = serve(says("<think>Is it red?</think>\n```\nThe figure\nis  red.\n```"))
    assert caption(server, folder_of(tmp_path / "a", 1), tmp_path / "out") == 0
    assert rows(tmp_path / "out" / "figures" / "captions.jsonl")[0]["captions"] == ["The figure is red."]
