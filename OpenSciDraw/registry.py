"""Registries: a name in a config becomes a class or a function.

A registry knows its names without importing anything heavy: it reads the files of its package with
`ast` and looks for `@MODELS.register("Name", ...)`. A file is imported when one of its names is asked
for, so adding a model, dataset, objective or validator is adding one file.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from OpenSciDraw.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class _Declaration:
    """Where a name is registered in a source file, and what it decorates."""

    module: str
    path: Path
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Registry:
    """Names of one kind (`kind` is the word used in messages).

    `variable` is the name under which the files use this registry, `packages` are the packages whose files are read.
    """

    def __init__(self, kind: str, variable: str, *packages: str):
        self.kind = kind
        self.variable = variable
        self.packages = packages
        self._objects: dict[str, Any] = {}
        self._declared: dict[str, _Declaration] | None = None

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator: make the class or function known under every name given (string literals).

        Raises:
            UserError: no name, or a name that already means another object.
        """
        if not names:
            raise UserError(
                f'{self.variable}.register needs at least one name, e.g. @{self.variable}.register("Name").'
            )

        def add(target: T) -> T:
            for name in names:
                known = self._objects.get(name)
                # a module that is imported anew (importlib.reload) registers itself again
                if known is not None and _origin(known) != _origin(target):
                    raise UserError(
                        f"{self.kind} {name!r} is registered twice: by {_origin(known)} and by {_origin(target)}. "
                        "Rename one of them."
                    )
                self._objects[name] = target
            return target

        return add

    def names(self) -> list[str]:
        """Every known name, sorted; nothing is imported.

        Raises:
            UserError: a file of the package cannot be parsed, or two files claim one name.
        """
        return sorted({*self._scan(), *self._objects})

    def problem(self, name: str) -> str | None:
        """Why `name` is not a name here, or None when it is one."""
        known = self.names()
        if name in known:
            return None
        close = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.4)
        hint = [k for k in known if k.lower() in close][:1]
        return (
            f"Unknown {self.kind} {name!r}. Known: {', '.join(known) or 'none'}."
            + (f" Did you mean {hint[0]!r}?" if hint else "")
        )  # fmt: skip

    def get(self, name: str) -> Any:
        """The class or function of that name; its file is imported now.

        Raises:
            UserError: unknown name; says which are known and which is nearest.
        """
        if name not in self._objects:
            problem = self.problem(name)
            if problem:
                raise UserError(problem)
            importlib.import_module(self._scan()[name].module)
        return self._objects[name]

    def class_literal(self, name: str, attribute: str) -> Any:
        """A constant of a registered class's body, read without importing; None when it declares none."""
        declaration = self._scan().get(name)
        if declaration is None or not isinstance(declaration.node, ast.ClassDef):
            return None
        for statement in declaration.node.body:
            if isinstance(statement, ast.Assign):
                targets = statement.targets
            elif isinstance(statement, ast.AnnAssign):
                targets = [statement.target]
            else:
                continue
            if any(isinstance(t, ast.Name) and t.id == attribute for t in targets):
                return statement.value.value if isinstance(statement.value, ast.Constant) else None
        return None

    def _scan(self) -> dict[str, _Declaration]:
        if self._declared is None:
            found: dict[str, _Declaration] = {}
            for path, module in self._files():
                for name, declaration in self._declarations(path, module):
                    if name in found:
                        other = found[name]
                        raise UserError(
                            f"{self.kind} {name!r} is registered twice: in {other.path}:{other.node.lineno} and in "
                            f"{path}:{declaration.node.lineno}. Rename one of them."
                        )
                    found[name] = declaration
            self._declared = found
        return self._declared

    def _files(self) -> Iterator[tuple[Path, str]]:
        """Every file of the packages, and the module that it is."""
        for package in self.packages:
            spec = importlib.util.find_spec(package)
            folders = list(spec.submodule_search_locations or ()) if spec is not None else []
            for path in sorted(p for folder in folders for p in Path(folder).glob("*.py")):
                yield path, package if path.stem == "__init__" else f"{package}.{path.stem}"

    def _declarations(self, path: Path, module: str) -> list[tuple[str, _Declaration]]:
        source = path.read_bytes()
        if f"{self.variable}.register".encode() not in source:
            return []
        try:
            tree = ast.parse(source, str(path))
        except SyntaxError as error:
            raise UserError(f"{path}:{error.lineno}: {error.msg}. Mend this file (or move it away).") from error
        found = []
        for node in tree.body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for call in filter(self._is_register, node.decorator_list):
                assert isinstance(call, ast.Call)
                for argument in call.args:
                    if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                        raise UserError(
                            f"{path}:{argument.lineno}: {self.variable}.register takes names as string literals, "
                            "because they are read without running the file."
                        )
                    found.append((argument.value, _Declaration(module, path, node)))
        return found

    def _is_register(self, node: ast.expr) -> bool:
        return (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "register"
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == self.variable
        )


def _origin(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


MODELS = Registry("model_type", "MODELS", "OpenSciDraw.models")
EMBEDDED = Registry("embedded model", "EMBEDDED", "OpenSciDraw.models", "OpenSciDraw.models.embedded")
DATASETS = Registry("dataset type", "DATASETS", "OpenSciDraw.datasets")
SAMPLERS = Registry("sampler type", "SAMPLERS", "OpenSciDraw.datasets")
TRAIN_ITERATION_FUNCS = Registry(
    "train_iteration_func_name", "TRAIN_ITERATION_FUNCS", "OpenSciDraw.train_iteration_funcs"
)
VALIDATION_FUNCS = Registry("validation_func_name", "VALIDATION_FUNCS", "OpenSciDraw.validation_funcs")
METRICS = Registry("metric", "METRICS", "OpenSciDraw.evaluation")
