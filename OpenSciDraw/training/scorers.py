"""Scores of pictures in processes beside the training."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from OpenSciDraw.config import Config, EvaluateConfig
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.base import NotScored, PictureMetric, Scores
from OpenSciDraw.evaluation.examples import Example, drawn_example, load_examples
from OpenSciDraw.figures.listing import DrawnRef, list_figures
from OpenSciDraw.registry import METRICS

_LOG = logging.getLogger("OpenSciDraw")
_PROBED = 64  # examples that are asked which scores there are
Known = Example | DrawnRef  # what is known of a prompt; a drawn figure's truth is made where it is needed


def known_figures(config: Config) -> dict[str, Known]:
    """What the pictures of each prompt are scored by, by the id that the data give it.

    Raises:
        UserError: the figures cannot be listed.
    """
    encode, data = config.encode, config.dataset
    source = str(config.reward.figures or data.figures or encode.figures)
    if source.startswith("drawn:"):
        refs = list_figures(source)[0]
        return {ref.id: ref for ref in refs if isinstance(ref, DrawnRef)}
    resolution = data.resolution or encode.resolution
    columns = (encode.image_column, encode.caption_column, encode.where, encode.reference_column)
    return {example.id: example for example in load_examples(source, None, resolution, *columns)}


@lru_cache(maxsize=1024)
def _drawn(ref: DrawnRef) -> Example:
    return drawn_example(ref)


def example_of(known: Known) -> Example:
    return _drawn(known) if isinstance(known, DrawnRef) else known


class Scorer:
    """The named scores of one picture after another. `names`: 'metric.score'."""

    def __init__(self, settings: EvaluateConfig, folder: Path, names: Sequence[str]):
        self.names = list(names)
        self.metrics: dict[str, PictureMetric] = {}
        for name in dict.fromkeys(name.split(".")[0] for name in names):
            metric = METRICS.get(name)(settings, folder)
            if not isinstance(metric, PictureMetric):
                raise UserError(f"reward.metrics: {name!r} is a number of a whole set of pictures, and a reward is of one picture.")
            self.metrics[name] = metric

    def score(self, picture: np.ndarray | None, known: Known) -> tuple[list[float], str | None]:
        """One number for each name, NaN where it does not apply, and why a metric could not score the picture.

        `picture` (H, W, 3) uint8.
        """
        found: dict[str, float] = {}
        failure: str | None = None
        image = None if picture is None else Image.fromarray(picture)
        for name, metric in self.metrics.items():
            scores: Scores = {}
            try:
                scores = metric.score(image, example_of(known))
            except NotScored as error:
                failure = f"{name}: {error}"
            found |= {f"{name}.{key}": hits / total for key, (hits, total) in scores.items() if total}
        return [found.get(name, float("nan")) for name in self.names], failure

    def require_names(self, known: Sequence[Known]) -> None:
        """Raises UserError for a name that no metric gives for any of the first examples; says which there are."""
        there: dict[str, None] = {}
        for item in known[:_PROBED]:
            for name, metric in self.metrics.items():
                metric.check([example_of(item)])
                there |= dict.fromkeys(f"{name}.{key}" for key in metric.score(None, example_of(item)))
        wrong = [name for name in self.names if name not in there]
        if wrong:
            raise UserError(
                f"reward.metrics: nothing is called {wrong[0]!r} in the first {min(_PROBED, len(known))} prompts. "
                f"There: {', '.join(there) or 'nothing'}."
            )


_scorer: Scorer | None = None  # of a scoring process


def _start(settings: EvaluateConfig, folder: Path, names: Sequence[str]) -> None:
    """In a scoring process: no signal to the group ends it, but the end of its parent does."""
    global _scorer
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _scorer = Scorer(settings, folder, names)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _score(pictures: np.ndarray, known: Sequence[Known]) -> list[tuple[list[float], str | None]]:
    assert _scorer is not None
    return [_scorer.score(picture, item) for picture, item in zip(pictures, known, strict=True)]


class Scorers:
    """`processes` that score side by side; with 0 the calling one scores when a result is asked for."""

    def __init__(self, config: Config, known: Mapping[str, Known]):
        self.known = known
        arguments = (config.evaluate, Path(config.model_output_dir) / "scoring", list(config.reward.metrics))
        self._own = Scorer(*arguments)
        self._own.require_names(list(known.values()))
        self._pool: ProcessPoolExecutor | None = None
        self.processes = config.reward.processes
        if self.processes:  # spawned: a process with CUDA or threads must not be forked
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, context, initializer=_start, initargs=arguments)

    def submit(self, pictures: np.ndarray, ids: Sequence[str]) -> Scoring:
        """Begin to score pictures (N, H, W, 3) uint8, of the prompts `ids` (N,).

        Raises:
            UserError: nothing is known of a prompt.
        """
        unknown = next((name for name in ids if name not in self.known), None)
        if unknown is not None:
            raise UserError(
                f"Nothing is known of {unknown!r}, so its pictures cannot be scored. Set reward.figures to what the data were "
                "made of."
            )
        known = [self.known[name] for name in ids]
        if self._pool is None:
            return Scoring([], self._own, pictures, known)
        share = max(1, -(-len(ids) // self.processes))
        parts = [slice(at, at + share) for at in range(0, len(ids), share)]
        return Scoring([self._pool.submit(_score, pictures[part], known[part]) for part in parts])

    def __enter__(self) -> Scorers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


class Scoring:
    """Scores that are on their way."""

    def __init__(
        self, futures: Sequence[Future[Any]], scorer: Scorer | None = None, pictures: np.ndarray | None = None,
        known: Sequence[Known] = (),
    ):  # fmt: skip
        self._futures, self._scorer, self._pictures, self._known = futures, scorer, pictures, known

    def wait(self) -> np.ndarray:
        """(N, M) scores, NaN where one does not apply or could not be had.

        Raises:
            UserError: a scoring process has ended.
        """
        try:
            found = [row for future in self._futures for row in future.result()]
        except BrokenProcessPool as error:
            raise UserError(
                "A process that scores pictures has ended (out of memory?). Set fewer reward.processes, or 0 to see what a metric "
                "does."
            ) from error
        if self._scorer is not None and self._pictures is not None:
            found = [self._scorer.score(picture, item) for picture, item in zip(self._pictures, self._known, strict=True)]
        failures = [failure for _, failure in found if failure is not None]
        if failures:
            _LOG.warning("%d of %d pictures lack a score; the first: %s", len(failures), len(found), failures[0])
        return np.array([scores for scores, _ in found], dtype=np.float32)
