"""The plans that docs/plan.md shows are those that the program prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from OpenSciDraw.cli import main as scienceflow

PAGE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"\(`(configs/\S+ --[^`]+)`\):\n\n```\n(.*?)```", PAGE, re.DOTALL)
CLOSING = "Computed, not measured on a GPU. Not counted: validation's own activations."  # said once on the page


def test_the_page_shows_three_plans() -> None:
    assert len(SHOWN) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("command", "shown"), SHOWN, ids=[command.split()[0] for command, _ in SHOWN])
def test_a_shown_plan_is_what_its_command_prints(
    command: str, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert scienceflow(["plan", *command.split()]) == 0
    assert capsys.readouterr().out.strip().removesuffix(CLOSING).strip() == shown.strip()
