"""docs/adding-a-model.md alone is enough: its file in a copy of the package, its config, its commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

PAGE = (REPO / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
MODEL, CONFIG = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
COMMANDS = re.findall(r"^scienceflow (.+)$", PAGE, re.M)
GOLDEN = """
import torch
from OpenSciDraw.models.base import ModelSource
from OpenSciDraw.models.toy import F, Toy
from OpenSciDraw.inference.sample import sample_normalized
model = Toy(ModelSource('embedded:toy_tiny'), 64, torch.float32)
model.load_vae(), model.load_text_encoder(), model.load_transformer()
text, empty = (model.collate_text(model.encode_prompts([prompt])) for prompt in ('A box.', ''))
noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
ours = F.pixel_shuffle(sample_normalized(model, text, empty, noise, 3, 2.0), 2)
theirs = model.pipeline(model.transformer)(
    prompt_embeds=text.embeds, pooled_prompt_embeds=model._pooled(text.embeds), negative_prompt_embeds=empty.embeds,
    negative_pooled_prompt_embeds=model._pooled(text.embeds), latents=F.pixel_shuffle(noise, 2), width=64, height=64,
    num_inference_steps=3, guidance_scale=2.0, output_type='latent').images
assert torch.allclose(ours, theirs, atol=1e-5) and ours.std() > 0.1
"""


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package and the page's files in it, after the page's commands have run there.

    The example is held against its pipeline as well: a page that people copy must be right.
    """
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(REPO / "OpenSciDraw", folder / "OpenSciDraw", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "train_OpenSciDraw_loop.py", folder)
    (folder / "OpenSciDraw" / "models" / "toy.py").write_text(MODEL)
    (folder / "my_toy.py").write_text(CONFIG)
    program = ["import shlex, sys", "from OpenSciDraw import cli"]
    for command in COMMANDS:
        fewer = " --cfg_options max_train_steps=2" if "my_toy.py" in command else ""
        program.append(f"assert cli.main(shlex.split({command + fewer!r})) == 0")
    program.append(GOLDEN)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_pages_file_trains_two_steps_on_drawn_figures(followed: Path) -> None:
    run = followed / "runs" / "toy" / "train"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 2]
    assert (run / "pytorch_lora_weights.safetensors").is_file()


def test_its_pictures_come_from_the_familys_own_pipeline(followed: Path) -> None:
    run = followed / "runs" / "toy" / "train"
    assert (run / "validation_images" / "step_000002" / "00.png").is_file()
    assert list((run / "samples").glob("*.png"))


def test_its_store_knows_the_family_and_the_encoders(followed: Path) -> None:
    from OpenSciDraw.store.shard import read_shard_info

    shards = sorted((followed / "runs" / "toy" / "store").glob("*/00000.parquet"))
    infos = [read_shard_info(path) for path in shards]
    assert len(infos) == 2 and all(info is not None and info.contract.family == "Toy" for info in infos)


def test_the_page_names_the_methods_that_a_family_must_and_may_define() -> None:
    from OpenSciDraw.models.base import FigureModel

    missing = [name for name in FigureModel.__abstractmethods__ if f"def {name}(" not in MODEL]
    assert not missing, missing
    assert all(f"`{name}`" in PAGE for name in ("guide", "check_transformer", "note_truncated"))


def test_the_page_names_every_switch_of_what_only_some_families_have() -> None:
    from OpenSciDraw.models.base import FigureModel

    switches = [name for name in vars(FigureModel) if isinstance(vars(FigureModel)[name], bool)]
    assert {"edits", "text_sees_pictures", "embeds_guidance"} <= set(switches)
    names = [*switches, "encode_instructions", "blank_text", "embedded_guidance", "tokenizer_part", "check_pipeline", "base_models"]
    assert not [name for name in names if f"`{name}" not in PAGE] and "`TextBatch.slots`" in PAGE


def test_guidance_as_an_input_of_the_transformer_needs_one_pass_and_is_put_back(tiny, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    import torch

    from OpenSciDraw.inference.sample import sample_normalized
    from OpenSciDraw.models.base import FigureModel

    seen, velocity = [], tiny.velocity

    def watched(*given):  # type: ignore[no-untyped-def]
        seen.append(tiny.embedded_guidance)
        return velocity(*given)

    monkeypatch.setattr(tiny, "velocity", watched)
    text, noise = tiny.collate_text(tiny.encode_prompts(["A box."])), torch.randn(1, 128, 8, 8)
    with torch.no_grad():
        sample_normalized(tiny, text, text, noise, 2, 3.5)
        assert seen == [3.5, 1.0] * 2  # with the prompt, and without it: two passes
        seen.clear()
        monkeypatch.setattr(type(tiny), "embeds_guidance", True)
        sample_normalized(tiny, text, text, noise, 2, 3.5)
    assert seen == [3.5, 3.5] and tiny.embedded_guidance == FigureModel.embedded_guidance == 1.0
