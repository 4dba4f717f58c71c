"""What a training process imports: nothing optional that its config does not use, and that is all that changes."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, merged, write_config

from OpenSciDraw.config import Config
from OpenSciDraw.training.startup import quick_imports, unused_libraries

UNUSED = (
    "wandb", "matplotlib", "torchao", "scipy", "sklearn", "tensorboard", "deepspeed", "bitsandbytes", "ray", "cv2",
    "torchvision", "onnx", "torch.utils.tensorboard",
)  # fmt: skip


def test_a_run_without_a_tracker_imports_no_library_that_it_does_not_use(store_config: dict, tmp_path: Path) -> None:
    """From the command to the last step, in a process of its own.

    Not on the list, because torch itself brings them: torch._dynamo (the first optimizer that is made imports it, and so does
    transformers.masking_utils), and with it torch._inductor, torch.onnx and sympy; and pandas, which pyarrow imports where it is.
    """
    values = merged(store_config, model_output_dir=str(tmp_path / "run"), max_train_steps=1)
    config = write_config(tmp_path / "c.py", values)
    code = (
        "import json, sys, train_OpenSciDraw_loop as loop\n"
        "assert loop.main(sys.argv[1:]) == 0\n"
        "print('MODULES', json.dumps([name for name, module in sys.modules.items() if module is not None]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(config)], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("MODULES ")]
    loaded = set(json.loads(line.removeprefix("MODULES ")))
    assert "diffusers" in loaded and "peft" in loaded  # the process did train
    assert sorted(loaded & set(UNUSED)) == []


def config_of(store_config: dict, **changes: object) -> Config:
    return Config.model_validate(merged(store_config, **changes))


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({"quantization": "int8"}, "torchao"),
        ({"quantization": "fp8"}, "torchao"),
        ({"quantization": "nf4"}, "bitsandbytes"),
        ({"bnb_quantization_config_path": "bnb.json"}, "bitsandbytes"),
    ],
)
def test_a_library_that_the_config_asks_for_is_not_left_out(changes: dict, used: str, store_config: dict) -> None:
    assert used in unused_libraries(config_of(store_config))
    assert used not in unused_libraries(config_of(store_config, **changes))


@pytest.mark.parametrize(
    ("file", "content", "left_out"),
    [
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "torchao"}}, []),
        ("scheduler/scheduler_config.json", {"use_beta_sigmas": True}, ["torchao", "bitsandbytes"]),
        ("vae/config.json", {}, ["torchao", "bitsandbytes", "scipy"]),
    ],
)
def test_a_library_that_the_models_files_ask_for_is_not_left_out(
    file: str, content: dict, left_out: list[str], store_config: dict, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(json.dumps(content))
    (tmp_path / "model_index.json").write_text("{}")
    assert unused_libraries(config_of(store_config, pretrained_model_name_or_path=str(tmp_path))) == left_out


def test_nothing_is_left_out_for_a_hub_model_that_is_not_here(store_config: dict, tmp_path: Path) -> None:
    config = config_of(store_config, pretrained_model_name_or_path="owner/model", cache_dir=str(tmp_path))
    assert unused_libraries(config) == []


def test_a_library_that_was_left_out_can_be_imported_afterwards() -> None:
    sys.modules.pop("colorsys", None)
    with quick_imports(["colorsys"]):
        assert not gc.isenabled()
        with pytest.raises(ImportError):
            import colorsys
    assert gc.isenabled()
    import colorsys

    assert colorsys.rgb_to_hsv(0, 0, 0) == (0.0, 0.0, 0)
    with quick_imports(["colorsys"]):  # loaded: it stays
        assert sys.modules["colorsys"] is colorsys
    assert sys.modules["colorsys"] is colorsys
    gc.unfreeze()
