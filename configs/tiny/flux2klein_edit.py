"""The small base model learns to edit drawn figures by instruction: recolour, relabel, add, remove, move, swap, redirect.

Command:  first flux2klein_edit_copy.py, then flux2klein_edit_letters.py, whose weights this starts from and whose stores it uses
          C=configs/tiny/flux2klein_edit_copy.py
          scienceflow encode $C --cfg_options dataset.base_dir=runs/edit encode.figures=drawn:16000:seed=100:edit
          scienceflow train configs/tiny/flux2klein_edit.py
          scienceflow evaluate runs/edit/train --ema --figures drawn:300:seed=7:edit --steps 6 --guidance 1
Cost:     CPU cores with bf16 instructions: 20 min of one to encode, 61 min of two to train (torchrun, two processes of batch 16).
Result:   docs/edit.md.
"""

_base_ = "flux2klein_edit_letters.py"

pretrained_full_ckpt_path = "runs/edit_letters/train"
dataset = dict(
    sources=[
        dict(path="edit/store", share=0.55),
        dict(path="letters/store", share=0.2),
        dict(path="repaint/store", share=0.15),
        dict(path="edit_copy/store", share=0.1),
    ],
)

max_train_steps = 3000
learning_rate = 9e-4
lr_scheduler = "cosine"

validation_steps = 300
evaluate = dict(figures="drawn:64:seed=9:edit", metrics=["edit", "structure"], batch_size=32)
checkpointing_steps = 300
model_output_dir = "runs/edit/train"
logging_steps = 20
