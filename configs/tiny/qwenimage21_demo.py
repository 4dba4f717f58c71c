"""The path of Qwen-Image-2.1 on a CPU: figures and edits drawn by the program, and a small model of the family's own classes.

Command:  scienceflow draw runs/demo_qwen21/figures --count 40 --edits && scienceflow encode configs/tiny/qwenimage21_demo.py \
          && scienceflow train configs/tiny/qwenimage21_demo.py
Cost:     one CPU core, minutes.
Result:   see docs/qwen-image-21.md; its base and its VAE are random, so this shows that it runs, no more.
"""

_base_ = "flux2klein_demo.py"  # optimizer, cadences

model_type = "QwenImage21"
pretrained_model_name_or_path = "embedded:qwen_image_21_tiny"
max_sequence_length = 256

# 512 and 1024 are the resolutions whose sides are all multiples of 32 px
encode = dict(figures="runs/demo_qwen21/figures", resolution=512)
dataset = dict(base_dir="runs/demo_qwen21")
rank = 16
lora_alpha = 16
lora_layers = "to_k,to_q,to_v,to_out.0,img_mlp.proj,img_mlp.gate_layer,img_mlp.out,img_in,txt_in.in_layer,proj_out"
learning_rate = 1e-3
train_batch_size = 1
gradient_accumulation_steps = 2
max_train_steps = 20
held_out_examples = 4
validation_prompts = ["A box labelled 'A' with an arrow to a box labelled 'B'."]
resolution_list = [[128, 96]]
validation_steps = 20
guidance_scale = 1.0
checkpointing_steps = 20
model_output_dir = "runs/demo_qwen21/train"
