"""Configs to start from, where the folder holds none yet. Values alone, as in configs/tiny and configs/base_config.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LAYERS = "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"
_STORE = {"type": "ArXiVParquetDatasetV2", "base_dir": "stores", "parquet_base_path": "figures"}
_EVERY = {"use_parquet_dataset": True, "dataset": _STORE, "lora_layers": _LAYERS, "report_to": "none",
          "resume_from_checkpoint": "latest"}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """`title` is what the page says of it."""

    title: str
    values: dict[str, Any]


RECIPES: dict[str, Recipe] = {
    "tiny": Recipe("The embedded small base, LoRA: minutes on a CPU", {
        **_EVERY, "model_type": "Flux2Klein", "pretrained_model_name_or_path": "embedded:flux2_klein_tiny",
        "max_sequence_length": 84, "encode": {"resolution": 128, "batch_size": 16}, "rank": 32, "lora_alpha": 32,
        "learning_rate": 5e-3, "lr_scheduler": "cosine",
        "lr_warmup_steps": 20, "train_batch_size": 16, "max_train_steps": 300, "timestep_shift": 10.0, "logit_std": 1.5,
        "gradient_checkpointing": False, "dataloader_num_workers": 0, "resolution_list": [[128, 128]], "validation_steps": 100,
        "num_inference_steps": 20, "guidance_scale": 3.0, "checkpointing_steps": 100, "checkpoints_total_limit": 2,
        "held_out_examples": 8, "evaluate": {"figures": "drawn:64:seed=9:style=small"},
    }),
    "klein-4B": Recipe("FLUX.2-klein-base-4B, LoRA of rank 128: one GPU of 24 GB or more", {
        **_EVERY, "model_type": "Flux2Klein", "pretrained_model_name_or_path": "black-forest-labs/FLUX.2-klein-base-4B",
        "max_sequence_length": 512, "rank": 128, "lora_alpha": 128, "optimizer": "prodigy", "learning_rate": 1.0,
        "lr_warmup_steps": 0, "train_batch_size": 1,
        "gradient_accumulation_steps": 2, "max_train_steps": 5000, "encode": {"resolution": 768},
        "validation_steps": 500, "checkpointing_steps": 500, "checkpoints_total_limit": 3, "guidance_scale": 4.0,
    }),
}  # fmt: skip
