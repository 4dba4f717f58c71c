"""Configs on the page: a form made from the schema, checked by the loader of the command line; what differs between two."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from OpenSciDraw.config import SECRET_KEYS, Config, save_config
from OpenSciDraw.config.text import all_fields, literals_of, section_of, type_text
from OpenSciDraw.errors import UserError
from OpenSciDraw.studio import saved
from OpenSciDraw.studio.places import CONFIGS, Places
from OpenSciDraw.studio.recipes import RECIPES
from OpenSciDraw.utils.files import make_folder, write_text

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
RECIPE = "recipe:"


def fields() -> list[dict[str, Any]]:
    """Every key that a form can change: name, group, type, unit, default, meaning, and its choices where these are few."""
    found = []
    for name, field in all_fields().items():
        if section_of(field.annotation) is not None or name in SECRET_KEYS:
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        found.append({
            "name": name, "group": str(extra.get("group", "")), "unit": str(extra.get("unit") or ""), "type": type_text(field),
            "default": None if field.is_required() else shown(_default(field)), "meaning": field.description or "",
            "choices": _choices(field),
        })  # fmt: skip
    return found


def _default(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True)
    return None if value is PydanticUndefined else value


def _choices(field: FieldInfo) -> list[str]:
    """All values of a key, where it names them: True and False, or words."""
    parts = typing.get_args(field.annotation) or (field.annotation,)
    if typing.get_origin(field.annotation) is typing.Literal:
        return [shown(value) for value in parts]
    if set(parts) - {type(None)} == {bool}:
        return ["False", "True"] + (["None"] if type(None) in parts else [])
    words = [part for part in parts if part is not type(None)]
    if words and all(typing.get_origin(part) is typing.Literal for part in words):
        return [shown(value) for part in words for value in typing.get_args(part)] + (["None"] if type(None) in parts else [])
    return []


def shown(value: Any) -> str:
    """A value as the form shows it: a text as it is, anything else as Python writes it."""
    if isinstance(value, str):
        return value
    return repr(list(value) if isinstance(value, tuple) else value)


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested values; a dict that is itself a key's value (encode.where) stays one."""
    known = all_fields()
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + name
        if isinstance(value, dict) and (key not in known or section_of(known[key].annotation) is not None):
            found |= leaves(value, f"{key}.")
        else:
            found[key] = value
    return found


def overrides(changes: dict[str, str]) -> list[str]:
    """Texts of a form as `key=value` of the command line: for a key that takes a text alone, the text as it is."""
    known, found = all_fields(), []
    for name, text in changes.items():
        field = known.get(name)
        kind = "" if field is None else type_text(field)
        may_be_none = text.strip().lower() in ("none", "null") and "None" in kind and "'none'" not in kind
        is_text = kind in ("str", "str | None") or (field is not None and text in literals_of(field.annotation))
        found.append(f"{name}={text!r}" if is_text and not may_be_none else f"{name}={text}")
    return found


def base_file(places: Places, base: str) -> Path:
    """The saved config that a form starts from: one in the folder, or a recipe, which is written out as one."""
    if not base.startswith(RECIPE):
        return places.inside(base)
    recipe = RECIPES.get(base.removeprefix(RECIPE))
    if recipe is None:
        raise UserError(f"There is no recipe {base!r:.80}. Known: {', '.join(RECIPES)}.")
    values = recipe.values | {"model_output_dir": str(places.root / "runs" / "run")}
    values["dataset"] = values["dataset"] | {"base_dir": str(places.root / "stores")}
    lines = [f'"""{recipe.title}"""', *(f"{name} = {value!r}" for name, value in values.items())]
    file = make_folder(places.own / "recipes") / f"{base.removeprefix(RECIPE)}.py"
    write_text(file, "\n".join(lines) + "\n")
    return file


def checked(places: Places, base: str, changes: dict[str, str]) -> Config:
    """The config that a form describes.

    Raises:
        UserError: with the messages of the command line; a place outside of the studio's folder.
    """
    config = saved.load(base_file(places, base), overrides(changes))
    places.require_inside(config)
    return config


def values_of(places: Places, base: str) -> dict[str, str]:
    """Every key's value as the form shows it, whether or not they agree with one another."""
    values = leaves(saved.values(base_file(places, base).read_bytes()))
    defaults = {name: _default(field) for name, field in all_fields().items() if section_of(field.annotation) is None}
    return {name: shown(values.get(name, default)) for name, default in defaults.items() if name not in SECRET_KEYS}


def named(name: str) -> str:
    """A name for a config and its run. Raises UserError where it is none."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r:.80} is no name: letters, digits, _ and -, at most 60, a letter or digit first.")
    return name


def save(places: Places, name: str, config: Config) -> Path:
    """Write configs/NAME.py. An earlier one of that name is never replaced."""
    file = make_folder(places.root / CONFIGS) / f"{named(name)}.py"
    if not places.has(file.parent) or file.exists() or file.is_symlink():
        raise UserError(f"{CONFIGS}/{name}.py is there already. Choose another name: a config is never changed in place.")
    save_config(config, file)
    return file


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[dict[str, str | None]]:
    """The keys in which two configs' values differ, each with both; None where one does not say."""
    mine, theirs = leaves(one), leaves(other)
    different = [name for name in dict.fromkeys([*mine, *theirs]) if mine.get(name) != theirs.get(name)]
    return [
        {"key": name, "one": shown(mine[name]) if name in mine else None, "other": shown(theirs[name]) if name in theirs else None}
        for name in different
    ]
