"""How a training process imports: without collecting garbage meanwhile, and nothing optional that its config does not use."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from OpenSciDraw.config import Config

_FILES = ("transformer/config.json", "text_encoder/config.json", "vae/config.json", "scheduler/scheduler_config.json")


def unused_libraries(config: Config) -> list[str]:
    """Libraries that diffusers, transformers and peft load wherever they find them, and that this run has no use for.

    None of them when the model's files say that it is quantised, or are not on this machine yet.
    """
    of_model = _model_configs(config)
    if of_model is None or any(part.get("quantization_config") for part in of_model):
        return []
    used = {
        "torchao": config.quantization in ("int8", "fp8"),
        "bitsandbytes": config.quantization == "nf4" or config.bnb_quantization_config_path is not None,
        "scipy": any(part.get("use_beta_sigmas") for part in of_model),  # diffusers' schedulers, for nothing else
    }
    return [name for name, is_used in used.items() if not is_used]


def _model_configs(config: Config) -> list[dict[str, Any]] | None:
    """The JSON configs of the model's parts; None when one of a hub model is not in the cache."""
    name = config.pretrained_model_name_or_path
    if name.startswith("embedded:"):
        return []  # ours: plain weights
    folder = Path(name).expanduser()
    if folder.is_dir():
        return [json.loads(path.read_text()) for file in _FILES if (path := folder / file).is_file()]
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(name, file, cache_dir=config.cache_dir, revision=config.revision) for file in _FILES]
    paths = [Path(path) for path in found if isinstance(path, str)]
    return [json.loads(path.read_text()) for path in paths] if len(paths) == len(_FILES) else None


@contextmanager
def quick_imports(unused: Iterable[str] = ()) -> Iterator[None]:
    """Imports in this block find `unused` libraries not installed, and no garbage is collected while they run.

    What a module makes stays: looking through all of it again and again takes a fifth of the time of importing. It is left
    out of later collections too. A library that is loaded already is left as it is.
    """
    hidden = [name for name in unused if name not in sys.modules]
    was_enabled = gc.isenabled()
    gc.disable()
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own sign for "cannot be imported"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        gc.freeze()
        if was_enabled:
            gc.enable()
