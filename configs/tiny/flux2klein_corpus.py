"""The small model on figures of your own: a trial of the whole path before a large model takes days.

Command:  scienceflow encode configs/tiny/flux2klein_corpus.py --cfg_options encode.figures=my_figures/
          scienceflow train configs/tiny/flux2klein_corpus.py
Cost:     two CPU cores, minutes.
Result:   not measured by us.
"""

_base_ = "flux2klein_demo.py"

encode = dict(figures=None)  # a folder, .jsonl, .csv or .parquet: give it by --cfg_options encode.figures=...
dataset = dict(base_dir="runs/corpus")
train_batch_size = 4
learning_rate = 5e-4
max_train_steps = 200
held_out_examples = 16
model_output_dir = "runs/corpus/train"
