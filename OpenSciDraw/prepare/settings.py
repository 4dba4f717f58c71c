"""What `scienceflow prepare` can be told, and the limits of one paper."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """What one paper may use. A paper that needs more is rejected, with the limit as its reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float = Field(120.0, gt=0, description="wall-clock time")
    memory_bytes: int = Field(3 * 2**30, gt=0, description="address space of its process beyond what the interpreter has")
    files: int = Field(20_000, gt=0, description="files in its archive or folder")
    unpacked_bytes: int = Field(2 * 2**30, gt=0, description="bytes of all its files together")
    file_bytes: int = Field(512 * 2**20, gt=0, description="bytes of one file")
    tex_bytes: int = Field(32 * 2**20, gt=0, description="bytes of TeX that is read, inputs counted each time")
    expansions: int = Field(200_000, gt=0, description="macro expansions")
    depth: int = Field(100, gt=0, description="nesting of groups, environments and inputs")
    figures: int = Field(1_000, gt=0, description="pictures of one paper")
    image_pixels: int = Field(120_000_000, gt=0, description="pixels of one picture before it is scaled down")


class PrepareSettings(BaseModel):
    """Settings of `scienceflow prepare`, given as `--cfg_options KEY=VALUE`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # -- pictures
    dpi: int = Field(200, ge=36, le=1200, description="resolution at which PDF, EPS, SVG and TikZ are drawn, dots per inch")
    max_side: int = Field(2048, ge=64, description="longer side of a stored picture, px; larger ones are scaled down")
    # -- what is kept
    min_side: int = Field(128, ge=1, description="shortest side of a picture, px")
    max_aspect_ratio: float = Field(4.0, ge=1, description="longer side / shorter side")
    blank: float = Field(
        0.002, ge=0, le=1, description="a picture with a smaller share of pixels that are not background is blank"
    )
    min_caption_words: int = Field(4, ge=0, description="words of a caption")
    max_caption_chars: int = Field(8_000, ge=1, description="characters of a caption")
    languages: list[str] = Field(["en"], description="ISO 639-1 codes of captions that are kept; [] keeps all")
    kinds: list[Literal["diagram", "plot", "photo", "table"]] = Field(
        ["diagram", "plot"], description="kinds of picture that are kept (measured, not exact: docs/prepare.md)"
    )
    near_duplicate_bits: int = Field(
        12, ge=0, le=24, description="pictures whose perceptual hashes (256 bits) differ in at most so many are one"
    )
    ocr: bool = Field(False, description="read the text in the pictures (needs the extra 'ocr')")
    # -- splits, by paper
    validation_share: float = Field(0.005, ge=0, lt=1, description="share of the papers in figures/validation")
    test_share: float = Field(0.005, ge=0, lt=1, description="share of the papers in figures/test")
    seed: int = Field(42, description="of the split and of the contact sheet's choice")
    # -- work
    papers_per_shard: int = Field(64, ge=1, description="papers whose pictures share a file in extracted/")
    figures_per_shard: int = Field(512, ge=1, description="pictures in one file of figures/")
    num_workers: int = Field(0, ge=0, description="papers worked on side by side; 0: one a core")
    metadata: str | None = Field(None, description="JSON lines with `id` and `license` of papers (arXiv's metadata snapshot)")
    limits: Limits = Field(default_factory=lambda: Limits.model_validate({}))
