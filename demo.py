"""`make demo`: the shipped base model learns a house style of figures, end to end on a CPU, by the product's own commands.

Encode -> verify -> score the base -> train a LoRA -> score it -> export -> report. All that it makes lies in runs/demo;
delete that folder to start over. A second run resumes: nothing is encoded, trained or drawn twice.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from OpenSciDraw.config import Config, load_config
from OpenSciDraw.drawn.figure import DrawnFigure
from OpenSciDraw.figures.listing import DrawnRef, list_figures
from OpenSciDraw.planning.machine import cpu_has_bf16

CONFIG = Path("configs/tiny/flux2klein_demo.py")
SHOWN = 6  # rows of the picture


def run(*arguments: str) -> float:
    """One of the product's commands as a user would type it; returns its seconds."""
    print(f"\n$ scienceflow {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", "OpenSciDraw.cli", *arguments], check=False).returncode
    if code:
        sys.exit(f"stopped: scienceflow {' '.join(arguments)} exited with {code}; mend it and run the demo again to go on")
    return time.perf_counter() - start


def precision() -> list[str]:
    """Options of a command: the config's bf16, or fp32 on a processor that would only imitate bf16, several times slower."""
    if torch.cuda.is_available() or cpu_has_bf16() is not False:
        return []
    print("This processor has no bf16 instructions, so the demo computes in fp32: mixed_precision = 'no'.", flush=True)
    return ["--cfg_options", "mixed_precision=no"]


def references(config: Config) -> list[tuple[str, DrawnFigure]]:
    """The first figures that both models were asked for: (id, figure)."""
    refs, _ = list_figures(str(config.evaluate.figures), max_figures=SHOWN)
    return [(ref.id, ref.draw()) for ref in refs if isinstance(ref, DrawnRef)]


def compare(config: Config, before: Path, after: Path, out: Path) -> None:
    """One row per prompt: the figure that it describes, what the base drew, what the adapter drew."""
    side, gap, top = 256, 12, 34
    rows = references(config)
    sheet = Image.new("RGB", (3 * (side + gap) + gap, len(rows) * (side + gap) + top), "white")
    pen, face = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    for column, title in enumerate(("reference", "before: the base model", "after: with the LoRA")):
        pen.text((gap + column * (side + gap), 8), title, fill="black", font=face)
    for row, (name, figure) in enumerate(rows):
        pictures = [figure.image, *(Image.open(folder / "pictures" / f"{name}.png") for folder in (before, after))]
        for column, picture in enumerate(pictures):
            x, y = gap + column * (side + gap), top + row * (side + gap)
            pen.rectangle([x - 1, y - 1, x + side, y + side], outline="#bbbbbb")
            sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x, y))
    sheet.save(out)


def main() -> None:
    start = time.perf_counter()
    config = load_config(CONFIG)
    run_dir = Path(config.model_output_dir)
    before, after = run_dir / "evaluations" / "before", run_dir / "evaluations" / "after"
    options = precision()
    seconds = {name: run(name, str(CONFIG), *options) for name in ("encode", "verify")}
    seconds["score before"] = run("evaluate", str(CONFIG), "--out", str(before), *options)
    seconds["train"] = run("train", str(CONFIG), *options)
    seconds["score after"] = run("evaluate", str(run_dir), "--out", str(after), "--compare", str(before))
    seconds["export"] = run("export", str(run_dir), "--format", "both")
    grid = run_dir / "before_after.png"
    compare(config, before, after, grid)
    seconds["report"] = run("report", str(run_dir))
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"\nDone in {time.perf_counter() - start:.0f} s ({spent}).")
    print(f"  pictures  {grid}  reference / before / after for prompts that were never trained on")
    print(f"  scores    {after / 'evaluation.json'}  the table above, with intervals")
    print(f"  adapter   {run_dir / 'export'}  for diffusers and for ComfyUI")
    print(f"  store     {Path(config.dataset.base_dir) / config.dataset.parquet_base_path}  (decoded samples in verify/)")
    print(f"  report    {run_dir / 'report.html'}  open this one in a browser: all of it on one page")
    print("docs/embedded-model.md says what the small model can do; the same commands train FLUX.2-klein-base-9B.")


if __name__ == "__main__":
    main()
