"""A vision-language model of transformers on this machine, in place of an endpoint."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from OpenSciDraw.captions.prompts import caption_in
from OpenSciDraw.captions.styles import Style
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.fingerprints import fingerprint
from OpenSciDraw.models.picture_processor import WithoutFilms
from OpenSciDraw.utils.endpoint import BadAnswer

_WITH_FILMS = {  # whose processors transformers cannot load without torchvision, by the model's type
    "qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_vl_moe": "Qwen3VLProcessor",
}  # fmt: skip


class LocalAsker:
    """An image-text-to-text model, one figure at a time, on the GPU where there is one; the likeliest token at each step.

    `model` is a folder or hub id, loaded in its own dtype without code of its own.

    Raises:
        UserError: it cannot be loaded; what is missing.
    """

    threads = 1

    def __init__(self, model: str, most_tokens: int, most_side: int):
        from transformers import AutoConfig, AutoModelForImageTextToText

        self.most_tokens, self.most_side = most_tokens, most_side
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model
        try:
            kind = AutoConfig.from_pretrained(name).model_type
            self.processor = _load_processor(name, kind)
            self.model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").to(self.device).eval()
        except (OSError, ValueError, ImportError) as error:
            detail = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise UserError(
                f"--local {model} cannot be loaded: {type(error).__name__}: {detail} Give the folder or hub id of a transformers "
                "model of images and text to text, with its processor."
            ) from error
        if not self.processor.chat_template:
            raise UserError(f"--local {model} has no chat template, so that it cannot be given an instruction. Take a chat model.")
        self.who = _identity(name)

    @torch.inference_mode()
    def ask(self, style: Style, text: str, picture: Image.Image) -> dict[str, Any]:
        """As `Asker.ask`. The instruction goes before the request: not every template has a system's part."""
        sent = picture.convert("RGB")
        sent.thumbnail((self.most_side, self.most_side))
        content = [{"type": "image", "image": sent}, {"type": "text", "text": f"{style.instruction}\n\n{text}"}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        ).to(self.device, self.model.dtype)  # fmt: skip
        given = inputs["input_ids"].shape[1]
        out = self.model.generate(**inputs, max_new_tokens=self.most_tokens, do_sample=False)[0, given:]
        ends = self.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        if len(out) >= self.most_tokens and int(out[-1]) not in ends:
            raise BadAnswer(f"truncated: the answer reached --max_tokens = {self.most_tokens}", final=True)
        answer = self.processor.decode(out, skip_special_tokens=True)
        caption_in(answer)
        return {"text": answer, "usage": {"prompt_tokens": given, "completion_tokens": len(out)}}


def _load_processor(name: str, kind: str) -> Any:
    import transformers

    if kind not in _WITH_FILMS or find_spec("torchvision") is not None:
        return transformers.AutoProcessor.from_pretrained(name)
    pictures = transformers.AutoImageProcessor.from_pretrained(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    template = tokenizer.chat_template
    file = Path(name) / "chat_template.jinja"
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    processor_class = type("PictureProcessor", (WithoutFilms, getattr(transformers, _WITH_FILMS[kind])), {})
    return processor_class(pictures, tokenizer, template)


def _identity(name: str) -> str:
    """The model's name; of a folder with a short hash of its weights, since another model may lie there later."""
    if not Path(name).is_dir():
        return name
    return f"{Path(name).resolve().name}@{fingerprint(Path(name))}"
