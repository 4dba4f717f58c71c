"""The page of an outcome: counts, figures with their captions, and figures without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from OpenSciDraw.captions.asking import Failure
from OpenSciDraw.captions.lists import Captioned
from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.figures.refs import FigureRef
from OpenSciDraw.prepare.contact_sheet import Tile, contact_sheet
from OpenSciDraw.utils.files import write_text

MOST = 60  # figures with captions on the page
_MOST_FAILED = 24


def write_sheet(
    tables: Sequence[tuple[str, Sequence[Sequence[str]]]], shown: Sequence[Captioned], count: int, failures: Sequence[Failure],
    refs: Sequence[FigureRef], file: Path,
) -> None:  # fmt: skip
    """`shown`: some of the `count` figures with captions."""
    by_id = {ref.id: ref for ref in refs}

    def groups() -> Iterator[tuple[str, list[Tile]]]:
        heading = f"{count} figures with captions" + (f", {len(shown)} of them shown" if len(shown) < count else "")
        yield heading, [_tile(figure) for figure in shown]
        if failures:
            some = failures[:_MOST_FAILED]
            more = f", {len(some)} of them shown" if len(some) < len(failures) else ""
            yield f"{len(failures)} captions missing{more}", [
                Tile(_bytes(by_id[failure.id]), f"{failure.id} · {failure.style}", failure.reason) for failure in some
            ]

    write_text(file, "".join(contact_sheet(f"Captions: {count} of {len(refs)} figures", tables, groups())))


def _tile(figure: Captioned) -> Tile:
    texts = [(f"{style} · {len(text.split())} words", text) for style, text, _ in figure.texts]
    if figure.ref.caption and all(style != "source" for style, *_ in figure.texts):
        texts.append(("in the source", figure.ref.caption))
    (line, text), *further = texts
    return Tile(_bytes(figure.ref), f"{figure.ref.id} · {line}", text, further)


def _bytes(ref: FigureRef) -> bytes:
    try:
        return ref.read()
    except RejectedFigure:
        return b""  # the sheet shows a grey square
