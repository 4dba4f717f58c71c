"""All weights of FLUX.2-klein-base-9B, averaged, on eight 80 GB GPUs.

Command:  accelerate launch --config_file accelerate_cfg/1m8g_fsdp2.yaml \\
              train_OpenSciDraw_loop.py configs/260120/flux2klein_fulltune.py
Data:     add --cfg_options dataset.base_dir=/path/to/data encode.figures=/path/to/figures (encode likewise, before).
Cost:     published for a full fine-tune on 4 x A100-80GB at 768 px: 1.3-2.0 images/s. `scienceflow plan` computes yours.
Result:   not measured by us.
"""

_base_ = "../base_config.py"

use_lora = False
optimizer = "AdamW"
learning_rate = 1e-5
lr_scheduler = "constant_with_warmup"
lr_warmup_steps = 500
train_batch_size = 1

use_ema = True
ema_decay = 0.9999
ema_steps = 10

checkpoints_total_limit = 2  # about 144 GB each: fp32 weights, average, optimizer state
run_name = "flux2klein_fulltune"
model_output_dir = "runs/flux2klein_fulltune"
