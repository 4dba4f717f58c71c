"""The embedded base model learns from rewards that are read from its own pictures: components, arrows and labels.

Command:  scienceflow train configs/tiny/flux2klein_reward.py
Cost:     one CPU core; a round of four steps (24 pictures drawn) takes 12 s of it in bf16, where it has instructions for that.
Result:   see docs/reward.md.
"""

from OpenSciDraw.drawn.figure import draw_figure

model_type = "Flux2Klein"
pretrained_model_name_or_path = "embedded:flux2_klein_tiny"
max_sequence_length = 84

# Prompts with ground truth. Seed 0 is that of the base's own training, 1 and 9 are those of tests.
dataset = dict(type="FigureDataset", figures="drawn:9000:seed=5:style=small", resolution=128)

train_iteration_func_name = "reward"
reward = dict(
    metrics={
        "structure.components": 1.0,
        "structure.arrows": 1.0,
        "structure.labels": 1.0,
        "structure.one_letter_labels": 0.0,  # logged, not rewarded, as the next two
        "structure.colour": 0.0,
        "structure.shape": 0.0,
    },
    group_size=2,
    include_figure=True,  # all pictures of a prompt mostly have the same letters wrong, and then there is nothing else to learn
    draw_steps=6,
    draw_guidance=1.0,  # this base draws as well without guidance
    steps_per_round=4,
    processes=1,
    advantage_limit=1.0,  # of two pictures one is wholly good and one wholly bad
    pull=1.0,  # with 0.1 and a rate of 1.5e-4 the held-out loss rose by half within 60 steps
)

use_lora = False
optimizer = "AdamW"
learning_rate = 3e-5
lr_scheduler = "constant_with_warmup"
lr_warmup_steps = 20
use_ema = True
ema_steps = 1
ema_decay = 0.99
adam_beta2 = 0.99
adam_weight_decay = 0.0
train_batch_size = 24  # prompts
max_train_steps = 400
timestep_shift = 10.0
logit_std = 1.5  # the prompt decides where sigma is above 0.8
gradient_checkpointing = False
mixed_precision = "no"  # on this CPU fp32 is faster at these sizes
dataloader_num_workers = 0
held_out_examples = 32

validation_prompts = [draw_figure(1, index, 128, style="small").caption for index in range(8)]
resolution_list = [[128, 128]]
validation_steps = 60
num_inference_steps = 6
guidance_scale = 1.0

model_output_dir = "runs/reward"
checkpointing_steps = 20
resume_from_checkpoint = "latest"
report_to = "none"
logging_steps = 1
