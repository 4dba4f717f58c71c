"""A complete example: from scored pictures to a LoRA of FLUX.2-klein that prefers the better ones. Edit the lines marked EDIT.

Command:  accelerate launch train_OpenSciDraw_loop.py configs/examples/flux2klein_mdpo.py
          scienceflow sample runs/my_preferences --prompt "The figure illustrates ..."
Cost:     a step is about 5 to 6 times as long as one of flow matching with the same batch, because a sample is up to four pictures
          and the reference runs as well: `scienceflow plan configs/examples/flux2klein_mdpo.py --gpu H100-80GB` counts it.
Result:   not measured by us. docs/preferences.md says what to watch.
"""

# The model whose pictures were scored: the base, with the LoRA of the fine-tuning before this fused into it.
model_type = "Flux2Klein"
pretrained_model_name_or_path = "black-forest-labs/FLUX.2-klein-base-4B"  # EDIT, or a local diffusers folder
pretrained_lora_ckpt_path = "runs/my_figures"  # EDIT; None where the base itself drew the pictures (then fuse_... = False)
fuse_pretrained_lora = True  # the reference is then the base with it, and a new adapter trains
max_sequence_length = 512  # as the captions were encoded

# 1. The groups: a store with groups.parquet beside its figures/, or the published parquet of scored pictures.
use_parquet_dataset = True
dataset = dict(
    type="PreferenceGroups",
    base_dir="data",  # EDIT
    parquet_base_path="my_groups",  # EDIT
)

# 2. What is compared, and by which rules groups are made of scored pictures (docs/preferences.md has all of them).
train_iteration_func_name = "mdpo"  # or "dpo": each loser is a pair of its own with the winner
preference = dict(
    mode="contrastive",  # or "adaptive", "mean"
    beta=100.0,
    max_margin=0.01,  # EDIT after a look at loss_sigma_... of the first steps: a few hundredths of the loss
    winner_weight=10.0,  # raise it when preference_winner_change rises
    axis_weights=dict(component=1.0, arrow=1.0, text=1.0),
    min_pictures=6,
    min_reward=0.70,
    min_gap=0.30,
)
weighting_scheme = "logit_normal"  # as the paper says; the published config has "none"
timestep_shift = "resolution"

# 3. What is trained: every linear layer of the transformer's blocks.
rank = 64
lora_alpha = 64
lora_layers = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"
)

# 4. How long, and how. Preferences need a smaller rate and fewer steps than figures.
optimizer = "AdamW"
learning_rate = 2e-5
lr_scheduler = "constant_with_warmup"
lr_warmup_steps = 50
train_batch_size = 1  # groups
gradient_accumulation_steps = 16
max_train_steps = 500
mixed_precision = "bf16"
gradient_checkpointing = True
held_out_examples = 64  # winners that are never trained on, for the held-out loss

# 5. What to look at on the way.
validation_prompts = [  # EDIT
    "The figure illustrates a two-stage pipeline with boxes labelled 'Retriever' and 'Reader'.",
]
resolution_list = [[1024, 768]]
validation_steps = 100
num_inference_steps = 28
guidance_scale = 3.5
logging_steps = 5

# 6. Where the run lives. The same command resumes it.
model_output_dir = "runs/my_preferences"  # EDIT
checkpointing_steps = 100
resume_from_checkpoint = "latest"
report_to = "none"  # "wandb", "tensorboard", "trackio": beside metrics.jsonl
