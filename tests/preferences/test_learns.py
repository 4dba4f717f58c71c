"""The small base trains on preferences of its own pictures, from prompts to scores, by the product's commands alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
from run_prefer import all_of  # noqa: E402


@pytest.mark.slow
def test_own_preferences_are_told_apart_and_pictures_hold_a_floor(tmp_path: Path, fresh_accelerate: None) -> None:
    found = all_of(tmp_path, prompts=24, steps=30, unseen=64)
    assert found["prefer"]["groups"]["made"] >= 10
    logged = found["last logged"]
    accuracy = [value for name, value in logged.items() if name.startswith("preference_accuracy_")]
    assert accuracy and min(accuracy) >= 0.75, logged
    assert logged["preference_winner_change"] < 0.01, logged
    trained = {name: item["value"] for name, item in found["trained"].items()}
    assert trained["components"] >= 0.85 and trained["arrows"] >= 0.9 and trained["one_letter_labels"] >= 0.6, trained
