"""Versions of the packages that decide what a run or an evaluation computes."""

from __future__ import annotations

import platform
from importlib import metadata

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Of this project, of Python, and of the installed ones among the packages that compute; nothing is imported."""
    from OpenSciDraw import __version__

    found = {"OpenSciDraw": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
