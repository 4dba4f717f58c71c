"""LoRA on Z-Image (6B): attention and feed-forward of all 34 blocks, the model that most users of small GPUs train.

Command:  accelerate launch train_OpenSciDraw_loop.py configs/examples/zimage_lora.py
Data:     add --cfg_options dataset.base_dir=/path/to/data encode.figures=/path/to/figures (encode likewise, before).
Cost:     `scienceflow plan configs/examples/zimage_lora.py --gpu RTX4090-24GB`; not measured by us.
Result:   not measured by us.
"""

_base_ = "../base_config.py"

model_type = "ZImage"
pretrained_model_name_or_path = "Tongyi-MAI/Z-Image"  # open; Z-Image-Turbo is distilled and is refused
max_sequence_length = 512  # tokens with the template; rows are trimmed, so a short caption costs what it is long

lora_layers = "to_q,to_k,to_v,to_out.0,feed_forward.w1,feed_forward.w2,feed_forward.w3"
train_batch_size = 1
gradient_accumulation_steps = 2

dataset = dict(parquet_base_path="ArXiV_parquet/ZImage_latents/")

guidance_scale = 4.0
num_inference_steps = 50

run_name = "zimage_lora"
tracker_name = "ScienceFlow-ZImage"
model_output_dir = "runs/zimage_lora"
