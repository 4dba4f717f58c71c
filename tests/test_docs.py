"""What the documents say is so: commands parse, links lead somewhere, keys exist, the table of keys is fresh."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import REPO

from OpenSciDraw.cli import build_parser
from OpenSciDraw.config.names import ALIASES
from OpenSciDraw.config.text import all_fields
from OpenSciDraw.prepare.pipeline import parse_settings

PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("OpenSciDraw/*.md"), *REPO.glob("docs/*.md"), *REPO.glob("dev/*.md")])
KEYS = set(all_fields()) | set(ALIASES)


def name_of(path: Path) -> str:
    return str(path.relative_to(REPO))


def blocks(page: Path, language: str) -> Iterator[str]:
    """Fenced blocks of a language."""
    yield from re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def command_lines(page: Path) -> Iterator[list[str]]:
    """Commands of the bash blocks as words, without comments."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_table_of_keys_is_up_to_date() -> None:
    program = [sys.executable, str(REPO / "docs" / "update_config_table.py"), "--check"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_parses_and_its_files_exist(page: Path) -> None:
    for words in command_lines(page):
        if "OpenSciDraw.cli" in words:
            words = ["scienceflow", *words[words.index("OpenSciDraw.cli") + 1 :]]
        if words[0] == "scienceflow":
            try:
                build_parser().parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"{name_of(page)}: {shlex.join(words)}")
        files = [word for word in words if word.endswith((".py", ".yaml", ".sh")) and "/" in word]
        missing = [word for word in files if not (REPO / word).exists() and "my_" not in word]
        assert not missing, f"{name_of(page)}: {shlex.join(words)}: no such file {missing}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_named_command_exists(page: Path) -> None:
    helped = build_parser().format_help()
    for name in re.findall(r"`scienceflow (\w+)", prose(page)):
        assert re.search(rf"^ +{name}( |$)", helped, re.M), f"{name_of(page)}: scienceflow {name}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{name_of(page)}: {target}"
        assert path.is_relative_to(REPO), f"{name_of(page)}: {target} leads out of the repository"
        assert not anchor or anchor in anchors(path), f"{name_of(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_key_set_in_backticks_exists(page: Path) -> None:
    """`rank = 64` and --cfg_options rank=64; names in capitals are the environment's."""
    named = re.findall(r"`([a-z_][a-z0-9_.]*) ?= ?[^`]+`", prose(page))
    for words in command_lines(page):
        if "--cfg_options" in words and "prepare" not in words:
            named += [word.partition("=")[0] for word in words[words.index("--cfg_options") + 1 :] if "=" in word]
    unknown = [name for name in named if name not in KEYS]
    assert not unknown, f"{name_of(page)}: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_setting_of_prepare_exists(page: Path) -> None:
    for words in command_lines(page):
        if "prepare" in words and "--cfg_options" in words:
            parse_settings(words[words.index("--cfg_options") + 1 :])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_config_snippets_set_only_keys_that_exist(page: Path) -> None:
    """Python blocks without an import are configs, or parts of one."""
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        if any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body):
            continue
        for node in tree.body:
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                continue
            name = node.targets[0].id
            inner = [f"{name}.{k.arg}" for k in node.value.keywords] if isinstance(node.value, ast.Call) else []
            unknown = [key for key in [name, *inner] if key not in KEYS and not key.rpartition(".")[2].startswith("_")]
            assert not unknown, f"{name_of(page)}: {unknown}"


def test_the_menu_of_the_website_names_every_page_once() -> None:
    menu = yaml.safe_load((REPO / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named: list[str] = []
    while menu:  # a page's name, or {title: page or menu}
        entry = menu.pop()
        if isinstance(entry, str):
            named.append(entry)
        else:
            menu += [inner for value in entry.values() for inner in (value if isinstance(value, list) else [value])]
    assert sorted(named) == sorted(page.relative_to(REPO / "docs").as_posix() for page in (REPO / "docs").rglob("*.md"))


def test_the_scripts_are_bash_and_print_no_token() -> None:
    scripts = sorted((REPO / "env_setup").glob("*.sh"))
    assert [script.name for script in scripts] == ["init_flux2_env.sh", "init_qwen25_env.sh"]
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)
        text = script.read_text(encoding="utf-8")
        assert "set -euo pipefail" in text
        assert not re.search(r"(echo|printf).*\$\{?HF_TOKEN", text)
