"""A complete example: a LoRA of FLUX.2-klein that learns from scores of pictures that it draws itself. Edit the lines marked EDIT.

Command:  accelerate launch train_OpenSciDraw_loop.py configs/examples/flux2klein_reward.py
          scienceflow report runs/my_rewards
Cost:     drawing takes most of it: `scienceflow plan configs/examples/flux2klein_reward.py --gpu H100-80GB` counts it.
Result:   not measured by us on the large model. docs/reward.md says what to watch.
"""

# The model that draws: the base, with the LoRA of the fine-tuning before this fused into it.
model_type = "Flux2Klein"
pretrained_model_name_or_path = "black-forest-labs/FLUX.2-klein-base-4B"  # EDIT, or a local diffusers folder
pretrained_lora_ckpt_path = "runs/my_figures"  # EDIT; None to start from the base itself (then fuse_... = False)
fuse_pretrained_lora = True  # the pull is then to the base with it, and a new adapter trains
max_sequence_length = 512

# 1. The prompts. Drawn figures have ground truth, so that structure, arrows and labels can be read back and scored.
dataset = dict(type="FigureDataset", figures="drawn:5000:size=512", resolution=512)
held_out_examples = 64  # figures whose loss is watched

# 2. What is drawn, what is rewarded, and what must not become worse.
train_iteration_func_name = "reward"
reward = dict(
    metrics={
        "structure.components": 1.0,
        "structure.arrows": 1.0,
        "structure.labels": 1.0,
        "structure.colour": 0.0,  # logged, not rewarded
    },
    group_size=8,
    draw_steps=10,
    draw_guidance=1.0,  # EDIT: as validation's (None) where the model draws badly without guidance
    draw_batch=8,
    steps_per_round=1,
    processes=8,  # EDIT: cores that are free beside the training
    pull=0.1,
    watch={"held_out_loss": 0.25, "structure/colour": 0.05},  # what is not rewarded must not become worse by such a share
)
weighting_scheme = "none"
timestep_shift = "resolution"

# 3. What is trained: every linear layer of the transformer's blocks.
rank = 32
lora_alpha = 64
lora_layers = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"
)

# 4. How long, and how.
optimizer = "AdamW"
learning_rate = 3e-4
lr_scheduler = "constant_with_warmup"
lr_warmup_steps = 10
train_batch_size = 1  # prompts
gradient_accumulation_steps = 6
max_train_steps = 500
mixed_precision = "bf16"
gradient_checkpointing = True

# 5. What to look at on the way: pictures, and metrics that are not rewarded.
validation_func_name = "evaluate_validation_func"
evaluate = dict(figures="drawn:64:seed=9:size=512", metrics=["structure", "distribution"])
validation_prompts = [  # EDIT
    "The figure illustrates a two-stage pipeline with boxes labelled 'Retriever' and 'Reader'.",
]
resolution_list = [[512, 512]]
validation_steps = 25
num_inference_steps = 28
guidance_scale = 3.5
logging_steps = 1

# 6. Where the run lives. The same command resumes it.
model_output_dir = "runs/my_rewards"  # EDIT
checkpointing_steps = 25
resume_from_checkpoint = "latest"
report_to = "none"  # "wandb", "tensorboard", "trackio": beside metrics.jsonl
