"""What a run does not use, it does not import: each of these costs a start of the process time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import REPO, merged

UNUSED = (
    "wandb", "matplotlib", "tensorboard", "deepspeed", "bitsandbytes", "ray", "datasets", "cv2", "onnxruntime",
)  # fmt: skip
# Not here: torchao, scipy, sklearn, torchvision, pandas; transformers, diffusers and pyarrow import them where they are installed.
RUN = """
import json, sys
from OpenSciDraw.config import Config
from OpenSciDraw.training import Training
from train_OpenSciDraw_loop import train
assert train(Training(Config.model_validate(json.loads(sys.argv[1])))) == 0
print(json.dumps([name for name in json.loads(sys.argv[2]) if name in sys.modules]))
"""


def test_a_lora_run_imports_nothing_that_it_does_not_use(store_config: dict, tmp_path: Path) -> None:
    values = merged(store_config, model_output_dir=str(tmp_path), report_to="none", max_train_steps=1)
    arguments = [json.dumps(values, default=str), json.dumps(UNUSED)]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
