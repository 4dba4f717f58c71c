"""Several pictures of each prompt: the same example under one id for each noise, and which of them are drawn together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.evaluator import Evaluator
from OpenSciDraw.evaluation.examples import Example, picture_name
from OpenSciDraw.figures.buckets import Bucket, fit
from OpenSciDraw.figures.listing import RejectedFigure

if TYPE_CHECKING:
    from pathlib import Path

    from OpenSciDraw.config import EvaluateConfig
    from OpenSciDraw.evaluation.base import Metric
    from OpenSciDraw.evaluation.drawing import Artist, DrawingBatch, Sampler


def picture_id(prompt: str, number: int) -> str:
    """The id of a prompt's picture; with `evaluate.seed` it gives the noise."""
    return f"{prompt}-{number:03d}"


def pictures_of(example: Example, count: int) -> list[Example]:
    """The example `count` times, each with the id of one picture."""
    return [replace(example, id=picture_id(example.id, number)) for number in range(count)]


def figure_of(example: Example) -> Image.Image:
    """The prompt's own figure, at the size at which its pictures are drawn.

    Raises:
        UserError: it cannot be read.
    """
    try:
        picture = example.reference_image()
    except RejectedFigure as error:
        raise UserError(f"prefer.include_figure: the figure of {example.id} cannot be read: {error}. Leave it out.") from error
    assert picture is not None, "prompts without a figure are refused before anything is drawn"
    return fit(picture, Bucket(height=example.height, width=example.width))[0]


class SeveralPictures(Evaluator):
    """Draws and scores pictures of prompts, so that their bits depend on nothing but prompt, noise and `batch_size`.

    Pictures of one prompt alone are drawn together, `batch_size` at a time. Where one of a batch is missing (a process was killed
    while it saved them) the batch is drawn again, for a batch of another size gives other last bits. `figures`: ids of pictures
    that are not drawn: they are the prompt's own figure.
    """

    def __init__(
        self, folder: Path, examples: Sequence[Example], metrics: Mapping[str, Metric], settings: EvaluateConfig,
        part: str = "", figures: frozenset[str] = frozenset(),
    ):  # fmt: skip
        super().__init__(folder, examples, metrics, settings, part)
        self.figures = figures

    def _together(self) -> list[list[Example]]:
        of_prompt: dict[str, list[Example]] = {}
        for example in self.examples:
            if example.id in self.figures:
                continue
            of_prompt.setdefault(example.id.rpartition("-")[0], []).append(example)
        size = self.settings.batch_size
        return [same[at : at + size] for same in of_prompt.values() for at in range(0, len(same), size)]

    def _to_draw(self, drawn: Any) -> list[Example]:
        missing = {example.id for example in super()._to_draw(drawn)}
        given = [example for example in self.examples if example.id in self.figures & missing]
        return given + [example for batch in self._together() if any(e.id in missing for e in batch) for example in batch]

    def _batches(self, examples: Sequence[Example], multiple: int) -> list[DrawingBatch]:
        from OpenSciDraw.evaluation.drawing import batches_of

        wanted = {example.id for example in examples}
        chosen = [batch for batch in self._together() if batch[0].id in wanted]
        return [drawn for batch in chosen for drawn in batches_of(batch, multiple, len(batch))]

    def _draw(self, artist: Artist, examples: Sequence[Example], sampler: Sampler) -> None:
        from OpenSciDraw.evaluation.drawing import save_picture

        self.pictures.mkdir(exist_ok=True)
        given = [example for example in examples if example.id in self.figures]
        with self.drawn_file.open("a", encoding="utf-8") as records:
            for example in given:
                save_picture(figure_of(example), self.pictures / picture_name(example.id))
                records.write(self.record(example, 0.0))
        super()._draw(artist, [example for example in examples if example.id not in self.figures], sampler)

    def _identity(self, artist: Artist, sampler: Sampler) -> dict[str, Any]:
        figures = {"include_figure": True} if self.figures else {}
        return {**super()._identity(artist, sampler), "batch_size": self.settings.batch_size, **figures}

    def undone(self) -> int:
        """How many pictures are not drawn, or not measured by every metric."""
        drawn = self._drawn_before()
        measured = [{result.id for result in self.results.of(name)} for name in self.metrics]
        return sum(e.id not in drawn or any(e.id not in ids for ids in measured) for e in self.examples)
