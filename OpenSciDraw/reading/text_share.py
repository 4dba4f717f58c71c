"""How much of a picture is text."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_TEXT_SIDE, _BLOCK, _STEP = 1024, 16, 40  # px, px, of 255


def text_share(grey: Image.Image) -> float:
    """Share of a grey picture that small text covers: blocks of 16 px, full of steps in both directions, that lie in
    short rows. Hatching and crowded markers count as well; docs/prepare.md says how well it agrees with the truth."""
    factor = math.ceil(max(grey.size) / _TEXT_SIDE)
    small = np.asarray(grey.reduce(factor) if factor > 1 and min(grey.size) >= factor else grey).astype(np.int16)
    rows, columns = (small.shape[0] - 1) // _BLOCK, (small.shape[1] - 1) // _BLOCK
    if not rows or not columns:
        return 0.0
    height, width = rows * _BLOCK, columns * _BLOCK
    inner = small[:height, :width]
    busy = np.ones((rows, columns), dtype=bool)
    for beside, least in ((small[:height, 1 : width + 1], 32), (small[1 : height + 1, :width], 24)):
        steps = (np.abs(beside - inner) > _STEP).view(np.uint8)
        count = steps.reshape(rows, _BLOCK, columns, _BLOCK).sum(axis=1, dtype=np.uint8).sum(axis=2, dtype=np.int16)
        busy &= (count >= least) & (count <= 192)
    thickness = np.minimum(_run_lengths(busy), _run_lengths(busy.T).T)
    return float((busy & (thickness <= 3)).mean())


def _run_lengths(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of every True in (n, columns): how many stand together in its column."""
    index = np.arange(1, len(mask) + 1)[:, None]

    def since_gap(part: NDArray[np.bool_]) -> NDArray[np.int64]:
        return index - np.maximum.accumulate(np.where(part, 0, index), axis=0)

    return since_gap(mask) + since_gap(mask[::-1])[::-1] - 1
