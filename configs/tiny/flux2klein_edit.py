"""The small base model learns to edit drawn figures by instruction, by LoRA: recolour, relabel, add, remove, move, swap, redirect.

Command:  scienceflow encode configs/tiny/flux2klein_edit.py && scienceflow train configs/tiny/flux2klein_edit.py
Cost:     one CPU core: 7 min to encode, 57 min to train (with other work beside it).
Result:   docs/edit.md.
"""

_base_ = "flux2klein_demo.py"

encode = dict(figures="drawn:6000:seed=100:edit")
dataset = dict(base_dir="runs/edit")

rank = 64
lora_alpha = 64
learning_rate = 2.5e-3
lr_warmup_steps = 50
max_train_steps = 1800

validation_prompts = []
validation_steps = 600
evaluate = dict(figures="drawn:64:seed=9:edit", metrics=["edit", "structure"])
held_out_examples = 64

model_output_dir = "runs/edit/train"
checkpointing_steps = 300
logging_steps = 20
