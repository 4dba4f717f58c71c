"""Metrics over pictures: what is there already is kept, what is missing or unreadable counts as a failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from PIL import Image
from tqdm import tqdm

from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.base import NotScored, PictureMetric, SetMetric
from OpenSciDraw.evaluation.examples import Example
from OpenSciDraw.evaluation.results import WHOLE_SET, Result, Results, digest, digest_of
from OpenSciDraw.figures.listing import RejectedFigure, load_figure

MISSING = "missing"


@dataclass(frozen=True)
class Drawn:
    """An example and the file that should hold its picture."""

    example: Example
    path: Path


@dataclass(frozen=True)
class Picture:
    """What a file gave: its bytes' hash (None: no file), the picture (None: no picture) and then why not."""

    digest: str | None
    image: Image.Image | None
    failure: str | None


def read_picture(path: Path) -> Picture:
    """A picture file, whatever its shape, as upright RGB."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return Picture(None, None, MISSING)
    except OSError as error:
        return Picture(None, None, f"unreadable: {error.strerror}")
    try:
        return Picture(digest(raw), load_figure(raw, min_side=1, max_aspect_ratio=float("inf")), None)
    except RejectedFigure as error:
        return Picture(digest(raw), None, str(error))


def score_picture(name: str, metric: PictureMetric, method: str, drawn: Drawn, known: Result | None) -> Result:
    """One picture by one metric; `known` itself where it is of this picture, example and `method` (the identity's digest)."""
    example = digest_of(drawn.example)
    picture = read_picture(drawn.path)
    if known is not None and known.is_of(example, picture.digest, method):
        return known
    retry, failure = False, picture.failure
    try:
        scores = metric.score(picture.image, drawn.example)
    except NotScored as error:
        scores, failure, retry = error.scores, failure or str(error), failure is None
    return Result(drawn.example.id, name, dict(scores), example, picture.digest, method, failure, retry)


def score_pictures(
    name: str, metric: PictureMetric, drawn: Sequence[Drawn], results: Results | None = None, show: bool = True
) -> Iterator[Result]:
    """The result of every picture that `results` does not hold yet, in order, as each is done; `show`: a progress bar."""

    method = digest(metric.identity())

    def score(item: Drawn) -> tuple[Result, bool]:
        known = None if results is None else results.get(name, item.example.id)
        result = score_picture(name, metric, method, item, known)
        return result, result is known

    with ThreadPoolExecutor(metric.threads) as pool, tqdm(total=len(drawn), desc=name, unit="picture", disable=not show) as bar:
        futures = [pool.submit(score, item) for item in drawn]
        try:
            for future in futures:
                result, is_known = future.result()
                if not is_known:
                    yield result
                bar.update()
        finally:
            for future in futures:  # where one raises, what was not begun yet is not begun
                future.cancel()


# -- sets --------------------------------------------------------------------------------------------
class _Lazy(Sequence[Image.Image]):
    """Pictures that are read when they are asked for."""

    def __init__(self, items: Sequence[Drawn], read: Callable[[Drawn], Image.Image]):
        self._items, self._get = items, read

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Sequence[Image.Image]:
        if isinstance(index, slice):
            return _Lazy(self._items[index], self._get)
        return self._get(self._items[index])


def _picture_or_blank(item: Drawn) -> Image.Image:
    found = read_picture(item.path).image
    return found or Image.new("RGB", (item.example.width, item.example.height), "white")


def _reference(item: Drawn) -> Image.Image:
    try:
        found = item.example.reference_image()
    except RejectedFigure as error:
        raise UserError(f"The reference of {item.example.id!r} cannot be used: {error}. Replace it or leave it out.") from error
    assert found is not None  # only examples with a reference come here
    return found


def score_set(name: str, metric: SetMetric, drawn: Sequence[Drawn], results: Results) -> list[tuple[str, str]]:
    """The pictures of the examples that have a reference, against these references; added to `results` unless it is there.

    Returns (id, reason) of the pictures that were blank in it.
    """
    pairs = [item for item in drawn if item.example.reference is not None]
    found = [read_picture(item.path) for item in pairs]
    example, picture = (digest(values) for values in ([digest_of(item.example) for item in pairs], [p.digest for p in found]))
    method, known = digest(metric.identity()), results.get(name, WHOLE_SET)
    if pairs and not (known is not None and known.is_of(example, picture, method)):
        scores = metric.score_set(_Lazy(pairs, _picture_or_blank), _Lazy(pairs, _reference))
        results.add([Result(WHOLE_SET, name, dict(scores), example, picture, method, retry=not scores)])
    return [(item.example.id, p.failure) for item, p in zip(pairs, found, strict=True) if p.failure is not None]
