"""Compiled blocks cannot hurt: whatever goes wrong in the trial means eager blocks and one line that says why."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import merged
from test_adapters import KLEIN, QWEN

from OpenSciDraw.config import Config
from OpenSciDraw.models.base import build_model
from OpenSciDraw.training import compile_trial
from OpenSciDraw.training.run import Training

CPU = torch.device("cpu")
PASSED = {"ok": True, "compiling": 60.0, "eager": 0.5, "compiled": 0.3, "blocks": 4, "blocks_in_all": 40}


def config(family: str = "klein", **values: Any) -> Config:
    small = {"encode": {"figures": "drawn:2", "resolution": 128}, "mixed_precision": "bf16"}
    return Config.model_validate(merged(merged(KLEIN, **(QWEN if family == "qwen" else {})), **{**small, **values}))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -- a child that goes wrong ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the trial was ended by SIGSEGV"),
        ("raise RuntimeError('CUDA error: an illegal memory access')", "the trial failed: RuntimeError: CUDA error: an illegal"),
        ("import time; time.sleep(60)", "the trial took longer than 2 s"),
        ("print('warming up')", "the trial ended without an answer"),
        ("", "the trial ended without an answer"),
        ("raise SystemExit(3)", "the trial failed: exit code 3"),
    ],
)
def test_a_child_that_dies_hangs_or_says_nothing_is_an_answer(code: str, reason: str) -> None:
    found = compile_trial.ask([sys.executable, "-c", code], "{}", 2.0)
    assert found["ok"] is False and found["reason"].startswith(reason)


def test_what_the_child_prints_before_its_answer_does_not_matter() -> None:
    code = f"print('a warning'); print({json.dumps(json.dumps(PASSED))})"
    assert compile_trial.ask([sys.executable, "-c", code], "{}", 20.0) == PASSED


# -- the comparison ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("klein", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("klein", False), ("qwen", True), ("qwen", False))),
    ],
)
def test_blocks_that_stay_what_they_are_pass_and_wrong_ones_do_not(family: str, lora: bool, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.parallel.sharding import repeated_blocks

    monkeypatch.setattr(compile_trial, "compile_blocks", lambda transformer, backend: None)
    found = compile_trial.trial(config(family, use_lora=lora), CPU)
    assert found["ok"] and found["blocks"] <= found["blocks_in_all"] and found["eager"] > 0

    def wrong(transformer: Any, backend: str) -> None:
        def scaled(block: Any, inputs: Any, out: Any) -> Any:
            return tuple(1.2 * part for part in out) if isinstance(out, tuple) else 1.2 * out

        repeated_blocks(transformer)[0].register_forward_hook(scaled)

    monkeypatch.setattr(compile_trial, "compile_blocks", wrong)
    found = compile_trial.trial(config(family, use_lora=lora), CPU)
    assert not found["ok"] and "compiled output are" in found["reason"]


@pytest.mark.slow
def test_wrong_gradients_alone_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(transformer: Any, backend: str) -> None:
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda grad: 1.5 * grad)

    monkeypatch.setattr(compile_trial, "compile_blocks", wrong)
    assert "compiled gradients are" in compile_trial.trial(config(), CPU)["reason"]


@pytest.mark.slow
def test_blocks_really_compiled_in_a_real_child_pass() -> None:
    given = config()
    found = compile_trial.answer(given, build_model(given).transformer_config(), CPU)
    assert found["ok"], found
    assert found["compiling"] > 1


# -- what is remembered and decided -----------------------------------------------------------------------
def asked(monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any]) -> list[list[str]]:
    commands: list[list[str]] = []
    monkeypatch.setattr(compile_trial, "ask", lambda command, question, limit: commands.append(command) or dict(answers))
    return commands


def test_the_answer_is_remembered_by_versions_and_settings(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    commands, given = asked(monkeypatch, PASSED), config()
    shape = build_model(given).transformer_config()
    first = compile_trial.answer(given, shape, CPU)
    again = compile_trial.answer(config(seed=7, max_train_steps=3), shape, CPU)
    assert len(commands) == 1 and first["compiled"] == again["compiled"] and Path(first["file"]).is_relative_to(own_cache)
    compile_trial.answer(config(rank=8), shape, CPU)
    compile_trial.answer(given, {**shape, "attention_head_dim": 7}, CPU)
    monkeypatch.setattr(compile_trial, "_versions", lambda: {"torch": "9.0"})
    compile_trial.answer(given, shape, CPU)
    assert len(commands) == 4


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, **values: Any) -> tuple[Config, Any]:
    given = config(**values)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    shape = build_model(given).transformer_config()
    return given, SimpleNamespace(device=torch.device("cuda"), trained_part="transformer", transformer_config=lambda: shape)


def test_auto_compiles_on_a_gpu_where_the_steps_to_come_pay_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, {**PASSED, "compiling": 7000.0})  # saves 0.2 s for 4 of 40 blocks: 2 s a step
    given, model = on_a_gpu(monkeypatch)
    assert compile_trial.may_compile(given, model, 3501, alone=True)
    assert not compile_trial.may_compile(given, model, 3499, alone=True)
    assert not compile_trial.may_compile(given, model, None, alone=True)
    assert not compile_trial.may_compile(given, model, 10_000, alone=False)
    model.device = CPU
    assert not compile_trial.may_compile(given, model, 10_000, alone=True)


def test_auto_starts_no_trial_for_a_run_too_short_to_pay_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any) -> Any:
        raise AssertionError("a trial was started")

    monkeypatch.setattr(compile_trial, "ask", started)
    given, model = on_a_gpu(monkeypatch)
    assert not compile_trial.may_compile(given, model, compile_trial.LONG - 1, alone=True)


def test_a_failed_trial_means_eager_blocks_also_where_they_were_asked_for(monkeypatch, caplog) -> None:  # type: ignore[no-untyped-def]
    asked(monkeypatch, {"ok": False, "reason": "the trial was ended by SIGSEGV"})
    for value in ("auto", True):
        given, model = on_a_gpu(monkeypatch, compile_blocks=value)
        assert not compile_trial.may_compile(given, model, 10_000, alone=True)
    assert caplog.text.count("blocks are not compiled: the trial was ended by SIGSEGV. Remembered in ") == 2


def test_a_run_compiles_its_blocks_when_the_trial_has_passed(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    asked(monkeypatch, PASSED)
    compiled: list[Any] = []
    monkeypatch.setattr("OpenSciDraw.training.build.compile_blocks", compiled.append)
    training: Training = run(model_output_dir=str(tmp_path / "run"), max_train_steps=1, compile_blocks=True)
    assert compiled == [training.model.transformer]
