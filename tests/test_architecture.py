"""The package's imports go one way: no module reaches itself through others, also by imports inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

from conftest import REPO

PACKAGE = "OpenSciDraw"


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted((REPO / PACKAGE).rglob("*.py")):
        name = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports_of(tree: ast.Module, known: set[str]) -> set[str]:
    """Our modules that a module imports when it runs; those for type checkers alone do not count."""
    for_types = {
        id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }  # fmt: skip
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {name if (name := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def test_no_modules_import_each_other() -> None:
    trees = modules()
    edges = {name: imports_of(tree, set(trees)) - {name} for name, tree in trees.items()}
    assert len(edges) > 100 and "OpenSciDraw.errors" in edges["OpenSciDraw.cli"]
    while True:  # take away, again and again, what imports nothing that is left: circles stay
        free = {name for name, used in edges.items() if not used}
        if not free:
            break
        edges = {name: used - free for name, used in edges.items() if name not in free}
    assert not edges, f"in circles, or above them: {sorted(edges)}"


def test_every_module_of_the_package_says_what_it_is_for() -> None:
    silent = [name for name, tree in modules().items() if tree.body and not ast.get_docstring(tree)]
    assert not silent and Path(REPO / PACKAGE / "README.md").is_file()
