"""The embedded base model is trained on preferences of its own pictures, made without a judge: M-DPO by LoRA.

Command:  scienceflow prefer configs/tiny/flux2klein_prefer.py --out runs/prefer/set --batch_size 32
          scienceflow train configs/tiny/flux2klein_prefer.py
          scienceflow evaluate runs/prefer/train --compare configs/tiny/flux2klein_prefer.py
Cost:     one CPU core, with mixed_precision=bf16 where it has instructions for it: 20 min to draw 4,000 pictures, score and encode,
          11 min to train.
Result:   docs/prefer.md, "What training on them gave".
"""

model_type = "Flux2Klein"
pretrained_model_name_or_path = "embedded:flux2_klein_tiny"
max_sequence_length = 84
mixed_precision = "no"

# 1. Pictures of prompts that no evaluation uses, and the rules by which they become groups.
# One drawn picture of each, beside the prompt's own figure, which wins wherever the model fails.
prefer = dict(figures="drawn:4000:seed=33:style=small", pictures=2, include_figure=True)
encode = dict(resolution=128, batch_size=16, num_workers=0)
dataset = dict(type="PreferenceGroups", base_dir="runs/prefer/set", parquet_base_path="store")

# 2. What is trained on them.
train_iteration_func_name = "mdpo"
preference = dict(
    mode="contrastive",
    beta=100.0,
    max_margin=0.01,
    winner_weight=20.0,
    axis_weights=dict(component=2.0, arrow=3.0, text=1.0),  # of 2,421 losers 80 fail by an arrow, 2,095 by a text
)
weighting_scheme = "logit_normal"
timestep_shift = 10.0  # as the base was trained
logit_std = 1.5
rank = 32
lora_alpha = 32
lora_layers = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"
)
learning_rate = 3e-4
lr_scheduler = "cosine"
lr_warmup_steps = 10
train_batch_size = 4  # groups
max_train_steps = 1000
gradient_checkpointing = False
dataloader_num_workers = 0
held_out_examples = 16

# 3. How pictures are drawn and measured.
num_inference_steps = 6
guidance_scale = 1.0
evaluate = dict(figures="drawn:500:seed=9:style=small", metrics=["structure"], batch_size=32)
validation_steps = 250
logging_steps = 10

model_output_dir = "runs/prefer/train"
checkpointing_steps = 250
checkpoints_total_limit = 2
resume_from_checkpoint = "latest"
report_to = "none"
