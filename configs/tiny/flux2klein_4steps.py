"""The small base model learns to draw in 4 steps without guidance what it draws in 12 steps with guidance 3; all weights.

Command:  scienceflow encode configs/tiny/flux2klein_4steps.py && scienceflow train configs/tiny/flux2klein_4steps.py
          scienceflow evaluate runs/4steps/train --figures drawn:500:seed=9:style=small
Cost:     one CPU core: 38 min to train; 10 min beside other work to encode.
Result:   docs/few-steps.md.
"""

from OpenSciDraw.drawn.figure import draw_figure

_base_ = "flux2klein_demo.py"

train_iteration_func_name = "trajectory_distillation"
distill = dict(steps=4, teacher_steps=12, guidance=3.0, inputs="data")

encode = dict(figures="drawn:9000:seed=0:style=small", resolution=128, batch_size=64, samples_per_shard=1000, num_workers=0)
dataset = dict(base_dir="runs/4steps")

use_lora = False
mixed_precision = "no"
train_batch_size = 16
learning_rate = 3e-4
adam_beta2 = 0.99
adam_weight_decay = 0.0
lr_warmup_steps = 10
max_train_steps = 500

validation_prompts = [draw_figure(1, index, 128, style="small").caption for index in range(8)]
validation_steps = 500
evaluate = dict(figures="drawn:64:seed=9:style=small", metrics=["structure"])
held_out_examples = 8
checkpointing_steps = 50
logging_steps = 5

model_output_dir = "runs/4steps/train"
