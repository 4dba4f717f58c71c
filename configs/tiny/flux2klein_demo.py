"""The whole path in minutes on a CPU: drawn figures, and a small model of FLUX.2-klein's own classes.

Command:  scienceflow encode configs/tiny/flux2klein_demo.py && scienceflow train configs/tiny/flux2klein_demo.py
Cost:     two CPU cores, minutes; see `make demo`.
Result:   see docs; a model of this size learns layout and colour, not lettering.
"""

model_type = "Flux2Klein"
pretrained_model_name_or_path = "embedded:flux2_klein_tiny"
max_sequence_length = 128

encode = dict(figures="drawn:2000", resolution=128, batch_size=16)
use_parquet_dataset = True
dataset = dict(type="ArXiVParquetDatasetV2", base_dir="runs/demo", parquet_base_path="store")

rank = 32
lora_alpha = 32
lora_layers = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"
)

optimizer = "AdamW"
learning_rate = 1e-3
lr_warmup_steps = 0
train_batch_size = 8
max_train_steps = 300
gradient_checkpointing = False
mixed_precision = "no"
dataloader_num_workers = 0

validation_prompts = [
    "The figure illustrates a flowchart with three boxes labelled 'Input', 'Model' and 'Output', joined by arrows.",
    "A bar plot with four bars.",
]
resolution_list = [[128, 128]]
validation_steps = 150
num_inference_steps = 20
guidance_scale = 2.0

model_output_dir = "runs/demo/train"
checkpointing_steps = 150
checkpoints_total_limit = 2
resume_from_checkpoint = "latest"
report_to = "none"
logging_steps = 10
