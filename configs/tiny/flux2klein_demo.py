"""The whole path in minutes on a CPU: drawn figures, and a small model of FLUX.2-klein's own classes.

Command:  scienceflow encode configs/tiny/flux2klein_demo.py && scienceflow train configs/tiny/flux2klein_demo.py
Cost:     two CPU cores, minutes; see `make demo`.
Result:   see docs; a model of this size learns layout and colour, not lettering.
"""

from OpenSciDraw.datasets.drawn import draw_figure

model_type = "Flux2Klein"
pretrained_model_name_or_path = "embedded:flux2_klein_tiny_random"
max_sequence_length = 128

encode = dict(figures="drawn:2000:size=128", resolution=128, batch_size=16)
use_parquet_dataset = True
dataset = dict(type="ArXiVParquetDatasetV2", base_dir="runs/demo", parquet_base_path="store")

rank = 64
lora_alpha = 64
lora_layers = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "linear_in,linear_out,to_qkv_mlp_proj,attn.to_out,"
    "x_embedder,context_embedder,proj_out"  # the base is random, so its projections have to learn as well
)

optimizer = "AdamW"
learning_rate = 5e-3
lr_scheduler = "cosine"
lr_warmup_steps = 20
train_batch_size = 4
max_train_steps = 1200
gradient_checkpointing = False
mixed_precision = "bf16"
dataloader_num_workers = 0

# Captions of figures of another seed than the training figures'; demo.py draws these figures as references.
validation_prompts = [draw_figure(1, index, 128).caption for index in range(4)]
resolution_list = [list(draw_figure(1, index, 128).image.size) for index in range(4)]
validation_steps = 400
num_inference_steps = 20
guidance_scale = 2.0

model_output_dir = "runs/demo/train"
checkpointing_steps = 400
checkpoints_total_limit = 2
resume_from_checkpoint = "latest"
report_to = "none"
logging_steps = 10
