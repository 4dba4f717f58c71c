"""Trackers (wandb, TensorBoard, trackio, MLflow): whether they can be used, found out before anything loads."""

from __future__ import annotations

import importlib.util
import netrc
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError

_ANSWER_SECONDS = 20.0
_WITHOUT_KEY = {"offline", "disabled", "dryrun"}


def trackers_of(config: Config) -> list[str]:
    """The trackers that `report_to` names."""
    given = config.report_to if isinstance(config.report_to, list) else [config.report_to]
    return [str(name) for name in given if name not in (None, "none")]


def require_trackers(config: Config) -> None:
    """Raises UserError where a tracker is not installed, or cannot be reached or logged in to: what it is, and what to do."""
    names = trackers_of(config)
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        extra = ",".join(missing)
        raise UserError(f"report_to = {missing}: not installed. pip install 'OpenSciDraw[{extra}]', or set report_to = 'none'.")
    for name, check in (("wandb", wandb_problem), ("mlflow", mlflow_problem)):
        if name in names and (problem := check()) is not None:
            raise UserError(". ".join(problem))


def wandb_problem() -> tuple[str, str] | None:
    """What is wrong with wandb's login and what to do; None where there is a key (not tried) or none is needed."""
    keys = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if os.environ.get("WANDB_MODE") in _WITHOUT_KEY or any(os.environ.get(name) for name in keys):
        return None
    if _has_netrc_entry(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")):
        return None
    return (
        "wandb: report_to asks for it and there is no key",
        "Run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline, or report_to = 'none' in the config.",
    )


def mlflow_problem() -> tuple[str, str] | None:
    """What is wrong with MLflow's server and what to do; None where it answers, or there is none (runs are kept in a folder)."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("azureml://") and importlib.util.find_spec("azureml") is None:
        return f"mlflow: MLFLOW_TRACKING_URI = {uri.partition('?')[0]} is Azure ML's", "Run `pip install azureml-mlflow`."
    if not uri.startswith(("http://", "https://")):
        return None
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=_ANSWER_SECONDS).close()
    except urllib.error.HTTPError:  # it answers; what it says to a run is MLflow's to tell
        return None
    except (OSError, ValueError) as error:
        where = urlparse(uri)
        return (
            f"mlflow: no answer from {where.scheme}://{where.hostname}:{where.port or ''} ({type(error).__name__})",
            "Start the server, or correct MLFLOW_TRACKING_URI, or unset it (then runs are kept here), or set report_to = 'none'.",
        )
    return None


def arguments(config: Config) -> dict[str, dict[str, Any]]:
    """What each tracker's own start is given."""
    own = {"wandb": {"name": config.run_name, "dir": config.model_output_dir}, "mlflow": {"run_name": config.run_name}}
    return {name: own[name] for name in trackers_of(config) if name in own}


def _has_netrc_entry(url: str) -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(urlparse(url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
