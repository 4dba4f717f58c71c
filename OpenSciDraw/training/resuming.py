"""What may change between a checkpoint and the run that goes on from it: each key takes effect and is named, or is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from OpenSciDraw.config import SECRET_KEYS, Config
from OpenSciDraw.errors import UserError

NO_SETTINGS = frozenset({"model_output_dir", "resume_from_checkpoint"}) | SECRET_KEYS  # where a run lies; what is never written
_STATE = "the optimizer's state or the weights have this form"
FIXED = {  # key -> why it cannot change
    **dict.fromkeys(("seed", "data_sampler.type", "data_sampler.drop_last", "data_sampler.shuffle", "data_sampler.seed",
                     "dataset.num_train_examples", "dataset.sources",
                     "held_out_examples"), "it decides which rows come when, and which never"),
    **dict.fromkeys(("model_type", "transformer_cfg", "use_lora", "lora_layers", "rank", "lora_alpha", "adapter_type",
                     "use_rslora", "lokr_factor", "lokr_decompose_both", "oft_block_size"), "it decides what trains"),
    **dict.fromkeys(("optimizer", "use_8bit_adam", "offload_optimizer", "master_weights", "mixed_precision"), _STATE),
    **dict.fromkeys((f"preference.{rule}" for rule in (
        "axis_weights", "min_pictures", "min_reward", "min_gap", "other_gap_low", "other_gap_high", "min_total_gap",
        "other_gap_weight")), "it decides which rows there are"),
    "reward.steps_per_round": "it decides when pictures are drawn",
    "use_ema": "an average has all steps in it or is none",
    "pretrained_lora_ckpt_path": "a run reads it when it starts",
    "fuse_pretrained_lora": "a run reads it when it starts",
    "pretrained_full_ckpt_path": "a run reads it when it starts",
}  # fmt: skip
_OF_THE_STATE = frozenset({"params", "lr", "initial_lr", "d", "d0", "d_numerator", "k"})  # of a group, not from the config


def settings(config: Config) -> dict[str, Any]:
    """The config by dotted keys, as JSON values; without what is no setting of the experiment."""
    return _flat(config.model_dump(mode="json", exclude=set(NO_SETTINGS)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {prefix + name: value}
    return found


def is_base(name: str, config: Config) -> bool:
    """Whether a path to start from is part of the frozen base, which each start of the run loads anew, from where it lies now."""
    fused = config.use_lora and config.fuse_pretrained_lora
    return (name == "pretrained_lora_ckpt_path" and fused) or (name == "pretrained_full_ckpt_path" and config.use_lora)


def changes(before: Mapping[str, Any], config: Config, where: object) -> dict[str, tuple[Any, Any]]:
    """Keys whose value is another than in `before` (`settings` of a checkpoint), with both values.

    Raises:
        UserError: a key that cannot change within a run; names it with both values.
    """
    now = settings(config)
    names = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
    found = {name: (before.get(name), now.get(name)) for name in names}
    refused = [name for name in found if reason_of(name) is not None and not is_base(name, config)]
    if refused:
        said = "; ".join(f"{name} = {found[name][0]!r} there, {found[name][1]!r} now ({reason_of(name)})" for name in refused)
        raise UserError(
            f"{where} was trained with other settings that cannot change within a run: {said}. Set them back, or start a new run "
            "from its weights with pretrained_lora_ckpt_path or pretrained_full_ckpt_path."
        )
    return found


def reason_of(name: str) -> str | None:
    """Why a key, or the section it is in, cannot change; None where it can."""
    return next((reason for key, reason in FIXED.items() if name == key or name.startswith(f"{key}.")), None)


def said(found: Mapping[str, tuple[Any, Any]], step: int) -> list[str]:
    """One line for each change."""
    return [f"{name}: {was!r} until step {step}, {now!r} from here" for name, (was, now) in found.items()]


def options_of(optimizer: Any) -> list[dict[str, Any]]:
    """What the config set of each parameter group: betas, weight decay and so on."""
    return [{name: value for name, value in group.items() if name not in _OF_THE_STATE} for group in optimizer.param_groups]


def follow_config(optimizer: Any, schedule: Any, options: list[dict[str, Any]], rate: float) -> None:
    """After a checkpoint's state was loaded: `options` and the learning rate of the config, at the schedule's place.

    Where nothing changed, nothing does, to the bit: a schedule's rate is its base rate times a function of the step.
    """
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
    schedule.base_lrs = [rate] * len(schedule.base_lrs)
    for group, own, factor in zip(optimizer.param_groups, options, schedule.lr_lambdas, strict=True):
        group |= own
        group["initial_lr"] = rate
        group["lr"] = rate * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
