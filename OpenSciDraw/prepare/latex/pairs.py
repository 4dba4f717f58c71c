"""Which picture of a figure belongs to which caption.

A picture belongs to the caption of the smallest part of the figure that holds both. Where several captions stand
beside each other, pictures and captions pair in order; what stays ambiguous is reported and never guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

AMBIGUOUS = "ambiguous captions: it cannot be told which of the figure's captions is the picture's"
_LABEL = re.compile(r"\\label\s*\{([^{}]{0,300})\}")


@dataclass(frozen=True)
class Picture:
    """A picture as written: file name and options, or TikZ (its number in Flat.tikz, or source)."""

    name: str
    options: str = ""
    context: int = 0
    paths: tuple[str, ...] = ()  # of \graphicspath
    extensions: tuple[str, ...] = ()  # of \DeclareGraphicsExtensions
    tikz: int | str | None = None


@dataclass(eq=False)
class Caption:
    text: str
    label: str = ""
    starred: bool = False


@dataclass(eq=False)
class Scope:
    """An environment or group. A panel's `caption` is the one that its command was given."""

    items: list[Picture | Caption | Scope] = field(default_factory=list)
    is_panel: bool = False
    caption: str = ""
    label: str = ""
    continued: bool = False  # \ContinuedFloat: the figure before goes on
    is_loose: bool = False  # of pictures and captions outside of any figure environment

    def holds(self, kind: type[Picture] | type[Caption]) -> bool:
        return any(isinstance(item, kind) or isinstance(item, Scope) and item.holds(kind) for item in self.items)


_Own = tuple[Picture, str, str]  # a picture, its own caption, its own label


@dataclass
class Unit:
    """Pictures that share a caption: a figure as a reader counts them."""

    pictures: list[_Own]
    caption: Caption | None = None
    label: str = ""
    reason: str | None = None  # why they have no caption


def units(figure: Scope) -> list[Unit]:
    """The figures in a figure environment (or in what \\captionof makes one)."""
    found = [unit for unit in _grouped(figure) if unit.pictures]
    for unit in found:
        unit.label = unit.caption.label if unit.caption is not None and unit.caption.label else figure.label
    return found


def _grouped(scope: Scope) -> list[Unit]:
    """From the inside out."""
    row: list[list[_Own] | Caption] = []  # this level's pictures, by the box that they stand in, and captions, in order
    done: list[Unit] = []
    for item in scope.items:
        if isinstance(item, Picture):
            row.append([(item, "", "")])
        elif isinstance(item, Caption):
            row.append(item)
        elif item.is_panel:
            row.append(_panel(item))
        else:
            inner = _grouped(item)
            if any(unit.pictures and (unit.caption or unit.reason) for unit in inner):
                done += inner
            else:  # a box of pictures alone, or one that only holds the caption
                pictures = [own for unit in inner for own in unit.pictures]
                row += [pictures] if pictures else []
                row += [unit.caption for unit in inner if unit.caption is not None]
    row = [entry for entry in row if entry]
    whole = [entry for entry in row if isinstance(entry, Caption)]
    if done and len(whole) == 1 and all(unit.caption for unit in done):  # boxes with captions, and one for all of them
        return [Unit([*_as_panels(done), *(own for entry in row if not isinstance(entry, Caption) for own in entry)], whole[0])]
    return done + _in_order(row)


def _as_panels(parts: list[Unit]) -> list[_Own]:
    """The pictures of parts of a figure, each with its part's caption as its own."""
    return [
        (picture, caption or unit.caption.text, label or unit.caption.label)
        for unit in parts
        if unit.caption is not None
        for picture, caption, label in unit.pictures
    ]


def _panel(scope: Scope) -> list[_Own]:
    """Pictures of a panel, with its own caption and label."""
    pictures: list[_Own] = []
    captions: list[Caption] = []

    def collect(part: Scope) -> None:
        for item in part.items:
            if isinstance(item, Picture):
                pictures.append((item, "", ""))
            elif isinstance(item, Caption):
                captions.append(item)
            elif item.is_panel and item is not scope:
                pictures.extend(_panel(item))
            else:
                collect(item)

    collect(scope)
    own = scope.caption or (captions[0].text if len(captions) == 1 else "")
    mark = captions[0].label if len(captions) == 1 and captions[0].label else scope.label
    return [(picture, caption or own, label or mark) for picture, caption, label in pictures]


def _in_order(row: list[list[_Own] | Caption]) -> list[Unit]:
    """Captions below their pictures (or above them), where there are several; else one caption for all."""
    boxes = [entry for entry in row if not isinstance(entry, Caption)]
    captions = [entry for entry in row if isinstance(entry, Caption)]
    plain = [caption for caption in captions if not caption.starred]
    starred = len(captions) - len(plain)
    if len(plain) == 1 and starred == len(boxes) > 1:  # \\caption*{(a) …} for the panels, \\caption for the figure
        panels = _in_order([entry for entry in row if entry is not plain[0]])
        if all(unit.caption for unit in panels):
            return [Unit(_as_panels(panels), plain[0])]
    if len(plain) == 1:
        captions = plain  # the others are notes, as of sources
    all_pictures = [own for box in boxes for own in box]
    if len(captions) <= 1 or len(boxes) <= 1:  # the first of two captions: the second is the same in another language
        return [Unit(all_pictures, captions[0] if captions else None)] if row else []
    ordered = _runs(row, captions)
    if ordered is None:
        return [Unit(all_pictures, reason=AMBIGUOUS)]
    return ordered


def _runs(row: list[list[_Own] | Caption], captions: list[Caption]) -> list[Unit] | None:
    """Boxes, then their caption, or as many captions; and so on. Or all captions above. None where it is neither."""
    chosen = set(map(id, captions))
    entries = [entry for entry in row if not isinstance(entry, Caption) or id(entry) in chosen]
    above, below = isinstance(entries[0], Caption), isinstance(entries[-1], Caption)
    if above == below:
        return None
    found: list[Unit] = []
    boxes: list[list[_Own]] = []
    run: list[Caption] = []
    for entry in [*(entries if below else reversed(entries)), []]:
        if isinstance(entry, Caption):
            run.append(entry)
            continue
        if run:
            if len(run) == 1:
                found.append(Unit([own for box in (boxes if below else boxes[::-1]) for own in box], run[0]))
            elif len(run) == len(boxes):
                found += [Unit(box, caption) for box, caption in zip(boxes, run, strict=True)]
            else:
                return None
            boxes, run = [], []
        boxes.append(entry)
    return found if below else found[::-1]


def caption_of(text: str, starred: bool = False) -> Caption:
    label = _LABEL.search(text)
    return Caption(_LABEL.sub("", text) if label else text, label[1].strip() if label else "", starred)


def turn(scope: Scope, angle: str) -> None:
    for index, item in enumerate(scope.items):
        if isinstance(item, Picture) and "angle" not in item.options:
            scope.items[index] = replace(item, options=f"{item.options},angle={angle}".lstrip(","))
        elif isinstance(item, Scope):
            turn(item, angle)
