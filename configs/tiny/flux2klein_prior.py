"""Prior preservation: the house style of the demo, while the base's own figures are kept as the base predicts them.

Command:  docs/mixing-data.md (prior preservation): two stores are encoded by flux2klein_demo.py first, then this config is trained.
Cost:     as the demo's, a step with half as many figures of the house style.
Result:   docs/mixing-data.md: the base's prompts keep colours and shapes, and lose a third of the letters that they lose otherwise.
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
max_train_steps = 300
held_out_examples = 0
validation_prompts = []
resolution_list = []
model_output_dir = "runs/prior/train"
