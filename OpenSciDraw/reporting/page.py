"""The page: HTML from a run's data. What is no `Html` is escaped where it is put into a table; no other script runs."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

PICTURE_SIDE = 512  # pixels; larger pictures are scaled down
PICTURE_BYTES = 12_000_000  # of all pictures of a page; beyond it steps between the first and the last are left out
_MOST_PIXELS = 50_000_000


class Html(str):
    """Text that is HTML already."""


def code(text: str) -> Html:
    return Html(f"<code>{escape(text)}</code>")


class Pictures:
    """Pictures as data addresses, each file once, until the page is full."""

    def __init__(self, limit: int = PICTURE_BYTES):
        self.left = limit
        self._known: dict[Path, str | None] = {}

    def image(self, file: Path) -> str | None:
        """Attributes of an img element: address, width, height. None: the file cannot be read."""
        if file not in self._known:
            self._known[file] = self._encode(file)
        return self._known[file]

    def _encode(self, file: Path) -> str | None:
        try:
            with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as picture:
                if picture.width * picture.height > _MOST_PIXELS:
                    return None
                image = picture.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError):
            return None
        attributes = image_attributes(image)
        self.left -= len(attributes)
        return attributes


def image_attributes(image: Image.Image) -> str:
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    out = BytesIO()
    image.save(out, "WEBP", quality=88, method=3)
    address = base64.b64encode(out.getvalue()).decode()
    return f'src="data:image/webp;base64,{address}" width="{image.width}" height="{image.height}"'


def picture(pictures: Pictures, file: Path, description: str) -> str:
    attributes = pictures.image(file)
    return '<p class="lead">This picture cannot be read.</p>' if attributes is None else picture_button(attributes, description)


def picture_button(attributes: str, description: str) -> str:
    alt = escape(description, quote=True)
    image = f'<img {attributes} alt="{alt}" decoding="async">'
    return f'<button class="picture" type="button" aria-label="Enlarge: {alt}">{image}</button>'


def side_by_side(rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> str:
    """Pictures of one prompt beside each other, in a card of their own; `rows`: (prompt, [(name, picture as HTML), ...])."""
    cards = []
    for prompt, named in rows:
        figures = "".join(f"<figure>{html}<figcaption>{escape(name)}</figcaption></figure>" for name, html in named)
        cards.append(f'<li><p>{escape(prompt)}</p><div class="row">{figures}</div></li>')
    return f'<ul class="cards">{"".join(cards)}</ul>'


def document(title: str, lead: str, sections: Sequence[tuple[str, str]], made_by: str = "scienceflow report") -> str:
    """A whole page. `sections`: (heading, HTML); empty ones are left out."""
    kept = [(f"s{at}", heading, html) for at, (heading, html) in enumerate(sections) if html]
    links = "".join(f'<li><a href="#{key}">{escape(heading)}</a></li>' for key, heading, _ in kept)
    parts = "".join(
        f'<section id="{key}" aria-labelledby="{key}h"><h2 id="{key}h">{escape(heading)}</h2>{html}</section>'
        for key, heading, html in kept
    )
    style, script = (files("OpenSciDraw.reporting").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    allowed = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in
               (("style", style), ("script", script))}  # fmt: skip
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; base-uri 'none'; "
        f"form-action 'none'; script-src 'sha256-{allowed['script']}'; style-src-elem 'sha256-{allowed['style']}'; "
        "style-src-attr 'unsafe-inline'\">"
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{style}</style></head><body>'
        f'<header><h1>{escape(title)}</h1>{lead}<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>{parts}</main>'
        f"<footer>Made by {code(made_by)}. This file needs no network.</footer>"
        '<dialog aria-label="Enlarged picture"><img src="data:," alt=""><p></p><button type="button">Close</button></dialog>'
        f"<script>{script}</script></body></html>\n"
    )


# -- sections ----------------------------------------------------------------------------------------
def facts(pairs: Sequence[tuple[str, Any]]) -> str:
    kept = [(name, str(value)) for name, value in pairs if value not in (None, "")]
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in kept)
    return f'<dl class="facts">{shown}</dl>' if shown else ""


def remarks(texts: Sequence[str]) -> str:
    inner = "".join(f"<p>{escape(text)}</p>" for text in texts)
    return f'<div class="remarks" role="note">{inner}</div>' if inner else ""


def table(
    head: Sequence[Any], rows: Sequence[Sequence[Any]], caption: str = "", numbers: Sequence[int] = (), kind: str = ""
) -> str:
    """Cells that are no Html are escaped; `numbers`: columns that are aligned to the right; `kind`: a class of page.css."""

    def cells(tag: str, row: Sequence[Any]) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        shown = (cell if isinstance(cell, Html) else escape(str(cell)) for cell in row)
        return "".join(f'<{tag}{scope}{" class=number" if at in numbers else ""}>{cell}</{tag}>' for at, cell in enumerate(shown))

    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{cells('th', head)}</tr></thead>"
    label = escape(caption or "Table: " + ", ".join(filter(None, head)), quote=True)
    inner = f'<table class="{kind}">{said}{top}<tbody>{body}</tbody></table>'
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{label}">{inner}</div>'

