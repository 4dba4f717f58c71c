"""One layer of a config: the values of a file or of the command line, and where each was set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Layer:
    """The values of one file (or the command line) under their own names, and where each dotted key was set."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    literals: set[str] = field(default_factory=set)  # names set to a string written in the file


def filled(layer: Layer) -> Layer:
    """Give every entry of a dict a place: its own or that of the dict it stands in."""

    def fill(name: str, value: Any, inherited: str) -> None:
        place = layer.places.setdefault(name, inherited)
        if isinstance(value, dict):
            for inner, item in value.items():
                fill(f"{name}.{inner}", item, place)

    for name, value in layer.values.items():
        fill(name, value, next((p for k, p in layer.places.items() if k.split(".")[0] == name), "?"))
    return layer


def merge_layers(base: Layer, over: Layer) -> None:
    """Put `over` on top of `base`: dicts key by key, everything else replaced; `_delete_=True` replaces a dict."""

    def merge(below: dict[str, Any], above: dict[str, Any], prefix: str) -> None:
        for name, value in above.items():
            dotted = f"{prefix}{name}"
            old = below.get(name)
            if isinstance(value, dict) and isinstance(old, dict) and value.get("_delete_") is not True:
                below[name] = dict(old)
                merge(below[name], value, f"{dotted}.")
                continue
            for place in [p for p in base.places if p == dotted or p.startswith(f"{dotted}.")]:
                del base.places[place]
            base.literals.discard(dotted)
            below[name] = _without_delete(value)

    merge(base.values, over.values, "")
    base.places |= over.places
    base.literals |= over.literals


def _without_delete(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_delete(item) for name, item in value.items() if name != "_delete_"}
