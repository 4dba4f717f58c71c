"""The whole path in minutes on a CPU: drawn figures, and a small model of Qwen-Image's own classes.

Command:  scienceflow encode configs/tiny/qwenimage_demo.py && scienceflow train configs/tiny/qwenimage_demo.py
Cost:     two CPU cores, minutes.
Result:   see docs/qwen-image.md; a model of this size learns layout and colour, not lettering.
"""

_base_ = "flux2klein_demo.py"  # figures, prompts, optimizer, cadences

model_type = "QwenImage"
pretrained_model_name_or_path = "embedded:qwen_image_tiny"
max_sequence_length = 256

dataset = dict(base_dir="runs/demo_qwen")
lora_layers = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.0.proj,img_mlp.net.2,txt_mlp.net.0.proj,txt_mlp.net.2,"
    "img_in,txt_in,proj_out"  # the base is random, so its projections have to learn as well
)
model_output_dir = "runs/demo_qwen/train"
