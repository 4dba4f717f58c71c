"""The package's imports go one way: no module reaches itself through others, also by imports inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

from conftest import REPO

PACKAGE = "OpenSciDraw"
# From the bottom to the top: a room uses those above its line alone. The modules beside them are for all (errors, flow,
# quiet, registry) or use all (cli).
ROOMS = (
    "utils config drawn figures reading vectorize prepare store parallel models captions weights datasets encode "
    "train_iteration_funcs inference evaluation preferences validation_funcs training planning reporting bench illustrate "
    "studio"
).split()
FOR_ALL = {"__init__", "errors", "flow", "quiet", "registry"}


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


def room_of(module: str) -> str:
    parts = module.split(".")[1:]
    return parts[0] if parts else "__init__"


def test_imports_point_one_way() -> None:
    trees = modules()
    rooms = {room_of(name) for name in trees}
    assert rooms == {*ROOMS, *FOR_ALL, "cli"}, "a new room has its place in ROOMS"
    wrong = []
    for name, tree in trees.items():
        own = room_of(name)
        for used in sorted({room_of(module) for module in imports_of(tree, set(trees))} - {own} - FOR_ALL):
            if own in FOR_ALL or (own != "cli" and ROOMS.index(used) > ROOMS.index(own)):
                wrong.append(f"{name} uses {used}")
    assert not wrong


def test_a_room_says_what_it_may_use_and_uses_no_more() -> None:
    trees = modules()
    for room in ROOMS:
        said = (ast.get_docstring(trees[f"{PACKAGE}.{room}"]) or "").partition("May use: ")[2].rstrip(".")
        assert said, f"{room}/__init__.py says what the room owns and what it may use"
        allowed = set(said.split(", "))
        if said.startswith("all rooms above it but "):
            allowed = set(ROOMS[: ROOMS.index(room)]) - set(said.removeprefix("all rooms above it but ").split(" and "))
        own = [tree for name, tree in trees.items() if room_of(name) == room]
        used = {room_of(module) for tree in own for module in imports_of(tree, set(trees))} - FOR_ALL - {room}
        assert used <= allowed, f"{room} uses {sorted(used - allowed)}"


def test_rooms_and_modules_stay_small() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (REPO / PACKAGE).rglob("*.py")}
    total = sum(lines.values())
    for room in ROOMS:
        share = sum(count for path, count in lines.items() if path.is_relative_to(REPO / PACKAGE / room)) / total
        assert share <= 0.2, f"{room} is {share:.0%} of the package"
    assert not [f"{path.name}: {count} lines" for path, count in lines.items() if count > 400]
    assert sum(count > 310 for count in lines.values()) <= 8, "a module has one subject and about 300 lines"
