"""The schema of a config: every key with its type, unit, default and meaning, and what must agree between keys.

Strict: no unknown key, no silent conversion (an int is accepted where a float is asked for). Nothing heavy is
imported here, so that a wrong config fails before torch loads. `scienceflow config --schema` prints the table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)

from OpenSciDraw.config.checks import FIGURE_DATASET, require_agreement
from OpenSciDraw.registry import TRAIN_ITERATION_FUNCS
from OpenSciDraw.utils.files import is_remote

PACKAGED_FEATURES = ("efficientnet-lite0", "figure-measures")  # of evaluation/features.py; anything else is a folder
SECRET_KEYS = frozenset({"huggingface_token", "hub_token"})

Tracker = Literal["wandb", "tensorboard", "trackio", "mlflow", "none"]


def key(default: Any, group: str, meaning: str, unit: str = "", **limits: Any) -> Any:
    """A config key: its default, the group it is listed in, one line of meaning, its unit and limits."""
    extra: dict[str, Any] = {"group": group, "unit": unit}
    if isinstance(default, type):
        return Field(default_factory=default, description=meaning, json_schema_extra=extra, **limits)
    return Field(default, description=meaning, json_schema_extra=extra, **limits)


def _canonical_optimizer(value: object) -> object:
    return {"adamw": "AdamW", "prodigy": "prodigy"}.get(value.lower(), value) if isinstance(value, str) else value


def _tuple_as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _checkpoint_name(value: str) -> str:
    if not re.fullmatch(r"latest|checkpoint-\d+", value):
        raise ValueError("must be 'latest', 'checkpoint-<step>' such as 'checkpoint-5000', or None")
    return value


def _picture_side(value: int) -> int:
    if value < 32 or value % 8:
        raise ValueError("must have sides that are multiples of 8 and at least 32 px")
    return value


Side = Annotated[int, AfterValidator(_picture_side)]
Size = Annotated[tuple[Side, Side], Field(strict=False)]  # a list or a tuple; its numbers stay strict


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)


class TransformerConfig(_Section):
    type: str = key(..., "Model", "Class of the transformer; must be the one of model_type.")


class DatasetConfig(_Section):
    type: str = key(
        "ArXiVParquetDatasetV2", "Data", "Registered dataset; FigureDataset encodes figures while training."
    )
    base_dir: str = key(".", "Data", "Folder of the encoded data; required except for FigureDataset.")
    parquet_base_path: str = key("", "Data", "Folder of the store inside base_dir.")
    num_workers: int | None = key(None, "Data", "Second place of dataloader_num_workers.", "processes", ge=0)
    num_train_examples: int | None = key(None, "Data", "Use only the first rows; None = all.", "rows", ge=1)
    cache_dir: str | None = key(None, "Data", "base_dir in cloud storage: folder of the local copies; None = the user's cache.")
    cache_gb: float = key(50.0, "Data", "base_dir in cloud storage: largest size of the copied rows here.", "GB", gt=0)
    read_ahead_batches: int = key(
        2, "Data", "base_dir in cloud storage: batches whose rows each worker fetches ahead.", "batches", ge=0
    )
    stat_data: bool = key(False, "Data", "Print the table of rows per bucket.")
    figures: str | None = key(None, "Data", "FigureDataset: where the figures are, as encode.figures.")
    resolution: Literal[128, 256, 512, 768, 1024] | None = key(
        None, "Data", "FigureDataset: bucket grid; None = encode.resolution.", "px"
    )
    contract: dict[str, Any] | None = key(
        None,
        "Data",
        "How data without a contract were encoded, as you declare it; compared with the model's.",
    )

    @property
    def is_remote(self) -> bool:
        return is_remote(self.base_dir)

    @property
    def location(self) -> str:
        """Folder or address of the encoded data."""
        return f"{self.base_dir.rstrip('/')}/{self.parquet_base_path}"


class SamplerConfig(_Section):
    type: str = key("ArXiVMixScaleBatchSampler", "Data", "Registered sampler.")
    batch_size: int | None = key(None, "Data", "Second place of train_batch_size.", "samples per device", ge=1)
    drop_last: bool = key(False, "Data", "Drop a bucket's last, smaller batch.")
    shuffle: bool = key(True, "Data", "Shuffle rows and batches each epoch.")
    seed: int | None = key(None, "Data", "Seed of the data order; None = seed.", ge=0)


class EncodeConfig(_Section):
    figures: str | None = key(
        None, "Encode",
        "Figures to encode: a folder (with x.txt/x.json captions, or of parquet files), a .jsonl, .csv or .parquet "
        "file, or 'drawn:2000' / 'drawn:2000:seed=1' for figures drawn by the program.",
    )  # fmt: skip
    resolution: Literal[128, 256, 512, 768, 1024] = key(768, "Encode", "Bucket grid: a unit is resolution / 16.", "px")
    image_column: str | None = key(None, "Encode", "Column of the image or its path; None = found by name.")
    caption_column: str | None = key(None, "Encode", "Column of the caption; None = found by name.")
    text_storage: Literal["bf16", "int8", "fp8"] = key(
        "bf16", "Encode", "Prompt embeddings on disk: 'bf16' is exact, 'int8' and 'fp8' take half (docs/encode.md has the errors)."
    )
    vae_precision: Literal["auto", "fp32", "tf32", "bf16"] = key(
        "auto", "Encode", "What the VAE encodes in: 'fp32' is exact; 'auto' = the fastest whose error in the latents is no larger "
        "than rounding to bf16 (fp32 on a CPU), kept in a store that is there.",
    )  # fmt: skip
    samples_per_shard: int = key(256, "Encode", "Rows of one shard, the unit of resuming.", "rows", ge=1)
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = key(
        "auto", "Encode", "Figures or captions encoded at once; 'auto' = by the GPU's memory, 4 on a CPU.", "samples"
    )
    num_workers: int = key(2, "Encode", "Processes that read and decode figures.", "processes", ge=0)
    min_quality: Literal["low", "medium", "high"] | None = key(
        None, "Encode", "Rows of a lower tier (column quality or quality_tier) are left out; None = all."
    )
    where: dict[str, Any] = key(
        {}, "Encode", "Only rows of lists and tables with these values: dict(split='gen_768', is_tikz=False); a list: any of it."
    )
    max_figures: int | None = key(None, "Encode", "Encode only the first ones; None = all.", "figures", ge=1)
    max_image_pixels: int = key(100_000_000, "Encode", "Larger figures are rejected before decoding.", "px", ge=1)
    max_aspect_ratio: float = key(16.0, "Encode", "Longer figures (long side / short side) are rejected.", "ratio", ge=1)
    min_side: int = key(32, "Encode", "Figures with a shorter side are rejected.", "px", ge=1)
    max_upscale: float = key(4.0, "Encode", "Figures that their bucket would enlarge more are rejected.", "factor", ge=1)


class EvaluateConfig(_Section):
    """What `scienceflow evaluate` does where its own options do not say otherwise, and validation functions always."""

    figures: str | None = key(
        None, "Evaluate",
        "Prompts to draw, with what the pictures are compared with: as encode.figures, or a .jsonl of prompts with sizes.",
    )  # fmt: skip
    metrics: Annotated[list[str], BeforeValidator(_tuple_as_list)] = key(
        ["structure"], "Evaluate", "Registered metrics: structure, text, distribution, held_out, judge."
    )
    limit: int | None = key(None, "Evaluate", "Only the first ones; None = all.", "figures", ge=1)
    steps: int | None = key(None, "Evaluate", "Steps of a picture; None = num_inference_steps.", "sampling steps", ge=1)
    guidance: float | None = key(None, "Evaluate", "Guidance; None = as in validation.", "factor", ge=0)
    seed: int = key(0, "Evaluate", "Seed of the pictures' noise (with each one's id) and of what metrics draw by chance.", ge=0)
    batch_size: int = key(8, "Evaluate", "Pictures of one size drawn at once.", "pictures", ge=1)
    reader: Literal["rapidocr", "tesseract"] = key("rapidocr", "Evaluate", "Program that reads text in pictures.")
    features: str | None = key(
        None, "Evaluate",
        "distribution: 'efficientnet-lite0', 'figure-measures', or the folder of a CLIP or DINO model; None = a packaged one.",
    )  # fmt: skip
    judge_url: str | None = key(None, "Evaluate", "judge: address of an OpenAI-compatible endpoint, e.g. http://host:8000/v1.")
    judge_model: str | None = key(None, "Evaluate", "judge: name of the model at that address.")
    judge_arrow_direction: bool = key(True, "Evaluate", "judge: an arrow's direction counts.")
    judge_requests: int = key(4, "Evaluate", "judge: requests at the same time.", "requests", ge=1)
    judge_timeout: float = key(120.0, "Evaluate", "judge: longest time of one request.", "s", gt=0)
    judge_retries: int = key(3, "Evaluate", "judge: further tries of a failed request.", "tries", ge=0)
    judge_key_variable: str = key("OPENAI_API_KEY", "Evaluate", "judge: environment variable that holds the access key.")


class Config(_Section):
    """A whole config. Every key is an attribute; nothing is changed after loading.

    Raises:
        pydantic.ValidationError: wrong keys or types; keys that contradict each other are listed in the
            CrossFieldError inside. `load_config` turns these into a UserError with file and line.
    """

    seed: int = key(42, "Run", "Seed of data order, noise, adapter initialisation and dropout.", ge=0)
    deterministic: bool = key(False, "Run", "Use deterministic kernels only (slower; fails where there is none).")

    model_type: str = key(
        "Flux2Klein", "Model", "Model family: 'Flux2Klein', 'QwenImage' or one of your own in models/."
    )
    pretrained_model_name_or_path: str = key(
        ..., "Model", "Hub id, local diffusers folder, or 'embedded:NAME'.", min_length=1
    )
    revision: str | None = key(None, "Model", "Branch, tag or commit of the hub repository.")
    variant: str | None = key(None, "Model", "Weight variant of the files, e.g. 'fp16'.")
    cache_dir: str | None = key(None, "Model", "Folder for downloads; None = Hugging Face's own.")
    huggingface_token: str | None = key(
        None,
        "Model",
        "Access token; None = HF_TOKEN of the environment (preferred).",
        repr=False,
        exclude=True,
    )
    quantization: Literal["int8", "fp8", "nf4"] | None = key(
        None, "Model", "Quantise the frozen base of a LoRA: weights in 8 bits (torchao) or 4 (bitsandbytes)."
    )
    bnb_quantization_config_path: str | None = key(
        None, "Model", "JSON file with BitsAndBytesConfig's arguments, instead of quantization."
    )
    transformer_cfg: TransformerConfig | None = key(
        None, "Model", "dict(type=...): the transformer class; only checked."
    )
    offload: bool = key(
        False, "Model", "LoRA: keep the frozen blocks in CPU memory, each on the GPU only while it is used."
    )
    resident_blocks: int = key(4, "Model", "offload: blocks on the GPU at a time.", "blocks", ge=2)
    compile_blocks: Literal["auto"] | bool = key(
        "auto", "Model", "Compile the blocks (torch.compile) after a trial in another process; 'auto' = on a GPU, where it pays."
    )
    max_sequence_length: int = key(512, "Model", "Prompt length after padding.", "tokens", ge=1, le=32768)

    use_lora: bool = key(True, "LoRA", "Train LoRA adapters; False = all weights of the transformer.")
    lora_layers: str | Annotated[list[str], BeforeValidator(_tuple_as_list)] = key(
        "to_k,to_q,to_v",
        "LoRA",
        "Linear layers to adapt: name endings, comma-separated or a list.",
        min_length=1,
    )
    rank: int = key(64, "LoRA", "Rank of the LoRA matrices.", ge=1)
    lora_alpha: int = key(4, "LoRA", "Scale of the adapter: its strength is lora_alpha / rank.", ge=1)
    lora_dropout: float = key(0.0, "LoRA", "Dropout before the LoRA matrices.", "probability", ge=0, lt=1)
    pretrained_lora_ckpt_path: str | None = key(None, "LoRA", "Adapter to start from: a file or folder.")
    fuse_pretrained_lora: bool = key(
        False, "LoRA", "Add pretrained_lora_ckpt_path to the base weights and train a new adapter on them."
    )
    pretrained_full_ckpt_path: str | None = key(None, "LoRA", "Transformer weights that replace the base's.")

    train_batch_size: int = key(1, "Size", "Batch of one device and micro-step.", "samples", ge=1)
    num_train_epochs: int | None = key(
        1, "Size", "Passes over the data; None = no limit, also where only max_train_steps is set.", "epochs", ge=1
    )
    max_train_steps: int | None = key(
        80000,
        "Size",
        "Steps; None = no limit, also where only num_train_epochs is set. With both, whichever comes first.",
        "optimizer steps",
        ge=1,
    )
    gradient_accumulation_steps: int = key(1, "Size", "Micro-steps of one optimizer step.", "micro-steps", ge=1)
    gradient_checkpointing: bool = key(True, "Size", "Recompute activations in the backward pass: less memory, slower.")
    activation_memory_gb: Literal["auto"] | Annotated[float, Field(ge=0)] | None = key(
        "auto",
        "Size",
        "gradient_checkpointing: recompute only the blocks whose activations do not fit into this; 'auto' = what is free on the "
        "GPU (on a CPU: recompute all blocks); None = recompute all blocks.",
        "GB a device",
    )
    dataloader_num_workers: int = key(
        2, "Size", "Processes that read batches; 0 = the training process.", "processes", ge=0
    )

    optimizer: Annotated[Literal["AdamW", "prodigy"], BeforeValidator(_canonical_optimizer)] = key(
        "AdamW", "Optimizer", "Optimizer, in any case."
    )
    use_8bit_adam: bool = key(False, "Optimizer", "AdamW with 8-bit state.")
    offload_optimizer: bool = key(False, "Optimizer", "AdamW: fp32 weights, state and step in CPU memory.")
    master_weights: Literal["fp32", "bf16"] = key(
        "fp32", "Optimizer", "use_lora = False: type of the trained weights; 'bf16' rounds updates stochastically (AdamW)."
    )
    learning_rate: float = key(
        2e-4, "Optimizer", "Rate; 1.0 for prodigy, which finds its own.", "per optimizer step", gt=0
    )
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = key("constant", "Optimizer", "Schedule of the rate, by its diffusers name.")
    lr_warmup_steps: int = key(500, "Optimizer", "Rise of the rate; not used by 'constant'.", "optimizer steps", ge=0)
    lr_num_cycles: int = key(1, "Optimizer", "Restarts of cosine_with_restarts.", "cycles", ge=1)
    lr_power: float = key(1.0, "Optimizer", "Power of polynomial.", gt=0)
    scale_lr: bool = key(False, "Optimizer", "Multiply the rate by the effective batch.")
    adam_beta1: float = key(0.9, "Optimizer", "Decay of the first moment (prodigy too).", ge=0, lt=1)
    adam_beta2: float = key(0.999, "Optimizer", "Decay of the second moment (prodigy too).", ge=0, lt=1)
    adam_weight_decay: float = key(1e-4, "Optimizer", "Decoupled weight decay (prodigy too).", ge=0)
    adam_epsilon: float = key(1e-8, "Optimizer", "Added to the denominator (prodigy too).", gt=0)
    max_grad_norm: float = key(1.0, "Optimizer", "Gradients are clipped to this norm.", "L2 norm", gt=0)
    prodigy_beta3: float | None = key(
        None, "Optimizer", "Decay of prodigy's estimate; None = sqrt(adam_beta2).", ge=0, lt=1
    )
    prodigy_decouple: bool = key(True, "Optimizer", "Prodigy: weight decay as in AdamW.")
    prodigy_use_bias_correction: bool = key(True, "Optimizer", "Prodigy: Adam's bias correction.")
    prodigy_safeguard_warmup: bool = key(True, "Optimizer", "Prodigy: keep its estimate small during warm-up.")

    checkpointing_steps: int = key(500, "Checkpoints", "A checkpoint every so many steps.", "optimizer steps", ge=1)
    resume_from_checkpoint: Annotated[str, AfterValidator(_checkpoint_name)] | None = key(
        None, "Checkpoints", "'latest', 'checkpoint-5000', or None to start anew."
    )
    checkpoints_total_limit: int | None = key(
        None, "Checkpoints", "Keep the newest ones; None = all.", "checkpoints", ge=1
    )
    upcast_before_saving: bool = key(
        False, "Checkpoints", "Save the final weights in fp32 instead of mixed_precision's type; LoRA weights always are."
    )

    use_ema: bool = key(False, "EMA", "Keep an average of the trained weights over the steps (fp32).")
    ema_decay: float = key(0.9999, "EMA", "Decay of the average.", "per optimizer step", gt=0, lt=1)
    ema_update_after_step: int = key(0, "EMA", "First step that counts.", "optimizer steps", ge=0)
    ema_steps: int = key(100, "EMA", "Steps between updates, each by ema_decay ** ema_steps.", "optimizer steps", ge=1)
    validate_with_ema: bool = key(True, "EMA", "Validate with the averaged weights.")

    mixed_precision: Literal["bf16", "fp16", "no"] = key(
        "bf16", "Precision", "Type of base weights and activations; 'no' = fp32."
    )
    fp8_products: bool = key(
        False, "Precision", "LoRA: the frozen blocks' products in 8-bit floats, forward and for the input's gradient (Ada, Hopper)."
    )
    allow_tf32: bool = key(False, "Precision", "TF32 matrix products on NVIDIA GPUs.")

    weighting_scheme: Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"] = key(
        "none",
        "Flow matching",
        "Density of trained noise levels (logit_normal, mode) or loss weight (sigma_sqrt, cosmap).",
    )
    logit_mean: float = key(
        0.0, "Flow matching", "logit_normal: diffusers' meaning, positive = LESS noise.", "logit of 1 - sigma"
    )
    logit_std: float = key(1.0, "Flow matching", "logit_normal: width.", "logit", gt=0)
    mode_scale: float = key(1.29, "Flow matching", "mode: scale of diffusers' mode density.")
    timestep_shift: Literal["none", "resolution"] | Annotated[float, Field(gt=0)] = key(
        "none",
        "Flow matching",
        "Shift of the noise levels: 'resolution' = exp(mu), mu linear in tokens; or a factor.",
        "factor",
    )

    use_parquet_dataset: bool = key(
        False, "Data", "Rows are encoded beforehand; where unset, it follows from dataset.type."
    )
    dataset: DatasetConfig = key(..., "Data", "dict(type=..., base_dir=...): where the data are.")
    data_sampler: SamplerConfig = key(SamplerConfig, "Data", "dict(type=...): how batches are made.")
    text: Literal["stored", "online"] = key(
        "stored",
        "Data",
        "Prompt embeddings in the store, or encoded while training (FigureDataset: always online).",
    )
    caption_dropout: float = key(
        0.1, "Data", "Share of captions replaced by the empty prompt.", "probability", ge=0, le=1
    )
    held_out_examples: int = key(64, "Data", "Rows kept from training for the held-out loss.", "rows", ge=0)
    max_bad_rows_fraction: float = key(
        0.01, "Data", "Training stops when more rows cannot be read.", "share of rows", ge=0, le=1
    )
    encode: EncodeConfig = key(
        EncodeConfig, "Encode", "dict(figures=..., resolution=...): how figures become encoded rows."
    )

    train_iteration_func_name: str = key(None, "Functions", "Registered objective; unset = that of model_type.")
    validation_func_name: str = key("generic_validation_func", "Functions", "Registered validation function.")

    validation_prompts: Annotated[list[str], BeforeValidator(_tuple_as_list)] = key(
        [], "Validation", "Prompts drawn at each validation."
    )
    resolution_list: Annotated[list[Size], BeforeValidator(_tuple_as_list)] = key(
        [],
        "Validation",
        "[width, height] of each prompt's picture, or one for all; [] = encode.resolution squared.",
        "px",
    )
    validation_steps: int = key(500, "Validation", "Validate every so many steps.", "optimizer steps", ge=1)
    validation_guidance_scale: float = key(
        1.0, "Validation", "Guidance of validation pictures where guidance_scale is None.", "factor", ge=0
    )
    guidance_scale: float | None = key(None, "Validation", "Guidance of sampled pictures.", "factor", ge=0)
    true_cfg_scale: float | None = key(
        None, "Validation", "True classifier-free guidance (Qwen-Image).", "factor", ge=0
    )
    negative_prompt: str | None = key(None, "Validation", "Prompt to steer away from; None = the empty prompt.")
    num_inference_steps: int = key(28, "Validation", "Steps of a sampled picture.", "sampling steps", ge=1)
    validate_unquantized: bool = key(
        False, "Validation", "Draw validation pictures with the base as it was before quantising."
    )
    validation_seed: int = key(42, "Validation", "Seed of the validation pictures' noise.", ge=0)
    evaluate: EvaluateConfig = key(EvaluateConfig, "Evaluate", "dict(figures=..., metrics=[...]): numbers from drawn figures.")

    base_filesys_path: str = key(".", "Paths", "Folder that relative paths of this config start from.")
    model_output_dir: str = key("runs/scienceflow", "Paths", "Folder of the run.", min_length=1)
    image_output_dir: str | None = key(None, "Paths", "Validation pictures; None = model_output_dir/validation_images.")
    logging_dir: str = key("logs", "Paths", "Tracker files, inside model_output_dir.")

    report_to: Tracker | Annotated[list[Tracker], BeforeValidator(_tuple_as_list)] | None = key(
        "wandb", "Logging", "Tracker or list of them beside metrics.jsonl; 'none' or None = no other."
    )
    tracker_name: str = key("ScienceFlow", "Logging", "Project name at the tracker.", min_length=1)
    run_name: str | None = key(None, "Logging", "Name of the run at the tracker.")
    logging_steps: int = key(10, "Logging", "Metrics every so many steps.", "optimizer steps", ge=1)

    push_to_hub: bool = key(False, "Hub", "Upload the trained weights at the end.")
    hub_token: str | None = key(None, "Hub", "Token for the upload; None = HF_TOKEN.", repr=False, exclude=True)
    hub_model_id: str | None = key(None, "Hub", "Repository to upload to: owner/name.")

    _provenance: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def provenance(self) -> dict[str, str]:
        """Where each value was set: dotted key -> 'file:line', '--cfg_options' or 'default'."""
        return self._provenance

    def __eq__(self, other: object) -> bool:
        """Equal values; where they were set does not count."""
        return isinstance(other, Config) and self.__dict__ == other.__dict__

    def dataset_arguments(self) -> dict[str, Any]:
        """What the class of `dataset.type` is called with."""
        data = self.dataset
        common: dict[str, Any] = {"num_train_examples": data.num_train_examples, "stat_data": data.stat_data}
        if data.type == FIGURE_DATASET:
            changes = {"figures": data.figures, "resolution": data.resolution or self.encode.resolution}
            return {"encode": self.encode.model_copy(update=changes), **common}
        paths = {"base_dir": data.base_dir, "parquet_base_path": data.parquet_base_path}
        if data.is_remote:
            common |= {"cache_dir": data.cache_dir, "cache_gb": data.cache_gb}
        return {**paths, "with_text": self.text == "stored", **common}

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Values that follow from others, where they are not set themselves; applied twice, it changes nothing."""
        if not isinstance(given, dict):
            return given
        values = _with_base_path(
            {k: v.model_dump(exclude_unset=True) if isinstance(v, _Section) else v for k, v in given.items()}
        )
        data, sampler = values.get("dataset"), values.get("data_sampler")
        online = isinstance(data, dict) and data.get("type") == FIGURE_DATASET
        if isinstance(data, dict):
            values.setdefault("use_parquet_dataset", not online)
            if data.get("num_workers") is not None:
                values.setdefault("dataloader_num_workers", data["num_workers"])
        if online:
            values.setdefault("text", "online")
        if isinstance(sampler, dict) and sampler.get("batch_size") is not None:
            values.setdefault("train_batch_size", sampler["batch_size"])
        if values.get("max_train_steps") is not None:  # a limit that is set is not cut short by another's default
            values.setdefault("num_train_epochs", None)
        elif values.get("num_train_epochs") is not None:
            values["max_train_steps"] = None
        if values.get("train_iteration_func_name") is None:
            family = values.get("model_type", cls.model_fields["model_type"].default)
            values["train_iteration_func_name"] = _objective_of(str(family), bool(values.get("use_parquet_dataset")))
        return values

    @model_validator(mode="after")
    def _agree(self) -> Config:
        require_agreement(self)
        return self


