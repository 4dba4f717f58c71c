"""Shared by all tests: the embedded model (real classes, small width) and small real data.

Where tests run: on the CPU, also where a GPU is, because most compare with a CPU's bits; the GPU is hidden from them and from the
processes that they start. Those marked `gpu` mean any device: they run on the CPU like the others, and on the GPU with
`pytest --device cuda`, which runs no others. tests/test_on_gpu.py starts that where a GPU is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests start processes of their own; two torch pools stall each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"
VISIBLE = "CUDA_VISIBLE_DEVICES"
VISIBLE_BEFORE = "SCIENCEFLOW_VISIBLE_BEFORE"  # what it was before it was emptied: for the tests that start others on the GPU


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: only tests marked gpu, on the GPU")


def pytest_configure(config: pytest.Config) -> None:
    """torch looks at the variable when CUDA is first used, which is later than this."""
    if config.getoption("--device") == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as `deterministic = True` wants it
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no GPU here. Leave it out.")
    else:
        os.environ.setdefault(VISIBLE_BEFORE, os.environ.get(VISIBLE, "all"))
        os.environ[VISIBLE] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cuda":
        others = [item for item in items if item.get_closest_marker("gpu") is None]
        items[:] = [item for item in items if item.get_closest_marker("gpu") is not None]
        config.hook.pytest_deselected(items=others)


class _AtOnce:
    """A failure on the GPU is printed when it happens: a run there can be cut before its end."""

    def __init__(self, config: pytest.Config):
        self.config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext[-4000:]}")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """No bytes in names: gzip writes the time into its own, and processes that share tests must agree on names."""
    return argname if isinstance(val, bytes) else None


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("--device") == "cuda":
        session.config.pluginmanager.register(_AtOnce(session.config))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the tests of this session run."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch as it was before, after a test that trains with `deterministic = True`."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    from OpenSciDraw.models.embedded import embedded_folder

    return embedded_folder("flux2_klein_tiny_random")


def make_model(dtype: torch.dtype = torch.float32, length: int = 64):  # type: ignore[no-untyped-def]
    """The embedded klein with every component loaded."""
    from OpenSciDraw.models.flux2_klein import Flux2Klein
    from OpenSciDraw.models.source import ModelSource

    model = Flux2Klein(ModelSource("embedded:flux2_klein_tiny_random"), length, dtype)
    model.load_vae()
    model.load_text_encoder()
    model.load_transformer()
    return model


@pytest.fixture(scope="session")
def tiny():  # type: ignore[no-untyped-def]
    return make_model()


RECOMMENDED = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"
)
BASE = {
    "model_type": "Flux2Klein", "pretrained_model_name_or_path": "embedded:flux2_klein_tiny_random", "max_sequence_length": 64,
    "mixed_precision": "no", "rank": 4, "lora_alpha": 8, "lora_layers": RECOMMENDED, "learning_rate": 1e-3,
    "lr_warmup_steps": 0, "train_batch_size": 2, "num_train_epochs": 100, "max_train_steps": 4,
    "gradient_checkpointing": False, "dataloader_num_workers": 0, "held_out_examples": 2, "logging_steps": 1,
    "checkpointing_steps": 100, "validation_steps": 100, "num_inference_steps": 2, "report_to": "none",
}  # fmt: skip


@pytest.fixture(scope="session")
def store_config(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A config's values with a store of 40 drawn figures behind them, encoded by the product."""
    from OpenSciDraw.config import Config
    from OpenSciDraw.encode import run as encode

    folder = tmp_path_factory.mktemp("data")
    values = {
        **BASE,
        "dataset": {"type": "ArXiVParquetDatasetV2", "base_dir": str(folder), "parquet_base_path": "store"},
        "encode": {"figures": "drawn:40", "resolution": 128, "samples_per_shard": 16, "num_workers": 0, "batch_size": 8},
    }
    assert encode.main(Config.model_validate(values)) == 0
    return values


