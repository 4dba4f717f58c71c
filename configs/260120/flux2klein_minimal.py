"""LoRA on the attention of the dual-stream blocks alone: the minimal set of docs/lora-targets.md.

Command:  accelerate launch train_OpenSciDraw_loop.py configs/260120/flux2klein_minimal.py
Data:     add --cfg_options dataset.base_dir=/path/to/data encode.figures=/path/to/figures (encode likewise, before).
Cost:     published for LoRA on klein-9B: about 22 GB of GPU memory in bf16. Time: not measured by us.
Result:   not measured by us.
"""

_base_ = "../base_config.py"

lora_layers = "to_k,to_q,to_v,to_out.0"
run_name = "flux2klein_minimal"
model_output_dir = "runs/flux2klein_minimal"
