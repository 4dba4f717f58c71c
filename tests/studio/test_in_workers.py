"""What runs beside the server: stores listed and decoded, evaluations paired, a worker that ends or is asked nonsense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BASE, merged
from PIL import Image

from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.results import Result, Results
from OpenSciDraw.figures.listing import list_figures, load_figure
from OpenSciDraw.studio.decoding import decode_row
from OpenSciDraw.studio.drawing import draw
from OpenSciDraw.studio.figures_index import Filter, Index
from OpenSciDraw.studio.listing import write_index
from OpenSciDraw.studio.pairing import paired
from OpenSciDraw.studio.planning import known_gpu
from OpenSciDraw.studio.workers import Worker


def nothing(said: Any) -> None:
    pass


def test_a_store_is_listed_and_its_latents_decode_to_the_figures(store_config: dict[str, Any], tmp_path: Path) -> None:
    store = Path(store_config["dataset"]["base_dir"]) / "store"
    assert write_index(nothing, str(store.parent), str(store), str(tmp_path / "i.arrow")) == {"rows": 40}
    index = Index(tmp_path / "i.arrow")
    assert index.is_store and len(index.rows(Filter())) == 40
    ref = list_figures("drawn:40")[0][7]
    row = index.row_of(ref.id)
    assert row is not None and index.row(row)["caption"] == ref.caption
    assert decode_row(nothing, str(store), row, str(tmp_path / "x.png"))["shape"]
    figure, decoded = load_figure(ref).convert("L"), Image.open(tmp_path / "x.png").convert("L")
    one, other = np.asarray(figure.resize(decoded.size), float).ravel(), np.asarray(decoded, float).ravel()
    assert np.corrcoef(one, other)[0, 1] > 0.8


def test_an_edit_by_instruction_is_the_picture_that_sample_draws(tmp_path: Path) -> None:
    """The picture to edit goes through the family's own pipeline, and the prompt is the instruction."""
    from OpenSciDraw.cli import main
    from OpenSciDraw.config import Config, save_config

    source = tmp_path / "source.png"
    load_figure(list_figures("drawn:1:size=128")[0][0]).save(source)
    config = tmp_path / "base.py"
    save_config(Config.model_validate(merged(BASE, dataset={"base_dir": str(tmp_path)}, encode={"resolution": 128})), config)
    words = ["--prompt", "Make 'CNN' red.", "--seed", "5", "--steps", "2", "--guidance", "2", "--image", str(source)]
    assert main(["sample", str(config), *words, "--out", str(tmp_path / "sampled")]) == 0
    drawn = {"prompt": "Make 'CNN' red.", "seeds": [5], "strengths": [1.0], "steps": 2, "guidance": 2.0}
    made = draw(nothing, str(config), out=str(tmp_path), images=[str(source)], **drawn)
    (file,) = (tmp_path / "sampled").glob("*.png")
    size = (made["width"], made["height"])
    assert size == Image.open(file).size
    assert np.array_equal(np.asarray(Image.open(tmp_path / "0.png")), np.asarray(Image.open(file)))
    draw(nothing, str(config), out=str(tmp_path), **drawn, width=size[0], height=size[1])
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "0.png")), np.asarray(Image.open(file)))


def evaluation(folder: Path, name: str, hits: list[int]) -> None:
    place = folder / "evaluations" / name
    results = [Result(f"p{at}", "structure", {"arrows": (hit, 2)}, "example", "picture", "method") for at, hit in enumerate(hits)]
    Results(place).add(results)
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "examples": len(hits), "failures": 0, "higher_is_better": True}
    (place / "evaluation.json").write_text(json.dumps({"figures": "drawn:9", "metrics": {"structure/arrows": score}}))


def test_two_runs_are_compared_on_the_same_pictures(tmp_path: Path) -> None:
    evaluation(tmp_path / "a", "x", [2] * 8 + [1])
    evaluation(tmp_path / "b", "y", [0] * 8 + [1])
    (pair,) = paired(nothing, str(tmp_path / "a"), str(tmp_path / "b"))["pairs"]
    found = pair["metrics"]["structure/arrows"]
    assert (found["better"], found["examples"], found["difference"]) == ("this", 9, pytest.approx(16 / 18))
    assert paired(nothing, str(tmp_path / "a"), str(tmp_path))["pairs"] == []


def test_a_worker_that_ends_is_an_error_and_the_next_question_starts_another(tmp_path: Path) -> None:
    worker = Worker(tmp_path, "look")
    with pytest.raises(UserError, match="KeyError"):
        worker.ask("nonsense")
    first = worker._process
    assert first is not None
    first.kill()
    with pytest.raises(UserError, match="There is no figure source|ended"):
        worker.ask("list", root=str(tmp_path), source=str(tmp_path / "none"), out=str(tmp_path / "x"))
    worker.stop()


def test_a_gpu_is_known_by_its_name_and_memory() -> None:
    from OpenSciDraw.studio.devices import Device

    assert known_gpu(Device("0", "NVIDIA A100-SXM4-40GB", 0, 42)) == "A100-40GB"
    assert known_gpu(Device("0", "NVIDIA GeForce RTX 4090", 0, 25)) == "RTX4090-24GB"
    with pytest.raises(UserError, match="not among the GPUs"):
        known_gpu(Device("0", "NVIDIA T4", 0, 16))
