"""`make pretrain`: the embedded model from random weights, by the product's own commands; hours on a CPU.

VAE, text encoder and transformer train one after the other; a second run goes on where the first one stopped. All
lies in runs/pretrain; `--ship` copies the result into the package (OpenSciDraw/models/shipped).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.figures.fitting import to_model_range
from OpenSciDraw.models.embedded import SHIPPED, embedded_folder
from OpenSciDraw.models.flux2_klein import Flux2Klein
from OpenSciDraw.models.source import ModelSource

ROOT = Path("runs/pretrain")
BASE = ROOT / "base"
NAME = "flux2_klein_tiny"


def run(*arguments: str) -> None:
    print(f"\n$ scienceflow {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "OpenSciDraw.cli", *arguments], check=False).returncode
    if code:
        sys.exit(f"stopped: scienceflow {' '.join(arguments)} exited with {code}; run this again to go on")


def trained(stage: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The averaged weights of a finished stage."""
    (file,) = (ROOT / stage / "ema" / "transformer").glob("*.safetensors")
    weights = load_file(file)
    return {name: t.to(dtype).contiguous() if t.is_floating_point() else t for name, t in weights.items()}


def assemble() -> None:
    """runs/pretrain/base: the start's folder with the trained VAE (and its latents' statistics) and text encoder."""
    building = BASE.with_name(".base.tmp")
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(embedded_folder(f"{NAME}_start"), building)
    vae, file = trained("decoder_again", torch.float16), building / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(vae, file, {"format": "pt"})  # as it will be read when the statistics are taken
    vae["bn.running_mean"], vae["bn.running_var"] = latent_statistics(building)
    save_file(vae, file, {"format": "pt"})
    text = trained("text", torch.bfloat16)
    save_file(text, building / "text_encoder" / "model.safetensors", {"format": "pt"})
    building.replace(BASE)


@torch.no_grad()
def latent_statistics(folder: Path, figures: int = 512) -> tuple[Tensor, Tensor]:
    """Mean and variance of each packed latent channel over drawn figures: what the pipeline normalises by."""
    model = Flux2Klein(ModelSource(str(folder)), 1, torch.float32)  # no text is encoded
    model.load_vae()
    model.vae.bn.running_mean.zero_()
    model.vae.bn.running_var.fill_(1.0)
    rows = []
    for index in range(figures):
        picture = torch.from_numpy(np.asarray(draw_figure(2, index, 128, style="small").image).copy())
        packed = model.normalize(model.encode_images(to_model_range(picture.permute(2, 0, 1)[None])))
        rows.append(packed[0].flatten(1).T)
    values = torch.cat(rows).double()
    return values.mean(0).float(), values.var(0).float()


def ship() -> None:
    """The trained model into the package, every weight in 16 bits."""
    folder = SHIPPED / NAME
    card = folder / "README.md"  # the model card, written by hand
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(BASE, folder)
    card.write_text(text, encoding="utf-8")
    weights = trained("transformer", torch.bfloat16)
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"shipped to {folder}: {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ship", action="store_true", help="only copy the trained model into the package")
    if parser.parse_args().ship:
        return ship()
    seconds: dict[str, float] = {}
    for name in ("vae", "decoder", "decoder_again", "text"):
        start = time.perf_counter()
        run("train", f"configs/tiny/pretrain_{name}.py")
        seconds[name] = time.perf_counter() - start
    if not BASE.exists():
        assemble()
    for command in ("encode", "train"):
        start = time.perf_counter()
        run(command, "configs/tiny/pretrain_flux2klein.py")
        seconds[command] = time.perf_counter() - start
    print(json.dumps({name: round(value) for name, value in seconds.items()}))


if __name__ == "__main__":
    main()
