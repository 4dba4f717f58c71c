"""`scienceflow doctor [CONFIG.py]`: is this machine ready to train? One line for each finding, and what to do about each failure.

Without a config it looks at the machine; with one also at what that config needs: its model, its store, its disk, its tracker.
No weights are loaded, and the network is asked one question: may this login read the model? Secrets are never printed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from OpenSciDraw.errors import UserError
from OpenSciDraw.planning.machine import GB, Finding, check_gpus, check_host

if TYPE_CHECKING:
    from OpenSciDraw.config import Config
    from OpenSciDraw.models.base import FigureModel

PACKAGE = "OpenSciDraw"
SHOWN = ("torch", "diffusers", "transformers", "peft", "accelerate")
HUB_TIMEOUT_SECONDS = 5
PARTS = ("transformer", "vae", "text_encoder")


def main(arguments: Namespace) -> int:
    """Print the findings; 0 when nothing fails, 2 otherwise. Reads `arguments.config` (None or a path) and `.cfg_options`."""
    failures = 0
    for finding in examine(arguments.config, arguments.cfg_options):
        failures += finding.level == "FAIL"
        print(finding, flush=True)
    print(f"\n{failures} thing(s) to mend" if failures else "\nReady.")
    return 2 if failures else 0


def examine(path: str | None, overrides: list[str]) -> Iterator[Finding]:
    """All findings, the quick ones first."""
    config = None
    if path is not None:
        from OpenSciDraw.config import load_config

        try:
            config = load_config(path, overrides)
            yield Finding("ok", f"config {path}: every key is right")
        except UserError as error:
            yield Finding("FAIL", str(error).rstrip(), "Mend the config; what depends on it was not looked at.")
    yield from check_python()
    yield from check_packages(config)
    yield from check_host(config)
    yield from check_tracker(config)
    if importlib.util.find_spec("torch") is None:  # said above
        return
    yield from check_gpus(config)
    yield from check_login()
    if config is not None:
        yield from check_model(config)


# -- software ---------------------------------------------------------------------------------------
def check_python() -> Iterator[Finding]:
    text = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    supported = platform.system() in ("Linux", "Darwin")
    yield Finding("ok" if supported else "FAIL", text, "" if supported else "Only Linux is supported (macOS was not tried).")


def wanted_packages(config: Config | None) -> set[str]:
    """Packages beside the required ones that this config uses."""
    if config is None:
        return set()
    from OpenSciDraw.training.trackers import trackers_of

    wanted = set(trackers_of(config))
    if config.quantization in ("int8", "fp8"):
        wanted.add("torchao")
    if config.quantization == "nf4" or config.bnb_quantization_config_path:
        wanted.add("bitsandbytes")
    return wanted


def check_packages(config: Config | None) -> Iterator[Finding]:
    """Installed versions against the bounds of pyproject.toml."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("FAIL", f"{PACKAGE} is not installed", "pip install -e . in the repository")
        return
    extra = wanted_packages(config)
    needed = {r.name: r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""}) or r.name in extra}
    wrong = 0
    for name in sorted(needed.keys() | extra):
        bounds = needed[name].specifier if name in needed else None
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or (bounds is not None and not bounds.contains(version, prereleases=True)):
            wrong += 1
            found = "is not installed" if version is None else f"{version} is outside {bounds}"
            yield Finding("FAIL", f"{name} {found}", f"pip install '{name}{bounds or ''}'")
    if not wrong:
        shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN)
        yield Finding("ok", f"{len(needed.keys() | extra)} packages within their bounds ({shown})")


# -- logins ------------------------------------------------------------------------------------------
def check_login() -> Iterator[Finding]:
    from huggingface_hub import get_token

    if get_token():
        where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "stored by `hf auth login`"
        yield Finding("ok", f"hub: a token is there ({where})")
    else:
        yield Finding("warning", "hub: no token; open models need none", "For gated ones: `hf auth login`, or set HF_TOKEN.")


def check_tracker(config: Config | None) -> Iterator[Finding]:
    from OpenSciDraw.training.trackers import mlflow_problem, wandb_problem

    for name, check in (("wandb", wandb_problem), ("mlflow", mlflow_problem)):
        if config is None or name not in wanted_packages(config):
            continue
        problem = check()
        if problem is None:
            mode = os.environ.get("WANDB_MODE")
            found = {"wandb": f"WANDB_MODE={mode}" if mode else "a key is there (not tried)", "mlflow": "it can be reached"}
            yield Finding("ok", f"{name}: {found[name]}")
        else:
            yield Finding("FAIL", *problem)


# -- what a config needs -------------------------------------------------------------------------------
def check_model(config: Config) -> Iterator[Finding]:
    """Access to the model, then what follows from its shapes: disk, and whether the store fits it."""
    from OpenSciDraw.models.base import build_model
    from OpenSciDraw.planning.step_cost import planned_model

    try:
        model = build_model(config)
    except UserError as error:
        yield Finding("FAIL", str(error).splitlines()[0], "\n            ".join(str(error).splitlines()[1:]) or "Correct the name.")
        return
    access = check_access(model)
    yield access
    try:
        with planned_model(config) as (planned, _):
            yield from check_disk(config, planned, all(model.is_on_this_machine(part) for part in PARTS))
            yield check_store(config, planned)
    except UserError as error:
        if access.level != "FAIL":
            yield Finding("FAIL", str(error).splitlines()[0], "What depends on the model's shapes was not looked at.")


