"""The rate of the training loop against a bare forward, backward and optimizer step on tensors that lie in memory.

Command:  python benchmarks/run_train_step.py

Ours: `train(Training(config))` itself, with reading of batches from the store, noise and noise levels keyed by sample,
caption dropout, clipping, schedule, metrics and progress bar; no checkpoint or validation falls into the time. Bare: a
copy of the same transformer with the same LoRA, AdamW and batch shapes, on latents already normalised and packed,
with position ids and text as tensors: torch.randn, forward, mean squared error, backward, step; no clipping. The
loop is never left: between two of its steps the bare steps take their turn (A B A B … in one process). FLOPs of a step
are counted by torch.utils.flop_counter and must agree. fp32, LoRA of rank 32 on all linear layers of the blocks.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from report import Result, ratio
from torch.utils.flop_counter import FlopCounterMode

from OpenSciDraw.config import Config
from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.encode import run as encode
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.training.run import Training
from train_OpenSciDraw_loop import train

TARGET = 0.95
TEXT_TOKENS = 64
LAYERS = "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"


@dataclass(frozen=True)
class Case:
    """A model, its batch, and how many steps are timed at a stretch, how many times."""

    name: str
    folder: str
    batch_size: int
    steps: int
    stretches: int


def build_wide(folder: Path) -> str:
    """The embedded model with a transformer of 768 = 12 x 64, 4 dual and 8 single blocks, random weights."""
    shutil.copytree(embedded_folder("flux2_klein_tiny_random"), folder, ignore=shutil.ignore_patterns("transformer"))
    torch.manual_seed(0)
    Flux2Transformer2DModel(
        in_channels=128, num_layers=4, num_single_layers=8, attention_head_dim=64, num_attention_heads=12,
        joint_attention_dim=3 * 64, axes_dims_rope=(16, 16, 16, 16), guidance_embeds=False,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    return str(folder)


class Bare:
    """Forward, backward and optimizer step, and nothing else."""

    def __init__(self, run: Training):
        self.run = run
        self.transformer = copy.deepcopy(run.accelerator.unwrap_model(run.model.transformer))
        parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=run.config.learning_rate)

    def inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What the transformer takes, made beforehand."""
        assert batch.latents is not None and batch.text is not None
        clean = self.run.model.normalize(batch.latents)
        text = torch.stack(batch.text).float()
        return {
            "clean": Flux2KleinPipeline._pack_latents(clean).contiguous(), "text": text,
            "img_ids": Flux2KleinPipeline._prepare_latent_ids(clean), "txt_ids": Flux2KleinPipeline._prepare_text_ids(text),
        }  # fmt: skip

    def step(self, clean: torch.Tensor, text: torch.Tensor, img_ids: torch.Tensor, txt_ids: torch.Tensor) -> None:
        noise, sigma = torch.randn_like(clean), torch.rand(len(clean))
        s = sigma.view(-1, 1, 1)
        predicted = self.transformer(
            hidden_states=(1 - s) * clean + s * noise, encoder_hidden_states=text, timestep=sigma, img_ids=img_ids,
            txt_ids=txt_ids, guidance=None, return_dict=False,
        )[0]  # fmt: skip
        (predicted - (noise - clean)).pow(2).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Turns(Training):
    """Training, which after every stretch of its own steps times as many bare ones on the same batches."""

    def __init__(self, config: Config, case: Case):
        super().__init__(config)
        self.case, self.bare = case, Bare(self)
        self.seconds: dict[str, list[float]] = {"bare": [], "ours": []}
        self.samples: list[int] = []  # of a stretch; a bucket's last batch may be smaller
        self.flops: dict[str, int] = {}

    def batches(self) -> Iterator[Batch]:
        stream = super().batches()
        first = next(stream)
        with FlopCounterMode(display=False) as counter:
            yield first  # the loop takes its step before it asks for more
        self.flops["ours"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            self.bare.step(**self.bare.inputs(first))
        self.flops["bare"] = counter.get_total_flops()
        for stretch in range(self.case.stretches + 1):
            done: list[Batch] = []
            start = time.perf_counter()
            for _ in range(self.case.steps):
                done.append(next(stream))
                yield done[-1]
            ours = time.perf_counter() - start
            bare = self._bare_seconds(done)
            if stretch:  # the first warms up
                self.seconds["ours"].append(ours)
                self.seconds["bare"].append(bare)
                self.samples.append(sum(len(batch.sample_ids) for batch in done))
        yield next(stream)  # the last step saves and validates

    def _bare_seconds(self, batches: list[Batch]) -> float:
        inputs = [self.bare.inputs(batch) for batch in batches]
        start = time.perf_counter()
        for values in inputs:
            self.bare.step(**values)
        return time.perf_counter() - start


def build_config(case: Case, folder: Path) -> Config:
    return Config.model_validate({
        "pretrained_model_name_or_path": case.folder, "mixed_precision": "no", "max_sequence_length": TEXT_TOKENS, "rank": 32,
        "lora_alpha": 32, "lora_layers": LAYERS, "learning_rate": 1e-4, "train_batch_size": case.batch_size,
        "num_train_epochs": None, "max_train_steps": 2 + case.steps * (case.stretches + 1), "gradient_checkpointing": False,
        "dataloader_num_workers": 0, "held_out_examples": 0, "logging_steps": 10, "checkpointing_steps": 10**6,
        "validation_steps": 10**6, "report_to": "none", "model_output_dir": str(folder / case.name),
        "dataset": {"base_dir": str(folder), "parquet_base_path": "store"},
        "encode": {"figures": "drawn:160", "resolution": 128, "batch_size": 16, "num_workers": 0},
    })  # fmt: skip


def measure(case: Case, folder: Path, result: Result) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps its state for one run a process
    GradientState._reset_state()
    config = build_config(case, folder)
    encode.main(config)  # the second case finds it done
    run = Turns(config, case)
    assert train(run) == 0
    size = sum(p.numel() for p in run.bare.transformer.parameters())
    ours, bare = run.seconds["ours"], run.seconds["bare"]
    rates = [median(n / s for n, s in zip(run.samples, taken, strict=True)) for taken in (bare, ours)]
    share = ratio(bare, ours)
    extra = median(o - b for o, b in zip(ours, bare, strict=True)) / case.steps
    result.rows.append([
        f"{case.name}, {size / 1e6:.1f} M", str(case.batch_size), f"{rates[0]:.2f}/s", f"{rates[1]:.2f}/s",
        f"{share:.3f}", f"{1e3 * extra:.1f} ms", f"{run.flops['ours'] / 1e9:.2f} G",
        f"{run.flops['bare'] / 1e9:.2f} G",
    ])  # fmt: skip
    numbers: dict[str, Any] = {"parameters": size, "ratio": share, "flops": run.flops, "seconds": run.seconds}
    numbers |= {"samples": run.samples, "steps_a_stretch": case.steps, "batch_size": case.batch_size}
    result.numbers[case.name] = numbers
    if run.flops["ours"] != run.flops["bare"]:
        result.notes.append(f"{case.name}: the FLOPs of a step differ.")


def main() -> None:
    logging.disable(logging.WARNING)
    columns = ["transformer with LoRA", "batch", "bare", "ours", "ratio", "more a step", "FLOPs, ours", "FLOPs, bare"]
    result = Result("train_step", "python benchmarks/run_train_step.py", columns)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        wide = build_wide(root / "model")
        for case in (
            Case("tiny", "embedded:flux2_klein_tiny_random", batch_size=8, steps=5, stretches=6),
            Case("wide", wide, batch_size=2, steps=1, stretches=6),
        ):
            measure(case, root, result)
    result.notes.insert(0, f"Target: {TARGET} of the bare rate or more. Figures at 128 px, {TEXT_TOKENS} text tokens.")
    result.save()


if __name__ == "__main__":
    main()
