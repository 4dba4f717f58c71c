"""The embedded model's VAE, from random weights to figures rebuilt; the first stage of `make pretrain`.

Command:  scienceflow train configs/tiny/pretrain_vae.py
Cost:     one CPU core, see docs/embedded-model.md.
Result:   see docs/embedded-model.md.
"""

_base_ = "pretrain_base.py"

model_type = "Flux2KleinVAE"
train_iteration_func_name = "vae_reconstruction"
validation_func_name = "vae_reconstruction_validation_func"
dataset = dict(_delete_=True, type="FigureDataset", figures="drawn:20000:seed=0:style=mixed", resolution=128)

train_batch_size = 8
max_train_steps = 5600
learning_rate = 1.5e-3
lr_warmup_steps = 100
ema_decay = 0.99
held_out_examples = 0
validation_steps = 500
checkpointing_steps = 250
model_output_dir = "runs/pretrain/vae"
