"""What is said of a config that cannot be used: every wrong key, where it stands, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Set as AbstractSet
from typing import Any

from pydantic import ValidationError

from OpenSciDraw.config.checks import CrossFieldError
from OpenSciDraw.config.layer import Layer
from OpenSciDraw.config.names import ALIASES
from OpenSciDraw.config.schema import SECRET_KEYS
from OpenSciDraw.config.text import (
    REDACTED,
    all_fields,
    literals_of,
    section_of,
    type_text,
)

COMMAND_LINE = "--cfg_options"


def contradictions(error: ValidationError, layer: Layer, ignore: AbstractSet[str]) -> list[str]:
    """What keys say against each other; not where a top-level key of `ignore` has a part in it."""
    causes = [item.get("ctx", {}).get("error") for item in error.errors(include_url=False)]
    found = [problem for cause in causes if isinstance(cause, CrossFieldError) for problem in cause.problems]
    texts = []
    for keys, message in found:
        if not ignore & {name.split(".")[0] for name in keys}:
            place = next((layer.places[name] for name in keys if name in layer.places), "default")
            texts.append(f"{place}: {keys[0]}: {message}")
    return texts


def wrong_keys(error: ValidationError, layer: Layer) -> dict[str, str]:
    """One line for each key that is unknown, missing or of the wrong type or range."""
    by_key: dict[str, list[dict[str, Any]]] = {}
    for item in error.errors(include_url=False):
        if item["loc"]:
            by_key.setdefault(_key_of(item["loc"], layer.values), []).append(dict(item))
    return {name: _text(name, items, layer) for name, items in by_key.items()}


def _key_of(loc: tuple[int | str, ...], values: dict[str, Any]) -> str:
    """The dotted key that an error of pydantic is about; what lies inside a value (indices, branches) is left out."""
    fields, name = all_fields(), ""
    node: Any = values
    for part in loc:
        if not isinstance(node, dict):
            break
        name = f"{name}.{part}" if name else str(part)
        node = node.get(part)
        if name in fields and section_of(fields[name].annotation) is None:
            break
    return name


def _text(name: str, items: list[dict[str, Any]], layer: Layer) -> str:
    kind, fields = items[0]["type"], all_fields()
    if kind == "missing":
        section, _, _ = name.rpartition(".")
        place = f"{layer.places[section]}: " if section in layer.places else ""
        return f"{place}{name} is missing: {fields[name].description}"
    value: Any = layer.values
    for part in name.split("."):
        value = next(item for inner, item in value.items() if str(inner) == part)
    place = layer.places.get(name, "?")
    if name not in fields:
        near = nearest(name, list(fields))
        hint = f"Did you mean {' or '.join(near)}?" if near else "`scienceflow config --schema` lists all keys; "
        hint += "" if near else "a helper variable's name begins with _."
        return f"{place}: unknown key {name} (a {type(value).__name__}). {hint}"
    shown = REDACTED if name.rpartition(".")[2] in SECRET_KEYS else _short(value)
    text = f"{place}: {name} = {shown} ({type(value).__name__}): expected {type_text(fields[name])}. "
    own = [item["ctx"]["error"] for item in items if item["type"] == "value_error"]
    if own:  # a rule of ours says more than the type and the meaning
        return f"{place}: {name} = {shown} ({type(value).__name__}): {own[0]}."
    if isinstance(value, str):
        near = difflib.get_close_matches(value, literals_of(fields[name].annotation), n=1)
        text += f"Did you mean {near[0]!r}? " if near else ""
    elif place == COMMAND_LINE and "str" in type_text(fields[name]):
        text += f"For text, quote it twice: \"{name}='{value}'\". "
    return text + (fields[name].description or "")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(name: str, known: list[str]) -> list[str]:
    """The known keys nearest to an unknown one: of the same name in another section, else by spelling there."""
    section, _, inner = name.rpartition(".")
    elsewhere = [other for other in known if other.rpartition(".")[2] == ALIASES.get(inner, inner)]
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == section}
    if not section:
        siblings |= {alias: alias for alias in ALIASES}
    close = difflib.get_close_matches(inner.lower(), list(siblings), n=3)
    return elsewhere[:2] or [siblings[other] for other in close]
