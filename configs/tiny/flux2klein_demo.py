"""`make demo`: the embedded base model learns a house style by LoRA: hand-drawn strokes, three colours and a shape unknown to it.

Command:  scienceflow encode configs/tiny/flux2klein_demo.py && scienceflow train configs/tiny/flux2klein_demo.py
Cost:     two CPU cores, minutes; see `make demo`.
Result:   see docs/embedded-model.md.
"""

from OpenSciDraw.drawn.figure import draw_figure

model_type = "Flux2Klein"
pretrained_model_name_or_path = "embedded:flux2_klein_tiny"
max_sequence_length = 84

encode = dict(figures="drawn:1000:style=house", resolution=128, batch_size=16)
use_parquet_dataset = True
dataset = dict(type="ArXiVParquetDatasetV2", base_dir="runs/demo", parquet_base_path="store")

rank = 32
lora_alpha = 32
lora_layers = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"
)

optimizer = "AdamW"
learning_rate = 5e-3
lr_scheduler = "cosine"
lr_warmup_steps = 20
train_batch_size = 16
max_train_steps = 300
timestep_shift = 10.0  # as the base was trained
logit_std = 1.5
gradient_checkpointing = False
mixed_precision = "bf16"
dataloader_num_workers = 0

# Captions of figures of another seed than the training figures'.
validation_prompts = [draw_figure(1, index, 128, style="house").caption for index in range(8)]
resolution_list = [[128, 128]]
validation_steps = 100
num_inference_steps = 20
guidance_scale = 3.0
evaluate = dict(figures="drawn:64:seed=9:style=house", metrics=["structure"])

model_output_dir = "runs/demo/train"
checkpointing_steps = 100
checkpoints_total_limit = 2
resume_from_checkpoint = "latest"
report_to = "none"
logging_steps = 10
