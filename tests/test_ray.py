"""`--engine ray` on a local cluster of two machines (a raylet each): the same bytes, and a killed worker loses nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import BASE, merged
from test_prepare import paper, settings

from OpenSciDraw import encode
from OpenSciDraw.config import Config
from OpenSciDraw.engines import ray_engine
from OpenSciDraw.errors import UserError
from OpenSciDraw.prepare.pipeline import prepare

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of two CPUs."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def config(folder: Path, **changes: object) -> Config:
    values = {
        **BASE, "dataset": {"type": "ArXiVParquetDatasetV2", "base_dir": str(folder), "parquet_base_path": "store"},
        "encode": {"figures": "drawn:24", "resolution": 128, "samples_per_shard": 8, "num_workers": 0, "batch_size": 4},
    }  # fmt: skip
    return Config.model_validate(merged(values, **changes))


def test_papers_are_prepared_to_the_same_bytes(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "pile").mkdir()
    for number in range(6):
        (tmp_path / "pile" / f"2101.0000{number}.gz").write_bytes(paper(number, 2))
    (tmp_path / "pile" / "2101.00009.pdf").write_bytes(b"%PDF-1.4")
    for engine in ("local", "ray"):
        prepare([tmp_path / "pile"], tmp_path / engine, settings(), engine)
    local, spread = content(tmp_path / "local"), content(tmp_path / "ray")
    sheet = "contact_sheet.html"  # its title is the folder's name
    assert {**spread, sheet: b""} == {**local, sheet: b""} and len(local) > 7


@pytest.mark.slow
def test_figures_are_encoded_to_the_same_bytes_though_an_encoder_is_killed(cluster: Any, tmp_path: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # as Ray sets it for one CPU: sums are split by thread
    assert encode.main(config(tmp_path / "local")) == 0
    killed: list[int] = []

    def kill_one() -> None:
        end = time.monotonic() + 120
        while not killed and time.monotonic() < end:
            time.sleep(0.05)
            for process in psutil.process_iter(["cmdline"]):
                if "Map(_FigureEncoder)).submit" in " ".join(process.info["cmdline"] or []):
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)
                    break

    watcher = threading.Thread(target=kill_one)
    watcher.start()
    assert encode.main(config(tmp_path / "ray"), "ray") == 0
    watcher.join()
    assert killed and content(tmp_path / "ray") == content(tmp_path / "local")


@pytest.mark.slow
def test_a_lost_machine_loses_nothing_and_finished_shards_stay(cluster: Any, tmp_path: Path) -> None:
    assert encode.main(config(tmp_path / "local")) == 0
    extra = cluster.add_node(num_cpus=2, object_store_memory=200_000_000)
    first = encode.main(config(tmp_path / "ray", encode={"max_figures": 8}), "ray")
    shard = tmp_path / "ray" / "store" / "figures" / "00000.parquet"
    stamp = shard.stat().st_mtime_ns
    timer = threading.Timer(6.0, lambda: cluster.remove_node(extra, allow_graceful=False))
    timer.start()
    assert first == 0 and encode.main(config(tmp_path / "ray"), "ray") == 0
    timer.join()
    assert shard.stat().st_mtime_ns == stamp
    figures = {name: data for name, data in content(tmp_path / "local").items() if "/figures/" in name}
    assert {name: data for name, data in content(tmp_path / "ray").items() if "/figures/" in name} == figures


def test_shards_that_do_not_arrive_are_named(tmp_path: Path) -> None:
    work = encode.Work(0, tmp_path / "00000.parquet", ["x"], "digest")
    with pytest.raises(UserError, match="1 shard.* not here after the cluster was done"):
        ray_engine._require_written([work])
