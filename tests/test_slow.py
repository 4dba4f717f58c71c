"""Minutes long: `make test-slow`."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
from conftest import REPO, SHARED, merged, write_config
from test_training import EXACT, assert_same_run, losses, start

from OpenSciDraw.cli import main
from OpenSciDraw.training import checkpoint
from OpenSciDraw.weights.files import list_checkpoints

pytestmark = pytest.mark.slow
CORPUS = SHARED / "corpora" / "figures"


def test_killed_at_random_moments_the_run_ends_as_an_uninterrupted_one(store_config, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """SIGKILL at eight random moments: while it starts, trains, saves. Weights and losses to the bit."""
    changes = {**EXACT, "resume_from_checkpoint": "latest", "checkpointing_steps": 1, "max_train_steps": 12}
    values = merged(store_config, **changes)
    runs = {name: tmp_path / name for name in ("whole", "killed")}
    configs = {n: write_config(tmp_path / f"{n}.py", merged(values, model_output_dir=str(f))) for n, f in runs.items()}
    assert start(configs["whole"]).wait() == 0
    moments = random.Random(0)
    for _ in range(8):
        process = start(configs["killed"])
        time.sleep(moments.uniform(3, 7))
        process.kill()
        process.wait()
    last = start(configs["killed"])
    assert last.wait() == 0, last.stderr.read()
    assert set(losses(runs["killed"])) == set(losses(runs["whole"])) == set(range(1, 13))
    assert_same_run(runs["whole"], runs["killed"], 12)


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of published figures is not here")
def test_published_figures_go_from_a_folder_to_an_exported_adapter(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The commands of the docs on 432 real figures: none lost, the loss falls, both files come out."""
    monkeypatch.chdir(tmp_path)
    config = str(REPO / "configs" / "tiny" / "flux2klein_corpus.py")
    options = ["--cfg_options", f"encode.figures={CORPUS}", "max_train_steps=60", "validation_steps=60"]
    assert main(["encode", config, *options]) == 0
    assert main(["verify", config, "--samples", "4", *options]) == 0
    assert main(["train", config, *options]) == 0
    assert main(["export", "runs/corpus/train"]) == 0
    assert (tmp_path / "runs" / "corpus" / "store" / "rejected.jsonl").read_text() == ""
    logged = losses(tmp_path / "runs" / "corpus" / "train")
    assert logged[60]["train_loss"] < 0.8 * logged[10]["train_loss"]
    assert len(list((tmp_path / "runs" / "corpus" / "train" / "export").glob("*.safetensors"))) == 2
    checkpoint.check(list_checkpoints(tmp_path / "runs" / "corpus" / "train")[-1])
    shutil.rmtree(tmp_path / "runs")
