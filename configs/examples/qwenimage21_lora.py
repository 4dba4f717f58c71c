"""A LoRA adapter on Qwen-Image-2.1 at 1024 px, from figures (and edits) of yours.

Command:  scienceflow encode configs/examples/qwenimage21_lora.py && scienceflow train configs/examples/qwenimage21_lora.py
Cost:     `scienceflow plan configs/examples/qwenimage21_lora.py` says it for your GPU; never run with the released weights.
Result:   see docs/qwen-image-21.md.
"""

model_type = "QwenImage21"
pretrained_model_name_or_path = "Qwen/Qwen-Image-2.1"
max_sequence_length = 1024

encode = dict(figures="my_figures/", resolution=1024)
dataset = dict(type="ArXiVParquetDatasetV2", base_dir="runs/qwen21", parquet_base_path="store")

rank = 64
lora_alpha = 64
lora_layers = "to_k,to_q,to_v,to_out.0,img_mlp.proj,img_mlp.gate_layer,img_mlp.out"

train_batch_size = 1  # texts of other lengths in one batch move the picture's positions: see the page
gradient_accumulation_steps = 8
gradient_checkpointing = True
mixed_precision = "bf16"
learning_rate = 1e-4
lr_warmup_steps = 100
max_train_steps = 2000

validation_prompts = ["A flowchart of three boxes labelled 'Encoder', 'Latent' and 'Decoder', joined by arrows."]
resolution_list = [[1024, 1024]]
num_inference_steps = 40
guidance_scale = 1.0  # as the model is meant to be drawn from; above 1 negative_prompt acts
model_output_dir = "runs/qwen21/train"
checkpointing_steps = 500
report_to = "none"
