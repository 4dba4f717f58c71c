"""The recommended set with every layer spelled out (fal/ostris style).

Command:  accelerate launch train_OpenSciDraw_loop.py configs/260120/flux2klein_explicit.py
Data:     add --cfg_options dataset.base_dir=/path/to/data encode.figures=/path/to/figures (encode likewise, before).
Cost:     published for LoRA on klein-9B: about 22 GB of GPU memory in bf16. Time: not measured by us.
Result:   not measured by us.
"""

_base_ = "../base_config.py"

lora_layers = (
    "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0,attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,attn.to_add_out,"
    "ff.linear_in,ff.linear_out,ff_context.linear_in,ff_context.linear_out,attn.to_qkv_mlp_proj,attn.to_out"
)
run_name = "flux2klein_explicit"
model_output_dir = "runs/flux2klein_explicit"
