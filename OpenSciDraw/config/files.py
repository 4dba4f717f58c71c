"""Config files: Python files with flat variables, `_base_` inheritance and `key=value` overrides, read with a reason
for every refusal. Everything here happens before torch is imported."""

from __future__ import annotations
import __future__ as future

import ast
import os
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from OpenSciDraw.config.earlier import (
    REQUIRED,
    drop_none,
    drop_retired,
    resolve_aliases,
    stand_in,
    take_old_names,
    take_published_dataset,
)
from OpenSciDraw.config.earlier_preferences import take_published_preferences
from OpenSciDraw.config.layer import Layer, filled, merge_layers
from OpenSciDraw.config.messages import COMMAND_LINE, contradictions, wrong_keys
from OpenSciDraw.config.names import ALIASES
from OpenSciDraw.config.schema import SECRET_KEYS, Config
from OpenSciDraw.config.text import (
    all_fields,
    saved_values,
)
from OpenSciDraw.errors import UserError
from OpenSciDraw.quiet import warn_once
from OpenSciDraw.utils.files import real

# What running a user's file can raise; anything else (KeyboardInterrupt, SystemExit) is not the file's fault.
_CODE_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


def load_config(path: str | Path, overrides: Sequence[str] = (), complete: bool = True) -> Config:
    """Read a config file with its bases, apply `key=value` overrides, and check everything.

    Not `complete`: a file that others build on, and that cannot run for want of keys, is read as well; their provenance is MISSING.

    Raises:
        UserError: a missing file, an error in a file, unknown or wrong keys, keys that contradict each other;
            all that was found, each with file and line and what to do.
    """
    problems: list[str] = []
    return _checked(_read_file(Path(path), (), problems), path, overrides, problems, complete)


def load_saved_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config.py of a run folder: values as training wrote them, read as literals. Whoever made the folder runs no code here.

    Raises:
        UserError: as `load_config`, or it holds code.
    """
    problems: list[str] = []
    try:
        values = saved_values(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"Cannot read the config {_shown(Path(path))}: {error.strerror}. Check the path.") from error
    except ValueError as error:
        raise UserError(
            f"{_shown(Path(path))}: {error}. A run's config.py holds values alone, and code in it is not run. If it is yours, "
            "give it by name to a command that takes a config."
        ) from error
    places = dict.fromkeys(values, _shown(Path(path)))
    layer = resolve_aliases(Layer({k: v for k, v in values.items() if _counts(k, v)}, places, set()), problems)
    return _checked(layer, path, overrides, problems)


def _checked(
    layer: Layer, path: str | Path, overrides: Sequence[str], problems: list[str], complete: bool = True
) -> Config:
    """`layer` with the command line's values on top, validated."""
    merge_layers(layer, _read_overrides(overrides, problems))
    drop_retired(layer)
    drop_none(layer)
    take_published_dataset(layer)
    take_published_preferences(layer, problems)
    take_old_names(layer)
    if not complete:
        stand_in(layer)
    _warn_of_secrets(layer)
    config = _validate(layer, problems)
    if config is None or problems:
        title = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{title} in the config {path}\n" + "\n".join(f"  {text}" for text in problems))
    config._provenance.update(_provenance(layer, config))
    default_warmup = Config.model_fields["lr_warmup_steps"].default
    if config.lr_scheduler == "constant" and config.lr_warmup_steps not in (0, default_warmup):
        warn_once("lr_warmup_steps has no effect with lr_scheduler = 'constant' (see 'constant_with_warmup').")
    return config


