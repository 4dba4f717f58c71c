"""Around training: encoding figures, drawing pictures beside the bare pipeline, and the diffusers example script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from suite_bench import Bench
from suite_process import stop, tail

from OpenSciDraw.models.base import build_model
from OpenSciDraw.validation_funcs.sample_prompts import PromptSet, sample_prompts

PROMPTS = ["Two boxes and an arrow.", "A line chart."]
GUIDANCE = 4.0


def encoded(bench: Bench, kind: str) -> dict[str, Any]:
    """Figures a second of `scienceflow encode`: from two runs of different length, so that loading the model does not count."""
    from OpenSciDraw.encode import run as encode

    seconds = []
    counts = (2, 6) if bench.rehearse else (16, 144)
    for number in counts:
        data = {"base_dir": str(bench.work), "parquet_base_path": f"encoded-{kind}-{number}"}
        config = bench.config(kind, "encode", dataset=data)
        config = config.model_copy(update={"encode": config.encode.model_copy(update={"figures": str(bench.figures(number))})})
        bench.free()
        start = time.perf_counter()
        assert encode.main(config) == 0
        seconds.append(time.perf_counter() - start)
    bench.store(kind)  # for the trainings to come
    found: dict[str, Any] = {"figures_per_second": (counts[1] - counts[0]) / (seconds[1] - seconds[0]), "whole_seconds": seconds[1]}
    if bench.cuda:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def drawn(bench: Bench, kind: str) -> dict[str, Any]:
    """Seconds a picture: the family's pipeline alone, `FigureModel.sample`, and validation, which writes PNGs too."""
    steps = 1 if bench.rehearse else 8
    side = [bench.side, bench.side]
    config = bench.config(
        kind, "draw", validation_prompts=PROMPTS, resolution_list=[side], num_inference_steps=steps, guidance_scale=GUIDANCE
    )
    model = build_model(config, bench.device)
    model.load_text_encoder()
    rows = [row.cpu() for prompt in [*PROMPTS, ""] for row in model.encode_prompts([prompt])]
    model.free_text_encoder()
    model.load_vae()
    model.load_transformer()
    pipe = model.pipeline(model.transformer)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=not bench.cuda)
    sizes = {"width": bench.side, "height": bench.side}

    def bare() -> None:
        for at, row in enumerate(rows[:-1]):
            pipe(
                prompt_embeds=row[None].to(bench.device), negative_prompt_embeds=rows[-1][None].to(bench.device), **sizes,
                num_inference_steps=steps, guidance_scale=GUIDANCE, generator=torch.Generator("cpu").manual_seed(at),
            )  # fmt: skip

    def sample() -> None:
        for at, row in enumerate(rows[:-1]):
            model.sample(pipe, [row], rows[-1], width=bench.side, height=bench.side, steps=steps, guidance=GUIDANCE, seeds=[at])

    def validate() -> None:
        sample_prompts(model, config, PromptSet(PROMPTS, rows[:-1], rows[-1]), 0, accelerator)

    ways: dict[str, Callable[[], None]] = {"bare": bare, "sample": sample, "validation": validate}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(2 if bench.rehearse else 4):
            for name, way in ways.items():
                bench.synchronize()
                start = time.perf_counter()
                way()
                bench.synchronize()
                if turn:  # the first warms up
                    taken[name].append((time.perf_counter() - start) / len(PROMPTS))
    found: dict[str, Any] = {f"{name}_seconds": median(seconds) for name, seconds in taken.items()}
    found |= {f"bare_over_{name}": found["bare_seconds"] / found[f"{name}_seconds"] for name in ("sample", "validation")}
    return found | {"steps_of_a_picture": steps}


def peer(bench: Bench, recompute: bool = True, steps: int = 16) -> dict[str, Any]:
    """diffusers' train_dreambooth_lora_flux2_klein.py (its path in the environment variable PEER) at the same settings."""
    folder, out = bench.folder("4B"), bench.work / "peer"
    stamps, log = bench.work / "peer_stamps.json", bench.work / "peer.log"
    blocks = json.loads((folder / "transformer" / "config.json").read_text())["num_single_layers"]
    outputs = [f"single_transformer_blocks.{number}.attn.to_out" for number in range(blocks)]  # PEFT would take a ModuleList too
    layers = bench.config("4B", "peer").lora_layers
    assert isinstance(layers, str)
    plain = bench.work / "plain"
    plain.mkdir(exist_ok=True)
    for picture in bench.figures(bench.stored).glob("*.png"):
        (plain / picture.name).write_bytes(picture.read_bytes())
    options = {
        "pretrained_model_name_or_path": folder, "instance_data_dir": plain, "instance_prompt": "A pipeline of boxes with arrows.",
        "resolution": bench.side, "train_batch_size": 1, "rank": bench.rank, "lora_alpha": bench.rank, "max_train_steps": steps,
        "lora_layers": ",".join([*(name for name in layers.split(",") if name != "attn.to_out"), *outputs]), "output_dir": out,
        "seed": 0, "learning_rate": 1e-4, "optimizer": "AdamW", "lr_scheduler": "constant", "lr_warmup_steps": 0,
        "checkpointing_steps": 100000, "max_sequence_length": bench.text_tokens, "mixed_precision": "bf16",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--cache_latents", "--skip_final_inference", "--text_encoder_out_layers", "9", "18", "27"]
    words += ["--gradient_checkpointing"] if recompute else []
    bench.free()
    start = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("suite_peer.py")), os.environ["PEER"], *words],
            env=os.environ | {"STAMPS": str(stamps)}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        if process.wait():
            raise RuntimeError(f"the script ended with {process.returncode}: {tail(log)}")
    finally:
        stop(process)
    found = json.loads(stamps.read_text())
    between = [after - before for before, after in zip(found["stamps"], found["stamps"][1:], strict=False)]
    return {
        "images_per_second": 1 / median(between[4:] or between), "peak_gb": found["peak_gb"],
        "whole_seconds": time.perf_counter() - start,
    }  # fmt: skip
