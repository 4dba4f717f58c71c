"""The small base model learns to edit drawn figures by instruction: recolour, relabel, add, remove, move, swap, redirect.

Command:  first flux2klein_edit_copy.py, whose weights this starts from, and whose mosaics are a fifth of what it sees
          C=configs/tiny/flux2klein_edit_copy.py
          scienceflow encode $C --cfg_options dataset.base_dir=runs/edit encode.figures=drawn:16000:seed=100:edit
          scienceflow encode $C --cfg_options dataset.base_dir=runs/repaint encode.figures=drawn:5000:seed=11:style=repaint:edit
          scienceflow train configs/tiny/flux2klein_edit.py
          scienceflow evaluate runs/edit/train --ema --figures drawn:300:seed=7:edit
Cost:     one CPU core with bf16 instructions: 20 min to encode, 100 min to train.
Result:   docs/edit.md.
"""

_base_ = "flux2klein_edit_copy.py"

pretrained_full_ckpt_path = "runs/edit_copy/train"
dataset = dict(
    _delete_=True,
    type="MixedSources",
    base_dir="runs",
    sources=[
        dict(path="edit/store", share=0.55),
        dict(path="repaint/store", share=0.25),
        dict(path="edit_copy/store", share=0.2),
    ],
)

max_train_steps = 2600
learning_rate = 6e-4  # with 1e-3 the model forgets how to copy before it has learned what to change
lr_scheduler = "cosine"
lr_warmup_steps = 50
edit_loss_mode = "balanced"
edit_loss_ratio = 0.3
timestep_shift = 20.0

validation_steps = 260
evaluate = dict(figures="drawn:64:seed=9:edit", metrics=["edit", "structure"], batch_size=32)
checkpointing_steps = 260
model_output_dir = "runs/edit/train"
logging_steps = 20
