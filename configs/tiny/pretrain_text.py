"""The embedded model's Qwen3 as a language model on captions, so that its hidden states mean something.

Command:  scienceflow train configs/tiny/pretrain_text.py
Cost:     one CPU core, see docs/embedded-model.md.
Result:   see docs/embedded-model.md.
"""

_base_ = "pretrain_base.py"

model_type = "Flux2KleinText"
train_iteration_func_name = "caption_language_model"
validation_func_name = "caption_language_model_validation_func"
dataset = dict(_delete_=True, type="FigureDataset", figures="drawn:40000:seed=0:style=small", resolution=128)
mixed_precision = "no"  # matrices this small are faster in fp32

train_batch_size = 32
max_train_steps = 3200
learning_rate = 2e-3
lr_warmup_steps = 100
ema_decay = 0.995
held_out_examples = 0
validation_steps = 200
checkpointing_steps = 200
model_output_dir = "runs/pretrain/text"
