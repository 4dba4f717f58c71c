"""Configs as the programs before this one read them: each old key and name acts, or is named in one line."""

from __future__ import annotations

from typing import Any

from OpenSciDraw.config.data_checks import FIGURE_DATASET
from OpenSciDraw.config.layer import Layer, filled
from OpenSciDraw.config.names import ALIASES, RETIRED
from OpenSciDraw.quiet import warn_once
from OpenSciDraw.registry import TRAIN_ITERATION_FUNCS, VALIDATION_FUNCS

MISSING = "missing: a run needs it"
REQUIRED: dict[str, Any] = {"pretrained_model_name_or_path": "?", "dataset": {"base_dir": "."}}
_TRAIN, _PUBLISHED = "train_iteration_func_name", "ArXiVHFDatasetUnified"


def resolve_aliases(layer: Layer, problems: list[str]) -> Layer:
    """The layer with every second spelling under its own name."""
    layer = _one_project(layer)
    _one_batch_size(layer)
    values = {name: value for name, value in layer.values.items() if name not in ALIASES}
    places, literals = dict(layer.places), set(layer.literals)
    used = {name: name for name in values}
    for alias, name in ALIASES.items():
        if alias not in layer.values:
            continue
        value, other = layer.values[alias], used.get(name)
        if other is not None and values[name] != value:
            problems.append(
                f"{layer.places.get(alias)}: {alias} and {other} ({layer.places.get(other)}) are the same key, "
                "set to different values. Keep one."
            )
        values[name], used[name] = value, alias
        for place in [p for p in layer.places if p == alias or p.startswith(f"{alias}.")]:
            places[name + place.removeprefix(alias)] = layer.places[place]
        if alias in literals:
            literals.add(name)
    return filled(Layer(values, {k: v for k, v in places.items() if k.split(".")[0] in values}, literals))


def _one_project(layer: Layer) -> Layer:
    """The layer with one name of the tracker's project: that which the loop of its kind read in programs before this one."""
    order = ["tracker_name", "wandb_project", "tracker_project_name"]
    if layer.values.get("use_lora") is False:
        order.insert(0, order.pop(1))
    first, *others = [name for name in order if name in layer.values] or [""]
    other = {name: layer.values[name] for name in others if layer.values[name] != layer.values[first]}
    if not other:
        return layer
    said = ", ".join(f"{name} = {value!r}" for name, value in other.items())
    warn_once(f"{layer.places.get(first, '?')}: {first} = {layer.values[first]!r} is the tracker's project; {said} does not count")
    return Layer({k: v for k, v in layer.values.items() if k not in other}, dict(layer.places), set(layer.literals))


def _one_batch_size(layer: Layer) -> None:
    """`sampler_cfg` made the batches where its name comes from, whatever `train_batch_size` said beside it."""
    sampler, size = layer.values.get("sampler_cfg"), layer.values.get("train_batch_size")
    if isinstance(sampler, dict) and size is not None and sampler.get("batch_size") not in (None, size):
        place = layer.places.get("sampler_cfg.batch_size", "?")
        warn_once(f"{place}: sampler_cfg.batch_size = {sampler['batch_size']!r} is the batch, not train_batch_size = {size!r}")
        layer.values["train_batch_size"] = sampler["batch_size"]


def drop_retired(layer: Layer) -> None:
    for name, hint in RETIRED.items():
        section, _, inner = name.rpartition(".")
        owner = layer.values.get(section) if section else layer.values
        if isinstance(owner, dict) and inner in owner:
            del owner[inner]
            place = layer.places.pop(name, "?")
            warn_once(f"{place}: {name} has no effect. {hint or 'Delete it.'}")


