"""A store in cloud storage: read like a local one, from real servers, over a line that breaks."""

from __future__ import annotations

import http.client
import logging
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import REPO
from test_store import CONTRACT, figure_row, make_store
from torch.utils.data import DataLoader

from OpenSciDraw.datasets.ahead import BatchReader, Numbered, ReadAhead
from OpenSciDraw.datasets.arxiv_parquet import ArXiVParquetDatasetV2, StoreRows
from OpenSciDraw.datasets.batch import BadRow
from OpenSciDraw.errors import UserError
from OpenSciDraw.store.cache import RowCache
from OpenSciDraw.store.encoded import EncodedStore
from OpenSciDraw.store.remote import Patience, Remote
from OpenSciDraw.store.remote_files import RemoteFolder
from OpenSciDraw.store.shard import FIGURE_SCHEMA, index_path, write_shard
from OpenSciDraw.store.staging import Staging

ROWS = 24
QUICK = Patience(tries=4, first_seconds=0.01, longest_seconds=0.05, stall_seconds=1.5)
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # the emulator's, public


class Line(ThreadingHTTPServer):
    """Passes HTTP on to a server. Each answer to a request for a range meets the next of `faults`, while there are any."""

    daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), _Passing)
        self.target, self.faults, self.ranges, self.lock = port, list[str](), 0, threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def next_fault(self) -> str:
        with self.lock:
            self.ranges += 1
            return self.faults.pop(0) if self.faults else ""


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Line

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=20)
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            server.putheader(name, value)
        server.endheaders(body or None)
        answer = server.getresponse()
        data = answer.read()
        asks_for_range = self.command == "GET" and ("Range" in self.headers or "x-ms-range" in self.headers)
        fault = self.server.next_fault() if asks_for_range else ""
        if fault == "busy":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        size = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", size or "0")
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault else data)
        if fault:
            self.wfile.flush()
            if fault == "stall":
                time.sleep(30)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass

    def log_message(self, *arguments: object) -> None: ...


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"no server at {port}")


def start(command: list[str], port: int) -> subprocess.Popen:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(port)
    return process


