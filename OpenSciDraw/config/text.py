"""Configs as text: the table of all keys, a resolved config with where each value came from, a saved config."""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from OpenSciDraw.config.names import ALIASES, RETIRED
from OpenSciDraw.config.schema import SECRET_KEYS, Config

REDACTED = "'***'"
_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as `TransformerConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (section_of(part) for part in typing.get_args(annotation))
    return next((section for section in found if section is not None), None)


def all_fields(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """Every key with its field; keys inside a section are dotted: 'dataset.type'."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field
        section = section_of(field.annotation)
        if section is not None:
            found |= all_fields(section, f"{prefix}{name}.")
    return found


def type_text(field: FieldInfo) -> str:
    """What a key accepts, for people: `int >= 1 | None`, `'none' | 'resolution' | float > 0`."""
    return _type(field.annotation, _limits(field.metadata))


def literals_of(annotation: Any) -> list[str]:
    """The strings that an annotation names."""
    if typing.get_origin(annotation) is typing.Literal:
        return [value for value in typing.get_args(annotation) if isinstance(value, str)]
    return [text for part in typing.get_args(annotation) for text in literals_of(part)]


def _type(annotation: Any, limits: str = "") -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(parts[0], limits + _limits(parts[1:]))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type(part, limits) for part in parts)
    if origin is typing.Literal:
        return " | ".join(map(repr, parts))
    if origin is list:
        return f"list[{_type(parts[0])}]"
    if origin is tuple:
        return f"[{', '.join(map(_type, parts))}]"
    if annotation is type(None):
        return "None"
    if origin is dict or section_of(annotation) is not None:
        return "dict"
    return str(annotation.__name__) + (limits if annotation in (int, float) else "")


def _limits(metadata: Iterable[Any]) -> str:
    found = ""
    for item in metadata:
        if isinstance(item, FieldInfo):
            found += _limits(item.metadata)
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            limits = dataclasses.asdict(item)  # annotated_types: Ge(ge=1), ...
            found += "".join(f" {sign} {limits[name]}" for name, sign in _LIMITS.items() if name in limits)
    return found


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _default_text(field: FieldInfo, name: str) -> str:
    if name == "train_iteration_func_name":
        return "from model_type"
    if field.default_factory is not None:
        return "dict()"
    return "required" if field.default is PydanticUndefined else repr(field.default)


def schema_table() -> str:
    """Every key as markdown, a table for each group; then second spellings and keys without effect."""
    groups: dict[str, list[str]] = {}
    for name, field in all_fields().items():
        cells = [
            f"`{name}`",
            f"`{type_text(field)}`",
            _extra(field).get("unit") or "",
            f"`{_default_text(field, name)}`",
        ]
        row = "| " + " | ".join(cell.replace("|", "\\|") for cell in [*cells, field.description or ""]) + " |"
        groups.setdefault(str(_extra(field)["group"]), []).append(row)
    head = "| key | type | unit | default | meaning |\n|---|---|---|---|---|\n"
    parts = [f"### {group}\n\n{head}" + "\n".join(rows) for group, rows in groups.items()]
    spellings = "\n".join(f"| `{alias}` | `{name}` |" for alias, name in ALIASES.items())
    parts.append(f"### Second spellings\n\n| spelling | key |\n|---|---|\n{spellings}")
    parts.append("### Accepted without effect\n\n" + ", ".join(f"`{name}`" for name in sorted(RETIRED)))
    return "\n\n".join(parts) + "\n"


def _grouped(config: Config) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    groups: dict[str, list[tuple[str, Any]]] = {}
    for name, value in config:
        groups.setdefault(str(_extra(Config.model_fields[name])["group"]), []).append((name, value))
    yield from groups.items()


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, BaseModel):
        for inner, item in value:
            yield from _leaves(f"{name}.{inner}", item)
    else:
        yield name, value


def format_config(config: Config) -> str:
    """The resolved config, one `key = value  # where it was set` a line; secrets are not shown."""
    lines: list[str] = []
    for group, items in _grouped(config):
        lines.append(f"# {group}")
        for name, value in (leaf for item in items for leaf in _leaves(*item)):
            text = REDACTED if name in SECRET_KEYS and value is not None else _literal(value)
            lines.append(f"{name} = {text}  # {config.provenance.get(name, 'default')}")
        lines.append("")
    return "\n".join(lines)


def _literal(value: Any, indent: str = "") -> str:
    """A value as Python source that evaluates to it."""
    if isinstance(value, BaseModel):
        inner = "".join(f"{indent}    {name}={_literal(item, indent + '    ')},\n" for name, item in value)
        return f"dict(\n{inner}{indent})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_literal(item) for item in value)}]"
    return repr(value)


def saved_values(source: str | bytes) -> dict[str, Any]:
    """The values of a config that `save_config` wrote, read as literals: nothing in it is run.

    Raises:
        ValueError: it holds something else; says at which line.
    """
    values: dict[str, Any] = {}
    try:
        for node in ast.parse(source).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # the docstring
            if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
                raise ValueError(f"line {node.lineno} is no `key = value`")
            try:
                values[node.targets[0].id] = _saved_value(node.value)
            except (ValueError, TypeError):
                raise ValueError(f"line {node.lineno}: the value of {node.targets[0].id} is no literal") from None
    except (SyntaxError, RecursionError, MemoryError) as error:
        line = f"line {error.lineno} " if isinstance(error, SyntaxError) and error.lineno else ""
        raise ValueError(f"{line}is not Python: {error}") from None
    return values


def _saved_value(node: ast.expr) -> Any:
    """A literal, or dict(key=literal, …), also in a list."""
    if isinstance(node, ast.List):
        return [_saved_value(item) for item in node.elts]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {str(keyword.arg): _saved_value(keyword.value) for keyword in node.keywords}
    return ast.literal_eval(node)


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved config as a config file that `load_config` reads back equal; secrets are left out."""
    lines = ['"""A resolved config, written by ScienceFlow. Secrets are left out: they belong in the environment."""']
    for group, items in _grouped(config):
        shown = [(name, value) for name, value in items if name not in SECRET_KEYS]
        lines += ["", f"# {group}", *(f"{name} = {_literal(value)}" for name, value in shown)]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
