"""What a metric is. Adding one is adding a file: a class with `@METRICS.register("name")` and one of the bases below.

A metric is made by `Class(settings, folder)`: `settings` is the `evaluate` section of a config (the command line's
options are put into it), `folder` is the evaluation's own, for what the metric wants to keep (answers, features); it may
not exist yet. Making one must be quick: it checks what it needs (packages, keys, addresses), raises UserError where that
is missing, and leaves networks to the first picture.

A metric does its own file a favour by importing torch, cv2 or onnxruntime inside functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image

if TYPE_CHECKING:
    from OpenSciDraw.config import EvaluateConfig
    from OpenSciDraw.evaluation.examples import Example

Scores = dict[str, tuple[float, float]]  # name -> (hits, total), 0 <= total; a set's score is sum(hits) / sum(totals)


class NotScored(Exception):
    """A picture could not be scored for a reason outside of it (a judge that does not answer).

    `scores` is what counts in its place: hits 0 of the full totals. It is counted as a failure and named; a later run of
    the same evaluation tries this picture again.
    """

    def __init__(self, reason: str, scores: Scores):
        super().__init__(reason)
        self.scores = scores


class Metric:
    """Base of all metrics. `higher_is_better` holds for all its names."""

    higher_is_better: ClassVar[bool] = True

    def __init__(self, settings: EvaluateConfig, folder: Path):
        self.settings, self.folder = settings, folder

    def check(self, examples: Sequence[Example]) -> None:
        """Raises UserError, before anything is drawn, for an example that is written in a way that cannot be measured."""
        return None

    def identity(self) -> dict[str, Any]:
        """What decides the numbers beside picture and example: version of the method, reader of text, judge's name.

        Kept with every result; where it differs, a picture is scored anew, and a comparison is refused.
        """
        return {"version": 1}


class PictureMetric(Metric, ABC):
    """Scores one picture at a time.

    `threads`: pictures that may be scored side by side (more than 1 for metrics that wait for a network).
    """

    threads: int = 1

    @abstractmethod
    def score(self, picture: Image.Image | None, example: Example) -> Scores:
        """(hits, total) by name; {} where the example lacks what this metric compares with.

        `picture` is RGB, of any size (boxes of `example.truth` are in pixels of example.width x example.height), or None
        where it is missing or unreadable: then hits are 0 of the totals that any picture would be measured by. Totals
        that depend on the picture (what was read, say) are 0 then.

        Raises:
            NotScored: see there.
        """


class SetMetric(Metric, ABC):
    """Compares a set of pictures with a set of references."""

    higher_is_better = False

    @abstractmethod
    def score_set(
        self, pictures: Sequence[Image.Image], references: Sequence[Image.Image]
    ) -> Mapping[str, tuple[float, float, float]]:
        """(value, low, high) by name, low and high the ends of a 95 % interval; {} where it cannot be computed.

        Both are RGB, of any size, read from disk when indexed, so they may be many; a missing or unreadable picture is
        there as a blank one. The seed for what is drawn by chance is `settings.seed`.
        """
