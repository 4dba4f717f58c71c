"""Processors of text with pictures that need no torchvision."""

from __future__ import annotations

from typing import Any

from transformers.processing_utils import ProcessorMixin


class WithoutFilms:
    """Before a processor of the Qwen-VL models: its own, without the part for films, which needs torchvision.

    The tokens are the same, and the pixels are Pillow's.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        for kind in ("image", "video"):
            setattr(self, f"{kind}_token", f"<|{kind}_pad|>")
            setattr(self, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>"))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)  # type: ignore[arg-type]
