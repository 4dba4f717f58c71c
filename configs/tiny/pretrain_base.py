"""What the three stages of the embedded model's pretraining share; see docs/embedded-model.md and pretrain.py."""

model_type = "Flux2Klein"
pretrained_model_name_or_path = "embedded:flux2_klein_tiny_start"
max_sequence_length = 84  # the longest caption of the small style has 83 tokens with its template

use_lora = False
use_ema = True
ema_steps = 10
optimizer = "AdamW"
adam_beta2 = 0.99
adam_weight_decay = 0.01
lr_scheduler = "cosine"
gradient_checkpointing = False
mixed_precision = "bf16"
upcast_before_saving = True
dataloader_num_workers = 0

dataset = dict(base_dir="runs/pretrain", parquet_base_path="store")
resume_from_checkpoint = "latest"
checkpoints_total_limit = 2
report_to = "none"
