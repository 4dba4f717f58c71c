"""Prompt embeddings in half of the bytes: what int8 and fp8 do to them, and to what the model predicts

Command: `python benchmarks/run_text_storage.py` (two minutes).

Two sets of embeddings: those of the embedded FLUX.2-klein's text encoder (random weights, real class) for captions of drawn
figures, and made ones of klein-9B's width (512 x 12288: three layers of 4096) with what is known of large language models:
each layer three times the one before, one channel in a hundred 20 times larger, and three channels of the first token 1000
times larger (Sun et al. 2024). The relative error is |stored - exact| / |exact|, over all tokens and of the worst one.
The velocity's is that of the embedded transformer, in fp32, for the same noisy latents at four noise levels; since that
model is random and listens little to its text, the same difference stands also as a share of what the text does at all (the
velocity with each caption against that with the empty prompt). What computing in bf16 instead of fp32 does is named below.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from report import Result, in_turn
from torch import Tensor

from OpenSciDraw import flow
from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.figures.fitting import to_model_range
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.models.flux2_klein import Flux2Klein
from OpenSciDraw.models.source import ModelSource
from OpenSciDraw.store import codec as text_codec
from OpenSciDraw.store.codec import CODECS, decode, encode, encoded_bytes

FIGURES, SIGMAS = 32, (0.2, 0.5, 0.8, 0.95)
LENGTH, WIDTH, LAYERS = 512, 12288, 3  # of klein-9B


def per_token_int8(tensor: Tensor) -> Tensor:
    """int8 with one scale for all channels of a token: what GROUP avoids."""
    group, text_codec.GROUP = text_codec.GROUP, tensor.shape[1]
    restored = stored(tensor, "int8")
    text_codec.GROUP = group
    return restored


def stored(tensor: Tensor, codec: str) -> Tensor:
    """`tensor` as it comes back from a store."""
    buffer = torch.frombuffer(bytearray(encode(tensor, codec)), dtype=torch.uint8)
    return decode(buffer, tensor.shape, codec)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    **{codec: (lambda tensor, codec=codec: stored(tensor, codec)) for codec in CODECS.values()},  # type: ignore[misc]
    "int8, one scale a token": per_token_int8,
}


def large_embedding() -> Tensor:
    """(512, 12288) with the outliers of a large language model."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(LENGTH, WIDTH, generator=generator)
    values[:, torch.randperm(WIDTH, generator=generator)[: WIDTH // 100]] *= 20
    values *= torch.tensor([1.0, 3.0, 9.0]).repeat_interleave(WIDTH // LAYERS)
    values[0, torch.randperm(WIDTH, generator=generator)[:3]] *= 1000
    return values.bfloat16()


def relative(changed: Tensor, exact: Tensor) -> tuple[float, float]:
    """Error over all tokens, and of the worst token."""
    error = (changed.double() - exact.double()).norm(dim=-1)
    size = exact.double().norm(dim=-1)
    return float(error.norm() / size.norm()), float((error / size).max())


class Velocities:
    """The embedded transformer's velocities of 32 drawn figures, given their embeddings."""

    def __init__(self, model: FigureModel):
        self.model = model
        figures = [draw_figure(0, index, width=128, height=128) for index in range(FIGURES)]
        pixels = np.stack([np.asarray(figure.image) for figure in figures])
        self.clean = model.normalize(model.encode_images(to_model_range(torch.from_numpy(pixels).permute(0, 3, 1, 2))))
        self.noise = torch.randn(self.clean.shape, generator=torch.Generator().manual_seed(1))
        self.rows = [row.bfloat16() for row in model.encode_prompts([figure.caption for figure in figures])]
        self.exact = self(self.rows)
        self.effect = self.exact - self(model.encode_prompts([""] * FIGURES))

    def __call__(self, rows: list[Tensor], autocast: bool = False) -> Tensor:
        """(sigmas, figures, …) velocities, fp32."""
        text = self.model.collate_text([row.float() for row in rows])
        found = []
        for level in SIGMAS:
            sigma = torch.full((FIGURES,), level)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found.append(self.model.velocity(flow.interpolate(self.clean, self.noise, sigma), sigma, text).float())
        return torch.stack(found)

    def error(self, changed: Tensor) -> tuple[float, float]:
        """As a share of the velocity, and of the text's effect on it."""
        difference = (changed - self.exact).norm()
        return float(difference / self.exact.norm()), float(difference / self.effect.norm())


def times(large: Tensor, repetitions: int = 5) -> dict[str, list[float]]:
    """Seconds to decode one embedding of klein-9B, in turn."""

    def timed(codec: str) -> Callable[[], float]:
        buffer = torch.frombuffer(bytearray(encode(large, codec)), dtype=torch.uint8)

        def run() -> float:
            start = time.perf_counter()
            decode(buffer, large.shape, codec)
            return time.perf_counter() - start

        return run

    return in_turn({codec: timed(codec) for codec in CODECS.values()}, repetitions)


@torch.no_grad()
def main() -> None:
    columns = ["stored as", "MB a caption (klein-9B)", "small encoder: error (worst token)", "made outliers: error (worst token)",
               "velocity's error", "share of the text's effect", "ms to decode"]  # fmt: skip
    result = Result("text_storage", "python benchmarks/run_text_storage.py", columns)
    model = Flux2Klein(ModelSource("embedded:flux2_klein_tiny_random"), 128, torch.float32)
    model.load_vae()
    model.load_text_encoder()
    model.load_transformer()
    velocities, large = Velocities(model), large_embedding()
    seconds: dict[str, Any] = times(large)
    for way, change in WAYS.items():
        rows = [change(row) for row in velocities.rows]
        small, worst = relative(torch.cat(rows), torch.cat(velocities.rows))
        made, made_worst = relative(change(large), large)
        error, share = velocities.error(velocities(rows))
        codec = way if way in CODECS.values() else "int8"
        size = encoded_bytes(large.shape, codec) / 1e6
        taken = f"{1e3 * min(seconds[way]):.1f}" if way in seconds else ""
        result.rows.append([way, f"{size:.2f}", f"{small:.4f} ({worst:.4f})", f"{made:.4f} ({made_worst:.4f})",
                            f"{error:.5f}", f"{share:.4f}", taken])  # fmt: skip
        errors = {"small": [small, worst], "made": [made, made_worst], "velocity": error, "share": share}
        result.numbers[way] = {"megabytes": size, **errors}
    error, share = velocities.error(velocities(velocities.rows, autocast=True))
    result.notes.append(
        f"For comparison: computing the same velocity in bf16 autocast instead of fp32 changes it by {error:.5f}, {share:.4f} of "
        "the text's effect."
    )
    result.numbers["bf16 autocast"] = {"velocity": error, "share": share}
    result.save()


if __name__ == "__main__":
    main()
