"""The whole path in minutes on a CPU: drawn figures, and a small model of Qwen-Image's own classes.

Command:  scienceflow encode configs/tiny/qwenimage_demo.py && scienceflow train configs/tiny/qwenimage_demo.py
Cost:     two CPU cores, minutes.
Result:   see docs/qwen-image.md; its base is random, so it learns paper, lines and colour.
"""

from OpenSciDraw.drawn.figure import draw_figure

_base_ = "flux2klein_demo.py"  # optimizer, cadences

model_type = "QwenImage"
pretrained_model_name_or_path = "embedded:qwen_image_tiny"
max_sequence_length = 256

encode = dict(figures="drawn:2000:size=128")
dataset = dict(base_dir="runs/demo_qwen")
rank = 64
lora_alpha = 64
lora_layers = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.0.proj,img_mlp.net.2,txt_mlp.net.0.proj,txt_mlp.net.2,"
    "img_in,txt_in,proj_out"  # the base is random, so its projections have to learn as well
)
learning_rate = 5e-3
train_batch_size = 4
max_train_steps = 1200
timestep_shift = "none"
validation_prompts = [draw_figure(1, index, 128).caption for index in range(4)]
resolution_list = [list(draw_figure(1, index, 128).image.size) for index in range(4)]
validation_steps = 400
guidance_scale = 2.0
checkpointing_steps = 400
model_output_dir = "runs/demo_qwen/train"
