"""The embedded model's VAE decoder alone, so that letters stay legible; after pretrain_vae.py, whose encoder it keeps.

Command:  scienceflow train configs/tiny/pretrain_decoder.py
          (then pretrain_decoder_again.py)
Cost:     one CPU core with bf16 instructions: 20 min.
Result:   see docs/embedded-model.md.
"""

_base_ = "pretrain_vae.py"

pretrained_full_ckpt_path = "runs/pretrain/vae"
train_iteration_func_name = "vae_decoder_reconstruction"
dataset = dict(figures="drawn:8000:seed=0:style=mixed")

max_train_steps = 2400
learning_rate = 5e-4
validation_steps = 200
checkpointing_steps = 200
model_output_dir = "runs/pretrain/decoder"
