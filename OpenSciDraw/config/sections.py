"""The parts of a config that are tables of their own, and how a key is declared."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)

from OpenSciDraw.utils.files import is_remote

PACKAGED_FEATURES = ("efficientnet-lite0", "figure-measures")  # of evaluation/features.py; anything else is a folder


def key(default: Any, group: str, meaning: str, unit: str = "", **limits: Any) -> Any:
    """A config key: its default, the group it is listed in, one line of meaning, its unit and limits."""
    extra: dict[str, Any] = {"group": group, "unit": unit}
    if isinstance(default, type):
        return Field(default_factory=default, description=meaning, json_schema_extra=extra, **limits)
    return Field(default, description=meaning, json_schema_extra=extra, **limits)


def canonical_optimizer(value: object) -> object:
    return {"adamw": "AdamW", "prodigy": "prodigy"}.get(value.lower(), value) if isinstance(value, str) else value


def tuple_as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def checkpoint_name(value: str) -> str:
    if not re.fullmatch(r"latest|checkpoint-\d+", value):
        raise ValueError("must be 'latest', 'checkpoint-<step>' such as 'checkpoint-5000', or None")
    return value


def picture_side(value: int) -> int:
    if value < 32 or value % 8:
        raise ValueError("must have sides that are multiples of 8 and at least 32 px")
    return value


class Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)


class TransformerConfig(Section):
    type: str = key(..., "Model", "Class of the transformer; must be the one of model_type.")


class SourceConfig(Section):
    """One of several sources of training rows."""

    path: str = key(..., "Data", "Folder of a store or of an older layout, inside base_dir.", min_length=1)
    name: str | None = key(None, "Data", "Its name in the log and in metrics; None = path.")
    share: float | None = key(None, "Data", "Its share of an epoch's rows, relative to the others'; for all or none.", gt=0)
    repeats: float = key(1.0, "Data", "Without shares: how often an epoch goes through its rows; also 0.5.", "passes", gt=0)
    weight: float = key(1.0, "Data", "Weight of its rows in the loss.", ge=0)
    keep_base: bool = key(False, "Data", "Prior preservation: the target is what the base predicts, not the figure.")

    @property
    def label(self) -> str:
        return self.name or self.path


class DatasetConfig(Section):
    type: str = key(
        "ArXiVParquetDatasetV2", "Data", "Registered dataset; FigureDataset encodes figures while training."
    )
    base_dir: str = key(".", "Data", "Folder of the encoded data; required except for FigureDataset.")
    parquet_base_path: str = key("", "Data", "Folder of the store inside base_dir.")
    gen_parquet_path: str | None = key(None, "Data", "ArXiVParquetDatasetV4: folder of the figures inside base_dir.")
    edit_parquet_path: str | None = key(None, "Data", "ArXiVParquetDatasetV4: folder of the edits inside base_dir.")
    quality_filter: Literal["high", "high+medium", "high_medium", "all"] | None = key(
        None, "Data", "ArXiVParquetDatasetV4: figures of these quality grades alone; None = all."
    )
    sources: Annotated[list[SourceConfig], BeforeValidator(tuple_as_list)] = key(
        [], "Data", "MixedSources: [dict(path=..., share=..., repeats=..., weight=..., keep_base=..., name=...), ...]."
    )
    path_remapping: dict[str, str] | None = key(
        None, "Data", "PreferenceGroups: beginnings of absolute paths in published rows, and what replaces them."
    )
    num_workers: int | None = key(None, "Data", "Second place of dataloader_num_workers.", "processes", ge=0)
    num_train_examples: int | None = key(None, "Data", "Use only the first rows; None = all.", "rows", ge=1)
    cache_dir: str | None = key(None, "Data", "base_dir in cloud storage: folder of the local copies; None = the user's cache.")
    cache_gb: float = key(50.0, "Data", "base_dir in cloud storage: largest size of the copied rows here.", "GB", gt=0)
    read_ahead_batches: int = key(
        2, "Data", "base_dir in cloud storage: batches whose rows each worker fetches ahead.", "batches", ge=0
    )
    stat_data: bool = key(False, "Data", "Print the table of rows per bucket.")
    figures: str | None = key(None, "Data", "FigureDataset: where the figures are, as encode.figures.")
    resolution: Literal[128, 256, 512, 768, 1024] | None = key(
        None, "Data", "FigureDataset: bucket grid; None = encode.resolution.", "px"
    )
    contract: dict[str, Any] | None = key(
        None,
        "Data",
        "How data without a contract were encoded, as you declare it; compared with the model's.",
    )

    @property
    def is_remote(self) -> bool:
        return is_remote(self.base_dir)

    @property
    def keeps_base(self) -> bool:
        """Whether what the base predicts for some rows is kept: prior preservation."""
        return any(source.keep_base for source in self.sources)

    @property
    def location(self) -> str:
        """Folder or address of the encoded data."""
        return f"{self.base_dir.rstrip('/')}/{self.parquet_base_path}"


class SamplerConfig(Section):
    type: str = key("ArXiVMixScaleBatchSampler", "Data", "Registered sampler.")
    batch_size: int | None = key(None, "Data", "Second place of train_batch_size.", "samples per device", ge=1)
    drop_last: bool = key(False, "Data", "Drop a bucket's last, smaller batch.")
    shuffle: bool = key(True, "Data", "Shuffle rows and batches each epoch.")
    seed: int | None = key(None, "Data", "Seed of the data order; None = seed.", ge=0)


class EncodeConfig(Section):
    figures: str | None = key(
        None, "Encode",
        "Figures to encode: a folder (with x.txt/x.json captions, or of parquet files), a .jsonl, .csv or .parquet "
        "file, or 'drawn:2000' / 'drawn:2000:seed=1' for figures drawn by the program.",
    )  # fmt: skip
    resolution: Literal[128, 256, 512, 768, 1024] = key(768, "Encode", "Bucket grid: a unit is resolution / 16.", "px")
    image_column: str | None = key(None, "Encode", "Column of the image or its path; None = found by name.")
    caption_column: str | Annotated[list[str], BeforeValidator(tuple_as_list)] | None = key(
        None, "Encode", "Column of the caption, or columns of several captions of a figure; None = found by name."
    )
    caption_weights: Annotated[list[Annotated[float, Field(ge=0)]], BeforeValidator(tuple_as_list)] = key(
        [], "Encode", "caption_column as a list: how often each of its captions is trained on; [] = alike.", "relative"
    )
    caption_lines: bool = key(False, "Encode", "Each line of a caption's .txt or .caption is a caption of its own.")
    mask_column: str | None = key(
        None, "Encode", "Column of the picture that says where a figure counts in the loss; x.mask.png beside x.png does without."
    )
    weight_column: str | None = key(None, "Encode", "Column, or key of a caption's .json, of a figure's weight in the loss.")
    reference_column: str | None = key(
        None, "Encode", "Column of the picture, or pictures, that an edit starts from; None = found by name."
    )
    text_storage: Literal["bf16", "int8", "fp8"] = key(
        "bf16", "Encode", "Prompt embeddings on disk: 'bf16' is exact, 'int8' and 'fp8' take half (docs/encode.md has the errors)."
    )
    vae_precision: Literal["auto", "fp32", "tf32", "bf16"] = key(
        "auto", "Encode", "What the VAE encodes in: 'fp32' is exact; 'auto' = the fastest whose error in the latents is no larger "
        "than rounding to bf16 (fp32 on a CPU), kept in a store that is there.",
    )  # fmt: skip
    samples_per_shard: int = key(256, "Encode", "Rows of one shard, the unit of resuming.", "rows", ge=1)
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = key(
        "auto", "Encode", "Figures or captions encoded at once; 'auto' = by the GPU's memory, 4 on a CPU.", "samples"
    )
    num_workers: int = key(2, "Encode", "Processes that read and decode figures.", "processes", ge=0)
    min_quality: Literal["low", "medium", "high"] | None = key(
        None, "Encode", "Rows of a lower tier (column quality or quality_tier) are left out; None = all."
    )
    where: dict[str, Any] = key(
        {}, "Encode", "Only rows of lists and tables with these values: dict(split='gen_768', is_tikz=False); a list: any of it."
    )
    max_figures: int | None = key(None, "Encode", "Encode only the first ones; None = all.", "figures", ge=1)
    max_image_pixels: int = key(100_000_000, "Encode", "Larger figures are rejected before decoding.", "px", ge=1)
    max_aspect_ratio: float = key(16.0, "Encode", "Longer figures (long side / short side) are rejected.", "ratio", ge=1)
    min_side: int = key(32, "Encode", "Figures with a shorter side are rejected.", "px", ge=1)
    max_upscale: float = key(4.0, "Encode", "Figures that their bucket would enlarge more are rejected.", "factor", ge=1)


class EvaluateConfig(Section):
    """What `scienceflow evaluate` does where its own options do not say otherwise, and validation functions always."""

    figures: str | None = key(
        None, "Evaluate",
        "Prompts to draw, with what the pictures are compared with: as encode.figures, or a .jsonl of prompts with sizes.",
    )  # fmt: skip
    metrics: Annotated[list[str], BeforeValidator(tuple_as_list)] = key(
        ["structure"], "Evaluate",
        "Registered metrics: structure, described, edit, text, distribution, held_out, judge, judge_published.",
    )  # fmt: skip
    limit: int | None = key(None, "Evaluate", "Only the first ones; None = all.", "figures", ge=1)
    steps: int | None = key(None, "Evaluate", "Steps of a picture; None = num_inference_steps.", "sampling steps", ge=1)
    guidance: float | None = key(None, "Evaluate", "Guidance; None = as in validation.", "factor", ge=0)
    seed: int = key(0, "Evaluate", "Seed of the pictures' noise (with each one's id) and of what metrics draw by chance.", ge=0)
    batch_size: int = key(8, "Evaluate", "Pictures of one size drawn at once.", "pictures", ge=1)
    reader: Literal["rapidocr", "tesseract"] = key("rapidocr", "Evaluate", "Program that reads text in pictures.")
    features: str | None = key(
        None, "Evaluate",
        "distribution: 'efficientnet-lite0', 'figure-measures', or the folder of a CLIP or DINO model; None = a packaged one.",
    )  # fmt: skip
    judge_url: str | None = key(None, "Evaluate", "judge: address of an OpenAI-compatible endpoint, e.g. http://host:8000/v1.")
    judge_model: str | None = key(None, "Evaluate", "judge: name of the model at that address.")
    judge_arrow_direction: bool = key(True, "Evaluate", "judge: an arrow's direction counts.")
    judge_requests: int = key(4, "Evaluate", "judge: requests at the same time.", "requests", ge=1)
    judge_timeout: float = key(120.0, "Evaluate", "judge: longest time of one request.", "s", gt=0)
    judge_retries: int = key(3, "Evaluate", "judge: further tries of a failed request.", "tries", ge=0)
    judge_key_variable: str = key("OPENAI_API_KEY", "Evaluate", "judge: environment variable that holds the access key.")
    judge_instructions: str | None = key(
        None, "Evaluate", "judge_published: file with the instructions to the judge (docs/bench.md); None = our own wording."
    )
    judge_rounds: int = key(1, "Evaluate", "judge_published: how often each picture is judged; scores are means.", "rounds", ge=1)


def is_path(value: object) -> bool:
    named = value in PACKAGED_FEATURES or (isinstance(value, str) and value.startswith(("drawn:", "~")))
    return isinstance(value, str) and not named and not is_remote(value)
