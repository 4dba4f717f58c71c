"""`scienceflow verify`: is a store what it says? Every shard against its checksum and contract, and pictures to look at."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from OpenSciDraw.config import Config
from OpenSciDraw.encode.work import Place, store_folder
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel, build_model
from OpenSciDraw.store.shard import FIGURE_PARTS, TEXT_PARTS, what_is_damaged
from OpenSciDraw.store.table import StoreTable
from OpenSciDraw.utils.files import make_folder

_LOG = logging.getLogger("OpenSciDraw")


def verify_main(target: str, samples: int, out: str | None, overrides: Sequence[str]) -> int:
    """Check every shard against its checksum and contract, and decode `samples` figures to pictures.

    `target` is a config file (then its model decodes the pictures and its contract is compared) or a store
    folder (checks alone). Returns 1 when something is damaged.
    """
    config: Config | None = None
    if target.endswith(".py"):
        from OpenSciDraw.config import load_config

        config = load_config(target, overrides)
    folder = store_folder(config) if config is not None else Path(target)
    if not (folder / "figures").is_dir():
        raise UserError(f"{folder} is no store: there is no figures/ in it. `scienceflow encode CONFIG.py` makes one.")
    if damaged := [error for index in sorted(folder.glob("*/[0-9]*.index.arrow")) if (error := what_is_damaged(index))]:
        for error in damaged:
            _LOG.error("damaged: %s", error)
        return 1
    tables = {"latents": StoreTable(folder / "figures", FIGURE_PARTS)}
    if tables["latents"].has_edits:
        tables["references"] = StoreTable(folder / "references", FIGURE_PARTS)
    if (folder / "text").is_dir():
        tables["text"] = StoreTable(folder / "text", TEXT_PARTS)
    problems = [problem for table in tables.values() for problem in _missing_shards(table)]
    for part, table in tables.items():
        for shard in tqdm(range(len(table.shards)), desc=f"verify {part}", unit="shard"):
            try:
                table.verify_shard(shard)
            except (ValueError, OSError) as error:
                problems.append(str(error))
        _LOG.info("%s: %d rows in %d shards, statistics of the first: %s", part, len(table), len(table.shards),
                  table.infos[0].facts["statistics"])  # fmt: skip
    if config is not None:
        pictures = make_folder(Path(out) if out else folder / "verify")
        model = build_model(config, Place.here().device())
        model.load_vae()
        for part, table in tables.items():
            model.contract().require(table.contract, ("text" if part == "text" else "latents",), folder)
        problems += _decode_samples(model, tables["latents"], samples, pictures)
    for problem in problems:
        _LOG.error("damaged: %s", problem)
    _LOG.info("%s: %s", folder, f"{len(problems)} problem(s)" if problems else "every shard is what was written")
    return 1 if problems else 0


def _missing_shards(table: StoreTable) -> list[str]:
    """Shards that must have been there: their index is left, or a later one is there."""
    names = {shard.name for shard in table.shards}
    last = max(int(shard.stem) for shard in table.shards)
    expected = {f"{number:05d}.parquet" for number in range(last + 1)}
    folder = Path(table.folder)
    expected |= {index.name.replace(".index.arrow", ".parquet") for index in folder.glob("[0-9]*.index.arrow")}
    return [f"{folder / name}: the shard is missing" for name in sorted(expected - names)]


def _decode_samples(model: FigureModel, table: StoreTable, samples: int, out: Path) -> list[str]:
    """Decode evenly spaced rows and write them with their captions. Returns what is wrong with rows that cannot be read."""
    problems = []
    rows = np.unique(np.linspace(0, len(table) - 1, min(samples, len(table))).astype(int)).tolist()
    for row in rows:
        try:
            latents = table.tensor(row)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        picture = model.decode(model.normalize(latents.float()[None].to(model.device)))[0]
        pixels = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        name = f"{row:07d}"
        Image.fromarray(pixels).crop(tuple(table.value("placement", row))).save(out / f"{name}.png")
        text = f"{table.value('id', row)}\n{table.value('caption', row)}\n"
        (out / f"{name}.txt").write_text(text, encoding="utf-8")
    _LOG.info("%d pictures decoded from the store: %s", len(rows) - len(problems), out)
    return problems
