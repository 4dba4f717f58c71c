"""Configs of preference training as published: their keys become ours, and what has no counterpart is named in one line."""

from __future__ import annotations

from typing import Any

from OpenSciDraw.config.data_checks import GROUP_DATASET
from OpenSciDraw.config.layer import Layer, filled
from OpenSciDraw.quiet import warn_once

_DATASET, _OBJECTIVE = "ArXiVParquetDatasetMD3PO", "Flux2Klein_md3po_train_iteration"
_RULES = {  # of the dataset's section
    "min_winner_score": "min_reward", "target_min_gap": "min_gap", "other_min_gap": "other_gap_low",
    "other_max_gap": "other_gap_high", "loser_balance_lambda": "other_gap_weight", "min_total_gap": "min_total_gap",
    "min_group_images": "min_pictures",
}  # fmt: skip
_SETTINGS = {"dpo_beta": "beta", "dpo_sft_weight": "winner_weight", "md3po_agg_mode": "mode"}
_ONLY: dict[str, Any] = {"winner_key": "reward", "require_distinct_losers": True, "md3po_alpha_mode": "uniform",
                         "md3po_global_loss_weight": 0.0}  # fmt: skip
_WITHOUT_EFFECT = {
    "parquet_glob": "All Parquet files of the folder are read.",
    "deterministic_latents": "Latents are always the means of the posteriors.",
    "strict_all_dims": "A group that lacks a loser for one axis trains on the others.",
    "inject_global_worst": "There is one loser for each axis, and no other.",
    "global_worst_min_gap": "There is one loser for each axis, and no other.",
    "ref_on_cpu": "The reference lies in CPU memory, block by block on the GPU; under FSDP2 it is dealt over the GPUs.",
}


def take_published_preferences(layer: Layer, problems: list[str]) -> None:
    """`ArXiVParquetDatasetMD3PO` and `Flux2Klein_md3po_train_iteration` with their keys, as PreferenceGroups and `mdpo`."""
    values, data = layer.values, layer.values.get("dataset")
    if not isinstance(data, dict) or data.get("type") != _DATASET:
        return
    preference: dict[str, Any] = {"max_margin": None, "winner_weight": 0.0}  # published training has neither unless it says so
    for section, table in ((data, _RULES), (values, _SETTINGS)):
        preference |= {ours: section.pop(name) for name, ours in table.items() if name in section}
    place = layer.places.get("dataset.type", "?")
    for section, prefix in ((data, "dataset."), (values, "")):
        for name, only in _ONLY.items():
            if name in section and (given := section.pop(name)) != only:
                where = layer.places.get(prefix + name, place)
                problems.append(f"{where}: {prefix}{name} = {given!r} is not known here; {only!r} is what can run.")
        for name, hint in _WITHOUT_EFFECT.items():
            if section.pop(name, None) not in (None, False):
                warn_once(f"{layer.places.get(prefix + name, place)}: {prefix}{name} has no effect. {hint}")
    axes = {str(name).removesuffix("_score") for name in data.pop("target_dims", ())}
    if axes:
        preference["axis_weights"] = {axis: float(axis in axes) for axis in ("component", "arrow", "text")}
    start, reference = values.get("pretrained_full_ckpt_path"), values.pop("ref_init_path", None)
    if reference not in (None, start):
        problems.append(
            f"{layer.places.get('ref_init_path', place)}: ref_init_path = {reference!r}: the reference is the model that "
            f"training starts from, {start!r}. Leave it out, or set policy_init_path to it."
        )
    values["preference"] = {**preference, **values.get("preference", {})}
    data["type"] = GROUP_DATASET
    if values.get("train_iteration_func_name") == _OBJECTIVE:
        values["train_iteration_func_name"] = "mdpo"
        values["use_lora"] = False
    layer.places["preference"] = place
    for name in [name for name in layer.places if not _is_there(values, name)]:
        del layer.places[name]
    filled(layer)
    warn_once(f"{place}: {_DATASET} is {GROUP_DATASET} here, and {_OBJECTIVE} is mdpo, for all weights")


def _is_there(values: dict[str, Any], dotted: str) -> bool:
    section: Any = values
    for name in dotted.split("."):
        if not isinstance(section, dict) or name not in section:
            return False
        section = section[name]
    return True
