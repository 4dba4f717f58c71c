"""The embedded model's VAE decoder alone, so that letters stay legible; after pretrain_vae.py, whose encoder it keeps.

Command:  scienceflow train configs/tiny/pretrain_decoder.py
          The shipped decoder learned a second time, from there:
          scienceflow train configs/tiny/pretrain_decoder.py --cfg_options train_batch_size=4 max_train_steps=3600 ema_decay=0.995
          pretrained_full_ckpt_path=runs/pretrain/decoder model_output_dir=runs/pretrain/decoder_again
Cost:     one CPU core with bf16 instructions: 20 min, the second time 15 min.
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
