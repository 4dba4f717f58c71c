"""What must agree between the keys of a config, each with what to do about it."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from OpenSciDraw.config.data_checks import (
    GROUP_DATASET,
    MIXED_DATASET,
    captions_problems,
    data_problems,
    mixed_problems,
    sources_problems,
)
from OpenSciDraw.config.drawing import distillation_problems, validation_model_problems
from OpenSciDraw.registry import DATASETS, METRICS, MODELS, SAMPLERS, TRAIN_ITERATION_FUNCS, VALIDATION_FUNCS

if TYPE_CHECKING:
    from OpenSciDraw.config.schema import Config

PREFERENCE_OBJECTIVES = ("dpo", "mdpo")
REWARD_OBJECTIVE = "reward"
MIN_PRODIGY_RATE, MAX_PRODIGY_RATE = 0.1, 10.0
MAX_ADAM_RATE = 0.1

Problem = tuple[tuple[str, ...], str]  # the keys concerned, the one to change first, and what to say


class CrossFieldError(ValueError):
    """Keys that are right alone and wrong together."""

    def __init__(self, problems: list[Problem]):
        super().__init__("\n".join(f"{keys[0]}: {message}" for keys, message in problems))
        self.problems = problems


def require_agreement(config: Config) -> None:
    """Raises CrossFieldError with everything that does not agree."""
    checks = (
        _registered_names, _optimizer, _platform, _adapter, _adapter_kind, _weights, _memory, data_problems, captions_problems,
        sources_problems, mixed_problems, _preferences, _rewards, _token_routing, _validation, distillation_problems,
        validation_model_problems,
    )  # fmt: skip
    problems = [problem for check in checks for problem in check(config)]
    if problems:
        raise CrossFieldError(problems)


def _registered_names(config: Config) -> list[Problem]:
    asked = [
        ("model_type", MODELS, config.model_type),
        ("dataset.type", DATASETS, config.dataset.type),
        ("data_sampler.type", SAMPLERS, config.data_sampler.type),
        ("train_iteration_func_name", TRAIN_ITERATION_FUNCS, config.train_iteration_func_name),
        ("validation_func_name", VALIDATION_FUNCS, config.validation_func_name),
        *(("evaluate.metrics", METRICS, name) for name in config.evaluate.metrics),
        *(("reward.metrics", METRICS, name.split(".")[0]) for name in config.reward.metrics),
    ]
    found: list[Problem] = []
    for name, registry, value in asked:
        message = registry.problem(value)
        if message:
            found.append(((name,), message))
    expected = MODELS.class_literal(config.model_type, "transformer_class")
    if config.transformer_cfg is not None and expected is not None and config.transformer_cfg.type != expected:
        message = f"{config.transformer_cfg.type!r} is not the transformer of {config.model_type!r}: {expected!r}."
        found.append((("transformer_cfg.type", "model_type"), message + " Correct it or leave transformer_cfg out."))
    return found


def _optimizer(config: Config) -> list[Problem]:
    found: list[Problem] = []
    rate = config.learning_rate
    if config.optimizer == "prodigy":
        if not MIN_PRODIGY_RATE <= rate <= MAX_PRODIGY_RATE:
            message = f"{rate:g} with prodigy, which multiplies its own rate by this. Set learning_rate = 1.0."
            found.append((("learning_rate", "optimizer"), message))
        if config.scale_lr:
            found.append((("scale_lr", "optimizer"), "prodigy finds the rate itself. Set scale_lr = False."))
        if config.use_8bit_adam:
            message = "8-bit state exists for AdamW only. Set use_8bit_adam = False or optimizer = 'AdamW'."
            found.append((("use_8bit_adam", "optimizer"), message))
    elif rate >= MAX_ADAM_RATE:
        message = f"{rate:g} is too high for AdamW (below {MAX_ADAM_RATE}). Set e.g. 1e-4, or optimizer = 'prodigy'."
        found.append((("learning_rate", "optimizer"), message))
    steps, warmup = config.max_train_steps, config.lr_warmup_steps
    if steps is None and config.num_train_epochs is None:
        found.append((("max_train_steps", "num_train_epochs"), "both are None: training would never end. Set one."))
    if config.lr_scheduler != "constant" and steps is not None and warmup > steps:
        message = f"{warmup} is more than max_train_steps = {steps}: the rate would never be reached. Set fewer."
        found.append((("lr_warmup_steps", "max_train_steps"), message))
    return found


def _platform(config: Config) -> list[Problem]:
    if config.mixed_precision == "bf16" and (platform.system(), platform.machine()) == ("Darwin", "arm64"):
        message = "'bf16' is not supported on Apple Silicon (MPS). Set mixed_precision = 'fp16'."
        return [(("mixed_precision",), message)]
    return []


def _adapter(config: Config) -> list[Problem]:
    found: list[Problem] = []
    if config.fuse_pretrained_lora and config.pretrained_lora_ckpt_path is None:
        message = "there is nothing to fuse. Set pretrained_lora_ckpt_path, or fuse_pretrained_lora = False."
        found.append((("fuse_pretrained_lora", "pretrained_lora_ckpt_path"), message))
    for name in ("train_iteration_func_name", "validation_func_name"):
        value = config.train_iteration_func_name if name.startswith("train") else config.validation_func_name
        if "fulltune" in value and config.use_lora:
            found.append(
                (
                    (name, "use_lora"),
                    f"{value!r} trains all weights, but use_lora is True. Set use_lora = False, or leave {name} out.",
                )
            )
    if config.push_to_hub and not config.hub_model_id:
        message = "where to is missing. Set hub_model_id = 'owner/name', or push_to_hub = False."
        found.append((("push_to_hub", "hub_model_id"), message))
    return found


def _adapter_kind(config: Config) -> list[Problem]:
    """Keys that do not act on an adapter of this kind, and what PEFT's layers of it do not go with."""
    kind, found = config.adapter_type, list[Problem]()
    if not config.use_lora and kind != "lora":
        found.append((("adapter_type", "use_lora"), f"{kind!r} with use_lora = False, which trains no adapter. Leave one out."))
    of_kinds = {
        "use_rslora": (("lora", "dora"), config.use_rslora), "lokr_factor": (("lokr",), config.lokr_factor != -1),
        "lokr_decompose_both": (("lokr",), config.lokr_decompose_both), "oft_block_size": (("oft",), config.oft_block_size != 32),
        "lora_dropout": (("lora", "dora", "oft"), config.lora_dropout),
    }  # fmt: skip
    for name, (kinds, is_set) in of_kinds.items():
        if is_set and kind not in kinds:
            message = f"does nothing with adapter_type = {kind!r}, only with {' or '.join(map(repr, kinds))}. Leave it out."
            found.append(((name, "adapter_type"), message))
    if config.lokr_factor == 0:
        found.append((("lokr_factor",), "0 is no side of a matrix. Set -1, or a number such as 8."))
    base = {"quantization": config.quantization, "fp8_products": config.fp8_products,
            "bnb_quantization_config_path": config.bnb_quantization_config_path}  # fmt: skip
    for name in (name for name, is_set in base.items() if is_set and kind != "lora"):
        message = f"{kind!r} needs the plain weights of its layers. Leave {name} out, or set adapter_type = 'lora'."
        found.append((("adapter_type", name), message))
    return found


