"""A complete example: from a folder of your figures to a LoRA of FLUX.2-klein. Edit the lines marked EDIT.

Command:  scienceflow encode configs/examples/flux2klein_lora.py
          scienceflow verify configs/examples/flux2klein_lora.py
          accelerate launch train_OpenSciDraw_loop.py configs/examples/flux2klein_lora.py
          scienceflow sample runs/my_figures --prompt "The figure illustrates ..."
          scienceflow export runs/my_figures
Cost:     published for LoRA on klein-4B / 9B: about 12 / 22 GB of GPU memory in bf16; captions on disk 7.9 / 12.6 MB
          each at 512 tokens with text = "stored". Time: not measured by us.
Result:   not measured by us.
"""

# The model. The 4B base is open; the 9B one (FLUX.2-klein-base-9B) is gated: accept its licence, `hf auth login`.
model_type = "Flux2Klein"
pretrained_model_name_or_path = "black-forest-labs/FLUX.2-klein-base-4B"  # EDIT, or a local diffusers folder
max_sequence_length = 512  # tokens of a caption; longer ones are cut

# 1. Encode: figures -> latents, captions -> embeddings, once.
encode = dict(
    figures="my_figures/",  # EDIT: x.png with x.txt beside it; or a .jsonl, .csv or .parquet file
    resolution=768,  # px: figures go to the nearest of 40 aspect ratios of about 768 x 768
    batch_size=4,
)
text = "online"  # few GB on disk; "stored" trains a little faster and needs 7.9 MB a caption

# 2. Where the encoded figures go, and from where training reads them.
use_parquet_dataset = True
dataset = dict(
    type="ArXiVParquetDatasetV2",
    base_dir="data",  # EDIT: a disk with room; `encode` says how much before it starts
    parquet_base_path="my_figures_klein4b",
)

# 3. What is trained: every linear layer of the transformer's blocks.
rank = 128
lora_alpha = 128
lora_layers = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"
)

# 4. How long, and how.
optimizer = "prodigy"
learning_rate = 1.0
lr_warmup_steps = 0
train_batch_size = 1  # raise it while memory allows
gradient_accumulation_steps = 4
num_train_epochs = 20
max_train_steps = 5000  # whichever comes first
mixed_precision = "bf16"  # "fp16" on Apple Silicon
gradient_checkpointing = True
caption_dropout = 0.1  # trains the empty prompt, which guidance needs
held_out_examples = 64  # figures that are never trained on (at most a tenth)

# 5. What to look at on the way.
validation_prompts = [  # EDIT
    "The figure illustrates a two-stage pipeline with boxes labelled 'Retriever' and 'Reader'.",
]
resolution_list = [[1024, 768]]
validation_steps = 250
num_inference_steps = 28
guidance_scale = 3.5

# 6. Where the run lives. The same command resumes it.
model_output_dir = "runs/my_figures"  # EDIT
checkpointing_steps = 250
checkpoints_total_limit = 3
resume_from_checkpoint = "latest"
report_to = "none"  # "wandb", "tensorboard", "trackio": beside metrics.jsonl
