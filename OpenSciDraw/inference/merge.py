"""`scienceflow merge`: adapters become part of the base's weights. `scienceflow extract`: two sets of weights become an adapter."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from OpenSciDraw.config import Config, load_config
from OpenSciDraw.errors import UserError
from OpenSciDraw.inference.export import (
    DTYPES,
    Adapter,
    Trained,
    find_trained,
    formats_of,
    plain_config,
    say_written,
    write_adapter,
    write_weights,
)
from OpenSciDraw.models.base import FigureModel, build_model
from OpenSciDraw.utils.files import naming_full_disk, real
from OpenSciDraw.utils.sole_user import sole_user
from OpenSciDraw.utils.tensor_files import FULL_FOLDER, FULL_STEM, TensorReader
from OpenSciDraw.weights.adapter_files import AdapterFile, adapter_path, read_adapter_file
from OpenSciDraw.weights.adapter_names import layer_names
from OpenSciDraw.weights.other_programs import Weights, open_weights
from OpenSciDraw.weights.trainable import resolve_lora_layers
from OpenSciDraw.weights.updates import Update, changed, leading, rank_for

_LOG = logging.getLogger("OpenSciDraw")


def with_strength(given: str) -> tuple[str, float]:
    """`FILE` or `FILE=STRENGTH`. Raises UserError where what follows the last = is no number and no such file is there."""
    path, mark, number = given.rpartition("=")
    if not mark or Path(given).expanduser().exists():
        return given, 1.0
    try:
        return path, float(number)
    except ValueError as error:
        raise UserError(f"--lora {given}: {number!r} is no strength. Give FILE, or FILE=0.8.") from error


def read_adapters(given: Sequence[str], model: FigureModel) -> list[tuple[AdapterFile, float]]:
    """The adapters of `--lora FILE[=STRENGTH] …`, for `model`."""
    names = layer_names(model) if given else None
    found = []
    for each in given:
        path, strength = with_strength(each)
        found.append((read_adapter_file(adapter_path(path, "--lora"), model, names), strength))
    return found


def weights_of(config: Config, model: FigureModel) -> Weights:
    """The base that `config` names: `pretrained_full_ckpt_path`, or the model's own transformer."""
    given = config.pretrained_full_ckpt_path
    if given is not None:
        return open_weights(given, _parameters(model), config.huggingface_token, model.original_place)
    return TensorReader(model.component_files(model.trained_part), FULL_STEM, variant=model.source.variant)


def _parameters(model: FigureModel) -> dict[str, Tensor]:
    return dict(model.empty_transformer().state_dict())


def _whole(weights: Weights, name: str) -> Tensor:
    found = weights[name]
    whole: Tensor = found if isinstance(found, Tensor) else found[:]
    return whole


class Merged:
    """Weights with adapters in them (`updates.changed`), computed when a tensor is asked for."""

    def __init__(self, weights: Weights, adapters: Sequence[tuple[AdapterFile, float]]):
        self.weights, self.adapters = weights, adapters

    @property
    def names(self) -> list[str]:
        return self.weights.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(name)

    def __getitem__(self, name: str) -> Tensor:
        base = _whole(self.weights, name)
        layer, _, last = name.rpartition(".")
        own = [(a.updates[layer], strength) for a, strength in self.adapters if last == "weight" and layer in a.updates]
        return changed(base, own) if own else base


def find_base(what: str, ema: bool) -> tuple[Trained, Weights, list[str]]:
    """What `merge` starts from: a config's base, or a run's weights; with the run's adapter, which is the first to be merged."""
    if what.endswith(".py"):
        config = load_config(what, complete=False)
        trained, own = Trained(Path(what), Path(config.model_output_dir), config, is_base=True), list[str]()
        weights = weights_of(config, build_model(config))
    else:
        trained = find_trained(what, ema)
        config, own = trained.config, [str(trained.path)] if trained.is_lora else []
        weights = weights_of(config, build_model(config)) if own else TensorReader(trained.path, FULL_STEM)
    if config.pretrained_lora_ckpt_path and config.fuse_pretrained_lora and (own or what.endswith(".py")):
        first = config.pretrained_lora_ckpt_path  # part of the base that trained
        weights = Merged(weights, read_adapters([first], build_model(config)))
    return trained, weights, own


