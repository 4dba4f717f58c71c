"""A row of a store as the picture that its latents are. Runs in a worker, which keeps the last VAE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import FigureModel, build_model
from OpenSciDraw.store.contract import Contract
from OpenSciDraw.store.shard import FIGURE_PARTS
from OpenSciDraw.store.table import StoreTable
from OpenSciDraw.utils.files import unfinished

_kept: dict[str, Any] = {}


def decode_row(report: Callable[[Any], None], store: str, row: int, out: str) -> dict[str, Any]:
    """Write the decoded latents of a figure to `out` (PNG). Returns shape and size.

    The model is the one that the store's contract names; where its VAE is another one now, that is refused.
    """
    table = StoreTable(Path(store) / "figures", FIGURE_PARTS)
    model = _model_of(table.contract)
    try:
        latents = table.tensor(row)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    with torch.no_grad():
        picture = model.decode(model.normalize(latents.float()[None].to(model.device)))[0]
    pixels = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    with unfinished(Path(out)) as part:
        Image.fromarray(pixels).crop(tuple(table.value("placement", row))).save(part, "PNG")
    return {"shape": list(latents.shape), "bytes": latents.nbytes}


def _model_of(contract: Contract) -> FigureModel:
    """The model that encoded, with its VAE. Raises UserError where the files are another VAE's."""
    key = contract.to_json()
    if _kept.get("key") != key:
        _kept.clear()
        values = {
            "model_type": contract.family, "pretrained_model_name_or_path": str(contract.origin["source"]),
            "revision": contract.origin["revision"], "dataset": {"type": "ArXiVParquetDatasetV2", "base_dir": "."},
        }  # fmt: skip
        config = Config.model_validate(values)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = build_model(config, device, draws_only=True)
        model.vae_precision = str(contract.latents.get("vae_precision", "fp32"))
        model.load_vae()
        model.contract().require(contract, ("latents",), "the store")
        _kept.update(key=key, model=model)
    found: FigureModel = _kept["model"]
    return found
