"""contact_sheet.html: what was kept and what was left out, to look at. One file, no network, opens from disk."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from OpenSciDraw.figures.decode import RejectedFigure, decode_picture

_SIDE = 320  # px of a thumbnail's longer side: sharp at 160 CSS px on screens of two pixels a point
_SHORT = 160  # characters of a text that are shown before it is opened
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem; }
h2 { margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 14px; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
figure img { display: block; width: 100%; height: 150px; object-fit: contain; background: #fff; }
figcaption { padding: 8px 10px; font-size: 12.5px; overflow-wrap: anywhere; }
figcaption b { display: block; font-size: 11.5px; opacity: .75; font-weight: 600; }
figcaption b:not(:first-child) { margin-top: 7px; }
details summary { cursor: pointer; }
.tables { display: flex; flex-wrap: wrap; gap: 10px 48px; align-items: flex-start; font-size: 13.5px; }
caption { text-align: left; font-weight: 600; padding: 6px 0; }
table { border-collapse: collapse; } td, th { padding: 3px 14px 3px 0; text-align: left; }
td:not(:first-child), th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
"""


@dataclass(frozen=True)
class Tile:
    """A picture of the sheet: the bytes of its file, a line about it, its caption, and further texts, each with a line."""

    image: bytes
    line: str
    caption: str
    further: Sequence[tuple[str, str]] = ()


def contact_sheet(
    title: str, tables: Sequence[tuple[str, Sequence[Sequence[str]]]], groups: Iterable[tuple[str, Sequence[Tile]]]
) -> Iterator[str]:
    """The page, in pieces. `tables` are (heading, rows; the first is the header), `groups` (heading, tiles)."""
    yield from (
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
        "<h2>Counts</h2><div class=tables>",
    )
    for heading, rows in tables:
        cells = map(_row, rows, ["th"] + ["td"] * (len(rows) - 1))
        yield from (f"<table><caption>{html.escape(heading)}</caption>", *cells, "</table>\n")
    yield "</div>\n"
    for heading, tiles in groups:
        yield from (f"<h2>{html.escape(heading)}</h2><div class=grid>\n", *map(_figure, tiles), "</div>\n")


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _figure(tile: Tile) -> str:
    said = [(tile.line, tile.caption), *tile.further]
    texts = "".join(f"<b>{html.escape(line)}</b>{_text(text)}" for line, text in said)
    source, alt = _thumbnail(tile.image), html.escape(tile.caption[:120], quote=True)
    return f'<figure><img loading=lazy alt="{alt}" src="{source}"><figcaption>{texts}</figcaption></figure>\n'


def _text(text: str) -> str:
    """A text; of a long one its beginning, which opens."""
    if len(text) <= _SHORT:
        return html.escape(text)
    return f"<details><summary>{html.escape(text[:_SHORT])}…</summary>{html.escape(text)}</details>"


def _thumbnail(data: bytes) -> str:
    """A data: URL; a grey square for a picture that cannot be shown."""
    try:
        image = decode_picture(data, min_side=1, max_aspect_ratio=float("inf"))
    except RejectedFigure:
        image = Image.new("RGB", (8, 8), (128, 128, 128))
    image.thumbnail((_SIDE, _SIDE))
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
