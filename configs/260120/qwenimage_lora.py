"""LoRA on Qwen-Image-2512: attention and feed-forward of both streams in all 60 blocks.

Command:  accelerate launch train_OpenSciDraw_loop.py configs/260120/qwenimage_lora.py
Data:     add --cfg_options dataset.base_dir=/path/to/data encode.figures=/path/to/figures (encode likewise, before).
Cost:     published for a LoRA at 1024 x 1024, batch 1: 42 GB of GPU memory; 30 GB with an fp8 base. Time: not measured by us.
Result:   not measured by us.
"""

_base_ = "../base_config.py"

# Qwen-Image 1.0 differs in the hub id alone: "Qwen/Qwen-Image". Neither is gated. Each needs a store of its own.
model_type = "QwenImage"
pretrained_model_name_or_path = "Qwen/Qwen-Image-2512"
max_sequence_length = 1024  # tokens; rows are trimmed, so a short caption costs what it is long

lora_layers = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.0.proj,img_mlp.net.2,txt_mlp.net.0.proj,txt_mlp.net.2"
)
train_batch_size = 1
gradient_accumulation_steps = 2

dataset = dict(parquet_base_path="ArXiV_parquet/QwenImage_latents/")

true_cfg_scale = 4.0
num_inference_steps = 50

run_name = "qwenimage_lora"
tracker_name = "ScienceFlow-QwenImage"
model_output_dir = "runs/qwenimage_lora"
