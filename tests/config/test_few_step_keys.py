"""What must agree between the keys of distillation, and of another base in validation."""

from __future__ import annotations

from pathlib import Path

import pytest

from OpenSciDraw.config import load_config
from OpenSciDraw.errors import UserError

START = "pretrained_model_name_or_path = 'embedded:flux2_klein_tiny_random'\ndataset = dict(base_dir='data')\n"
DISTILL = START + "train_iteration_func_name = 'trajectory_distillation'\nguidance_scale = 3.0\n"
OTHER = START + "validation_model = 'other'\nvalidation_prompts = ['a box']\n"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (START + "distill = dict(steps=2)", "distill: acts with 'trajectory_distillation' alone"),
        (DISTILL + "negative_prompt = 'blurred'", "guided away from the empty prompt"),
        (DISTILL + "distill = dict(steps=4, teacher_steps=4, guidance=1.0)", "has nothing to teach a student of 4"),
        (DISTILL + "pretrained_lora_ckpt_path = 'old'", "Set fuse_pretrained_lora = True"),
        (DISTILL + "distill = dict(inputs='noise')", "distill.inputs"),
        (OTHER + "use_lora = False", "another base is for an adapter"),
        (OTHER + "pretrained_full_ckpt_path = 'weights'", "stand in place of the base's"),
        (START + "validation_model = 'other'", "it draws validation_prompts, and there are none"),
        (START + "validation_model_steps = 4", "is for pictures on validation_model, which is None"),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together_are_refused(text: str, wrong: str, tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert wrong in str(caught.value)


@pytest.mark.parametrize("text", [DISTILL, DISTILL + "distill = dict(steps=2, guidance=1.0)", OTHER + "validation_model_steps = 8"])
def test_keys_that_go_together_load(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text(text)
    assert load_config(tmp_path / "config.py").distills == (text.startswith(DISTILL))