def take_old_names(layer: Layer) -> None:
    """Names of functions as configs of earlier programs give them, each with a line that says what runs."""
    values = layer.values
    train, validation = values.get("train_iteration_func_name"), values.get("validation_func_name")
    if validation in TRAIN_ITERATION_FUNCS.names() and validation not in VALIDATION_FUNCS.names():
        place = layer.places.get("validation_func_name", "?")
        warn_once(f"{place}: validation_func_name = {validation!r} is an objective: generic_validation_func is taken")
        del values["validation_func_name"]
    trains_all = "fulltune" in str(train) or str(train).endswith("_mixed_edit_train_iteration")
    if trains_all and values.get("use_lora", True) is True and not _set_together(layer, "use_lora", _TRAIN):
        place = layer.places.get(_TRAIN, "?")
        other = layer.places.get("use_lora", "the default")
        warn_once(f"{place}: {train} trains all weights: use_lora = False is taken, not the True of {other}")
        values["use_lora"] = False
    data = values.get("dataset")
    if not isinstance(train, str) or not isinstance(data, dict):
        return
    online = data.get("type") == FIGURE_DATASET
    other = train.removesuffix("_parquet") if online else f"{train}_parquet"
    if train.endswith("_func_parquet" if online else "_train_iteration_func") and other in TRAIN_ITERATION_FUNCS.names():
        place, when = layer.places.get("train_iteration_func_name", "?"), "while training" if online else "beforehand"
        warn_once(f"{place}: {other} is taken, since the figures of this dataset are encoded {when}")
        values["train_iteration_func_name"] = other


def _set_together(layer: Layer, one: str, other: str) -> bool:
    """Whether two keys were set in one file (or on the command line)."""
    files = [layer.places.get(name, name).rpartition(":")[0] or layer.places.get(name, name) for name in (one, other)]
    return one in layer.places and files[0] == files[1]


def take_published_dataset(layer: Layer) -> None:
    """`ArXiVHFDatasetUnified` reads a published list, its pictures and caches beside them: here, a store is made of it first."""
    data = layer.values.get("dataset")
    if not isinstance(data, dict) or data.get("type") != _PUBLISHED:
        return
    root, splits, quality = str(data.pop("data_root", ".")), data.pop("splits", []), data.pop("quality_filter", None)
    splits = [splits] if isinstance(splits, str) else list(splits)
    sizes = [int(end) for end in (split.rpartition("_")[2] for split in splits) if end.isdecimal()]
    encode: dict[str, Any] = {"figures": f"{root}/metadata.parquet"}
    encode |= {"where": {"split": splits}} if splits else {}
    encode |= {"min_quality": str(quality).lower()} if quality else {}
    encode |= {"resolution": max(sizes)} if sizes else {}
    layer.values["encode"] = {**encode, **layer.values.get("encode", {})}
    data |= {"type": "ArXiVParquetDatasetV2", "base_dir": root, "parquet_base_path": f"scienceflow_{'_'.join(splits) or 'all'}"}
    place = layer.places.get("dataset.type", layer.places.get("dataset", "?"))
    for name in [name for name in layer.places if name.startswith("dataset.") and name.partition(".")[2] not in data]:
        del layer.places[name]
    layer.places |= {"encode": place}
    filled(layer)
    store = f"{root}/{data['parquet_base_path']}"
    warn_once(f"{place}: {_PUBLISHED}: `scienceflow encode` makes a store of {encode['figures']}, in {store}, to train on")


def stand_in(layer: Layer) -> None:
    """Something for the keys that a file leaves to those that build on it, of the kind that its other keys are for."""
    values = layer.values
    encoded = values.get("use_parquet_dataset", not str(values.get("train_iteration_func_name", "")).endswith("_iteration_func"))
    missing = REQUIRED if encoded else REQUIRED | {"dataset": {"type": FIGURE_DATASET, "figures": "?"}}
    for name in missing.keys() - values.keys():
        values[name], layer.places[name] = missing[name], MISSING
    if not encoded and str(train := values.get("train_iteration_func_name")).endswith("_func_parquet"):
        values["train_iteration_func_name"] = str(train).removesuffix("_parquet")
    filled(layer)


def drop_none(layer: Layer) -> None:
    """`lora_layers = None` beside `use_lora = False` says the same twice."""
    if layer.values.get("use_lora") is False and layer.values.get("lora_layers", "") is None:
        del layer.values["lora_layers"]