def _weights(config: Config) -> list[Problem]:
    """Keys of full fine-tuning that mean nothing with a LoRA, and the other way round."""
    found: list[Problem] = []
    if config.use_lora:
        if config.master_weights != "fp32":
            message = "LoRA weights are always fp32. Set master_weights = 'fp32', or use_lora = False."
            found.append((("master_weights", "use_lora"), message))
    else:
        for name, value in (("pretrained_lora_ckpt_path", config.pretrained_lora_ckpt_path), ("lora_dropout", config.lora_dropout)):
            if value and not config.fuse_pretrained_lora:
                message = f"{value!r} with use_lora = False, which trains no adapter. Set it to {None if name[0] == 'p' else 0.0}"
                found.append(((name, "use_lora"), message + (", or fuse_pretrained_lora = True." if name[0] == "p" else ".")))
    if config.master_weights == "bf16" and (config.optimizer != "AdamW" or config.mixed_precision != "bf16"):
        message = "'bf16' needs optimizer = 'AdamW' (which rounds stochastically) and mixed_precision = 'bf16'."
        found.append((("master_weights", "optimizer", "mixed_precision"), message))
    if config.offload_optimizer and (config.use_8bit_adam or config.master_weights == "bf16"):
        message = "keeps fp32 weights and state in CPU memory. Set use_8bit_adam = False and master_weights = 'fp32' with it."
        found.append((("offload_optimizer", "use_8bit_adam", "master_weights"), message))
    if config.offload_optimizer and config.optimizer != "AdamW":
        message = "exists for AdamW only. Set offload_optimizer = False or optimizer = 'AdamW'."
        found.append((("offload_optimizer", "optimizer"), message))
    return found