def merge_main(arguments: Namespace) -> int:
    """Write a base with adapters in it, as all weights.

    Raises:
        UserError: nothing to merge, an adapter that does not fit, or a folder that holds the weights themselves.
    """
    trained, weights, own = find_base(arguments.what, arguments.ema)
    out, model = Path(arguments.out), build_model(trained.config)
    adapters = read_adapters([*own, *arguments.lora], model)
    if not adapters:
        raise UserError(f"{arguments.what} has no adapter to merge. Give --lora FILE, or FILE=STRENGTH; several too.")
    for adapter, strength in adapters:
        print(f"{adapter.path}: {adapter.format}, {len(adapter.updates)} layers, strength {strength:g}")
    if real(out / FULL_FOLDER) == real(trained.path):
        raise UserError(f"--out {out} is where the weights themselves lie. Choose another folder.")
    with sole_user(out, "merge"), naming_full_disk(out, "Free space and run it again."):
        dtype = DTYPES[arguments.dtype] if arguments.dtype else None
        merged = Merged(weights, adapters)
        say_written(write_weights(trained, merged, merged.__getitem__, out, formats_of(arguments.format), dtype))
    return 0


# -- extract ---------------------------------------------------------------------------------------
def extract_main(arguments: Namespace) -> int:
    """The difference of `tuned` and the config's base as a LoRA.

    Raises:
        UserError: other names or shapes than the base has, or no difference at all.
    """
    config = load_config(arguments.config, complete=False)
    model = build_model(config)
    base, parameters = weights_of(config, model), _parameters(model)
    tuned = open_weights(arguments.tuned, parameters, config.huggingface_token, model.original_place)
    _require_same(base, tuned, arguments.tuned)
    transformer = model.empty_transformer()
    patterns = arguments.layers or model.block_layers or config.lora_layers
    layers = {f"{name}.weight" for name in resolve_lora_layers(transformer, patterns)}
    updates, told, rest = {}, _Norms(), 0.0
    for name in tqdm(base.names, desc="extract", unit="tensor"):
        difference = _whole(tuned, name).float() - _whole(base, name).float()
        size = float(difference.double().square().sum())
        if name not in layers or not size:
            rest += 0.0 if name in layers else size
            continue
        update, share = _extracted(difference, arguments.rank, arguments.keep)
        updates[name.removesuffix(".weight")] = update
        told.add(size, share)
    if not updates:
        raise UserError(f"{arguments.tuned} does not differ from the base in any of the layers {patterns}: nothing to extract.")
    print(told.text(rest, updates))
    out = Path(arguments.out)
    tensors = {f"{n}.lora_A.weight": u.tensors["down"] for n, u in updates.items()}
    tensors |= {f"{n}.lora_B.weight": u.tensors["up"] for n, u in updates.items()}
    adapter = Adapter(out, out, config, updates, tensors, plain_config(updates))
    with sole_user(out, "extract"), naming_full_disk(out, "Free space and run it again."):
        say_written(write_adapter(adapter, out, formats_of(arguments.format), DTYPES[arguments.dtype or "fp32"]))
    return 0


def _extracted(difference: Tensor, rank: int | None, keep: float | None) -> tuple[Update, float]:
    down, up, share = leading(difference, rank if rank is not None else rank_for(difference, keep or 1.0))
    return Update("lora", {"down": down, "up": up}), share


class _Norms:
    """How much of the differences is kept."""

    def __init__(self) -> None:
        self.whole, self.kept = 0.0, 0.0

    def add(self, size: float, share: float) -> None:
        self.whole += size
        self.kept += size * share**2

    def text(self, rest: float, updates: dict[str, Update]) -> str:
        ranks = sorted(update.rank for update in updates.values())
        said = f"{len(updates)} layers, rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[0] != ranks[-1] else "")
        said += f": {(self.kept / self.whole) ** 0.5:.4f} of the norm of their differences"
        lost = (rest / (rest + self.whole)) ** 0.5
        return said + (f"; {lost:.4f} of that of all differences lies in tensors that no layer of the adapter has" if rest else "")


def _require_same(base: Weights, tuned: Weights, where: str) -> None:
    missing, extra = sorted(set(base.names) - set(tuned.names)), sorted(set(tuned.names) - set(base.names))
    shapes = [name for name in base.names if name in tuned.names and tuple(tuned.shape(name)) != tuple(base.shape(name))]
    if missing or extra or shapes:
        raise UserError(
            f"{where} is of another model than the config's base: {len(missing)} tensors missing ({', '.join(missing[:3])}), "
            f"{len(extra)} unexpected ({', '.join(extra[:3])}), {len(shapes)} of another shape ({', '.join(shapes[:3])})."
        )
