"""The small base model learns to copy its reference: mosaics that stay as they are. The first stage of learning edits.

Command:  scienceflow encode configs/tiny/flux2klein_edit_copy.py && scienceflow train configs/tiny/flux2klein_edit_copy.py
          (then flux2klein_edit.py)
Cost:     one CPU core with bf16 instructions: 3 min to encode, 6 min to train.
Result:   docs/edit.md.
"""

_base_ = "pretrain_base.py"

pretrained_model_name_or_path = "embedded:flux2_klein_tiny"
max_sequence_length = 44  # the longest instruction of drawn edits has 43 tokens with its template
encode = dict(figures="drawn:3000:seed=5:style=mosaic:edit", resolution=128, batch_size=32, samples_per_shard=1000, num_workers=0)
dataset = dict(base_dir="runs/edit_copy")

train_batch_size = 32
max_train_steps = 130
learning_rate = 1e-3
lr_scheduler = "constant_with_warmup"
lr_warmup_steps = 20
ema_decay = 0.99
caption_dropout = 0.05
timestep_shift = 40.0  # nearly all noise: what is drawn must come from the reference
logit_std = 1.5

validation_prompts = []
resolution_list = [[128, 128]]
validation_steps = 65
held_out_examples = 64
num_inference_steps = 6
guidance_scale = 1.0
checkpointing_steps = 65
model_output_dir = "runs/edit_copy/train"
logging_steps = 10
