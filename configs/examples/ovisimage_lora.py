"""LoRA on Ovis-Image (7B), a model made for legible text: attention of all 33 blocks.

Command:  accelerate launch train_OpenSciDraw_loop.py configs/examples/ovisimage_lora.py
Data:     add --cfg_options dataset.base_dir=/path/to/data encode.figures=/path/to/figures (encode likewise, before).
Cost:     `scienceflow plan configs/examples/ovisimage_lora.py --gpu RTX4090-24GB`; not measured by us.
Result:   not measured by us.
"""

_base_ = "../base_config.py"

model_type = "OvisImage"
pretrained_model_name_or_path = "AIDC-AI/Ovis-Image-7B"
max_sequence_length = 256  # tokens without the system prompt; the released pipeline takes no more, and its pads are read

lora_layers = "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out"
train_batch_size = 1
gradient_accumulation_steps = 2

dataset = dict(parquet_base_path="ArXiV_parquet/OvisImage_latents/")

guidance_scale = 5.0
num_inference_steps = 50

run_name = "ovisimage_lora"
tracker_name = "ScienceFlow-OvisImage"
model_output_dir = "runs/ovisimage_lora"
