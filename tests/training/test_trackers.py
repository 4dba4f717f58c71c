"""Trackers are tried before anything loads, and get the numbers that metrics.jsonl has."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import merged, write_config

REPO = Path(__file__).resolve().parents[2]


def trained(config: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Training by the command line, without this machine's keys."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "MLFLOW"))}
    command = [sys.executable, "train_OpenSciDraw_loop.py", str(config)]
    return subprocess.run(command, cwd=REPO, env={**own, **environment}, capture_output=True, text=True, check=False)


def test_wandb_without_a_login_is_refused_before_the_model_loads(store_config: dict, tmp_path: Path) -> None:
    values = {**store_config, "report_to": "wandb", "model_output_dir": str(tmp_path / "run"), "max_train_steps": 1}
    config = write_config(tmp_path / "c.py", values)
    done = trained(config, NETRC=str(tmp_path / "none"), HOME=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr and "Loading" not in done.stderr
    assert "Run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline, or report_to = 'none'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_mlflow_server_that_does_not_answer_is_refused(store_config: dict, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    config = write_config(tmp_path / "c.py", {**store_config, "report_to": "mlflow", "model_output_dir": str(tmp_path / "run")})
    done = trained(config, MLFLOW_TRACKING_URI="http://user:hush@127.0.0.1:9")
    assert done.returncode == 2 and "no answer from http://127.0.0.1:9 (" in done.stderr and "hush" not in done.stderr


def test_mlflows_own_server_gets_the_settings_and_every_line_of_metrics(store_config: dict, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("mlflow.server", reason="mlflow-skinny has no server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", "--backend-store-uri"]
    server = subprocess.Popen([*command, f"sqlite:///{tmp_path}/m.db"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              cwd=tmp_path, start_new_session=True)  # fmt: skip
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{uri}/version", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        values = merged(store_config, report_to="mlflow", tracker_name="figures", run_name="first", max_train_steps=3,
                        model_output_dir=str(tmp_path / "run"))  # fmt: skip
        done = trained(write_config(tmp_path / "c.py", values), MLFLOW_TRACKING_URI=uri)
        assert done.returncode == 0, done.stderr[-2000:]
        client = mlflow.MlflowClient(uri)
        (experiment,) = client.search_experiments(filter_string="name = 'figures'")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.run_name == "first" and run.info.status == "FINISHED" and run.data.params["rank"] == "4"
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["train_loss"] for line in lines if "train_loss" in line}
        assert {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train_loss")} == pytest.approx(losses)
        assert len(losses) == 3 and "held_out_loss" in run.data.metrics
    finally:
        os.killpg(server.pid, 15)
        server.wait()
