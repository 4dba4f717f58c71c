"""`scienceflow doctor` finds what keeps a run from starting, says what to do, and prints no secret."""

from __future__ import annotations

import http.server
import importlib.metadata
import threading
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import BASE, REPO, merged, write_config
from huggingface_hub import constants, hf_api

from OpenSciDraw.config import Config
from OpenSciDraw.models.base import build_model
from OpenSciDraw.planning import doctor, machine


def run(capsys: pytest.CaptureFixture[str], config: Path | None = None, *options: str) -> tuple[int, str]:
    """Exit code and what was printed."""
    code = doctor.main(Namespace(config=None if config is None else str(config), cfg_options=list(options)))
    return code, capsys.readouterr().out


def test_without_a_config_it_looks_at_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys)
    assert code == (2 if "FAIL" in text else 0)
    assert all(word in text for word in ("Python", "packages within their bounds (torch ", "memory", "GPU", "hub:"))


def test_each_finding_that_is_not_ok_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    config = REPO / "configs" / "260120" / "flux2klein_full.py"
    findings = list(doctor.examine(str(config), [f"model_output_dir={tmp_path}"]))
    assert {"ok", "warning", "FAIL"} == {finding.level for finding in findings}
    assert all(bool(finding.remedy) == (finding.level != "ok") for finding in findings)


def test_a_wrong_config_is_one_finding_and_the_machine_is_still_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run(capsys, write_config(tmp_path / "c.py", {**BASE, "dataset": {"base_dir": "x"}, "learning_rat": 1.0}))
    assert code == 2
    assert "FAIL" in text and "learning_rate" in text and "packages within" in text


