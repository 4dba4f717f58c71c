"""The language of a caption (py3langid: naive Bayes over byte n-grams; the model is in the package, 4 MB, BSD-3)."""

from __future__ import annotations

import re

UNDETERMINED = "und"
_MATH = re.compile(r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]|https?://\S+", re.DOTALL)
_MIN_PROBABILITY = 0.5  # English captions of three words are often below it, other languages rarely


def without_math(caption: str) -> str:
    """The caption with formulas and web addresses blanked out."""
    return _MATH.sub(" ", caption)


def language_of(caption: str) -> str:
    """ISO 639-1 code, one of language_model.LANGUAGES; 'und' for a caption that is too short or mostly math to tell."""
    from OpenSciDraw.prepare.filters.language_model import IDENTIFIER  # at first need: it takes 0.8 s

    language, probability = IDENTIFIER.classify(without_math(caption))
    return str(language) if probability >= _MIN_PROBABILITY else UNDETERMINED
