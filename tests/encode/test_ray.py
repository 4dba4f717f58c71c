"""`--engine ray` on a local cluster of two machines (a raylet each): the same bytes, and a killed worker loses nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import BASE, REPO, merged, write_config
from test_prepare import paper, settings

from OpenSciDraw.config import Config
from OpenSciDraw.encode import on_ray
from OpenSciDraw.encode import run as encode
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.listing import FigureRef
from OpenSciDraw.models.base import build_model
from OpenSciDraw.prepare.pipeline import prepare
from OpenSciDraw.store.contract import Contract
from OpenSciDraw.utils import ray_cluster

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
NODE = {"num_cpus": 2, "object_store_memory": 200_000_000}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes of two CPUs, started in another folder than the commands are."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        paths = (Path(__file__).parent, REPO / "tests", REPO / "tests" / "prepare")
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))  # of workers, for `Deadly`
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        cluster.add_node(**NODE)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def values(folder: Path, **changes: object) -> dict[str, Any]:
    start = {
        **BASE, "dataset": {"type": "ArXiVParquetDatasetV2", "base_dir": str(folder), "parquet_base_path": "store"},
        "encode": {"figures": "drawn:24", "resolution": 128, "samples_per_shard": 8, "num_workers": 0, "batch_size": 4},
    }  # fmt: skip
    return merged(start, **changes)


def config(folder: Path, **changes: object) -> Config:
    return Config.model_validate(values(folder, **changes))


class Reaper(threading.Thread):
    """SIGKILL to the first worker that does `task`, once for each of `tasks`."""

    def __init__(self, *tasks: str):
        super().__init__(daemon=True)
        self.left, self.killed = list(tasks), []
        self.start()

    def run(self) -> None:
        end = time.monotonic() + 90
        while self.left and time.monotonic() < end:
            time.sleep(0.01)
            for process in psutil.process_iter(["cmdline"]):
                name = " ".join(process.info["cmdline"] or [])
                task = next((task for task in self.left if name.startswith("ray::") and task in name), None)
                if task is not None:
                    process.send_signal(signal.SIGKILL)
                    self.left.remove(task)
                    self.killed.append(task)


def test_papers_are_prepared_to_the_same_bytes(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pile").mkdir()
    for number in range(6):
        Path("pile", f"2101.0000{number}.gz").write_bytes(paper(number, 2))
    Path("pile", "2101.00009.pdf").write_bytes(b"%PDF-1.4")
    for engine in ("local", "ray"):
        prepare(["pile"], Path(engine), settings(), engine)
    local, spread = content(Path("local")), content(Path("ray"))
    sheet = "contact_sheet.html"  # its title is the folder's name
    assert {**spread, sheet: b""} == {**local, sheet: b""} and len(local) > 7


def test_figures_and_captions_are_encoded_to_the_same_bytes(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert encode.main(config(Path("local"))) == 0
    caplog.clear()
    assert encode.main(config(Path("ray")), "ray") == 0
    assert content(Path("ray")) == content(Path("local")) and len(content(Path("local"))) == 2 * (3 + 4) + 1
    assert "24 of 25 captions were cut" in caplog.text


@pytest.mark.slow
def test_killed_encoders_and_decoders_change_nothing(cluster: Any, tmp_path: Path) -> None:
    assert encode.main(config(tmp_path / "local")) == 0
    reaper = Reaper("Map(_CaptionEncoder)).submit", "Map(_FigureEncoder)).submit", "_decode")
    assert encode.main(config(tmp_path / "ray"), "ray") == 0
    assert len(reaper.killed) == 3
    assert content(tmp_path / "ray") == content(tmp_path / "local")


@pytest.mark.slow
def test_a_lost_machine_loses_nothing_and_finished_shards_stay(cluster: Any, tmp_path: Path) -> None:
    online = {"text": "online", "encode": {"samples_per_shard": 4}}
    assert encode.main(config(tmp_path / "local", **online)) == 0
    shutil.copytree(tmp_path / "local", tmp_path / "ray")
    shards = sorted((tmp_path / "ray" / "store" / "figures").glob("*.parquet"))
    for shard in shards[1:]:
        shard.unlink()
    stamp = shards[0].stat().st_mtime_ns
    lost = cluster.add_node(**NODE)

    def lose() -> None:
        while not shards[1].exists():
            time.sleep(0.01)
        cluster.remove_node(lost, allow_graceful=False)

    timer = threading.Thread(target=lose, daemon=True)
    timer.start()
    assert encode.main(config(tmp_path / "ray", **online), "ray") == 0
    timer.join(30)
    assert not timer.is_alive() and shards[0].stat().st_mtime_ns == stamp
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def contract_of(config: Config) -> Contract:
    model = build_model(config)
    model.load_empty_vae()
    return model.contract()


@pytest.mark.slow
def test_a_machine_with_another_model_is_refused(cluster: Any, tmp_path: Path) -> None:
    mine = config(tmp_path)
    contract = contract_of(mine)
    other = replace(contract, text={**contract.text, "fingerprint": "of another one"})
    work = encode.Work(0, tmp_path / "00000.parquet", ["a caption"], "digest")
    with pytest.raises(UserError, match="is not the one of the machine on which the command was started(?s:.*)of another one"):
        on_ray.encode(mine, [work], other, [], contract)
    assert not work.path.exists()


class Deadly(FigureRef):
    """A figure that kills whoever decodes it."""

    def read(self) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@pytest.mark.slow
def test_work_that_kills_its_worker_each_time_ends_with_an_error(cluster: Any, tmp_path: Path) -> None:
    mine = config(tmp_path)
    work = encode.Work(0, tmp_path / "00000.parquet", [Deadly("id", "caption", "source", 0)], "digest")
    with pytest.raises(UserError, match="A worker died 4 times in the same work(?s:.*)WorkerCrashedError"):
        on_ray.encode(mine, [], contract_of(mine), [work], contract_of(mine))


def command(path: Path, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "OpenSciDraw.cli", "encode", str(path), *more], cwd=REPO)


def wait_for(happened: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_command_goes_on_with_the_shards_that_are_missing(cluster: Any, tmp_path: Path) -> None:
    changes = {"text": "online", "encode": {"figures": "drawn:160"}}
    assert encode.main(config(tmp_path / "local", **changes)) == 0
    path = write_config(tmp_path / "config.py", values(tmp_path / "ray", **changes))
    first = tmp_path / "ray" / "store" / "figures" / "00000.index.arrow"
    killed = command(path, "--engine", "ray")
    wait_for(first.exists, 90)
    killed.kill()
    killed.wait()
    there = content(tmp_path / "ray")
    assert len(there) < len(content(tmp_path / "local"))
    stamp = first.stat().st_mtime_ns
    assert command(path, "--engine", "ray").wait(120) == 0
    assert first.stat().st_mtime_ns == stamp and content(tmp_path / "ray") == content(tmp_path / "local")


def test_shards_that_do_not_arrive_are_named(tmp_path: Path) -> None:
    work = encode.Work(0, tmp_path / "00000.parquet", ["x"], "digest")
    with pytest.raises(UserError, match="1 shard.* not here after the cluster was done"):
        ray_cluster.require_written([work])


def test_a_second_process_of_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="start it once"):
        ray_cluster.join_cluster()
