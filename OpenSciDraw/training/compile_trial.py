"""Whether compiled blocks may be used: tried in a process of its own, compared with eager ones, remembered.

torch.compile can fail in ways that no `except` catches: an illegal memory access poisons the process, a wrong kernel the weights.
So the run's kinds of block, at their real widths and with what trains in them, are first compiled in a child process on the
same device. It compares outputs and gradients with eager blocks, both against fp32, at two sizes of picture with
one graph for all, and times both. What it found is kept by versions, card and settings; whatever goes wrong means eager blocks.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from OpenSciDraw import __version__
from OpenSciDraw.config import Config
from OpenSciDraw.utils.files import write_json

if TYPE_CHECKING:
    from OpenSciDraw.models.base import FigureModel

_LOG = logging.getLogger("OpenSciDraw")
LIMIT_SECONDS = 600.0  # for the child: to start, to compile, to time
BLOCKS = 2  # of each kind: the first one's input has no gradient, the second one's has
WORSE, SLACK = 1.5, 1e-3  # a compiled block may be this much further from fp32 than an eager one, relative and absolute
TIMED = 5
LONG = 3000  # steps from which "auto" asks for a trial at all: it takes minutes, which a shorter run never gets back
PACKAGES = ("torch", "triton", "diffusers", "peft")
# what decides which code is compiled
KEYS = ("model_type", "mixed_precision", "use_lora", "lora_layers", "rank", "lora_alpha", "lora_dropout", "adapter_type",
        "use_rslora", "lokr_factor", "lokr_decompose_both", "oft_block_size", "master_weights",
        "train_batch_size", "max_sequence_length", "gradient_checkpointing")  # fmt: skip


# -- asking --------------------------------------------------------------------------------------------
def may_compile(config: Config, model: FigureModel, steps: int | None, alone: bool) -> bool:
    """Whether this run's blocks are compiled; one line says why not, where the config or a trial that failed is the reason.

    `steps`: optimizer steps to come, None = unknown. `alone`: the whole transformer is on this device (no FSDP2, no DeepSpeed).
    With "auto" it must also pay: the run is LONG, and what its steps save is more than compiling took in the trial.
    """
    if config.compile_blocks is False or config.token_routing.share:
        return False
    asked, device = config.compile_blocks is True, model.device
    quantised = config.quantization or config.bnb_quantization_config_path or config.fp8_products
    special = quantised or config.offload or not alone or config.mixed_precision == "fp16" or model.trained_part != "transformer"
    if not asked and (device.type != "cuda" or special or steps is None or steps < LONG):
        return False
    if special:
        _LOG.warning("compile_blocks = True: compiled without a trial, which knows no quantised or dealt blocks and no fp16")
        return True
    found = answer(config, model.transformer_config(), device)
    if not found["ok"]:
        _LOG.warning("blocks are not compiled: %s. Remembered in %s; delete it to try again", found["reason"], found["file"])
        return False
    saved = (found["eager"] - found["compiled"]) * found["blocks_in_all"] / found["blocks"] * config.gradient_accumulation_steps
    if not asked and saved * (steps or 0) < found["compiling"]:
        _LOG.info("blocks are not compiled: %.3f s saved a step against %.0f s of compiling", saved, found["compiling"])
        return False
    _LOG.info("blocks are compiled: %.3f s saved a step, in the trial", saved)
    return True


def answer(config: Config, transformer_config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What the trial said, now or when it was last asked: `ok`, and its `reason` or the seconds that it measured."""
    question = {
        "config": {name: getattr(config, name) for name in KEYS},
        "transformer": {k: v for k, v in transformer_config.items() if not k.startswith("_")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"OpenSciDraw": __version__, "python": sys.version.split()[0], **_versions()},
    }
    digest = hashlib.sha256(json.dumps(question, sort_keys=True, default=str).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "OpenSciDraw" / "compile"
    file = cache / f"{digest}.json"
    if file.exists():
        return json.loads(file.read_text()) | {"file": str(file)}
    _LOG.info("trying compiled blocks in a process of its own, once for these versions, this device and these settings …")
    values = config.model_dump(mode="json", exclude_unset=True)
    found = ask([sys.executable, "-m", "OpenSciDraw.training.compile_trial", str(device)], json.dumps(values), LIMIT_SECONDS)
    cache.mkdir(parents=True, exist_ok=True)
    write_json(file, found | {"question": question})
    return found | {"file": str(file)}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def ask(command: list[str], question: str, limit: float) -> dict[str, Any]:
    """Run the trial; whatever ends it without an answer is its answer.

    It compiles into a folder of its own: a process that is killed leaves half a library there, at which a later one would fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder},
        )  # fmt: skip
        try:
            out, said = child.communicate(question, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"ok": False, "reason": f"the trial took longer than {limit:.0f} s"}
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)  # compilers that it started
            except ProcessLookupError:
                pass
            child.wait()
    if child.returncode < 0:
        return {"ok": False, "reason": f"the trial was ended by {signal.Signals(-child.returncode).name}"}
    lines = [line for line in (out if child.returncode == 0 else said).splitlines() if line.strip()]
    if child.returncode:
        return {"ok": False, "reason": f"the trial failed: {lines[-1][:300] if lines else f'exit code {child.returncode}'}"}
    try:
        return dict(json.loads(lines[-1]))
    except (IndexError, ValueError):
        return {"ok": False, "reason": "the trial ended without an answer"}


# -- the child ------------------------------------------------------------------------------------------
def trial(config: Config, device: torch.device, backend: str = "inductor") -> dict[str, Any]:
    """Compare and time a small transformer of the run's kind, eager and compiled."""
    from OpenSciDraw.models.base import DTYPES
    from OpenSciDraw.parallel.sharding import repeated_blocks

    half = DTYPES[config.mixed_precision]
    exact = _small(config.model_copy(update={"mixed_precision": "no", "master_weights": "fp32"}), device, half)
    references = [_step(exact, case) for case in _cases(exact, config)]
    whole = len(repeated_blocks(exact.empty_transformer()))
    model = _small(config, device, half)
    cases = _cases(model, config)
    eager = [_step(model, case) for case in cases]
    seconds = _seconds(model, cases[0])
    start = time.perf_counter()
    compile_blocks(model.transformer, backend)
    compiled = [_step(model, case) for case in cases]
    compiling = time.perf_counter() - start
    for name, at in (("output", 0), ("gradients", 1)):
        for reference, plain, tried in zip(references, eager, compiled, strict=True):
            allowed, found = WORSE * _error(plain[at], reference[at]) + SLACK, _error(tried[at], reference[at])
            if not found <= allowed:
                return {"ok": False, "reason": f"compiled {name} are {found:.2g} from fp32, where {allowed:.2g} is allowed"}
    return {"ok": True, "compiling": compiling, "eager": seconds, "compiled": _seconds(model, cases[0]),
            "blocks": len(repeated_blocks(model.transformer)), "blocks_in_all": whole}  # fmt: skip


def _small(config: Config, device: torch.device, half: torch.dtype) -> FigureModel:
    """A model whose transformer has two blocks of each kind, random weights that `half` can hold, and what trains as in the run."""
    from OpenSciDraw.models.base import build_model
    from OpenSciDraw.parallel.sharding import block_lists
    from OpenSciDraw.weights import trainable
    from OpenSciDraw.weights.precision import compute_throughout

    model = build_model(config, device)
    transformer = model.empty_transformer(trainable.loading_dtype(config))
    layers = trainable.resolve_lora_layers(transformer, config.lora_layers) if config.use_lora else []
    for name, blocks in block_lists(transformer).items():
        setattr(transformer, name, blocks[:BLOCKS])
    torch.manual_seed(0)
    for module in transformer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.randn(parameter.shape, device=device)
            values = values.mul_(parameter.shape[-1] ** -0.5) if parameter.ndim > 1 else values.mul_(0.1).add_(name == "weight")
            module._parameters[name] = nn.Parameter(values.to(half).to(parameter.dtype), requires_grad=False)
    transformer.to(device)
    there = dict(transformer.named_modules())
    present = [name for name in layers if name in there]
    trainable.make_trainable(transformer, config.model_copy(update={"lora_layers": present}) if layers else config)
    for name, parameter in transformer.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.02)
    compute_throughout(model, transformer, config)
    model.transformer = transformer.train()
    return model


