"""LoRA on attention, feed-forward and single-stream blocks: the recommended set of docs/lora-targets.md.

Command:  accelerate launch train_OpenSciDraw_loop.py configs/260120/flux2klein_full.py
Data:     add --cfg_options dataset.base_dir=/path/to/data encode.figures=/path/to/figures (encode likewise, before).
Cost:     published for LoRA on klein-9B: about 22 GB of GPU memory in bf16. Time: not measured by us.
Result:   not measured by us.
"""

_base_ = "../base_config.py"

lora_layers = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"
)
run_name = "flux2klein_full"
model_output_dir = "runs/flux2klein_full"
