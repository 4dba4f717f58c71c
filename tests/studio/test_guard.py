"""Who may talk to the studio, and which files it shows: everything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO

TOKEN, HOST = "a-token", "127.0.0.1:8899"
EVIL = "<script>alert(1)</script>"


def test_without_the_token_nothing_is_said(studio: Any, client: Any) -> None:
    client.cookies.clear()
    for path in ("/", "/api/runs", "/static/main.js", "/api/events"):
        assert client.get(path).status_code == 401, path
    assert client.get("/?token=wrong").status_code == 403
    assert client.get("/", headers={"Cookie": "scienceflow-studio=wrong"}).status_code == 401
    assert client.post("/api/runs/stop", json={"run": "a"}).status_code == 401


def test_the_token_becomes_a_cookie_that_no_script_and_no_other_page_gets(client: Any) -> None:
    answer = client.get(f"/?token={TOKEN}")
    assert answer.status_code == 303 and answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    policy = client.get("/").headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy and "default-src 'none'" in policy


@pytest.mark.parametrize("host", ["evil.example:8899", "127.0.0.1", "127.0.0.1:1", ""])
def test_another_host_is_refused_so_that_no_name_can_be_bound_to_this_machine(client: Any, host: str) -> None:
    assert client.get("/api/runs", headers={"Host": host}).status_code == 421


def test_what_another_page_sends_is_refused(client: Any) -> None:
    other = {"Origin": "http://evil.example"}
    assert client.get("/api/runs", headers=other).status_code == 403
    assert client.post("/api/runs/stop", json={"run": "a"}, headers=other).status_code == 403
    assert client.get("/api/runs", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.post("/api/runs/stop", content="run=a", headers={"Content-Type": "text/plain"}).status_code == 415
    del client.headers["Origin"]
    assert client.post("/api/runs/stop", json={"run": "a"}).status_code == 403
    assert client.get("/api/runs").status_code == 200  # navigation carries none


def test_what_is_too_large_is_not_read(client: Any) -> None:
    assert client.post("/api/runs/stop", json={"run": "a" * (1 << 20)}).status_code == 413
    many = client.post("/api/runs/stop", json={"run": "a" * 30_000})
    assert many.status_code == 400 and "at most" in many.json()["error"]
    assert client.post("/api/runs/stop", content="[" * 100_000, headers={"Content-Type": "application/json"}).status_code == 400


@pytest.mark.parametrize("name", ["../secret", "/etc", "runs/../../secret", "link", ".studio", "..", "runs/.hidden", "a\\b"])
def test_no_path_leads_out_of_the_folder(studio: Any, client: Any, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "config.py").write_text("run_name = 'secret'\n")
    (secret / "run.json").write_text("{}")
    (studio.places.root / "link").symlink_to(secret)
    answer = client.get("/api/runs/one", params={"run": name})
    assert answer.status_code == 400 and "not in the studio's folder" in answer.json()["error"]
    assert client.get("/api/runs").json() == []
    assert client.get("/static/..%2fapp.py").status_code == 404 and client.get("/static/app.py").status_code == 404


def test_links_inside_a_run_and_pictures_that_lists_name_do_not_lead_out(studio: Any, client: Any, tmp_path: Path) -> None:
    from OpenSciDraw.studio.listing import write_index

    outside, root = tmp_path / "outside", studio.places.root
    outside.mkdir()
    (outside / "metrics.jsonl").write_text(json.dumps({"step": 7, "train_loss": 0.5}) + "\n")
    (outside / "x.png").write_bytes(b"x")
    run = root / "run"
    run.mkdir()
    (run / "config.py").write_text("run_name = 'r'\n")
    (run / "run.json").write_text("{}")
    (run / "metrics.jsonl").symlink_to(outside / "metrics.jsonl")
    assert client.get("/api/runs").json()[0]["step"] == 0
    figures = root / "figures"
    figures.mkdir()
    (figures / "metadata.jsonl").write_text(json.dumps({"image": str(outside / "x.png"), "caption": "c"}) + "\n")
    out = tmp_path / "index.arrow"
    assert write_index(lambda said: None, str(root), str(figures), str(out)) == {"rows": 1}
    from OpenSciDraw.studio.figures_index import Index

    assert "outside of the studio's folder" in Index(out).row(0)["reason"]
    (figures / "x.txt").symlink_to(outside / "metrics.jsonl")
    from OpenSciDraw.errors import UserError

    with pytest.raises(UserError, match="a link that leads out"):
        write_index(lambda said: None, str(root), str(figures), str(out))


def test_a_strangers_config_is_read_and_never_run(studio: Any, client: Any, tmp_path: Path) -> None:
    run = studio.places.root / "run"
    run.mkdir()
    (run / "config.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nrun_name = {EVIL!r}\n")
    (run / "run.json").write_text("{}")
    assert client.get("/api/runs/one", params={"run": "run"}).status_code == 200
    values = client.get("/api/configs/values", params={"base": "run/config.py"})
    for answer in (client.post("/api/runs/start", json={"run": "run"}), values):
        assert answer.status_code == 400 and "code in it is not run" in answer.json()["error"]
    assert not (tmp_path / "ran").exists() and studio.queue.jobs() == []


def test_scripts_make_no_markup_of_texts_and_load_nothing_from_elsewhere() -> None:
    words = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "https://", "DOMParser")
    for file in (REPO / "OpenSciDraw" / "studio" / "static").iterdir():
        text = file.read_text()
        for word in words:
            assert word not in text, f"{file.name}: {word}"
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", ""), file.name


def test_a_field_of_another_type_is_refused_with_its_name(client: Any) -> None:
    for given in ({"number": "x"}, {"number": [1]}, {"number": float("1e30")}, {}):
        answer = client.post("/api/queue/stop", json=given)
        assert answer.status_code == 400 and "number" in answer.json()["error"]
