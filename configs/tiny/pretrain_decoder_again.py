"""The decoder of pretrain_decoder.py once more, from there: smaller batches, other figures, the rate up and down again.

Command:  scienceflow train configs/tiny/pretrain_decoder_again.py
Cost:     one CPU core with bf16 instructions: 15 min.
Result:   see docs/embedded-model.md.
"""

_base_ = "pretrain_decoder.py"

pretrained_full_ckpt_path = "runs/pretrain/decoder"
dataset = dict(figures="drawn:8000:seed=3:style=mixed")

train_batch_size = 4
max_train_steps = 3600
ema_decay = 0.995
validation_steps = 400
checkpointing_steps = 400
model_output_dir = "runs/pretrain/decoder_again"
