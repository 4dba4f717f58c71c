"""Small real models that come with the project: the same classes as the large ones, at small width.

`embedded:NAME` is an ordinary diffusers folder: trained and shipped in shipped/NAME, or built from code by the function
registered under that name (EMBEDDED, any file of models/ or of this folder), deterministically, and kept in the user's
cache. They make tests, CI and the demo run the code that trains the large models.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from OpenSciDraw.errors import UserError
from OpenSciDraw.registry import EMBEDDED

SHIPPED = Path(__file__).parent / "shipped"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def embedded_folder(name: str) -> Path:
    """The diffusers folder of an embedded model: the shipped one, or one that is built at first use (a few seconds).

    Raises:
        UserError: unknown name.
    """
    shipped = sorted(path.parent.name for path in SHIPPED.glob("*/model_index.json"))
    if name in shipped:
        return SHIPPED / name
    if name not in EMBEDDED.names():
        known = sorted([*shipped, *EMBEDDED.names()])
        raise UserError(f"Unknown embedded model {name!r}. Known: {', '.join(f'embedded:{n}' for n in known)}.")
    build = EMBEDDED.get(name)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scienceflow" / "embedded"
    sources = {Path(__file__), Path(inspect.getfile(build)), *(Path(__file__).parents[2] / "drawn").glob("*.py")}
    recipe = b"".join(path.read_bytes() for path in sorted(sources))
    folder = cache / f"{name}-{hashlib.sha256(recipe).hexdigest()[:12]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
        try:
            with torch.random.fork_rng(devices=[]):
                build(building)
            os.replace(building, folder)
        except OSError:
            if not folder.exists():  # otherwise another process has built it meanwhile
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def fill(model: nn.Module, seed: int, residual_gain: float) -> None:
    """Normal weights of std 1/sqrt(fan_in) from a seed; `residual_gain` for what is added to the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 1:
            nn.init.ones_(parameter) if name.endswith("weight") else nn.init.zeros_(parameter)
            continue
        adds = any(part in name for part in ("to_out", "to_add_out", "linear_out", "o_proj", "down_proj"))
        std = 1.0 if "embed_tokens" in name else (residual_gain if adds else 1.0) / math.sqrt(parameter.shape[1])
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def tokenizer(tokens: int = 1024, rich: int = 300, small: int = 0):  # type: ignore[no-untyped-def]  # the class's import is slow
    """Byte-level BPE with Qwen's special tokens and chat template, from captions of drawn figures of both styles."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    from OpenSciDraw.drawn.figure import draw_figure

    captions = [draw_figure(seed=7, index=index, size=128).caption for index in range(rich)]
    for index in range(small):  # with the template's words
        captions.append(f"user\n{draw_figure(seed=7, index=index, size=128, style='small').caption}assistant\n\n")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    made = Qwen2TokenizerFast(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=special,
    )  # fmt: skip
    made.chat_template = CHAT_TEMPLATE
    return made
