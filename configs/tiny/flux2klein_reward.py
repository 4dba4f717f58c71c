"""The embedded base model learns from rewards that are read from its own pictures: components, arrows and labels.

Command:  scienceflow train configs/tiny/flux2klein_reward.py
Cost:     one CPU core; see docs/reward.md.
Result:   see docs/reward.md.
"""

from OpenSciDraw.drawn.figure import draw_figure

model_type = "Flux2Klein"
pretrained_model_name_or_path = "embedded:flux2_klein_tiny"
max_sequence_length = 84

# Prompts with ground truth. Seed 0 is that of the base's own training, 1 and 9 are those of tests.
dataset = dict(type="FigureDataset", figures="drawn:2000:seed=5:style=small", resolution=128)

train_iteration_func_name = "reward"
reward = dict(
    metrics={
        "structure.components": 1.0,
        "structure.arrows": 1.0,
        "structure.labels": 1.0,
        "structure.one_letter_labels": 0.0,  # logged
        "structure.colour": 0.0,
        "structure.shape": 0.0,
    },
    group_size=8,
    draw_steps=8,
    processes=1,
)

use_lora = False
optimizer = "AdamW"
learning_rate = 1e-5
lr_scheduler = "constant_with_warmup"
lr_warmup_steps = 5
adam_weight_decay = 0.0
train_batch_size = 4  # prompts
gradient_accumulation_steps = 2
max_train_steps = 100
timestep_shift = 3.0
gradient_checkpointing = False
mixed_precision = "no"
dataloader_num_workers = 0
held_out_examples = 32

validation_prompts = [draw_figure(1, index, 128, style="small").caption for index in range(8)]
resolution_list = [[128, 128]]
validation_steps = 50
num_inference_steps = 20
guidance_scale = 3.0

model_output_dir = "runs/reward"
checkpointing_steps = 10
resume_from_checkpoint = "latest"
report_to = "none"
logging_steps = 1
