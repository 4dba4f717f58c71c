"""The rate of `scienceflow encode` against a bare loop of vae.encode and text encoder.

Command:  python benchmarks/run_encode.py

Ours: the functions of OpenSciDraw/encode/run.py that read PNG files, fit them into buckets at 128 px,
tokenise and encode the captions, encode the figures and write both into shards. Bare: the same vae.encode and the same
text encoder (cut after layer 27 alike) in the same batches of the same buckets, on pixels in [-1, 1] and token ids that lie
in memory; nothing is read, tokenised or kept. Both run in turn in one process with one torch thread. Figures are read
by the encoding process itself (0 workers, what suits a CPU) and by one data worker (what suits a GPU; here it
shares the processor's caches and memory with the model). Models and listing of figures are not counted; the worker's start is.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from report import Result, in_turn, ratio
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from OpenSciDraw.config import Config
from OpenSciDraw.drawn.folders import write_drawn_figures
from OpenSciDraw.encode import run as encode
from OpenSciDraw.encode import shards as encode_shards
from OpenSciDraw.encode import work as encode_work
from OpenSciDraw.encode.batches import BatchSizes
from OpenSciDraw.figures.buckets import Bucket
from OpenSciDraw.figures.listing import FigureRef, list_figures
from OpenSciDraw.models.base import FigureModel, build_model
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.store.contract import Contract

TARGET = 0.9
REPETITIONS = 3
BATCH_SIZE = 16
MAX_TOKENS = 128
WORKERS = (0, 1)


@dataclass(frozen=True)
class Case:
    """What is encoded by which model. `folder` is a diffusers folder or an embedded: name."""

    name: str
    folder: str
    figures: int


def build_wider(folder: Path) -> str:
    """The same classes, wider, with random weights: VAE (32, 64, 128), 28 layers of Qwen3 of width 256."""
    tiny = embedded_folder("flux2_klein_tiny_random")
    torch.manual_seed(0)
    AutoencoderKLFlux2(
        block_out_channels=(32, 64, 128), layers_per_block=1, norm_num_groups=16, sample_size=128,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    ).save_pretrained(folder / "vae")  # fmt: skip
    tokenizer = Qwen2TokenizerFast.from_pretrained(tiny, subfolder="tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=28,
            num_attention_heads=8, num_key_value_heads=4, head_dim=32, tie_word_embeddings=True,
        )
    ).save_pretrained(folder / "text_encoder")  # fmt: skip
    (folder / "model_index.json").write_bytes((tiny / "model_index.json").read_bytes())
    return str(folder)


class Encoding:
    """Both ways of encoding one list of figures."""

    def __init__(self, case: Case, folder: Path):
        self.folder = folder
        pictures = folder / "pictures"
        write_drawn_figures(pictures, case.figures, seed=0, size=256)
        self.config = Config.model_validate({
            "pretrained_model_name_or_path": case.folder, "mixed_precision": "no", "max_sequence_length": MAX_TOKENS,
            "dataset": {"base_dir": str(folder)},
            "encode": {"figures": str(pictures), "resolution": 128, "batch_size": BATCH_SIZE, "num_workers": 0},
        })  # fmt: skip
        self.refs, rejected = list_figures(str(pictures))
        assert not rejected
        self.captions = list(dict.fromkeys(["", *(ref.caption for ref in self.refs)]))
        self.model: FigureModel = build_model(self.config)
        self.model.load_vae()
        self.model.load_text_encoder()
        self.contract: Contract = self.model.contract()
        self.ids = self._token_batches()
        self.pixels = self._pixel_batches(self.refs)
        self.run = 0

    def _token_batches(self) -> list[Any]:
        starts = range(0, len(self.captions), BATCH_SIZE)
        return [self.model._tokenize(self.captions[at : at + BATCH_SIZE]) for at in starts]  # type: ignore[attr-defined]

    def _pixel_batches(self, refs: list[FigureRef]) -> list[Tensor]:
        """Batches as encode.py makes them: shard by shard, bucket by bucket."""
        batches = []
        for work in self._figure_work(self.folder):
            by_bucket: defaultdict[Bucket, list[Tensor]] = defaultdict(list)
            for ref in work.items:
                item = encode_shards.prepare(ref, self.config.encode)
                by_bucket[item.bucket].append(encode_shards.to_model_range(item.pixels))
            for bucket in sorted(by_bucket):
                batches += [torch.stack(part) for part in _parts(by_bucket[bucket])]
        return batches

    def _figure_work(self, folder: Path) -> list[encode_work.Work]:
        return encode_work.plan_shards(folder / "figures", self.refs, self.config.encode.samples_per_shard, lambda ref: ref.id)

    def our_captions(self) -> float:
        self.run += 1
        settings = self.config.encode
        works = encode_work.plan_shards(self._out() / "text", self.captions, settings.samples_per_shard, lambda text: text)
        start = time.perf_counter()
        for work in works:
            sizes = BatchSizes(BATCH_SIZE, self.model)
            encode_shards.encode_captions(self.model, work, self.contract, sizes, tqdm(disable=True), settings)
        return time.perf_counter() - start

    def our_figures(self, workers: int) -> float:
        work = self._figure_work(self._out() / str(workers))
        settings = self.config.encode.model_copy(update={"num_workers": workers})
        start = time.perf_counter()
        encode._encode_figures(self.model, work, self.contract, settings, lambda _: None)
        return time.perf_counter() - start

    def _out(self) -> Path:
        return self.folder / f"store{self.run}"

    @torch.no_grad()
    def bare_captions(self) -> float:
        start = time.perf_counter()
        for batch in self.ids:
            self.model.text_encoder(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True, use_cache=False
            )
        return time.perf_counter() - start

    @torch.no_grad()
    def bare_figures(self) -> float:
        start = time.perf_counter()
        for pixels in self.pixels:
            self.model.vae.encode(pixels).latent_dist.mode()  # type: ignore[attr-defined]
        return time.perf_counter() - start


def _parts(rows: list[Tensor]) -> list[list[Tensor]]:
    return [rows[at : at + BATCH_SIZE] for at in range(0, len(rows), BATCH_SIZE)]


def measure(case: Case, folder: Path, result: Result) -> None:
    both = Encoding(case, folder)
    names = {workers: f"figures, {workers} worker(s)" for workers in WORKERS}
    runs = {"bare captions": both.bare_captions, "captions": both.our_captions, "bare figures": both.bare_figures}
    runs |= {name: partial(both.our_figures, workers) for workers, name in names.items()}
    seconds = in_turn(runs, REPETITIONS)
    bare_both = [a + b for a, b in zip(seconds["bare captions"], seconds["bare figures"], strict=True)]
    comparisons = {"captions": (len(both.captions), seconds["bare captions"], seconds["captions"])}
    for name in names.values():
        ours = [a + b for a, b in zip(seconds["captions"], seconds[name], strict=True)]
        comparisons[name] = (len(both.refs), seconds["bare figures"], seconds[name])
        comparisons[f"captions and {name}"] = (len(both.refs), bare_both, ours)
    numbers: dict[str, Any] = {"seconds": seconds, "batches": len(both.pixels), "counts": {}, "ratio": {}}
    for name, (count, bare, ours) in comparisons.items():
        share = numbers["ratio"][name] = ratio(bare, ours)
        numbers["counts"][name] = count
        result.rows.append([case.name, name, f"{count / median(bare):.1f}/s", f"{count / median(ours):.1f}/s", f"{share:.3f}"])
    result.numbers[case.name] = numbers


def main() -> None:
    logging.disable(logging.WARNING)  # prompts that are cut
    torch.set_num_threads(1)
    result = Result("encode", "python benchmarks/run_encode.py", ["model", "what", "bare", "ours", "ratio"])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        wider = build_wider(root / "wider")
        cases = [Case("flux2_klein_tiny_random", "embedded:flux2_klein_tiny_random", 256), Case("wider", wider, 64)]
        for number, case in enumerate(cases):
            measure(case, root / str(number), result)
    result.notes = [f"Target: captions and figures together at {TARGET} of the bare rate or more. 128 px, batches of {BATCH_SIZE}."]
    result.save()


if __name__ == "__main__":
    main()