def test_a_store_is_compared_with_the_model_before_anything_loads(
    store_config: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.py", {**store_config, "model_output_dir": str(tmp_path)})
    code, text = run(capsys, config)
    assert code == 0 and "40 encoded figures, made by this model" in text, text
    code, text = run(capsys, config, "max_sequence_length=128")
    assert code == 2 and "text.max_sequence_length: 128 here, 64 there" in text
    code, text = run(capsys, config, f"dataset.base_dir={tmp_path}")
    assert code == 0 and "no encoded figures yet" in text


def test_a_package_outside_its_bounds_fails_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.7.0" if name == "peft" else real(name))
    (finding,) = [finding for finding in doctor.check_packages(None) if finding.level == "FAIL"]
    assert "peft 0.7.0 is outside" in finding.text and finding.remedy.startswith("pip install 'peft")


def test_packages_that_only_this_config_needs_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "bitsandbytes":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", version)
    config = Config.model_validate({**BASE, "dataset": {"base_dir": "x"}, "quantization": "nf4"})
    assert any(f.text == "bitsandbytes is not installed" for f in doctor.check_packages(config))
    assert all(f.level == "ok" for f in doctor.check_packages(None))


def test_bounds_of_extras_count_where_the_config_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0" if name == "tensorboard" else real(name))
    config = Config.model_validate({**BASE, "dataset": {"base_dir": "x"}, "report_to": "tensorboard"})
    assert any(f.text.startswith("tensorboard 2.0 is outside") for f in doctor.check_packages(config))
    assert all(f.level == "ok" for f in doctor.check_packages(None))


def test_no_secret_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_hidden")
    monkeypatch.setenv("WANDB_API_KEY", "wandbhidden")
    values = {**BASE, "dataset": {"base_dir": str(tmp_path)}, "report_to": "wandb", "model_output_dir": str(tmp_path)}
    code, text = run(capsys, write_config(tmp_path / "c.py", values))
    assert code == 0 and "a token is there (HF_TOKEN)" in text and "a key is there" in text, text
    assert "hidden" not in text


def test_wandb_needs_a_key_or_to_be_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = Config.model_validate({**BASE, "dataset": {"base_dir": "x"}, "report_to": "wandb"})

    def level() -> str:
        (finding,) = doctor.check_tracker(config)
        return finding.level

    assert level() == "FAIL"
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password hidden\n")
    assert level() == "ok"
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert level() == "ok"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """A hub on this machine that answers as `answer` says."""
    answer: dict = {"status": 200, "code": "", "asked": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer["asked"].append((self.path, self.headers.get("authorization")))
            self.send_response(answer["status"])
            self.send_header("X-Error-Code", answer["code"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield answer
    server.shutdown()
    server.server_close()


def hub_model(tmp_path: Path):  # type: ignore[no-untyped-def]
    name = "black-forest-labs/FLUX.2-klein-base-9B"
    values = merged(BASE, pretrained_model_name_or_path=name, cache_dir=str(tmp_path), dataset={"base_dir": "x"})
    return build_model(Config.model_validate(values))


@pytest.mark.parametrize(
    ("status", "code", "level", "says"),
    [
        (200, "", "ok", "may read it"),
        (403, "GatedRepo", "FAIL", "gated"),
        (401, "RepoNotFound", "FAIL", "no such repository"),
        (500, "", "warning", "500"),
    ],
)
def test_access_to_the_model_is_asked_of_the_hub(
    hub: dict, tmp_path: Path, status: int, code: str, level: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_hidden")
    hub |= {"status": status, "code": code}
    finding = doctor.check_access(hub_model(tmp_path))
    assert finding.level == level and says in finding.text, finding
    first, *_, last = hub["asked"]
    assert first[1] is None and last == ("/api/models/black-forest-labs/FLUX.2-klein-base-9B/auth-check", "Bearer hf_hidden")


def test_without_a_network_the_answer_comes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "HF_HUB_OFFLINE" in doctor.check_access(hub_model(tmp_path)).text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    finding = doctor.check_access(hub_model(tmp_path))
    assert finding.level == "FAIL" and "cannot be reached" in finding.text


def test_a_gpu_that_torch_does_not_see_fails_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.no_gpu("12.6", None, []).level == "warning"
    assert "built for CPUs" in machine.no_gpu(None, "550.54", []).text
    old = machine.no_gpu("13.0", "470.1", ["The NVIDIA driver on your system is too old"])
    assert old.level == "FAIL" and "too old" in old.text and "13.0" in old.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" in machine.no_gpu("12.6", "550.54", []).text


def test_bf16_is_refused_where_the_gpu_has_none() -> None:
    assert machine.precision((7, 0), "bf16").level == "FAIL"
    assert machine.precision((7, 0), "fp16").level == "ok"
    assert machine.precision((9, 0), "bf16").level == "ok"


def test_bf16_that_a_cpu_imitates_is_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    for flags, has in (("flags : fpu avx512f avx512_bf16", True), ("Features : asimd bf16", True), ("flags : fpu avx512f", False)):
        file.write_text(flags + "\n")
        assert machine.cpu_has_bf16(file) is has
    assert machine.cpu_has_bf16(tmp_path / "none") is None
    found = machine.cpu_precision(False, "bf16")
    assert found.level == "warning" and "mixed_precision = 'no'" in found.remedy
    assert [machine.cpu_precision(*case).level for case in ((True, "bf16"), (False, "no"), (None, "bf16"))] == ["ok"] * 3


def test_a_disk_fails_below_one_checkpoint_and_warns_below_all(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    levels = [doctor.room(folder, least, wanted, "", "x").level for least, wanted in ((1, 2), (1, 1e18), (1e18, 1e18))]
    assert levels == ["ok", "warning", "FAIL"]


def test_the_checkpoints_of_a_full_fine_tune_are_counted_from_shapes(tmp_path: Path) -> None:
    """9,078.58 M parameters x (4 + 8 + 4) bytes: weights, AdamW, average."""
    from OpenSciDraw.config import load_config
    from OpenSciDraw.planning.step_cost import planned_model

    config = load_config(REPO / "configs" / "260120" / "flux2klein_fulltune.py", [f"model_output_dir={tmp_path}"])
    with planned_model(config) as (model, _):
        (finding,) = doctor.check_disk(config, model, downloaded=True)
    assert "3 checkpoints of 145.26 GB" in finding.text
