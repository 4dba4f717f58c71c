"""A picture of unknown origin as SVG, TikZ and PowerPoint. Runs in a worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from OpenSciDraw.vectorize.labels import has_ocr
from OpenSciDraw.vectorize.render import draw, share_of
from OpenSciDraw.vectorize.run import FORMATS, describe, read_picture, require, write
from OpenSciDraw.vectorize.trace import trace


def vectorize(report: Callable[[Any], None], file: str, out: str) -> dict[str, Any]:
    """Write `out`/figure in every format; what was read in one line, as `scienceflow vectorize` says it.

    Raises:
        UserError: no picture that can be read, or a package is missing.
    """
    require(FORMATS)
    picture, ocr = read_picture(Path(file)), has_ocr()
    figure = trace(picture, ocr)
    write(figure, Path(out) / "figure", FORMATS)
    share = share_of(picture, draw(figure), figure)
    return {"says": describe(figure, share), "explained": share.explained, "ocr": ocr}
