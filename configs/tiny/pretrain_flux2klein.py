"""The embedded model's transformer, all its weights from random ones, on an encoded store of drawn figures.

Command:  scienceflow encode configs/tiny/pretrain_flux2klein.py && scienceflow train configs/tiny/pretrain_flux2klein.py
          (after the VAE and the text encoder: `make pretrain` does all of it)
Cost:     see docs/embedded-model.md.
Result:   see docs/embedded-model.md.
"""

from OpenSciDraw.drawn.figure import draw_figure

_base_ = "pretrain_base.py"

pretrained_model_name_or_path = "runs/pretrain/base"  # trained VAE and text encoder, random transformer
encode = dict(figures="drawn:30000:seed=0:style=small", resolution=128, batch_size=32, samples_per_shard=2000, num_workers=0)

train_batch_size = 32
max_train_steps = 10000
learning_rate = 1e-3
lr_warmup_steps = 200
ema_decay = 0.999
caption_dropout = 0.1
timestep_shift = 10.0  # the prompt decides where sigma is above 0.8: see docs/embedded-model.md
logit_std = 1.5

validation_prompts = [draw_figure(1, index, 128, style="small").caption for index in range(16)]
resolution_list = [[128, 128]]
validation_steps = 1000
num_inference_steps = 20
guidance_scale = 3.0
held_out_examples = 64
checkpointing_steps = 250
model_output_dir = "runs/pretrain/transformer"
