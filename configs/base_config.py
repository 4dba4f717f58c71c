"""The base of the experiments: a LoRA on FLUX.2-klein-base-9B, on figures encoded beforehand.

An experiment is a small file with `_base_ = '../base_config.py'` and what differs.
`scienceflow config --schema` prints every key with its unit, default and meaning;
`scienceflow config configs/my_experiment.py` prints the resolved values and where each was set.
Paths and secrets of a machine do not belong here: give paths in a file of your own or by --cfg_options, and
log in with `hf auth login` and `wandb login` (or set HF_TOKEN and WANDB_API_KEY).
"""

# Run
seed = 42

# Model. klein-base-9B is gated: accept its licence on the hub and log in. klein-base-4B is not.
model_type = "Flux2Klein"
pretrained_model_name_or_path = "black-forest-labs/FLUX.2-klein-base-9B"
max_sequence_length = 512  # tokens; the pipeline's default, up to 1024

# LoRA. Strength is lora_alpha / rank: 1.0 here.
use_lora = True
rank = 128
lora_alpha = 128
lora_dropout = 0.0
lora_layers = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"
)

# Size. Effective batch = train_batch_size x gradient_accumulation_steps x number of GPUs.
train_batch_size = 2  # per GPU, on 80 GB
gradient_accumulation_steps = 1
gradient_checkpointing = True
num_train_epochs = 2
max_train_steps = 50000  # whichever comes first
dataloader_num_workers = 4

# Optimizer. Prodigy finds its own rate: learning_rate stays 1.0. For AdamW take 1e-4 or so.
optimizer = "prodigy"
learning_rate = 1.0
lr_scheduler = "constant"
lr_warmup_steps = 0
max_grad_norm = 1.0

# Precision. On Apple Silicon use "fp16".
mixed_precision = "bf16"

# Flow matching. logit_mean has diffusers' meaning: positive is LESS noise.
weighting_scheme = "none"
timestep_shift = "none"  # "resolution" trains on more noise at larger sizes

# Data: the store that `scienceflow encode` writes to base_dir/parquet_base_path.
use_parquet_dataset = True
dataset = dict(
    type="ArXiVParquetDatasetV2",
    base_dir="data",
    parquet_base_path="ArXiV_parquet/Flux2Klein_latents/",
    num_train_examples=None,  # None = all
    stat_data=False,  # print the table of rows per bucket
)
data_sampler = dict(type="ArXiVMixScaleBatchSampler", shuffle=True, drop_last=False)
text = "stored"  # "online": no embeddings on disk (12.6 MB a caption), encoded while training
caption_dropout = 0.1
held_out_examples = 64

# Encode: where the figures are (a folder, .jsonl, .csv, .parquet) and the bucket grid.
encode = dict(figures=None, resolution=768)

# Validation
validation_prompts = [
    "The figure illustrates an encoder-decoder model. A box labelled 'Encoder' is connected by an arrow to a box "
    "labelled 'Decoder'.",
    "A line plot of training loss against steps with two curves labelled 'baseline' and 'ours'.",
]
resolution_list = [[1024, 768], [768, 768]]  # [width, height] of each prompt's picture
validation_steps = 500
num_inference_steps = 28
guidance_scale = 3.5

# Checkpoints
checkpointing_steps = 1000
checkpoints_total_limit = 3
resume_from_checkpoint = "latest"

# Paths
model_output_dir = "runs/flux2klein_lora"

# Logging
report_to = "wandb"
tracker_name = "ScienceFlow-Flux2Klein"
logging_steps = 10