def _with_base_path(given: dict[str, Any]) -> dict[str, Any]:
    """A copy whose relative paths start from base_filesys_path."""
    base = given.get("base_filesys_path", ".")
    root = Path(base).expanduser().absolute() if isinstance(base, str) and base not in ("", ".") else None

    def moved(section: Any, names: tuple[str, ...]) -> Any:
        if not isinstance(section, dict):
            return section
        return {k: str(root / v) if root and k in names and _is_path(v) else v for k, v in section.items()}

    if root:
        given = {"model_output_dir": Config.model_fields["model_output_dir"].default, **given}
    values: dict[str, Any] = moved(given, ("model_output_dir", "image_output_dir"))
    for name in ("dataset", "encode", "evaluate"):
        if name in values:
            values[name] = moved(values[name], ("base_dir", "figures", "cache_dir", "features"))
    return values


def _is_path(value: object) -> bool:
    named = value in PACKAGED_FEATURES or (isinstance(value, str) and value.startswith(("drawn:", "~")))
    return isinstance(value, str) and not named and not is_remote(value)


def _objective_of(family: str, parquet: bool) -> str:
    """The registered objective of a family: the README's per-family name, else 'flow_matching'."""
    wanted = f"{family}_train_iteration_func{'_parquet' if parquet else ''}".replace("_", "").lower()
    names = TRAIN_ITERATION_FUNCS.names()
    return next((name for name in names if name.replace("_", "").lower() == wanted), "flow_matching")
