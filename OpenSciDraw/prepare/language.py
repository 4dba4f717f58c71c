"""The language of a caption (py3langid: naive Bayes over byte n-grams, 140 languages, its model is in the package)."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

UNDETERMINED = "und"
_MATH = re.compile(r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]|https?://\S+", re.DOTALL)
_MIN_LETTERS = 20
_MIN_PROBABILITY = 0.9


def without_math(caption: str) -> str:
    return _MATH.sub(" ", caption)


def language_of(caption: str) -> str:
    """ISO 639-1 code; 'und' for a caption that is too short, mostly math, or not clearly of one language."""
    text = without_math(caption)
    if sum(letter.isalpha() for letter in text) < _MIN_LETTERS:
        return UNDETERMINED
    language, probability = _identifier().classify(text)
    return str(language) if probability >= _MIN_PROBABILITY else UNDETERMINED


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