def _memory(config: Config) -> list[Problem]:
    found: list[Problem] = []
    given = [name for name, value in (("quantization", config.quantization), ("offload", config.offload),
             ("bnb_quantization_config_path", config.bnb_quantization_config_path)) if value]  # fmt: skip
    if given and not config.use_lora:
        for name in given:
            found.append(((name, "use_lora"), f"{name} is for a frozen base, and use_lora = False trains all weights."))
    if config.quantization and config.bnb_quantization_config_path:
        found.append((("quantization", "bnb_quantization_config_path"), "both name a quantisation. Set one of them."))
    changed = {"pretrained_full_ckpt_path": config.pretrained_full_ckpt_path, "fuse_pretrained_lora": config.fuse_pretrained_lora}
    for name, value in changed.items():
        if value and (config.quantization or config.bnb_quantization_config_path):
            message = f"{value!r} changes the base, which a quantised one does not allow. Export the changed base first."
            found.append(((name, "quantization"), message))
    if config.fp8_products:
        contrary = {"use_lora": not config.use_lora, "mixed_precision": config.mixed_precision != "bf16", "offload": config.offload,
                    "quantization": config.quantization or config.bnb_quantization_config_path}  # fmt: skip
        for name in (name for name, is_set in contrary.items() if is_set):
            message = "8-bit products are for the frozen bf16 base of a LoRA, on the device and not quantised otherwise. "
            found.append((("fp8_products", name), message + "Set fp8_products = False."))
    if config.offload:
        wanted = {"gradient_checkpointing": config.gradient_checkpointing, "compile_blocks": config.compile_blocks is not True,
                  "activation_memory_gb": config.activation_memory_gb in (None, "auto")}  # fmt: skip
        for name in (name for name, right in wanted.items() if not right):
            message = "a block that comes and goes must be recomputed, and not compiled. Set gradient_checkpointing = True, "
            found.append((("offload", name), message + "activation_memory_gb = None, compile_blocks = False."))
        if config.quantization == "nf4" or config.bnb_quantization_config_path:
            found.append((("offload", "quantization"), "bitsandbytes' weights stay on the GPU. Take quantization = 'int8'."))
    if isinstance(config.activation_memory_gb, float) and not config.gradient_checkpointing:
        message = "gradient_checkpointing = False recomputes nothing, so there is nothing to choose. Set it to True."
        found.append((("activation_memory_gb", "gradient_checkpointing"), message))
    if config.validate_unquantized and not (config.quantization or config.bnb_quantization_config_path):
        found.append((("validate_unquantized", "quantization"), "the base is not quantised. Set validate_unquantized = False."))
    return found


def _preferences(config: Config) -> list[Problem]:
    found: list[Problem] = []
    data, objective, settings = config.dataset, config.train_iteration_func_name, config.preference
    if config.trains_preferences and data.type != GROUP_DATASET:
        message = f"{objective!r} compares winners with losers, and {data.type!r} has none. "
        message += f"Set dataset = dict(type={GROUP_DATASET!r}, ...), or choose another objective."
        found.append((("train_iteration_func_name", "dataset.type"), message))
    if config.needs_reference and config.pretrained_lora_ckpt_path and not config.fuse_pretrained_lora:
        message = f"{objective!r} compares with the model without the adapter that trains, so that one must start from nothing. "
        message += "Set fuse_pretrained_lora = True: the old adapter becomes part of the base, and a new one trains."
        found.append((("pretrained_lora_ckpt_path", "train_iteration_func_name", "fuse_pretrained_lora"), message))
    if data.type == GROUP_DATASET and data.is_remote:
        message = f"{GROUP_DATASET} reads a folder of this machine, and base_dir is in cloud storage. Copy the data here."
        found.append((("dataset.base_dir", "dataset.type"), message))
    if not any(weight for _, weight in settings.axis_weights):
        found.append((("preference.axis_weights",), "no axis has a weight above 0, so there is nothing to train on. Give one."))
    if settings.other_gap_low > settings.other_gap_high:
        message = f"{settings.other_gap_low:g} is more than other_gap_high = {settings.other_gap_high:g}: no loser lies between."
        found.append((("preference.other_gap_low", "preference.other_gap_high"), message + " Set a lower one."))
    if settings.tau is not None and settings.mode != "mean":
        message = f"{settings.tau:g} with mode = {settings.mode!r}, which does not use it. Set tau = None, or mode = 'mean'."
        found.append((("preference.tau", "preference.mode"), message))
    return found


