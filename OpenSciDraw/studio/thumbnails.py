"""Small pictures of figures, decoded without trust and kept in files, so many and no more."""

from __future__ import annotations

import os
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.decode import RejectedFigure, decode_picture
from OpenSciDraw.figures.refs import FigureRef, FileRef, RowRef, SpanRef
from OpenSciDraw.utils.files import make_folder, unfinished

SIDES = {"thumb": 256, "whole": 1536}  # px of the longer side
_MOST_FILES = 1000  # in each of 256 folders


def ref_of(row: dict[str, Any]) -> FigureRef:
    """The figure that a row of an index names."""
    common = (str(row.get("id", "")), "", row["file"], int(row["bytes"]), int(row.get("changed", 0)))
    if row["column"]:
        return RowRef(*common, row["file"], row["column"], int(row["row"]))
    return SpanRef(*common, row["file"], int(row["offset"])) if row["offset"] >= 0 else FileRef(*common)


def small_picture(row: dict[str, Any], size: str) -> bytes:
    """WebP of a figure, no larger than SIDES[size]. Raises UserError when the picture cannot be decoded."""
    try:
        return small(decode_picture(ref_of(row).read(), min_side=1, max_aspect_ratio=1e9), size)
    except RejectedFigure as error:
        raise UserError(f"{row.get('id', '')}: {error}") from error


def small(picture: Image.Image, size: str) -> bytes:
    picture.thumbnail((SIDES[size], SIDES[size]), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    picture.save(buffer, "WEBP", quality=82 if size == "thumb" else 92, method=2)
    return buffer.getvalue()


class Thumbnails:
    """Pictures by what they are of: another file under a name is another picture."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, row: dict[str, Any], size: str = "thumb") -> bytes:
        """From the cache, or made and put there. Raises UserError as `small_picture`."""
        if size not in SIDES:
            raise UserError(f"size = {size!r:.40}: expected {' or '.join(SIDES)}.")
        parts = [row["file"], row["column"], row["row"], row["offset"], row["bytes"], row.get("changed", 0), size]
        name = blake2b(repr(parts).encode(), digest_size=16).hexdigest()
        file = self.folder / name[:2] / f"{name[2:]}.webp"
        if file.is_file():
            return file.read_bytes()
        made = small_picture(row, size)
        make_folder(file.parent)
        with unfinished(file) as part:
            part.write_bytes(made)
        if name.endswith("0"):  # now and then
            _forget(file.parent)
        return made


def _forget(folder: Path) -> None:
    """Remove the oldest files where there are too many."""
    with os.scandir(folder) as found:
        files = sorted((entry.stat().st_mtime_ns, entry.path) for entry in found if entry.is_file())
    for _, path in files[: max(0, len(files) - _MOST_FILES)]:
        Path(path).unlink(missing_ok=True)
