"""LoRA on FLUX.2-dev (32B), the large sibling of klein: attention and feed-forward of all 56 blocks, base in 8 bits.

Command:  accelerate launch train_OpenSciDraw_loop.py configs/examples/flux2dev_lora.py
Data:     add --cfg_options dataset.base_dir=/path/to/data encode.figures=/path/to/figures (encode likewise, before).
Cost:     `scienceflow plan configs/examples/flux2dev_lora.py --gpu H100-80GB`; not measured by us.
Result:   not measured by us.
"""

_base_ = "../base_config.py"

model_type = "Flux2Dev"
pretrained_model_name_or_path = "black-forest-labs/FLUX.2-dev"  # gated: accept its licence, set HF_TOKEN
max_sequence_length = 512  # tokens with the template; pads are kept

lora_layers = "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"
rank = 32
lora_alpha = 32
quantization = "int8"
train_batch_size = 1
gradient_accumulation_steps = 2

dataset = dict(parquet_base_path="ArXiV_parquet/Flux2Dev_latents/")

embedded_guidance = 1.0  # while training; see docs/flux2-dev.md
guidance_scale = 4.0  # of pictures
num_inference_steps = 50

run_name = "flux2dev_lora"
tracker_name = "ScienceFlow-Flux2Dev"
model_output_dir = "runs/flux2dev_lora"
