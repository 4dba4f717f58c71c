"""Prior preservation: the house style of the demo, while the base's own figures are kept as the base predicts them.

Command:  see docs/mixing-data.md, which has the numbers: two stores are encoded first, then this config is trained.
Cost:     one CPU core, minutes.
Result:   docs/mixing-data.md.
"""

_base_ = "flux2klein_demo.py"

dataset = dict(
    _delete_=True,
    type="MixedSources",
    base_dir="runs/prior",
    sources=[
        dict(path="house", share=0.5),
        dict(path="base", share=0.5, keep_base=True),  # keep_base=False: a regularisation set
    ],
)
train_batch_size = 16
max_train_steps = 60
held_out_examples = 0
validation_prompts = []
resolution_list = []
model_output_dir = "runs/prior/train"
