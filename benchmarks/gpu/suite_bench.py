"""Models of real shapes with random weights, figures, stores and configs for the cases; tiny ones in a rehearsal.

A kind of model is a diffusers folder. Its transformer has the published shape, the VAE too; the text encoder has the right width
(so that embeddings have the right size) and narrow layers, so that no case spends its minutes on it. `4B` and `short` have their
transformer's weights on disk, `9B` and `qwen` draw them on the device when they are loaded, through the families below.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from suite_results import REPO, newest, read

from OpenSciDraw.config import Config
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.models.embedded import embedded_folder
from OpenSciDraw.models.flux2_klein import Flux2Klein
from OpenSciDraw.models.qwen_image import QwenImage
from OpenSciDraw.planning.plan import Costs, Plan, make_plan
from OpenSciDraw.registry import MODELS

KLEIN_LAYERS = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,linear_in,linear_out,to_qkv_mlp_proj,attn.to_out"
)
QWEN_LAYERS = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.0.proj,img_mlp.net.2,txt_mlp.net.0.proj,txt_mlp.net.2"
)
KNOWN = {
    "4B": "black-forest-labs/FLUX.2-klein-base-4B", "9B": "black-forest-labs/FLUX.2-klein-base-9B",
    "short": "black-forest-labs/FLUX.2-klein-base-4B", "qwen": "Qwen/Qwen-Image-2512",
}  # fmt: skip
SHORT = {"num_layers": 1, "num_single_layers": 2}  # blocks of `short`, where only exactness is asked for
ON_DISK = ("4B", "short")
OTHER_GB = 14.0  # of a Qwen-Image run beside its blocks: context, activations when recomputed, what lies outside the blocks, spare


class _Drawn(FigureModel):
    """A family whose transformer is drawn on the device: random weights, without gigabytes on the disk."""

    def load_transformer(
        self, quantization: Any = None, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        assert quantization is None, "quantising reads weights from files"
        self._transformer = drawn_transformer(self, device or self.device, dtype or self.weight_dtype)


@MODELS.register("DrawnFlux2Klein")
class DrawnFlux2Klein(_Drawn, Flux2Klein):
    pass


@MODELS.register("DrawnQwenImage")
class DrawnQwenImage(_Drawn, QwenImage):
    pass


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def drawn_transformer(model: FigureModel, device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with default_dtype(dtype), device:
        transformer = model.transformer_type.from_config(model.transformer_config())
    return transformer.eval().requires_grad_(False)


@dataclass
class Bench:
    """Where the cases work, and how large."""

    work: Path
    results: Path  # the JSON lines, to read what earlier cases measured
    rehearse: bool
    device: torch.device
    environment: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)  # by kind: what of it is not the published shape
    costs: dict[str, Costs] = field(default_factory=dict)  # by kind: steps that the planner has counted

    @property
    def side(self) -> int:
        return 128 if self.rehearse else 1024

    @property
    def text_tokens(self) -> int:
        return 64 if self.rehearse else 512

    @property
    def rank(self) -> int:
        return 8 if self.rehearse else 128

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def steps(self, count: int) -> int:
        return min(count, 3) if self.rehearse else count

    def earlier(self, case: str, value: str) -> float | None:
        """What an earlier case measured on this card with this commit; None where it did not run."""
        for record in newest(read(self.results)):
            same = all(record[name] == self.environment[name] for name in ("card", "commit"))
            if record["case"] == case and record["status"] == "ok" and same:
                return record["values"].get(value)
        return None

    def free(self) -> None:
        """Give memory back, and let peaks start anew."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    # -- what cases work on -----------------------------------------------------------------------
    def figures(self, count: int) -> Path:
        """A folder of `count` square figures with captions."""
        folder = self.work / f"figures-{count}"
        if not folder.exists():
            building = self.work / f".figures-{count}"
            shutil.rmtree(building, ignore_errors=True)
            draw_figures(building, count, self.side)
            building.rename(folder)
        return folder

    def folder(self, kind: str) -> Path:
        """The diffusers folder of a kind, built at first use."""
        folder = self.work / f"model-{kind}"
        if not (folder / "model_index.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            build_folder(self, kind, folder)
        return folder

    def config(self, kind: str, name: str, **changes: Any) -> Config:
        """A run of `kind` with the suite's settings; `name` is its folder."""
        family = "QwenImage" if kind == "qwen" else "Flux2Klein"
        values: dict[str, Any] = {
            "model_type": family if kind in ON_DISK else f"Drawn{family}", "pretrained_model_name_or_path": str(self.folder(kind)),
            "max_sequence_length": self.text_tokens, "mixed_precision": "bf16", "rank": self.rank, "lora_alpha": self.rank,
            "lora_layers": QWEN_LAYERS if kind == "qwen" else KLEIN_LAYERS, "learning_rate": 1e-4, "lr_warmup_steps": 0,
            "train_batch_size": 1, "num_train_epochs": None, "max_train_steps": self.steps(14),
            "dataloader_num_workers": 0 if self.rehearse else 4, "held_out_examples": 0, "logging_steps": 1 if self.rehearse else 2,
            "checkpointing_steps": 10**6, "validation_steps": 10**6, "report_to": "none", "compile_blocks": False,
            "model_output_dir": str(self.work / "runs" / name), "resume_from_checkpoint": None,
            "dataset": {"base_dir": str(self.work), "parquet_base_path": f"store-{kind}"},
            "encode": {"figures": str(self.figures(self.stored)), "resolution": self.side,
                       "num_workers": 0 if self.rehearse else 8},
        }  # fmt: skip
        return Config.model_validate(values | changes)

    @property
    def stored(self) -> int:
        """Figures of a store that trainings read."""
        return 6 if self.rehearse else 24

    def store(self, kind: str) -> None:
        """Encode the figures for `kind`, where that has not been done."""
        done = self.work / f"store-{kind}" / ".done"
        if not done.exists():
            from OpenSciDraw.encode import run as encode

            assert encode.main(self.config(kind, "encode")) == 0
            done.touch()

    def plan(self, kind: str, config: Config) -> Plan:
        return make_plan(config, plan_name(self.environment["card"], self.device), costs=self.costs.setdefault(kind, {}))

    def write_config(self, config: Config) -> Path:
        """The config as a file, for a command line."""
        from OpenSciDraw.config import save_config

        path = self.work / f"{Path(config.model_output_dir).name}.py"
        save_config(config, path)
        return path


def plan_name(card: str, device: torch.device) -> str:
    """The planner's name of the card: of the same model, else of the nearest memory; an H100's in a rehearsal."""
    from OpenSciDraw.planning.gpus import GPUS

    if device.type != "cuda":
        return "H100-80GB"
    total = torch.cuda.get_device_properties(device).total_memory / 1e9
    same = [name for name in GPUS if name.partition("-")[0].lower() in card.lower().replace(" ", "")] or list(GPUS)
    return min(same, key=lambda name: abs(GPUS[name].memory_gb - total))


def draw_figures(folder: Path, count: int, side: int) -> None:
    """Boxes on white, `x.png` with `x.txt`."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True)
    for index in range(count):
        chance = random.Random(index)
        picture = Image.new("RGB", (side, side), "white")
        pen = ImageDraw.Draw(picture)
        for _ in range(12):
            x, y = chance.randrange(side), chance.randrange(side)
            colour = (chance.randrange(256), chance.randrange(256), chance.randrange(256))
            pen.rectangle((x, y, x + side // 6, y + side // 9), fill=colour, outline="black")
        picture.save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(f"Figure {index}: a pipeline of twelve boxes, with arrows from left to right.")


# -- folders of models --------------------------------------------------------------------------------
def transformer_config(bench: Bench, kind: str) -> dict[str, Any]:
    """The published shape; narrow in a rehearsal. Qwen-Image has as many blocks as fit, and notes says so."""
    known = json.loads((REPO / "OpenSciDraw" / "models" / "known_configs.json").read_text())
    config = dict(known[KNOWN[kind]]["transformer/config.json"])
    if kind == "short":
        config |= SHORT
    if bench.rehearse:
        config |= {"num_attention_heads": 2, "joint_attention_dim": 64 if kind == "qwen" else 3 * 64}
        config |= {"num_layers": 2} if kind == "qwen" else SHORT
    elif kind == "qwen" and bench.cuda:
        config["num_layers"] = fitting_blocks(bench, config)
        if config["num_layers"] < 60:
            bench.notes[kind] = f"{config['num_layers']} of 60 blocks: memory is short"
    return config


def fitting_blocks(bench: Bench, config: dict[str, Any]) -> int:
    """Blocks of Qwen-Image whose bf16 weights, adapters and AdamW state leave room for a step that recomputes."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    weights = 2 * 2 * (4 * width**2 + 8 * width**2 + 6 * width**2)  # two streams: attention, feed-forward, modulation; 2 bytes
    adapter = 16 * 2 * bench.rank * (4 * 2 * width + 2 * 5 * width)  # fp32 weight, gradient and two moments
    free = torch.cuda.mem_get_info(bench.device)[0]
    return max(4, min(config["num_layers"], int((free - OTHER_GB * 1e9) / (weights + adapter))))


def build_folder(bench: Bench, kind: str, folder: Path) -> None:
    """Write the folder; model_index.json last, so that a half-built one is built again."""
    qwen = kind == "qwen"
    tiny = embedded_folder("qwen_image_tiny" if qwen else "flux2_klein_tiny_random")
    for part in ("tokenizer", "scheduler", *(("vae",) if bench.rehearse else ())):
        shutil.copytree(tiny / part, folder / part)
    config = transformer_config(bench, kind)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    with default_dtype(torch.bfloat16), bench.device:
        if not bench.rehearse:
            import diffusers

            (diffusers.AutoencoderKLQwenImage() if qwen else diffusers.AutoencoderKLFlux2()).save_pretrained(folder / "vae")
        width = config["joint_attention_dim"]
        (_qwen_encoder(tiny, width) if qwen else _klein_encoder(tiny, width // 3)).save_pretrained(folder / "text_encoder")
        if kind in ON_DISK:
            from diffusers import Flux2Transformer2DModel

            Flux2Transformer2DModel.from_config(config).save_pretrained(folder / "transformer", max_shard_size="10GB")
    if kind in bench.notes:
        (folder / "note").write_text(bench.notes[kind])
    shutil.copy(tiny / "model_index.json", folder / "model_index.json")


def _klein_encoder(tiny: Path, width: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config.from_pretrained(tiny / "text_encoder")
    config.hidden_size = width
    return Qwen3ForCausalLM(config)


def _qwen_encoder(tiny: Path, width: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig.from_pretrained(tiny / "text_encoder")
    text = config.text_config
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = width, width // 16, 2  # heads of 16, as its RoPE wants
    config.vision_config.out_hidden_size = width
    return Qwen2_5_VLForConditionalGeneration(config)
