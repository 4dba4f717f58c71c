"""A key that is changed for a run that goes on takes effect and is named, or is refused with both values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import merged
from test_training import losses

from OpenSciDraw.config import Config
from OpenSciDraw.config.text import all_fields, section_of
from OpenSciDraw.errors import UserError
from OpenSciDraw.training import resuming

OTHER_RUN = {"max_train_steps": 4, "checkpointing_steps": 2, "resume_from_checkpoint": "latest"}


def leaves() -> list[str]:
    return [name for name, field in all_fields().items() if section_of(field.annotation) is None]


@pytest.mark.parametrize("name", [name for name in leaves() if name not in resuming.NO_SETTINGS])
def test_every_key_of_the_schema_takes_effect_by_name_or_is_refused_with_both_values(name: str, store_config: dict) -> None:  # type: ignore[type-arg]
    config = Config.model_validate(store_config)
    now = resuming.settings(config)
    before = {**now, name: "another value"}
    if resuming.reason_of(name) is None or resuming.is_base(name, config):
        assert resuming.changes(before, config, "checkpoint-2") == {name: ("another value", now.get(name))}
        return
    with pytest.raises(UserError, match=f"checkpoint-2 .*{name} = 'another value' there, ") as refusal:
        resuming.changes(before, config, "checkpoint-2")
    assert f"{now.get(name)!r} now" in str(refusal.value)


def test_only_where_a_run_lies_is_no_setting() -> None:
    assert resuming.NO_SETTINGS == {"model_output_dir", "resume_from_checkpoint", "huggingface_token", "hub_token"}
    assert set(resuming.FIXED) <= {*all_fields()}


def test_a_changed_rate_takes_effect_and_is_told_in_the_log_and_in_run_json(run, tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    run(model_output_dir=str(tmp_path), learning_rate=1e-3, max_train_steps=2, checkpointing_steps=2)
    run(model_output_dir=str(tmp_path), learning_rate=1e-5, **OTHER_RUN)
    assert "learning_rate: 0.001 until step 2, 1e-05 from here" in caplog.text
    assert "max_train_steps: 2 until step 2, 4 from here" in caplog.text
    assert [losses(tmp_path)[step]["lr"] for step in (1, 2, 3, 4)] == [1e-3, 1e-3, 1e-5, 1e-5]
    sessions = json.loads((tmp_path / "run.json").read_text())["sessions"]
    assert sessions[0]["changed"] == {}
    assert sessions[1]["changed"] == {"learning_rate": [1e-3, 1e-5], "max_train_steps": [2, 4]}


@pytest.mark.parametrize(
    "changes",
    [
        {"adam_beta1": 0.5, "adam_beta2": 0.7, "adam_epsilon": 1e-4, "adam_weight_decay": 0.3},
        {"use_8bit_adam": True, "adam_beta1": 0.5, "adam_beta2": 0.7, "adam_epsilon": 1e-4, "adam_weight_decay": 0.3},
        {"optimizer": "prodigy", "adam_beta1": 0.5, "prodigy_beta3": 0.6, "prodigy_decouple": False,
         "prodigy_use_bias_correction": False, "prodigy_safeguard_warmup": False, "adam_weight_decay": 0.3},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
    ],
    ids=["AdamW", "8-bit", "Prodigy", "schedule"],
)  # fmt: skip
def test_the_optimizer_of_a_resumed_run_is_that_of_the_config(changes: dict, run, tmp_path: Path) -> None:  # type: ignore[type-arg, no-untyped-def]
    same = {name: changes[name] for name in changes if name in ("use_8bit_adam", "optimizer")}
    rate = 0.5 if "optimizer" in changes else 2e-3
    same["learning_rate"] = 1.0 if "optimizer" in changes else 1e-3
    run(model_output_dir=str(tmp_path), max_train_steps=2, checkpointing_steps=2, **same)
    resumed = run(model_output_dir=str(tmp_path), learning_rate=rate, **changes, **OTHER_RUN)
    fresh = run(model_output_dir=str(tmp_path / "fresh"), learning_rate=rate, max_train_steps=4, **changes)
    assert resuming.options_of(resumed.optimizer) == resuming.options_of(fresh.optimizer)
    assert resumed.optimizer.param_groups[0]["lr"] == fresh.optimizer.param_groups[0]["lr"]
    rates = [{step: values["lr"] for step, values in losses(out).items()} for out in (tmp_path, tmp_path / "fresh")]
    if "optimizer" not in changes:
        assert rates[0][3] == rates[1][3] and rates[0][4] == rates[1][4]


def test_an_average_goes_on_with_the_decay_of_the_config(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    average = {"use_ema": True, "ema_steps": 1}
    run(model_output_dir=str(tmp_path), max_train_steps=2, checkpointing_steps=2, ema_decay=0.9, **average)
    resumed = run(model_output_dir=str(tmp_path), ema_decay=0.1, **average, **OTHER_RUN)
    assert resumed.average.decay == 0.1


def test_a_refusal_comes_before_anything_loads(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    run(model_output_dir=str(tmp_path), max_train_steps=2, checkpointing_steps=2)
    monkeypatch.setattr("OpenSciDraw.training.build.build_model", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(UserError, match=r"rank = 4 there, 8 now \(it decides what trains\)"):
        run(model_output_dir=str(tmp_path), rank=8, **OTHER_RUN)


def test_the_adapter_that_a_run_started_from_may_be_gone_when_it_goes_on(run, store_config: dict, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run(model_output_dir=str(tmp_path / "first"), max_train_steps=1)
    start = {"pretrained_lora_ckpt_path": str(tmp_path / "first"), "model_output_dir": str(tmp_path / "second")}
    run(**start, max_train_steps=2, checkpointing_steps=2)
    (tmp_path / "first").rename(tmp_path / "moved")
    assert run(**start, **OTHER_RUN).step == 4
    with pytest.raises(UserError, match="a run reads it when it starts"):
        run(**start | {"pretrained_lora_ckpt_path": str(tmp_path / "moved")}, **OTHER_RUN)


def test_the_base_of_a_run_may_lie_elsewhere(store_config: dict, tmp_path: Path) -> None:  # type: ignore[type-arg]
    fused = merged(store_config, pretrained_lora_ckpt_path="a", fuse_pretrained_lora=True)
    before = resuming.settings(Config.model_validate(fused))
    now = Config.model_validate(fused | {"pretrained_lora_ckpt_path": "b"})
    assert resuming.changes(before, now, "x") == {"pretrained_lora_ckpt_path": ("a", "b")}
    assert resuming.said({"text": ("a", "b")}, 7) == ["text: 'a' until step 7, 'b' from here"]
