"""A LoRA adapter on Qwen-Image-Edit-2511 at 1024 px, from edits of yours: figures with the pictures that they were made from.

Command:  scienceflow encode configs/examples/qwenimage_edit_lora.py && scienceflow train configs/examples/qwenimage_edit_lora.py
Cost:     `scienceflow plan configs/examples/qwenimage_edit_lora.py` says it for your GPU; never run with the released weights.
Result:   see docs/qwen-image-edit.md.
"""

model_type = "QwenImageEdit"
pretrained_model_name_or_path = "Qwen/Qwen-Image-Edit-2511"
max_sequence_length = 1024  # tokens of words; pictures are about 190 more each

encode = dict(figures="my_edits/", resolution=1024)  # x.png, x.txt and x.source.png; 1024 is what the pipeline edits
dataset = dict(type="ArXiVParquetDatasetV2", base_dir="runs/qwen_edit", parquet_base_path="store")

rank = 64
lora_alpha = 64
lora_layers = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,img_mlp.net.0.proj,img_mlp.net.2,txt_mlp.net.0.proj,"
    "txt_mlp.net.2"
)

train_batch_size = 1
gradient_accumulation_steps = 8
gradient_checkpointing = True
mixed_precision = "bf16"
learning_rate = 1e-4
lr_scheduler = "constant_with_warmup"
lr_warmup_steps = 100
max_train_steps = 2000
caption_dropout = 0.1  # guidance needs a velocity without the instruction

validation_prompts = ["Rename the box 'Encoder' to 'Backbone' and draw its arrow dashed."]
validation_images = ["my_edits/example.source.png"]  # needed: the model draws nothing without a picture
resolution_list = [[1024, 1024]]
num_inference_steps = 40
guidance_scale = 4.0
model_output_dir = "runs/qwen_edit/train"
checkpointing_steps = 500
report_to = "none"