@pytest.fixture(scope="session")
def group_config(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A config's values for `mdpo` with a store of 14 groups behind them: drawn figures, each with its three flawed forms."""
    from OpenSciDraw.config import Config
    from OpenSciDraw.drawn.flaws import write_groups
    from OpenSciDraw.encode import run as encode

    folder = tmp_path_factory.mktemp("groups")
    write_groups(folder / "figures", folder / "groups.parquet", 14)
    values = {
        **BASE,
        "dataset": {"type": "PreferenceGroups", "base_dir": str(folder), "parquet_base_path": "store"},
        "encode": {"figures": str(folder / "figures"), "resolution": 128, "num_workers": 0, "batch_size": 8},
    }
    assert encode.main(Config.model_validate(values)) == 0
    (folder / "groups.parquet").rename(folder / "store" / "groups.parquet")
    return {**values, "train_iteration_func_name": "mdpo", "held_out_examples": 1}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Starts chat endpoints that answer from a script; KEY lies in the environment, and tries follow each other quickly."""
    from scripted_server import KEY, Scripted

    from OpenSciDraw.utils import endpoint

    servers: list[Scripted] = []
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "_LONGEST_WAIT", 0.05)

    def start(*script: Any) -> Any:
        servers.append(Scripted(*script))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()


def merged(values: dict, **changes: object) -> dict:
    """`values` with `changes`; dicts merge key by key."""
    out = dict(values)
    for key, value in changes.items():
        out[key] = {**out[key], **value} if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def write_config(path: Path, values: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
    return path


def train_and_resume(values: dict, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Encode, train 3 steps with a checkpoint at 2, and the third once more from it: the final adapters of both, by name."""
    from accelerate.state import AcceleratorState, GradientState
    from safetensors.torch import load_file

    from OpenSciDraw.config import Config
    from OpenSciDraw.encode import run as encode
    from OpenSciDraw.training.run import Training
    from train_OpenSciDraw_loop import train

    def go(values: dict) -> dict[str, torch.Tensor]:
        for state in (AcceleratorState, GradientState):
            state._reset_state(True) if state is AcceleratorState else state._reset_state()
        assert train(Training(Config.model_validate(values))) == 0
        return load_file(final)

    final = folder / "pytorch_lora_weights.safetensors"
    assert encode.main(Config.model_validate(values)) == 0
    first = go(values)
    shutil.rmtree(folder / "checkpoint-3")
    final.unlink()
    again = go({**values, "resume_from_checkpoint": "latest"})
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return first, again


@pytest.fixture
def fresh_accelerate():  # type: ignore[no-untyped-def]
    """accelerate keeps its state in singletons and training takes the signals: give both back."""
    import signal

    from accelerate.state import AcceleratorState, GradientState

    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield reset
    reset()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(fresh_accelerate, store_config):  # type: ignore[no-untyped-def]
    """Train the session's store with changes; returns the run, after its end."""

    def go(**changes):  # type: ignore[no-untyped-def]
        from OpenSciDraw.config import Config
        from OpenSciDraw.training.run import Training
        from train_OpenSciDraw_loop import train

        fresh_accelerate()
        training = Training(Config.model_validate(merged(store_config, **changes)))
        assert train(training) == 0
        return training

    return go


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Any]:
    pytest.importorskip("starlette", reason="needs the extra studio")
    from OpenSciDraw.studio.state import Studio

    folder = tmp_path / "work"
    folder.mkdir()
    made = Studio(folder)
    yield made
    made.close()


@pytest.fixture
def client(studio: Any) -> Any:
    """With the cookie, Host and Origin of the studio's own page; its queue starts nothing by itself."""
    testclient = pytest.importorskip("starlette.testclient", reason="needs httpx")
    from OpenSciDraw.studio.app import build_app

    host = "127.0.0.1:8899"
    app = build_app(studio, "a-token", {host})
    made = testclient.TestClient(app, base_url=f"http://{host}", headers={"Origin": f"http://{host}"}, follow_redirects=False)
    assert made.get("/?token=a-token").status_code == 303
    return made
