"""`make demo`: figures -> store -> trained adapter -> pictures, end to end on a CPU, by the product's own commands.

Everything it makes lies in runs/demo; delete that folder to start over. A second run resumes: nothing is
encoded or trained twice.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from OpenSciDraw.config_file import load_config  # noqa: E402
from OpenSciDraw.datasets.drawn import draw_figure  # noqa: E402

CONFIG = Path("configs/tiny/flux2klein_demo.py")


def run(*arguments: str) -> float:
    """One of the product's commands, as a user would type it; returns its seconds."""
    print(f"\n$ {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    program = [sys.executable, "-m", "OpenSciDraw.cli", *arguments[1:]] if arguments[0] == "scienceflow" else [sys.executable, *arguments[1:]]
    code = subprocess.run(program, check=False).returncode
    if code:
        sys.exit(f"stopped: {' '.join(arguments)} exited with {code}")
    return time.perf_counter() - start


def metrics(run_dir: Path) -> list[dict]:
    """Lines of metrics.jsonl; where a resumed run repeated a step, its last line counts."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return lines


def comparison(config, run_dir: Path, out: Path) -> None:  # type: ignore[no-untyped-def]
    """One row per validation prompt: the figure that the prompt describes, before training, after training."""
    folders = sorted((run_dir / "validation_images").glob("step_*"))
    before, after = folders[0], folders[-1]
    side, gap, top = 256, 12, 34
    count = len(config.validation_prompts)
    sheet = Image.new("RGB", (3 * (side + gap) + gap, count * (side + gap) + gap + top), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=18)
    for column, title in enumerate(("reference", f"before ({before.name})", f"after ({after.name})")):
        pen.text((gap + column * (side + gap), 8), title, fill="black", font=font)
    for row, index in enumerate(config_references(config)):
        pictures = [draw_figure(*index, size=config.encode.resolution).image]
        pictures += [Image.open(folder / f"{row:02d}.png") for folder in (before, after)]
        for column, picture in enumerate(pictures):
            picture = picture.convert("RGB")
            picture.thumbnail((side, side)) if picture.width > side else None
            scale = side / max(picture.size)
            picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
            at = (gap + column * (side + gap), top + row * (side + gap))
            pen.rectangle([at[0] - 1, at[1] - 1, at[0] + side, at[1] + side], outline="#bbbbbb")
            sheet.paste(picture, (at[0] + (side - picture.width) // 2, at[1] + (side - picture.height) // 2))
    sheet.save(out)
