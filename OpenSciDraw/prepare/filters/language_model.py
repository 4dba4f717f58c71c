"""py3langid's model, loaded on import (0.8 s, 110 MB): in a process that forks, once for all of its children.

Its 140 languages are cut to those that papers are written in: a short caption with a formula is else taken for Zulu
or Nigerian Pidgin more often than one really is.
"""

from py3langid.langid import MODEL_FILE, LanguageIdentifier

LANGUAGES = (
    "ar bg ca cs da de el en es et fa fi fr he hi hr hu id it ja ko lt lv nl no pl pt ro ru sk sl sr sv th tr uk vi zh".split()
)
IDENTIFIER = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
IDENTIFIER.set_languages(LANGUAGES)
