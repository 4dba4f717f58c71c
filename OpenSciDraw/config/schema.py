"""The schema of a config: every key with its type, unit, default and meaning, and what must agree between keys.

Strict: no unknown key, no silent conversion (an int is accepted where a float is asked for). Nothing heavy is
imported here, so that a wrong config fails before torch loads. `scienceflow config --schema` prints the table.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, model_validator

from OpenSciDraw.config.checks import PREFERENCE_OBJECTIVES, REWARD_OBJECTIVE, require_agreement
from OpenSciDraw.config.data_checks import FIGURE_DATASET, GROUP_DATASET, MIXED_DATASET, SOURCES_DATASET
from OpenSciDraw.config.drawing import DISTILLATION
from OpenSciDraw.config.following import objective_of, with_base_path
from OpenSciDraw.config.objective_sections import (
    DistillConfig,
    PreferConfig,
    PreferenceConfig,
    RewardConfig,
    TokenRoutingConfig,
)
from OpenSciDraw.config.sections import (
    DatasetConfig,
    EncodeConfig,
    EvaluateConfig,
    SamplerConfig,
    Section,
    TransformerConfig,
    canonical_optimizer,
    checkpoint_name,
    key,
    picture_side,
    tuple_as_list,
)

SECRET_KEYS = frozenset({"huggingface_token", "hub_token"})

Tracker = Literal["wandb", "tensorboard", "trackio", "mlflow", "none"]


Side = Annotated[int, AfterValidator(picture_side)]
Size = Annotated[tuple[Side, Side], Field(strict=False)]  # a list or a tuple; its numbers stay strict


class Config(Section):
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

    use_lora: bool = key(True, "LoRA", "Train an adapter (adapter_type); False = all weights of the transformer.")
    lora_layers: str | Annotated[list[str], BeforeValidator(tuple_as_list)] = key(
        "to_k,to_q,to_v",
        "LoRA",
        "Linear layers to adapt: name endings, comma-separated or a list.",
        min_length=1,
    )
    rank: int = key(64, "LoRA", "Rank of the adapter's matrices; not used by 'oft'.", ge=1)
    lora_alpha: int = key(4, "LoRA", "Scale of the adapter: its strength is lora_alpha / rank; not used by 'oft'.", ge=1)
    lora_dropout: float = key(0.0, "LoRA", "Dropout before the LoRA matrices.", "probability", ge=0, lt=1)
    adapter_type: Literal["lora", "dora", "lokr", "loha", "oft"] = key(
        "lora", "LoRA", "Kind of the adapter: LoRA, DoRA, or by Kronecker (LoKr) or Hadamard products (LoHa) or rotations (OFT)."
    )
    use_rslora: bool = key(False, "LoRA", "lora, dora: the strength is lora_alpha / sqrt(rank).")
    lokr_factor: int = key(-1, "LoRA", "lokr: sides of the first factor, at most; -1 = about the root of the layer's.", ge=-1)
    lokr_decompose_both: bool = key(False, "LoRA", "lokr: the first factor has low rank too, where that is smaller.")
    oft_block_size: int = key(32, "LoRA", "oft: side of a rotation; it must divide the layers' inputs.", "inputs", ge=2)
    pretrained_lora_ckpt_path: str | None = key(None, "LoRA", "Adapter to start from, of any program: a file or folder.")
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

    optimizer: Annotated[Literal["AdamW", "prodigy"], BeforeValidator(canonical_optimizer)] = key(
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
    resume_from_checkpoint: Annotated[str, AfterValidator(checkpoint_name)] | None = key(
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
        0.1, "Data", "Share of captions replaced by the empty prompt; none by 'dpo', 'mdpo', 'reward', 'trajectory_distillation'.",
        "probability", ge=0, le=1,
    )  # fmt: skip
    held_out_examples: int = key(64, "Data", "Rows kept from training for the held-out loss.", "rows", ge=0)
    max_bad_rows_fraction: float = key(
        0.01, "Data", "Training stops when more rows cannot be read.", "share of rows", ge=0, le=1
    )

    mask_outside_weight: float = key(
        0.0, "Data", "Figures with a mask: weight of the loss where the mask is black; where it is white it is 1.", ge=0, le=1
    )

    gen_loss_weight: float = key(1.0, "Edit", "Weight of the loss of figures without references.", ge=0)
    edit_loss_weight: float = key(1.0, "Edit", "Weight of the loss of edits: figures with references.", ge=0)
    edit_loss_mode: Literal["uniform", "weighted", "balanced"] = key(
        "uniform", "Edit", "Weights of an edit's loss: all tokens alike, edited ones more, or edited and kept ones as two parts."
    )
    edit_region_weight: float = key(10.0, "Edit", "Mode 'weighted': the weight of an edited token; a kept one's is 1.", gt=0)
    edit_loss_ratio: float = key(0.5, "Edit", "Mode 'balanced': the share of all edited tokens together.", "share", ge=0, le=1)
    preference: PreferenceConfig = key(
        PreferenceConfig, "Preference", "dict(mode=..., beta=...): training on preferences (objectives 'dpo' and 'mdpo')."
    )
    distill: DistillConfig = key(
        DistillConfig, "Distill", "dict(steps=..., guidance=...): learning to draw in few steps (trajectory_distillation)."
    )
    token_routing: TokenRoutingConfig = key(
        TokenRoutingConfig, "Token routing", "dict(share=..., first_block=..., last_block=...): tokens routed past blocks (TREAD)."
    )
    reward: RewardConfig = key(RewardConfig, "Reward", "dict(metrics=..., group_size=...): the objective 'reward'.")
    prefer: PreferConfig = key(PreferConfig, "Prefer", "dict(figures=..., pictures=...): groups of preferences from own pictures.")
    encode: EncodeConfig = key(
        EncodeConfig, "Encode", "dict(figures=..., resolution=...): how figures become encoded rows."
    )

    train_iteration_func_name: str = key(None, "Functions", "Registered objective; unset = that of model_type.")
    validation_func_name: str = key("generic_validation_func", "Functions", "Registered validation function.")

    validation_prompts: Annotated[list[str], BeforeValidator(tuple_as_list)] = key(
        [], "Validation", "Prompts drawn at each validation."
    )
    validation_images: list[str | list[str] | None] = key(
        [], "Validation", "Pictures that the prompts edit: a path, a list of paths or None for each, or [] for none."
    )
    resolution_list: Annotated[list[Size], BeforeValidator(tuple_as_list)] = key(
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
    embedded_guidance: float | None = key(
        None, "Flow matching", "Guidance that a transformer with such an input gets while training; None = 1.", "factor", ge=0
    )
    negative_prompt: str | None = key(None, "Validation", "Prompt to steer away from; None = the empty prompt.")
    num_inference_steps: int = key(28, "Validation", "Steps of a sampled picture.", "sampling steps", ge=1)
    validation_model: str | None = key(
        None, "Validation", "Another base of the same shapes (the distilled one) on which the adapter is drawn too: hub id, folder."
    )
    validation_model_steps: int | None = key(
        None, "Validation", "Steps on validation_model; None = 4 on a distilled model, else as on the base.", "sampling steps", ge=1
    )
    validation_model_guidance: float | None = key(
        None, "Validation", "Guidance on validation_model; None = 1 on a distilled model, else as on the base.", "factor", ge=0
    )
    validate_unquantized: bool = key(
        False, "Validation", "Draw validation pictures with the base as it was before quantising."
    )
    validation_seed: int = key(42, "Validation", "Seed of the validation pictures' noise.", ge=0)
    evaluate: EvaluateConfig = key(EvaluateConfig, "Evaluate", "dict(figures=..., metrics=[...]): numbers from drawn figures.")

    base_filesys_path: str = key(".", "Paths", "Folder that relative paths of this config start from.")
    model_output_dir: str = key("runs/scienceflow", "Paths", "Folder of the run.", min_length=1)
    image_output_dir: str | None = key(None, "Paths", "Validation pictures; None = model_output_dir/validation_images.")
    logging_dir: str = key("logs", "Paths", "Tracker files, inside model_output_dir.")

    report_to: Tracker | Annotated[list[Tracker], BeforeValidator(tuple_as_list)] | None = key(
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

    @property
    def trains_preferences(self) -> bool:
        """Whether the objective compares the policy with the one that training began with, on winners and losers."""
        return self.train_iteration_func_name in PREFERENCE_OBJECTIVES

    @property
    def distills(self) -> bool:
        """Whether the objective teaches the model that training began with to draw in few steps."""
        return self.train_iteration_func_name == DISTILLATION

    @property
    def needs_reference(self) -> bool:
        """Whether the objective runs the model that training began with beside the one that trains."""
        return self.trains_preferences or self.distills or (self.trains_rewards and self.reward.pull > 0) or self.dataset.keeps_base

    @property
    def trains_rewards(self) -> bool:
        """Whether the objective learns from pictures that the model itself draws while it trains."""
        return self.train_iteration_func_name == REWARD_OBJECTIVE

    def dataset_arguments(self) -> dict[str, Any]:
        """What the class of `dataset.type` is called with."""
        data = self.dataset
        common: dict[str, Any] = {"num_train_examples": data.num_train_examples, "stat_data": data.stat_data}
        if data.type == FIGURE_DATASET:
            changes = {"figures": data.figures, "resolution": data.resolution or self.encode.resolution}
            return {"encode": self.encode.model_copy(update=changes), **common}
        paths: dict[str, Any] = {"base_dir": data.base_dir, "parquet_base_path": data.parquet_base_path}
        if data.type == MIXED_DATASET:
            names = ("base_dir", "gen_parquet_path", "edit_parquet_path", "quality_filter")
            paths = {name: getattr(data, name) for name in names}
        if data.type == SOURCES_DATASET:
            paths = {"base_dir": data.base_dir, "sources": data.sources}
        if data.is_remote:
            common |= {"cache_dir": data.cache_dir, "cache_gb": data.cache_gb}
        if data.type == GROUP_DATASET:
            common |= {"preference": self.preference, "path_remapping": data.path_remapping}
        return {**paths, "with_text": self.text == "stored", **common}

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Values that follow from others, where they are not set themselves; applied twice, it changes nothing."""
        if not isinstance(given, dict):
            return given
        values = with_base_path(
            {k: v.model_dump(exclude_unset=True) if isinstance(v, Section) else v for k, v in given.items()},
            cls.model_fields["model_output_dir"].default,
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
            values["train_iteration_func_name"] = objective_of(str(family), bool(values.get("use_parquet_dataset")))
        return values

    @model_validator(mode="after")
    def _agree(self) -> Config:
        require_agreement(self)
        return self