@pytest.fixture(scope="module")
def s3_line() -> Iterator[Line]:
    pytest.importorskip("s3fs", reason="pip install '.[remote]'")
    pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    port = free_port()
    process = start([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port)
    yield Line(port)
    process.kill()


@pytest.fixture(scope="module")
def azure_line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    pytest.importorskip("adlfs", reason="pip install '.[remote]'")
    program = shutil.which("azurite-blob") or shutil.which("azurite-blob", path=str(REPO / "node_modules" / ".bin"))
    if program is None:
        pytest.skip("Azurite is not installed (npm install azurite, here or on the PATH)")
    port = free_port()
    options = ["--blobPort", str(port), "--blobHost", "127.0.0.1", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    process = start([program, *options, "--location", str(tmp_path_factory.mktemp("azurite"))], port)
    yield Line(port)
    process.kill()


@pytest.fixture
def s3(s3_line: Line, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Line]:
    values = {
        "AWS_ACCESS_KEY_ID": "key-of-the-test", "AWS_SECRET_ACCESS_KEY": "secret-of-the-test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_line.server_address[1]}", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    return _bucket("s3", "figures-of-the-test", s3_line, values, monkeypatch)


@pytest.fixture
def azure(azure_line: Line, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Line]:
    address = f"http://127.0.0.1:{azure_line.server_address[1]}/devstoreaccount1"
    text = f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={AZURE_KEY};BlobEndpoint={address};"
    return _bucket("abfs", "figures", azure_line, {"AZURE_STORAGE_CONNECTION_STRING": text}, monkeypatch)


def _bucket(protocol: str, bucket: str, line: Line, values: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, Line]:
    import fsspec

    for name, value in values.items():
        monkeypatch.setenv(name, value)
    line.faults, line.ranges = [], 0
    system = fsspec.filesystem(protocol, skip_instance_cache=True)
    if not system.exists(bucket):
        system.mkdir(bucket)
    fsspec.filesystem(protocol).clear_instance_cache()
    return f"{protocol}://{bucket}", line


@pytest.fixture
def memory() -> tuple[str, None]:
    import fsspec

    fsspec.filesystem("memory").store.clear()
    return "memory://bucket", None


@pytest.fixture(params=["memory", "s3", "azure"])
def cloud(request: pytest.FixtureRequest) -> tuple[str, Line | None]:
    return request.getfixturevalue(request.param)


def upload(local: Path, url: str, cache: Path) -> str:
    """A store as `encode` brings it there: shard by shard, and then the list of rejected figures."""
    staging = Staging(url, cache, QUICK)
    for shard in sorted(local.glob("*/*.parquet")):
        kind = shard.parent.name
        shutil.copy(shard, staging.folder / kind)
        shutil.copy(index_path(shard), staging.folder / kind)
        staging.publish(staging.folder / kind / shard.name)
    (staging.folder / "rejected.jsonl").touch()
    staging.publish_file(staging.folder / "rejected.jsonl")
    return url


def opened(url: str, cache: Path, gigabytes: float = 1.0) -> ArXiVParquetDatasetV2:
    dataset = ArXiVParquetDatasetV2(base_dir=url, parquet_base_path="", cache_dir=str(cache), cache_gb=gigabytes)
    _set_patience(dataset)
    return dataset


def _set_patience(dataset: ArXiVParquetDatasetV2) -> None:
    assert isinstance(dataset.rows, StoreRows) and dataset.rows.store.text is not None
    for table in (dataset.rows.store.figures, dataset.rows.store.text):
        table.files.remote.patience = QUICK  # type: ignore[attr-defined]


def assert_same_rows(dataset: ArXiVParquetDatasetV2, local: ArXiVParquetDatasetV2) -> None:
    assert len(dataset) == len(local)
    for row in range(len(local)):
        ours, expected = dataset.read(row), local.read(row)
        assert not isinstance(ours, BadRow) and not isinstance(expected, BadRow), ours
        assert (ours.id, ours.caption) == (expected.id, expected.caption)
        assert ours.latents is not None and expected.latents is not None and torch.equal(ours.latents, expected.latents)
        assert ours.text is not None and expected.text is not None and torch.equal(ours.text, expected.text)


@pytest.fixture
def local(tmp_path: Path) -> ArXiVParquetDatasetV2:
    (make_store(tmp_path / "local", rows=ROWS, per_shard=7) / "rejected.jsonl").touch()
    return ArXiVParquetDatasetV2(base_dir=str(tmp_path / "local"))


def test_a_store_in_the_cloud_is_read_like_a_local_one(cloud, local, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    url = upload(tmp_path / "local", f"{cloud[0]}/whole/store", tmp_path / "writer")
    dataset = opened(url, tmp_path / "cache")
    assert_same_rows(dataset, local)
    assert dataset.held_out(2).tolist() == local.held_out(2).tolist()
    assert dataset.contract == local.contract


@pytest.mark.parametrize("name", ["s3", "azure"])
def test_a_broken_line_costs_a_retry_and_no_row(name: str, request, local, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Connections cut in the middle of a row, servers that are busy, answers that stop half way."""
    base, line = request.getfixturevalue(name)
    url = upload(tmp_path / "local", f"{base}/broken/store", tmp_path / "writer")
    dataset = opened(url, tmp_path / "cache")
    line.faults = ["cut", "busy", "cut", "stall", "", "cut"]
    start = time.perf_counter()
    assert_same_rows(dataset, local)
    assert not line.faults and time.perf_counter() - start < 25


def test_a_line_that_stays_broken_costs_the_row_and_says_so(s3, local, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    url, line = upload(tmp_path / "local", f"{s3[0]}/dead/store", tmp_path / "writer"), s3[1]
    dataset = opened(url, tmp_path / "cache")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    line.faults = ["cut"] * 1000
    bad = dataset.read(0)
    line.faults = []
    assert isinstance(bad, BadRow) and "failed 4 times" in bad.reason
    assert not isinstance(dataset.read(0), BadRow)  # and it is well when the line is


@pytest.mark.parametrize("way", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_workers_read_ahead_each_with_a_connection_of_its_own(way: str, s3, local, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    url = upload(tmp_path / "local", f"{s3[0]}/workers/store", tmp_path / "writer")
    dataset = opened(url, tmp_path / "cache")
    dataset.read(0)  # the parent is connected before it forks
    batches = [[row, row + 1, row + 2] for row in range(0, ROWS, 3)]
    loader = DataLoader(
        BatchReader(dataset, 0), batch_size=None, sampler=Numbered(ReadAhead(batches, 2, 2)), num_workers=2,
        multiprocessing_context=way,  # type: ignore[arg-type]
    )  # fmt: skip
    found = list(loader)
    assert [i for batch in found for i in batch.sample_ids] == [f"paper{row}/fig.png" for row in range(ROWS)]
    assert not any(batch.bad for batch in found)
    for number, batch in enumerate(found):
        assert torch.equal(batch.latents[1], local.read(3 * number + 1).latents)


def test_read_ahead_gives_each_worker_the_rows_of_its_own_next_batches() -> None:
    batches = [[1], [2], [3], [4], [5]]
    assert list(ReadAhead(batches, 2, 1)) == [([1], [3]), ([2], [4]), ([3], [5]), ([4], []), ([5], [])]
    assert list(ReadAhead(batches, 0, 2))[0] == ([1], [2, 3])
    assert list(ReadAhead(batches, 1, 0)) == [(batch, []) for batch in batches]


def test_rows_that_come_are_fetched_side_by_side_and_each_row_once(s3, local, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    url, line = upload(tmp_path / "local", f"{s3[0]}/ahead/store", tmp_path / "writer"), s3[1]
    dataset = opened(url, tmp_path / "cache")
    line.ranges = 0
    dataset.batch([0, 1, 2], [3, 4, 5])
    dataset.batch([3, 4, 5])
    texts = {int(dataset.rows.store.text_row[row]) for row in range(6)}
    assert line.ranges == 6 + len(texts)
    assert_same_rows(dataset, local)
    before = line.ranges
    assert_same_rows(opened(url, tmp_path / "cache"), local)  # another process of this machine: all of it is here
    assert line.ranges == before


def test_indices_are_fetched_once_and_again_when_they_changed(memory, local, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    url = upload(tmp_path / "local", f"{memory[0]}/store", tmp_path / "writer")
    opened(url, tmp_path / "cache")
    copies = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("indices/*/*.index.arrow")}
    assert len(copies) == 5
    opened(url, tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("indices/*/*.index.arrow")} == copies
    changed = tmp_path / "local" / "figures" / "00000.parquet"
    write_shard(changed, FIGURE_SCHEMA, [figure_row(100 + n, f"caption {n % 3}") for n in range(7)], CONTRACT, {"work": "w"})
    upload(tmp_path / "local", url, tmp_path / "writer")
    assert_same_rows(opened(url, tmp_path / "cache"), ArXiVParquetDatasetV2(base_dir=str(tmp_path / "local")))


def test_a_damaged_copy_is_fetched_anew_and_a_damaged_shard_is_named(memory, local, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import fsspec

    url = upload(tmp_path / "local", f"{memory[0]}/store", tmp_path / "writer")
    assert_same_rows(opened(url, tmp_path / "cache"), local)
    rows = [p for p in (tmp_path / "cache" / "rows").glob("*/*")]
    assert len(rows) == ROWS + 3
    for path in rows:
        path.write_bytes(bytes(path.stat().st_size))
    assert_same_rows(opened(url, tmp_path / "cache"), local)
    system = fsspec.filesystem("memory")
    for path in system.glob("/bucket/store/figures/*.parquet"):
        system.pipe_file(path, bytes(system.size(path)))
    damaged = opened(url, tmp_path / "other")
    bad = damaged.read(3)
    assert isinstance(bad, BadRow) and "checksum" in bad.reason


def _fill(folder: Path, limit: int, name: int) -> None:
    cache = RowCache(folder, limit)
    for row in range(60):
        cache.put(f"shard{name}", row, bytes([name]) * 10_000)
        found = cache.get(f"shard{name}", row, 10_000)
        assert found is None or found == bytes([name]) * 10_000


def test_the_cache_stays_within_its_limit_with_many_processes(tmp_path: Path) -> None:
    limit = 200_000
    workers = [multiprocessing.Process(target=_fill, args=(tmp_path, limit, name)) for name in range(4)]
    for worker in workers:
        worker.start()
    most = 0
    while any(worker.is_alive() for worker in workers):
        most = max(most, _size(tmp_path))
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert 0 < most <= 1.2 * limit  # looked at while files come and go: some count twice
    assert 0.5 * limit < _size(tmp_path) <= limit


def _size(folder: Path) -> int:
    total = 0
    for path in folder.glob("*/*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_rows_read_last_stay_in_the_cache(tmp_path: Path) -> None:
    cache = RowCache(tmp_path, 100)
    for row in range(9):
        cache.put("shard", row, bytes(10))
        time.sleep(0.002)
    assert cache.get("shard", 0, 10) is not None  # the oldest, read just now
    time.sleep(0.002)
    for row in range(9, 12):
        cache.put("shard", row, bytes(10))
    assert cache.get("shard", 0, 10) is not None and cache.get("shard", 1, 10) is None
    RowCache(tmp_path / "none", 0).put("shard", 0, b"x")
    assert not (tmp_path / "none").exists()


def test_a_cache_that_cannot_be_written_costs_no_row(memory, local, tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    url = upload(tmp_path / "local", f"{memory[0]}/store", tmp_path / "writer")
    dataset = opened(url, tmp_path / "cache")
    (tmp_path / "cache" / "rows").write_text("a file where the folder should be")
    assert_same_rows(dataset, local)
    assert caplog.text.count("rows cannot be kept here") == 2  # once for each table


def test_an_interrupted_upload_leaves_no_shard_that_looks_whole(memory, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    staging = Staging(f"{memory[0]}/store", tmp_path / "writer", QUICK)
    shards = [staging.folder / "figures" / f"0000{number}.parquet" for number in range(2)]
    for shard in shards:
        write_shard(shard, FIGURE_SCHEMA, [figure_row(1, "a")], CONTRACT, {"work": "w"})
    staging.publish(shards[0])
    write = Remote.write

    def break_at_index(self: Remote, file: Path, name: str) -> None:
        if name.endswith(".index.arrow"):
            raise ConnectionError("cut")
        write(self, file, name)

    monkeypatch.setattr(Remote, "write", break_at_index)
    with pytest.raises(ConnectionError):
        staging.publish(shards[1])
    monkeypatch.undo()
    again = Staging(f"{memory[0]}/store", tmp_path / "another", QUICK)
    assert again.shards("figures") == [again.folder / "figures" / "00000.parquet"]
    assert again.has(again.folder / "figures" / "00000.parquet") and not again.has(again.folder / "figures" / "00001.parquet")
    with pytest.raises(UserError, match="00001.parquet.*interrupted"):
        EncodedStore(RemoteFolder(f"{memory[0]}/store", tmp_path / "cache", 0), with_text=False)


def test_staging_knows_what_others_brought_and_keeps_what_is_on_its_way(memory, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    one, other = (Staging(f"{memory[0]}/store", tmp_path / name, QUICK) for name in ("one", "other"))
    mine, theirs = (staging.folder / "figures" / f"0000{n}.parquet" for n, staging in enumerate((one, other)))
    for shard in (mine, theirs):
        write_shard(shard, FIGURE_SCHEMA, [figure_row(1, "a")], CONTRACT, {"work": "w"})
    other.publish(theirs)
    one.refresh()  # as another process of this machine does that starts now
    assert one.shards("figures") == [one.folder / "figures" / "00001.parquet"] and index_path(mine).exists()
    one.publish(mine)
    assert one.has(mine)
    fetched = (one.folder / "figures" / "00001.index.arrow").stat().st_mtime_ns
    one.refresh()
    assert (one.folder / "figures" / "00001.index.arrow").stat().st_mtime_ns == fetched  # it has not changed
    other.refresh()
    assert other.has(other.folder / "figures" / "00000.parquet")
    other.remote.remove("figures/00000.index.arrow")
    one.refresh()
    assert not one.has(mine)


def test_what_is_wrong_with_an_address_is_said(memory, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    for url, message in {
        "ftp://x/y": "ftp:// is no storage.*abfs://.*s3://",
        "abfs://c@account/x?sv=1&sig=abc": "(?s)credentials.*environment.*managed identity",
        "s3://user:word@bucket/x": "credentials.*environment.*AWS_ACCESS_KEY_ID",
        "s3://bucket/x;AccountKey=word": "credentials.*environment.*AWS_ACCESS_KEY_ID",
        "abfs://c@account/x;SharedAccessSignature=word": "credentials.*environment.*managed identity",
        "s3://bucket/x%3BAccountKey=word": "credentials.*environment",
        "s3://bucket/secret_access_key=word/x": "credentials.*environment",
        "memory://bucket/nothing": "no such folder or container",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            ArXiVParquetDatasetV2(base_dir=url, cache_dir=str(tmp_path))
        assert "sig=abc" not in str(error.value) and "word" not in str(error.value)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gcsfs is not installed.*pip install 'OpenSciDraw\[remote\]'"):
        Remote("gs://bucket/store")


def test_a_missing_bucket_and_missing_credentials_are_said(s3, tmp_path: Path, monkeypatch, caplog) -> None:  # type: ignore[no-untyped-def]
    caplog.set_level(logging.DEBUG, logger="OpenSciDraw")
    with pytest.raises(UserError, match="no such folder or container"):
        RemoteFolder("s3://no-such-bucket/store", tmp_path, 0, QUICK)
    import fsspec

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(UserError, match="credentials come from AWS_ACCESS_KEY_ID"):
        RemoteFolder(f"{s3[0]}/store", tmp_path, 0, QUICK)
    assert "secret-of-the-test" not in caplog.text


@pytest.mark.parametrize("command", ["config", "encode", "train", "plan"])
def test_credentials_in_an_address_are_refused_and_printed_by_no_command(command: str, tmp_path: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    from conftest import BASE, write_config

    from OpenSciDraw import cli

    dataset = {"type": "ArXiVParquetDatasetV2", "base_dir": "s3://bucket/x;AccountKey=hush", "wrong_key": 1}
    for values in (dataset, {k: v for k, v in dataset.items() if k != "wrong_key"}):
        config = write_config(tmp_path / "c.py", {**BASE, "model_output_dir": str(tmp_path / "run"), "dataset": values})
        assert cli.main([command, str(config)]) == 2
        printed = capfd.readouterr()
        assert "hush" not in printed.out + printed.err
    assert "carries credentials" in printed.err and not (tmp_path / "run").exists()


def test_a_service_that_never_answers_is_given_up_after_the_time_that_was_promised(memory, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Each of ten tries once had a minute: eleven minutes for an account that does not exist."""
    remote = Remote("memory://bucket/store", Patience(seconds=2.0, first_seconds=0.01, stall_seconds=60.0))
    waited: list[float] = []

    def silent(what: str, seconds: float, name: str, *arguments: object, **options: object) -> None:
        waited.append(seconds)
        time.sleep(min(seconds, 1.5))
        raise TimeoutError

    remote._once = silent  # type: ignore[method-assign]
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="failed 2 times"):
        remote.read("x")
    assert time.monotonic() - start < 4 and waited[0] <= 2.0 and waited[1] <= 1.0


def test_secrets_in_errors_are_left_out() -> None:
    from OpenSciDraw.store.remote import _plain

    text = _plain(OSError("GET https://a/b?sv=1&sig=SECRET&se=2 and AccountKey=SECRET; X-Amz-Signature=SECRET"))
    assert "SECRET" not in text and "se=2" in text


def test_a_dataset_in_the_cloud_can_be_pickled(memory, local, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dataset = opened(upload(tmp_path / "local", f"{memory[0]}/store", tmp_path / "writer"), tmp_path / "cache")
    dataset.batch([0, 1], [2, 3])
    assert_same_rows(pickle.loads(pickle.dumps(dataset)), local)


def test_local_paths_know_nothing_of_remote_ones(tmp_path: Path) -> None:
    make_store(tmp_path)
    code = (
        "import sys; from OpenSciDraw.datasets.arxiv_parquet import ArXiVParquetDatasetV2 as D;"
        f"D(base_dir={str(tmp_path)!r}).batch([0]); assert not {{'fsspec', 's3fs', 'aiohttp'}} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPO)})
    assert done.returncode == 0, done.stderr[-2000:]
