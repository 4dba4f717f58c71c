"""LoRA on Krea 2 (raw, 12.8B): attention and feed-forward of all blocks, those that fuse the text with them.

Command:  accelerate launch train_OpenSciDraw_loop.py configs/examples/krea2_lora.py
Data:     add --cfg_options dataset.base_dir=/path/to/data encode.figures=/path/to/figures (encode likewise, before).
Cost:     `scienceflow plan configs/examples/krea2_lora.py --gpu A100-80GB`; not measured by us.
Result:   not measured by us.
"""

_base_ = "../base_config.py"

model_type = "Krea2"
pretrained_model_name_or_path = "krea/Krea-2-Raw"  # gated; Krea-2-Turbo is distilled and is refused
max_sequence_length = 512  # tokens with the template's end; 60 KiB each in the store, in bf16

lora_layers = "to_q,to_k,to_v,to_gate,to_out.0,ff.gate,ff.up,ff.down"
train_batch_size = 1
gradient_accumulation_steps = 2

dataset = dict(parquet_base_path="ArXiV_parquet/Krea2_latents/")

guidance_scale = 5.5  # the pipeline's default, 4.5, counts from 0
num_inference_steps = 28

run_name = "krea2_lora"
tracker_name = "ScienceFlow-Krea2"
model_output_dir = "runs/krea2_lora"