def _cases(model: FigureModel, config: Config) -> list[tuple[Any, ...]]:
    """Inputs of `velocity` for a square picture of the run's resolution and for half of it; alike for each model."""
    from OpenSciDraw.models.base import TextBatch

    random = torch.Generator(model.device).manual_seed(2)
    batch, side, shape = config.train_batch_size, max(4, config.encode.resolution // 16), model.transformer.config  # in tokens
    level = torch.full((batch,), 0.5, device=model.device)
    cases = []
    for width in (side, side // 2):
        noisy = torch.randn(batch, shape.in_channels, side, width, device=model.device, generator=random)
        rows = torch.randn(batch, config.max_sequence_length, shape.joint_attention_dim, device=model.device, generator=random)
        cases.append((noisy, level, TextBatch(rows.to(model.weight_dtype))))
    return cases


def _step(model: FigureModel, case: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Output, and all gradients in one row, in fp32."""
    trained = [p for p in model.transformer.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = None
    torch.manual_seed(1)  # LoRA dropout
    out = model.velocity(*case)
    out.float().pow(2).mean().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]  # a last block does not use all that it has
    return out.detach().float(), torch.cat([gradient.float().flatten() for gradient in gradients])


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _seconds(model: FigureModel, case: tuple[Any, ...]) -> float:
    """Of a forward and backward, after one that does not count."""
    wait: Callable[[], None] = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    times = []
    for _ in range(TIMED + 1):
        wait()
        start = time.perf_counter()
        _step(model, case)
        wait()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def compile_blocks(transformer: nn.Module, backend: str = "inductor") -> None:
    """torch.compile for each block: those of one kind share one graph, for all sizes of picture."""
    from OpenSciDraw.parallel.sharding import repeated_blocks

    for block in repeated_blocks(transformer):
        block.compile(dynamic=True, backend=backend)


def main() -> None:
    """Reads a config as JSON from standard input; the answer is the last line of standard output."""
    for name in ("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit"):  # the later name, and that of torch 2.6
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, True)
    print(json.dumps(trial(Config.model_validate(json.load(sys.stdin)), torch.device(sys.argv[1]))))


if __name__ == "__main__":
    main()
