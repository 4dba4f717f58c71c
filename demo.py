"""`make demo`: figures -> store -> trained adapter -> pictures, end to end on a CPU, by the product's own commands.

All that it makes lies in runs/demo; delete that folder to start over. A second run resumes: nothing is
encoded or trained twice.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from OpenSciDraw import flow  # noqa: E402
from OpenSciDraw.config import Config  # noqa: E402
from OpenSciDraw.config_file import load_config  # noqa: E402
from OpenSciDraw.datasets.arxiv_parquet import ArXiVParquetDatasetV2  # noqa: E402
from OpenSciDraw.datasets.drawn import draw_figure  # noqa: E402
from OpenSciDraw.models.base import build_model  # noqa: E402
from OpenSciDraw.utils.trainable import load_weights, make_trainable, trainable_parameters  # noqa: E402

CONFIG = Path("configs/tiny/flux2klein_demo.py")
UNSEEN_SEED = 1  # the config's validation prompts are captions of these figures; training draws from seed 0


def run(program: str, *arguments: str) -> float:
    """One of the product's commands as a user would type it; returns its seconds."""
    print(f"\n$ {program} {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", "OpenSciDraw.cli", *arguments], check=False).returncode
    if code:
        sys.exit(f"stopped: {program} {' '.join(arguments)} exited with {code}")
    return time.perf_counter() - start


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def compare(config: Config, run_dir: Path, out: Path) -> None:
    """One row per validation prompt: the figure that it describes, before training, after training."""
    folders = sorted((run_dir / "validation_images").glob("step_*"))
    columns = {"reference": None, f"before ({folders[0].name})": folders[0], f"after ({folders[-1].name})": folders[-1]}
    side, gap, top = 256, 12, 34
    rows = len(config.validation_prompts)
    sheet = Image.new("RGB", (len(columns) * (side + gap) + gap, rows * (side + gap) + top), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (title, folder) in enumerate(columns.items()):
        x = gap + column * (side + gap)
        pen.text((x, 8), title, fill="black", font=ImageFont.load_default(size=18))
        for row in range(rows):
            if folder is None:
                picture = draw_figure(UNSEEN_SEED, row, size=config.encode.resolution).image
            else:
                picture = Image.open(folder / f"{row:02d}.png")
            scale = side / max(picture.size)
            picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
            y = top + row * (side + gap)
            pen.rectangle([x - 1, y - 1, x + side, y + side], outline="#bbbbbb")
            sheet.paste(picture, (x + (side - picture.width) // 2, y + (side - picture.height) // 2))
    sheet.save(out)


@torch.no_grad()
def denoise(config: Config, run_dir: Path, out: Path) -> None:
    """Held-out figures half under noise, and what the model makes of them in one step, without and with the adapter.

    x = x_sigma - sigma v (flow.py): the clearest sight of what a short training of a small model has learned.
    """
    model = build_model(config)
    model.load_vae()
    model.load_transformer()
    make_trainable(model.transformer, config)
    dataset = ArXiVParquetDatasetV2(**config.dataset_arguments())
    sigma = torch.tensor([0.5])
    rows = []
    for index in dataset.held_out(config.held_out_examples)[:4].tolist():
        batch = dataset.batch([index])
        assert batch.latents is not None and batch.text is not None
        clean, text = model.normalize(batch.latents), model.collate_text(batch.text)
        noisy = flow.interpolate(clean, flow.keyed_noise(0, 0, batch.sample_ids, clean.shape[1:]), sigma)
        rows.append((clean, noisy, text))
    guesses = []
    for trained in (False, True):  # a new adapter changes nothing (its B is zero): the base model
        if trained:
            load_weights(trainable_parameters(model.transformer), run_dir, config)
        guesses.append([noisy - sigma * model.velocity(noisy, sigma, text).float() for _, noisy, text in rows])
    cells = [[clean, noisy, before, after] for (clean, noisy, _), before, after in zip(rows, *guesses, strict=True)]
    sheet = Image.new("RGB", (4 * 264 + 8, len(rows) * 264 + 34), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(("held-out figure", "half noise", "base model", "with the adapter")):
        pen.text((8 + column * 264, 8), title, fill="black", font=ImageFont.load_default(size=18))
        for row, cell in enumerate(cells):
            pixels = (model.decode(cell[column])[0].clamp(-1, 1) + 1) * 127.5
            picture = Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).numpy())
            picture.thumbnail((256, 256))
            scale = 256 / max(picture.size)
            size = (round(picture.width * scale), round(picture.height * scale))
            sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (8 + column * 264, 34 + row * 264))
    sheet.save(out)


def plot_losses(metrics: list[dict[str, float]], out: Path) -> None:
    """Training loss and held-out loss by step, and the held-out loss at each noise level."""
    train = [(m["step"], m["train_loss"]) for m in metrics if "train_loss" in m]
    held = [m for m in metrics if "held_out_loss" in m]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(*zip(*train, strict=True), color="#888888", linewidth=1, label="training")
    left.plot([m["step"] for m in held], [m["held_out_loss"] for m in held], "o-", color="#1f6fb4", label="held out")
    left.set(xlabel="step", ylabel="loss", title="Loss")
    left.legend()
    for name in (key for key in held[0] if key.startswith("held_out_loss_q")):
        level = name.removeprefix("held_out_loss_q")
        right.plot([m["step"] for m in held], [m[name] for m in held], "o-", label=f"quantile {level}")
    right.set(xlabel="step", title="Held-out loss by noise level (0.9 = noisy)")
    right.legend(fontsize=8)
    figure.savefig(out, dpi=120)


def main() -> None:
    start = time.perf_counter()
    config = load_config(CONFIG)
    run_dir = Path(config.model_output_dir)
    seconds = {name: run("scienceflow", name, str(CONFIG)) for name in ("encode", "verify", "train")}
    seconds["export"] = run("scienceflow", "export", str(run_dir), "--format", "both")
    grid, curve, denoised = run_dir / "before_after.png", run_dir / "loss.png", run_dir / "denoised.png"
    metrics = read_metrics(run_dir)
    compare(config, run_dir, grid)
    plot_losses(metrics, curve)
    denoise(config, run_dir, denoised)
    held = [m["held_out_loss"] for m in metrics if "held_out_loss" in m]
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"\nDone in {time.perf_counter() - start:.0f} s ({spent}).")
    print(f"  pictures   {grid}  reference / before / after, {len(config.validation_prompts)} prompts never trained on")
    print(f"  denoised   {denoised}  held-out figures half under noise, without and with the adapter")
    print(f"  loss       {curve}  held-out loss {held[0]:.4f} before, {held[-1]:.4f} after {config.max_train_steps} steps")
    print(f"  adapter    {run_dir / 'export'}  for diffusers and for ComfyUI")
    print(f"  the store  {Path(config.dataset.base_dir) / config.dataset.parquet_base_path}  (decoded samples in verify/)")
    print("The small model is random at the start: it learns paper, lines and colours, not yet layout, lettering or prompts.")
    print("docs/embedded-model.md says what to expect of it; the same commands train FLUX.2-klein-base-9B.")


if __name__ == "__main__":
    main()