def _rewards(config: Config) -> list[Problem]:
    settings, data = config.reward, config.dataset
    if not config.trains_rewards:
        return []
    found: list[Problem] = []
    unnamed = [name for name in settings.metrics if "." not in name.strip(".")]
    if unnamed:
        message = f"{unnamed[0]!r} names no score. Write 'metric.score', for example 'structure.labels'."
        found.append((("reward.metrics",), message))
    if not any(settings.metrics.values()):
        found.append((("reward.metrics",), "no score has a weight above 0, so there is nothing to learn. Give one."))
    if not (settings.figures or data.figures or config.encode.figures):
        message = "what a picture should show is not known. Set it to the figures that the data were made of, e.g. 'drawn:2000'."
        found.append((("reward.figures", "dataset.figures", "encode.figures"), message))
    if settings.figure_weight and not settings.include_figure:
        message = f"{settings.figure_weight:g}, and no group has the data's own figure. Set include_figure, or figure_weight = 0."
        found.append((("reward.figure_weight", "reward.include_figure"), message))
    if data.type in (GROUP_DATASET, MIXED_DATASET):
        message = f"'reward' draws pictures of prompts, and {data.type!r} has groups or edits. Choose another dataset."
        found.append((("dataset.type", "train_iteration_func_name"), message))
    if "held_out_loss" in settings.watch and not config.held_out_examples:
        message = "held_out_loss is watched, and held_out_examples = 0 measures none. Set held_out_examples, or reward.watch = {}."
        found.append((("reward.watch", "held_out_examples"), message))
    return found


def _token_routing(config: Config) -> list[Problem]:
    if not config.token_routing.share:
        return []
    found: list[Problem] = []
    if config.trains_preferences or config.trains_rewards or config.distills:
        message = f"{config.train_iteration_func_name!r} compares forwards of one picture, which must run on the same tokens. "
        found.append((("token_routing.share", "train_iteration_func_name"), message + "Set token_routing.share = 0."))
    if config.compile_blocks is True:
        message = "compiled blocks do not take another number of tokens by hooks. Set compile_blocks = False, or share = 0."
        found.append((("token_routing.share", "compile_blocks"), message))
    return found


def metrics_in_training(config: Config) -> list[str]:
    """The metrics of `validation_func_name`: M for 'M_validation_func', evaluate.metrics for 'evaluate_validation_func'.

    Without held_out, which every validation computes (under its own names).
    """
    name = config.validation_func_name.removesuffix("_validation_func")
    if name == config.validation_func_name:
        return []
    asked = config.evaluate.metrics if name == "evaluate" else [name]
    return [metric for metric in asked if metric in METRICS.names() and metric != "held_out"]


def _validation(config: Config) -> list[Problem]:
    found: list[Problem] = []
    prompts, sizes = len(config.validation_prompts), len(config.resolution_list)
    if sizes not in (0, 1, prompts):
        message = f"{sizes} sizes for {prompts} validation_prompts. Give one [width, height] for each, one for all, or []."
        found.append((("resolution_list", "validation_prompts"), message))
    if (pictures := len(config.validation_images)) not in (0, prompts):
        message = f"{pictures} entries for {prompts} validation_prompts. Give one for each (a path, paths or None), or []."
        found.append((("validation_images", "validation_prompts"), message))
    if metrics_in_training(config) and config.evaluate.figures is None:
        message = f"{config.validation_func_name!r} needs figures. Set evaluate = dict(figures='drawn:64:seed=9', ...)."
        found.append((("evaluate", "validation_func_name"), message))
    return found
