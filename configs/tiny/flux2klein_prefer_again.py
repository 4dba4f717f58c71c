"""A second round of flux2klein_prefer.py: the trained model draws other prompts and is trained on the preferences of these.

Command:  scienceflow merge runs/prefer/train --out runs/prefer/merged --dtype fp32
          scienceflow prefer configs/tiny/flux2klein_prefer_again.py --out runs/prefer2/set --batch_size 32
          scienceflow train configs/tiny/flux2klein_prefer_again.py
          scienceflow evaluate runs/prefer2/train --compare configs/tiny/flux2klein_prefer.py
Cost:     one CPU core: 25 min.
Result:   docs/prefer.md, "What training on them gave".
"""

_base_ = "flux2klein_prefer.py"

pretrained_full_ckpt_path = "runs/prefer/merged"  # the base with the first round's adapter in it
prefer = dict(figures="drawn:3200:seed=34:style=small")
dataset = dict(base_dir="runs/prefer2/set")
max_train_steps = 750
model_output_dir = "runs/prefer2/train"