def check_access(model: FigureModel) -> Finding:
    """May this login read the model's repository? One question with a short timeout."""
    from huggingface_hub import auth_check, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    name, source = model.requested_source.name, model.source
    if source.is_local:
        return Finding("ok", f"model {name}: on this machine")
    if all(model.is_on_this_machine(part) for part in PARTS):
        return Finding("ok", f"model {name}: downloaded")
    if constants.HF_HUB_OFFLINE:
        remedy = "Unset HF_HUB_OFFLINE to download it, or point pretrained_model_name_or_path to a local folder."
        return Finding("FAIL", f"model {name}: not (all) on this machine, and HF_HUB_OFFLINE is set", remedy)
    problem = unreachable(f"{constants.ENDPOINT}/api/models/{name}")
    if problem is not None:
        remedy = "Check the network and its proxy; or download the model elsewhere and name its folder."
        return Finding("FAIL", f"model {name}: not on this machine, and the hub cannot be reached ({problem})", remedy)
    try:
        auth_check(name, token=source.token)
    except GatedRepoError:
        remedy = f"Accept the licence at https://huggingface.co/{name}, then `hf auth login` or set HF_TOKEN."
        return Finding("FAIL", f"model {name}: gated, and this login may not read it", remedy)
    except RepositoryNotFoundError:
        remedy = "Check the name; log in anew with `hf auth login`."
        return Finding("FAIL", f"model {name}: no such repository, or a private one, or a token that is not valid", remedy)
    except HfHubHTTPError as error:
        return Finding("warning", f"model {name}: the hub answered {error.response.status_code}", "Try again in a minute.")
    return Finding("ok", f"model {name}: this login may read it; it will be downloaded")


def unreachable(url: str) -> str | None:
    """Why a server does not answer (without login, through the environment's proxy); None when it does, whatever it says.

    huggingface_hub itself retries for half a minute.
    """
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        return str(error.reason if isinstance(error, urllib.error.URLError) else error)
    return None


def check_disk(config: Config, model: FigureModel, downloaded: bool) -> Iterator[Finding]:
    """Free space for the download and for checkpoints. Each is one of weights, optimizer state and average."""
    from huggingface_hub import constants

    from OpenSciDraw.training.optimizers.choice import optimizer_bytes
    from OpenSciDraw.weights import trainable

    transformer = model.empty_transformer(trainable.loading_dtype(config))
    trained = trainable.count_trained(transformer, config)
    if not downloaded:
        size = 2 * (sum(p.numel() for p in transformer.parameters()) + model.text_encoder_parameters())
        cache = Path(config.cache_dir or constants.HF_HUB_CACHE)
        yield room(cache, size, size, "to download the model", "Set HF_HOME or cache_dir to a larger disk.")
    own = 2 if config.master_weights == "bf16" else 4
    state = optimizer_bytes(config.model_copy(update={"offload_optimizer": False}))
    checkpoint = trained * (own + state + (4 if config.use_ema else 0))
    number = (config.checkpoints_total_limit or 2) + 1  # one more while it is written
    what = f"for {number} checkpoints of {checkpoint / GB:.2f} GB" + ("" if config.checkpoints_total_limit else " (all are kept)")
    remedy = "Choose another disk for model_output_dir, or set checkpoints_total_limit."
    yield room(Path(config.model_output_dir), checkpoint, number * checkpoint, what, remedy)


def room(folder: Path, least: float, wanted: float, what: str, remedy: str) -> Finding:
    """Bytes free for `folder`: FAIL below `least`, a warning below `wanted`."""
    folder = folder.expanduser().absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    level: Literal["ok", "warning", "FAIL"] = "ok" if free > wanted else "warning" if free > least else "FAIL"
    text = f"disk of {folder}: {free / GB:.1f} GB free, {wanted / GB:.1f} GB {what}"
    return Finding(level, text, "" if level == "ok" else remedy)


def check_store(config: Config, model: FigureModel) -> Finding:
    """Whether the encoded rows were made by this model, as training checks it first."""
    from OpenSciDraw.encode.work import store_folder
    from OpenSciDraw.store.encoded import EncodedStore

    if not config.use_parquet_dataset:
        return Finding("ok", f"figures are encoded while training ({config.dataset.figures})")
    if config.dataset.is_remote:
        return Finding("ok", f"{config.dataset.base_dir}: in cloud storage, not looked at here; training checks it first")
    folder = store_folder(config)
    if not EncodedStore.is_store(folder):
        if folder.is_dir() and next(folder.rglob("*.parquet"), None) is not None:
            return Finding("ok", f"{folder}: an older layout; it says nothing of how it was made")
        return Finding("warning", f"{folder}: no encoded figures yet", "scienceflow encode CONFIG.py, with the same options")
    try:
        store = EncodedStore(folder, with_text=config.text == "stored")
        model.contract().require(store.figures.contract, ("latents",), folder)
        if store.text is not None:
            model.contract().require(store.text.contract, ("text",), folder)
    except UserError as error:
        first, *rest = str(error).splitlines()
        return Finding("FAIL", first, "\n            ".join(rest) or "See docs/encode.md.")
    return Finding("ok", f"{folder}: {len(store.figures)} encoded figures, made by this model and these settings")
