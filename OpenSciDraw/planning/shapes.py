"""The sizes of picture that a run trains on, with how much of its data has each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from OpenSciDraw.config import Config
from OpenSciDraw.encode.work import store_folder
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.buckets import buckets
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.store.encoded import EncodedStore
from OpenSciDraw.store.table import StoreTable


@dataclass(frozen=True)
class Shape:
    """One size of picture in training: pixels, image tokens (references' too), text tokens, and how much of the data has it."""

    height: int
    width: int
    tokens: int
    text: int
    share: float
    references: tuple[tuple[int, int], ...] = ()  # height and width of the pictures that an edit starts from


def shapes(model: FigureModel, config: Config) -> list[Shape]:
    """Sizes of the store that the config names, with their shares; without one, all buckets of its resolution alike."""
    text, multiple = model.text_shape()[0], model.pixel_multiple
    if any(side % multiple for bucket in buckets(config.encode.resolution) for side in (bucket.height, bucket.width)):
        raise UserError(f"encode.resolution = {config.encode.resolution}: this model's sides are multiples of {multiple} px.")
    counts: Counter[_Size] = Counter()
    if not config.dataset.is_remote and EncodedStore.is_store(folder := store_folder(config)):
        store = EncodedStore(folder, with_text=config.text == "stored")
        lengths = store.text.lengths()[store.text_row].tolist() if store.text is not None else [text] * len(store.figures)
        typical = -(-sum(lengths) // len(lengths)) if len(set(lengths)) > 1 else lengths[0]
        references = [()] * len(store.figures) if store.references is None else _sizes_of_references(store, store.references)
        counts.update((h, w, typical, made_of) for (h, w), made_of in zip(_sizes(store.figures), references, strict=True))
    else:
        sizes = [(bucket.height, bucket.width) for bucket in buckets(config.encode.resolution)]
        counts.update((*size, text, (size,) if model.only_edits else ()) for size in sizes)
    by_tokens: dict[int, list[tuple[_Size, int]]] = {}
    for size, count in counts.items():  # sizes with equally many tokens cost the same
        pictures = [size[:2], *size[3]]
        tokens = sum(height // multiple * (width // multiple) for height, width in pictures)
        by_tokens.setdefault(tokens, []).append((size, count))
    out = []
    for tokens, sizes_of in sorted(by_tokens.items()):
        (height, width, length, made_of), _ = max(sizes_of, key=lambda item: item[1])
        share = sum(count for _, count in sizes_of) / counts.total()
        out.append(Shape(height, width, tokens, length, share, made_of))
    return out


_Size = tuple[int, int, int, tuple[tuple[int, int], ...]]  # height, width, tokens of text, (height, width) of references


def _sizes(table: StoreTable) -> list[tuple[int, int]]:
    """(height, width) of each row."""
    return list(zip(table.numbers("bucket_h").tolist(), table.numbers("bucket_w").tolist(), strict=True))


def _sizes_of_references(store: EncodedStore, references: StoreTable) -> list[tuple[tuple[int, int], ...]]:
    sizes = _sizes(references)
    return [tuple(sizes[at] for at in store.references_of(row)) for row in range(len(store.figures))]