# -- reading -----------------------------------------------------------------------------------
def _read_file(path: Path, parents: tuple[Path, ...], problems: list[str]) -> Layer:
    """A file's layer on top of its bases'."""
    shown, resolved = _shown(path), real(path)
    if resolved in parents:
        chain = " -> ".join(_shown(p) for p in (*parents[parents.index(resolved) :], resolved))
        raise UserError(f"_base_ goes in a circle: {chain}. Take one of them out.")
    try:
        source = path.read_bytes()
    except OSError as error:
        by = f" (the _base_ of {_shown(parents[-1])})" if parents else ""
        raise UserError(f"Cannot read the config {shown}{by}: {error.strerror}. Check the path.") from error
    try:
        tree = ast.parse(source, str(path))
        code = compile(tree, str(path), "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or "nested too deep"
        raise UserError(f"{shown}{line}: not Python: {reason}. Mend this line.") from error
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": "__config__"}
    try:
        exec(code, namespace)  # a config is the user's own program
    except _CODE_ERRORS as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        raise UserError(f"{shown}:{lines[-1]}: {type(error).__name__}: {error}. Mend this line.") from error
    lines_of = _Lines()
    lines_of.visit(tree)
    layer = Layer()
    for base in _bases(namespace.get("_base_", []), shown):
        merge_layers(layer, _read_file(resolved.parent / base, (*parents, resolved), problems))
    places = {name: f"{shown}:{line}" for name, line in lines_of.lines.items()}
    own = Layer({k: v for k, v in namespace.items() if _counts(k, v)}, places, lines_of.literals)
    merge_layers(layer, resolve_aliases(own, problems))
    return layer


def _bases(base: object, shown: str) -> list[str]:
    bases = [base] if isinstance(base, str) else base
    if not isinstance(bases, (list, tuple)) or not all(isinstance(item, str) for item in bases):
        raise UserError(f"{shown}: _base_ = {base!r}. Give the path of a config file, or a list of them.")
    return list(bases)


def _counts(name: str, value: object) -> bool:
    """Whether a name of a config file is a config key: no imports, functions, classes or _private names."""
    return not (name.startswith("_") or callable(value) or isinstance(value, (types.ModuleType, future._Feature)))


def _shown(path: Path) -> str:
    """A path as people know it: from the working directory where it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


class _Lines(ast.NodeVisitor):
    """The line of the last assignment of each top-level name, and of the keys of dicts written out there."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.literals: set[str] = set()

    def visit_FunctionDef(self, node: ast.AST) -> None:
        """Names inside functions, classes and lambdas are not the config's."""

    visit_AsyncFunctionDef = visit_ClassDef = visit_Lambda = visit_FunctionDef

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.lines[node.id] = node.lineno

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.visit(target)
            self._note(_dotted(target), node.value, node.lineno)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._note(_dotted(node.target), node.value, node.lineno)

    def _note(self, name: str | None, value: ast.expr, line: int) -> None:
        if name is None:
            return
        for old in [known for known in self.lines if known.startswith(f"{name}.")]:
            del self.lines[old]
        self.lines[name] = line
        is_literal = isinstance(value, ast.Constant) and isinstance(value.value, str)
        (self.literals.add if is_literal else self.literals.discard)(name)
        for inner, item, at in _written_keys(value):
            self._note(f"{name}.{inner}", item, at)


def _dotted(target: ast.expr) -> str | None:
    """'dataset.type' of the target `dataset['type']`."""
    if isinstance(target, ast.Name):
        return target.id
    if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
        owner = _dotted(target.value)
        return None if owner is None else f"{owner}.{target.slice.value!s}"
    return None


def _written_keys(value: ast.expr) -> Iterator[tuple[str, ast.expr, int]]:
    """Key, value and line of each entry of `dict(key=value)` or `{'key': value}`."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "dict":
        yield from ((k.arg, k.value, k.lineno) for k in value.keywords if k.arg is not None)
    elif isinstance(value, ast.Dict):
        for name, item in zip(value.keys, value.values, strict=True):
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value, item, name.lineno


def _read_overrides(overrides: Sequence[str], problems: list[str]) -> Layer:
    layer = Layer()
    seen: dict[str, tuple[str, Any]] = {}
    for text in overrides:
        name, equals, raw = text.partition("=")
        name = name.strip()
        if not equals or not all(part.isidentifier() for part in name.split(".")):
            problems.append(
                f"{COMMAND_LINE}: {name!r} is not key=value. Write e.g. train_batch_size=2 dataset.num_workers=4."
            )
            continue
        if name in SECRET_KEYS or name == "wandb_api_key":
            problems.append(
                f"{COMMAND_LINE}: {name}: a secret on the command line ends up in histories, process lists and the "
                "tracker's files. Set HF_TOKEN (or WANDB_API_KEY) in the environment instead."
            )
            continue
        top, _, rest = name.partition(".")
        value = parsed = parse_value(raw)
        for part in reversed(rest.split(".") if rest else []):
            value = {part: value}
        canonical = ".".join([ALIASES.get(top, top), rest]) if rest else ALIASES.get(top, top)
        before, known = seen.get(canonical, (name, parsed))
        if before != name and known != parsed:
            problems.append(f"{COMMAND_LINE}: {before} and {name} are the same key, set to different values. Keep one.")
        seen[canonical] = (name, parsed)
        literals = {canonical} if isinstance(parsed, str) else set()
        merge_layers(layer, filled(Layer({ALIASES.get(top, top): value}, {canonical: COMMAND_LINE}, literals)))
    return layer


def parse_value(raw: str) -> Any:
    """A value of the command line: a Python literal, true/false/none/null in any case, else the text itself."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if raw.strip().lower() in words:
        return words[raw.strip().lower()]
    try:
        return ast.literal_eval(raw.strip())
    except (ValueError, SyntaxError):
        return raw


# -- checking ----------------------------------------------------------------------------------


def _warn_of_secrets(layer: Layer) -> None:
    for name in sorted(SECRET_KEYS & layer.literals & layer.values.keys()):
        place = layer.places[name]
        warn_once(
            f"{place}: {name} is written out. Secrets belong in the environment: set HF_TOKEN or run `hf auth login`."
        )


def _validate(layer: Layer, problems: list[str]) -> Config | None:
    """The config, or None with what is wrong with it added to `problems`."""
    try:
        return Config(**layer.values)
    except ValidationError as error:
        problems += contradictions(error, layer, frozenset())
        wrong = wrong_keys(error, layer)
    problems += wrong.values()
    if wrong:  # the keys that are right alone are checked for contradictions too, so that all is said at once
        rest = _without(layer.values, set(wrong))
        rest = REQUIRED | rest
        try:
            Config(**rest)
        except ValidationError as error:
            problems += contradictions(error, layer, {name.split(".")[0] for name in wrong})
    return None


def _without(values: dict[str, Any], names: set[str], prefix: str = "") -> dict[str, Any]:
    kept = {}
    for name, value in values.items():
        if f"{prefix}{name}" not in names:
            kept[name] = _without(value, names, f"{prefix}{name}.") if isinstance(value, dict) else value
    return kept


def _provenance(layer: Layer, config: Config) -> dict[str, str]:
    """Where each key was set; values that follow from another key name it."""
    found = {name: layer.places.get(name, "default") for name in all_fields()}
    sources = {
        "use_parquet_dataset": "dataset.type",
        "text": "dataset.type",
        "dataloader_num_workers": "dataset.num_workers",
        "train_batch_size": "data_sampler.batch_size",
        "train_iteration_func_name": "model_type",
    }
    for name, source in sources.items():
        if found[name] == "default" and name in config.model_fields_set:
            found[name] = f"from {source}"
    return found
