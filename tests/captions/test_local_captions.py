"""Captions by a model on this machine: two random models of transformers' own classes, one of them without torchvision's films."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from OpenSciDraw.captions.local import LocalAsker
from OpenSciDraw.cli import main
from OpenSciDraw.models.embedded import embedded_folder, tokenizer

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save(model: Any, processing: list[Any], tokens: Any, folder: Path, ends: bool) -> Path:
    """`ends`: the last token that is allowed is the end of the answer; else no answer ever ends."""
    settings = model.generation_config
    end = tokens.convert_tokens_to_ids("<|im_end|>")
    settings.eos_token_id, settings.forced_eos_token_id = end, end if ends else None
    silent = {*tokens.all_special_ids, *tokens("\n \n\n").input_ids} - ({end} if ends else set())
    settings.suppress_tokens = sorted(silent)
    for part in (model, *processing):
        part.save_pretrained(folder)
    return folder


def llava(folder: Path, ends: bool = True) -> Path:
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen2Config,
    )

    tokens = tokenizer(rich=50)
    tokens.add_tokens(["<image>"], special_tokens=True)
    seeing = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56,
                              patch_size=14, projection_dim=32)  # fmt: skip
    text = Qwen2Config(vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, bos_token_id=None)  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=seeing, text_config=text, image_token_index=tokens.convert_tokens_to_ids("<image>"))
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = LlavaProcessor(
        pictures, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_TEMPLATE.replace("PICTURE", "<image>"),
    )  # fmt: skip
    return save(model, [processor], tokens, folder, ends)


def qwen_vl(folder: Path) -> Path:
    from transformers import Qwen2TokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration

    source = embedded_folder("qwen_image_21_tiny")
    model = Qwen3VLForConditionalGeneration.from_pretrained(source, subfolder="text_encoder")
    tokens = Qwen2TokenizerFast.from_pretrained(source, subfolder="processor")
    tokens.chat_template = _TEMPLATE.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>")
    return save(model, [tokens, Qwen2VLImageProcessorPil.from_pretrained(source, subfolder="processor")], tokens, folder, True)


@pytest.mark.parametrize("make", [llava, qwen_vl])
def test_a_local_model_writes_captions_and_is_asked_once(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out, asked = make(tmp_path / "model"), tmp_path / "out", []
    ask = LocalAsker.ask

    def counted(self: LocalAsker, *arguments: Any) -> Any:
        asked.append(arguments)
        return ask(self, *arguments)

    monkeypatch.setattr(LocalAsker, "ask", counted)
    command = ["caption", "drawn:2:size=128", "--out", str(out), "--local", str(model), "--max_tokens", "8", "--styles", "short"]
    for _ in range(2):
        assert main(command) == 0
    assert len(asked) == 2
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert all(row["text"].strip() and row["usage"]["completion_tokens"] == 8 for row in rows)
    assert rows[0]["model"].startswith("model@") and len(rows[0]["model"]) > 12
    if make is qwen_vl and find_spec("torchvision") is None:
        assert rows[0]["usage"]["prompt_tokens"] > 16  # the picture's tokens are in the prompt


def test_an_answer_that_does_not_end_is_truncated_and_what_is_no_model_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = llava(tmp_path / "model", ends=False), tmp_path / "out"
    command = ["caption", "drawn:1:size=128", "--out", str(out), "--max_tokens", "4", "--styles", "short", "--local"]
    assert main([*command, str(model)]) == 1
    assert "truncated: the answer reached --max_tokens = 4" in (out / "failures.jsonl").read_text()
    (tmp_path / "empty").mkdir()
    assert main([*command, str(tmp_path / "empty")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
