"""Several pictures of each prompt: the same example under one id for each noise, and which of them are drawn together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from OpenSciDraw.evaluation.evaluator import Evaluator
from OpenSciDraw.evaluation.examples import Example

if TYPE_CHECKING:
    from OpenSciDraw.evaluation.drawing import Artist, DrawingBatch, Sampler


def picture_id(prompt: str, number: int) -> str:
    """The id of a prompt's picture; with `evaluate.seed` it gives the noise."""
    return f"{prompt}-{number:03d}"


def pictures_of(example: Example, count: int) -> list[Example]:
    """The example `count` times, each with the id of one picture."""
    return [replace(example, id=picture_id(example.id, number)) for number in range(count)]


class SeveralPictures(Evaluator):
    """Draws and scores pictures of prompts, so that their bits depend on nothing but prompt, noise and `batch_size`.

    Pictures of one prompt alone are drawn together, `batch_size` at a time. Where one of a batch is missing (a process was killed
    while it saved them) the batch is drawn again, for a batch of another size gives other last bits.
    """

    def _together(self) -> list[list[Example]]:
        of_prompt: dict[str, list[Example]] = {}
        for example in self.examples:
            of_prompt.setdefault(example.id.rpartition("-")[0], []).append(example)
        size = self.settings.batch_size
        return [same[at : at + size] for same in of_prompt.values() for at in range(0, len(same), size)]

    def _to_draw(self, drawn: Any) -> list[Example]:
        missing = {example.id for example in super()._to_draw(drawn)}
        return [example for batch in self._together() if any(e.id in missing for e in batch) for example in batch]

    def _batches(self, examples: Sequence[Example], multiple: int) -> list[DrawingBatch]:
        from OpenSciDraw.evaluation.drawing import batches_of

        wanted = {example.id for example in examples}
        chosen = [batch for batch in self._together() if batch[0].id in wanted]
        return [drawn for batch in chosen for drawn in batches_of(batch, multiple, len(batch))]

    def _identity(self, artist: Artist, sampler: Sampler) -> dict[str, Any]:
        return {**super()._identity(artist, sampler), "batch_size": self.settings.batch_size}

    def undone(self) -> int:
        """How many pictures are not drawn, or not measured by every metric."""
        drawn = self._drawn_before()
        measured = [{result.id for result in self.results.of(name)} for name in self.metrics]
        return sum(e.id not in drawn or any(e.id not in ids for ids in measured) for e in self.examples)
