"""A frozen base in 8 or 4 bits, through diffusers' own quantisation configs.

Only linear layers inside the transformer's blocks are quantised; projections in and out, embeddings, modulations and norms
keep their type: they are few parameters and much of the error. Adapters on top train in fp32. torchao's layers (int8, fp8)
unpack their weight for each product, and autograd keeps the unpacked copy unless the block is recomputed
(gradient_checkpointing).
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import DTYPES, FigureModel
from OpenSciDraw.parallel.sharding import repeated_blocks
from OpenSciDraw.utils.files import parse_json
from OpenSciDraw.weights import trainable
from OpenSciDraw.weights.precision import compute_throughout


def quantization_config(config: Config, model: FigureModel) -> Any | None:
    """diffusers' config for `quantization` or `bnb_quantization_config_path`; None when the base is not quantised.

    Raises:
        UserError: the library is missing, the file is not BitsAndBytesConfig's arguments, or the device cannot do it.
    """
    if config.quantization == "nf4" or config.bnb_quantization_config_path is not None:
        _require("bitsandbytes")
        if model.device.type != "cuda":
            raise UserError("bitsandbytes quantises on a CUDA GPU, and there is none. Set quantization = 'int8' or None here.")
    if config.bnb_quantization_config_path is not None:
        return _from_file(Path(config.bnb_quantization_config_path).expanduser())
    if config.quantization is None:
        return None
    skip = _layers_outside_blocks(model.empty_transformer())
    if config.quantization == "nf4":
        from diffusers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[config.mixed_precision],
            llm_int8_skip_modules=skip,
        )  # fmt: skip
    _require("torchao")
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kind = Int8WeightOnlyConfig() if config.quantization == "int8" else Float8WeightOnlyConfig()
    return TorchAoConfig(kind, modules_to_not_convert=skip)


def _require(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise UserError(f"This quantization needs {library}: pip install 'OpenSciDraw[quantization]', or set quantization = None.")


def _layers_outside_blocks(transformer: nn.Module) -> list[str]:
    """Names of linear layers that belong to no block."""
    inside = {id(module) for block in repeated_blocks(transformer) for module in block.modules()}
    return [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear) and id(module) not in inside]


def _from_file(path: Path) -> Any:
    from diffusers import BitsAndBytesConfig

    try:
        given = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"bnb_quantization_config_path: {path} cannot be read as JSON ({error}).") from error
    known = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    ignored = {"quant_method", "_load_in_4bit", "_load_in_8bit"}  # what BitsAndBytesConfig itself writes beside them
    unknown = sorted(given.keys() - known - ignored) if isinstance(given, dict) else [repr(given)]
    if unknown:
        raise UserError(f"{path}: unknown {', '.join(unknown)}. BitsAndBytesConfig takes {', '.join(sorted(known))}.")
    return BitsAndBytesConfig(**{key: value for key, value in given.items() if key in known})


@contextmanager
def unquantized(model: FigureModel, config: Config, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """The base as it was before quantising, with the adapter being trained, as `model.transformer`; freed afterwards."""
    trained = model.transformer
    try:
        model.load_transformer()
        trainable.make_trainable(model.transformer, config)
        compute_throughout(model, model.transformer, config)
        with torch.no_grad():
            for name, parameter in trainable.trainable_parameters(model.transformer).items():
                parameter.copy_(parameters[name])
        yield
    finally:
        model.transformer = trained
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
