"""The small base model learns to find in its reference what a text names: cells with letters, some of which get another colour.

Command:  first flux2klein_edit_copy.py, whose weights this starts from
          C=configs/tiny/flux2klein_edit_copy.py
          scienceflow encode $C --cfg_options dataset.base_dir=runs/letters encode.figures=drawn:5000:seed=21:style=letters:edit
          scienceflow encode $C --cfg_options dataset.base_dir=runs/repaint encode.figures=drawn:5000:seed=11:style=repaint:edit
          scienceflow train configs/tiny/flux2klein_edit_letters.py
          (then flux2klein_edit.py)
Cost:     one CPU core with bf16 instructions: 8 min to encode, 30 min to train.
Result:   docs/edit.md.
"""

_base_ = "flux2klein_edit_copy.py"

pretrained_full_ckpt_path = "runs/edit_copy/train"
dataset = dict(
    _delete_=True,
    type="MixedSources",
    base_dir="runs",
    sources=[
        dict(path="letters/store", share=0.6),
        dict(path="repaint/store", share=0.25),
        dict(path="edit_copy/store", share=0.15),
    ],
)

max_train_steps = 700
edit_loss_mode = "balanced"
edit_loss_ratio = 0.5
timestep_shift = 20.0
validation_steps = 100
checkpointing_steps = 100
model_output_dir = "runs/edit_letters/train"
