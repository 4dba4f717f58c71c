"""The DeepSpeed files of accelerate_cfg/, held against accelerate's launcher and DeepSpeed's parser (skipped without it).

Training with ZeRO-2 and ZeRO-3 is in test_spread.py, beside the other ways of spreading.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import BASE, REPO, merged

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.parallel.zero import Zero, settings, take_request

HERE = {"dataset": {"type": "ArXiVParquetDatasetV2", "base_dir": "nowhere"}}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("precision", "accumulation", "clip"), [("bf16", 4, 0.5), ("no", 1, 1.0)])
def test_the_file_gives_the_stage_and_the_config_every_number(
    stage: int, precision: str, accumulation: int, clip: float, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    """File -> accelerate's launcher -> its environment -> our request -> DeepSpeed's own parser."""
    pytest.importorskip("deepspeed")
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env
    from deepspeed.runtime.config import DeepSpeedConfig

    file = Path(REPO) / "accelerate_cfg" / f"1m8g_zero{stage}.yaml"
    given = launch_command_parser().parse_args(["--config_file", str(file), "train_OpenSciDraw_loop.py", "c.py"])
    arguments, defaults, _ = _validate_launch_command(given)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # as `accelerate launch` does
    assert arguments.use_deepspeed and int(arguments.num_processes) == 8
    for name, value in prepare_deepspeed_cmd_env(arguments)[1].items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "8")
    request = take_request()
    assert request == Zero(stage, offload_optimizer=False)
    assert take_request() is None  # accelerate does not see it any more

    monkeypatch.delenv("WORLD_SIZE")  # the parser multiplies batches by the processes that really run
    values = {"mixed_precision": precision, "gradient_accumulation_steps": accumulation, "max_grad_norm": clip}
    parsed = DeepSpeedConfig(settings(Config.model_validate(merged(BASE, **HERE, **values)), request))
    assert parsed.zero_config.stage == stage and parsed.zero_config.offload_optimizer is None
    assert (parsed.gradient_accumulation_steps, parsed.gradient_clipping) == (accumulation, clip)
    assert (parsed.train_micro_batch_size_per_gpu, parsed.bfloat16_config.enabled) == (2, precision == "bf16")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "Allowed: 2 and 3"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param_device"),
    ],
)
def test_what_deepspeed_cannot_do_here_is_refused(environment, said: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        take_request()


def test_a_missing_deepspeed_says_how_to_install_it(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from OpenSciDraw.parallel import zero

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        take_request()
