"""How long captions are for the model that will train on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from OpenSciDraw.errors import UserError

if TYPE_CHECKING:
    from OpenSciDraw.config import Config

_BATCH = 1024  # captions tokenized at once


class Lengths:
    """Tokens of captions by the tokenizer of the config's model, and `limit`, its max_sequence_length.

    Counted without the family's template, which takes a few of these places too.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """

    def __init__(self, config: Config):
        from transformers import AutoTokenizer

        from OpenSciDraw.models.base import build_model

        self.limit = config.max_sequence_length
        model = build_model(config, draws_only=True)
        folder = model.component_files(model.tokenizer_part)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"--config: the tokenizer in {folder} cannot be loaded: {str(error).splitlines()[0]}") from error

    def of(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption."""
        return [
            len(ids)
            for start in range(0, len(captions), _BATCH)
            for ids in self._tokenizer(list(captions[start : start + _BATCH]), add_special_tokens=False).input_ids
        ]
