"""Saved configs, read as values and never run. One at a time: when two threads are in `ast.parse`, Python 3.11 now and then ends it
with "AST constructor recursion depth mismatch"."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from OpenSciDraw.config import Config, load_saved_config
from OpenSciDraw.config.text import saved_values

_TURN = threading.Lock()


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """As `load_saved_config`."""
    with _TURN:
        return load_saved_config(path, overrides)


def values(source: bytes) -> dict[str, Any]:
    """As `saved_values`."""
    with _TURN:
        return saved_values(source)
