"""The command `scienceflow vectorize`: pictures to SVG, TikZ and PowerPoint, and how much of each was read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from OpenSciDraw.errors import UserError
from OpenSciDraw.utils.files import make_folder
from OpenSciDraw.vectorize.figure import VectorFigure
from OpenSciDraw.vectorize.labels import has_ocr
from OpenSciDraw.vectorize.powerpoint import write_pptx
from OpenSciDraw.vectorize.render import Share, draw, share_of, side_by_side
from OpenSciDraw.vectorize.svg import write_svg
from OpenSciDraw.vectorize.tikz import write_tikz
from OpenSciDraw.vectorize.trace import trace

FORMATS = ("svg", "tikz", "pptx")
_ENDING = {"svg": ".svg", "tikz": ".tex", "pptx": ".pptx"}
_READ = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # not EPS, which a program would be run for
_LEAST, _MOST = 32, 8192  # px of a side
_MOST_PIXELS = 64_000_000
_DIAGRAM = 0.5  # share of the ink from which a picture counts as read


def main(arguments: argparse.Namespace) -> int:
    formats = _formats(arguments.format)
    require(formats)
    paths = [Path(name) for name in arguments.pictures]
    targets = _targets(paths, arguments.out)
    ocr = has_ocr()
    if not ocr:
        print("No OCR is installed: only letters of the drawing font are read. For all texts: pip install 'OpenSciDraw[ocr]'.")
    for path, target in zip(paths, targets, strict=True):
        picture = read_picture(path)
        make_folder(target.parent)
        figure = trace(picture, ocr)
        written = write(figure, target, formats)
        drawn = draw(figure)
        share = share_of(picture, drawn, figure)
        if arguments.compare:
            written.append(target.with_name(f"{target.name}.compare.png"))
            zoom = max(1, round(512 / max(picture.size)))
            large = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.LANCZOS)
            side_by_side(large, draw(figure, zoom)).save(written[-1])
        if arguments.json:
            counts = {"shapes": len(figure.shapes), "arrows": len(figure.connectors), "texts": len(figure.all_texts())}
            print(json.dumps({"picture": str(path), **counts, **asdict(share), "files": [str(file) for file in written]}))
        else:
            print(f"{path}: {describe(figure, share)}\n  {' '.join(map(str, written))}")
    return 0


def require(formats: Sequence[str]) -> None:
    """Raises UserError where a package for the formats is missing."""
    needed = {"cv2": "opencv-python-headless", "resvg_py": "resvg-py", **({"pptx": "python-pptx"} if "pptx" in formats else {})}
    if missing := [package for module, package in needed.items() if find_spec(module) is None]:
        raise UserError(f"scienceflow vectorize needs {', '.join(missing)}: pip install 'OpenSciDraw[vectorize]'.")


def _formats(given: str) -> list[str]:
    formats = list(dict.fromkeys(given.split(",")))
    if unknown := [name for name in formats if name not in FORMATS]:
        raise UserError(f"--format {given}: there is no format {', '.join(map(repr, unknown))}. Formats: {','.join(FORMATS)}.")
    return formats


def _targets(paths: Sequence[Path], out: str | None) -> list[Path]:
    """Where the files of each picture go, without their endings; two pictures would overwrite each other's in one place."""
    targets = [(Path(out) if out else path.parent) / path.stem for path in paths]
    if twice := sorted({str(target) for target in targets if targets.count(target) > 1}):
        raise UserError(f"Files of several pictures would have one name: {', '.join(twice)}. Give the pictures one by one.")
    return targets


def read_picture(path: Path) -> Image.Image:
    """The picture as RGB, transparent parts on white.

    Raises UserError for what is no picture, or one of other than 32 to 8192 px a side.
    """
    try:
        with Image.open(path, formats=_READ) as opened:
            wide, high = opened.size
            if not (_LEAST <= min(wide, high) and max(wide, high) <= _MOST and wide * high <= _MOST_PIXELS):
                raise UserError(f"{path}: {wide} x {high} px. Sides of {_LEAST} to {_MOST} px are read.")
            layers = opened.convert("RGBA")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file.") from None
    except (OSError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file system, not of the picture
        raise UserError(f"{path}: not a picture that can be read ({str(error)[:200]}). Give PNG or JPEG.") from None
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")


def write(figure: VectorFigure, target: Path, formats: Sequence[str]) -> list[Path]:
    """Write the figure as `target` with .svg, .tex and .pptx behind it; returns the files."""
    files = []
    for kind in formats:
        file = target.with_name(target.name + _ENDING[kind])
        if kind == "pptx":
            file.write_bytes(write_pptx(figure))
        else:
            file.write_text(write_svg(figure) if kind == "svg" else write_tikz(figure), encoding="utf-8")
        files.append(file)
    return files


def describe(figure: VectorFigure, share: Share) -> str:
    """What was read, in one line."""
    parts = [_count(len(figure.shapes), "shape"), _count(len(figure.connectors), "arrow or line", "arrows and lines")]
    parts.append(_count(len(figure.all_texts()), "text"))
    if figure.lines:
        parts.append(_count(len(figure.lines), "line of a plot", "lines of a plot"))
    line = f"{', '.join(parts)}; explains {share.explained:.0%} of the ink"
    if share.explained < _DIAGRAM or not (figure.shapes or figure.lines):
        return f"{line}: this is no diagram of filled boxes and arrows, or not one that can be read"
    return line + (f", and draws {share.added:.0%} that is not there" if share.added >= 0.05 else "")


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"
