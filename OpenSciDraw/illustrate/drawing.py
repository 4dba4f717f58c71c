"""Candidates drawn with several seeds and scored, by the parts of `evaluate`: nothing is drawn or judged in another way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from OpenSciDraw.bench.tables import overall_of
from OpenSciDraw.config import Config, EvaluateConfig
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.answers import findings
from OpenSciDraw.evaluation.base import Metric
from OpenSciDraw.evaluation.described import differences, parse_description
from OpenSciDraw.evaluation.evaluator import PICTURES, Evaluator
from OpenSciDraw.evaluation.examples import Example, picture_name
from OpenSciDraw.evaluation.results import Result
from OpenSciDraw.evaluation.run import Target, make_metrics
from OpenSciDraw.evaluation.scoring import read_picture
from OpenSciDraw.evaluation.text_fidelity import quoted_phrases
from OpenSciDraw.figures.refs import FileRef
from OpenSciDraw.illustrate.writing import Written
from OpenSciDraw.preferences.seeds import SeveralPictures, pictures_of

if TYPE_CHECKING:
    from OpenSciDraw.inference.export import Trained

COUNTED = {  # of a metric's scores, those whose mean ranks pictures
    "judge": ("components", "arrows", "text"),
    "described": ("components", "arrows", "labels"),
    "text": ("word_recall", "word_precision"),
}


@dataclass(frozen=True)
class Candidate:
    """One description to draw. Of an edit, `source` is the picture that it starts from and `instruction` what is asked for.

    `wanted` is what its pictures are compared with: the first description of all that refining makes of it, so that their scores
    measure one thing, and a description that asks for less gains nothing.
    """

    id: str
    subject: str
    written: Written
    wanted: Written
    width: int
    height: int
    round: int = 0
    parent: str | None = None
    instruction: str | None = None
    source: Path | None = None

    def scored_as(self) -> Example:
        """The description that its pictures are compared with, and its checklist."""
        return Example(self.id, self.wanted.text, self.width, self.height, rubric=dict(self.wanted.rubric) or None)

    def drawn_as(self, resolution: int) -> Example:
        """What they are drawn from."""
        if self.source is None:
            return Example(self.id, self.written.text, self.width, self.height)
        assert self.instruction is not None
        ref = FileRef(self.source.name, "", str(self.source), self.source.stat().st_size, 0)
        return Example(self.id, self.instruction, self.width, self.height, sources=(ref,), resolution=resolution)


@dataclass(frozen=True)
class Drawn:
    """A picture: `score` (None: nothing to score it by) ranks those of a description; `findings`: (what is wrong, its mending)."""

    id: str
    file: str
    seed: int
    metric: str | None
    score: float | None
    scores: dict[str, float]
    findings: list[tuple[str, str]]
    failure: str | None

    @property
    def rank(self) -> float:
        return -1.0 if self.score is None else self.score


def metric_for(written: Written, judge: bool) -> str | None:
    """The judge where there is one and a checklist, else what can be read without ground truth; None: nothing can."""
    if judge and written.rubric:
        return "judge"
    if parse_description(written.text).parts:
        return "described"
    return "text" if quoted_phrases(written.text) else None


class Easel:
    """Draws candidates into one folder and scores them, going on with what is there. `remarks`: what could not be done."""

    def __init__(self, folder: Path, target: Target, trained: Trained | None, measuring: EvaluateConfig, pictures: int):
        assert target.config is not None
        self.folder, self.target, self.trained = folder, target, trained
        self.config: Config = target.config
        self.measuring, self.pictures = measuring, pictures
        self.identity: dict[str, Any] = {}
        self.remarks: list[str] = []
        self._made: dict[str, dict[str, Metric]] = {}

    def draw(self, candidates: Sequence[Candidate]) -> dict[str, list[Drawn]]:
        """The pictures of each candidate by its id, best first; pictures that score alike stay in the order of their numbers.

        Raises:
            UserError: as of `evaluate`; an edit by a model that does not edit.
        """
        for candidate in candidates:  # what a metric needs is missed here, before anything is drawn
            self._metrics(metric_for(candidate.wanted, self.measuring.judge_url is not None))
        resolution = self.config.encode.resolution
        examples = [e for candidate in candidates for e in pictures_of(candidate.drawn_as(resolution), self.pictures)]
        evaluator = SeveralPictures(self.folder, examples, {}, self.measuring)
        evaluator.draw(self.config, self.trained)
        self.identity = evaluator.identity
        return {candidate.id: self._scored(candidate) for candidate in candidates}

    def _metrics(self, name: str | None) -> dict[str, Metric]:
        """The metric by its name, made once; {} for None, and for `text` on a machine that reads none, which is remarked on."""
        if name is None:
            return {}
        if name not in self._made:
            settings = self.measuring.model_copy(update={"metrics": [name], "figures": str(self.folder)})
            try:
                self._made[name] = make_metrics(settings, self.folder, self.target)
            except UserError as error:
                if name != "text" or "reader" in self.measuring.model_fields_set:
                    raise
                self._made[name] = {}
                self.remarks.append(f"words in pictures are not read, so descriptions without named shapes have no score: {error}")
        return self._made[name]

    def _scored(self, candidate: Candidate) -> list[Drawn]:
        metrics = self._metrics(metric_for(candidate.wanted, self.measuring.judge_url is not None))
        name = next(iter(metrics), None)
        examples = pictures_of(candidate.scored_as(), self.pictures)
        results: dict[str, Result] = {}
        if name is not None:
            evaluator = Evaluator(self.folder, examples, metrics, self.measuring)
            evaluator.measure()
            results = {result.id: result for result in evaluator.results.of(name, [e.id for e in examples])}
        said = findings(self.folder) if name == "judge" else {}
        drawn = [self._drawn(example, name, results.get(example.id), said.get(example.id, [])) for example in examples]
        return sorted(drawn, key=lambda picture: -picture.rank)

    def _drawn(self, example: Example, name: str | None, result: Result | None, said: Sequence[str]) -> Drawn:
        from OpenSciDraw.evaluation.drawing import Sampler

        file = picture_name(example.id)
        seed = Sampler(1, 1.0, self.measuring.seed).noise_seed(example.id)
        scores = result.scores if result is not None else {}
        counted = {key: numbers for key, numbers in scores.items() if key in COUNTED.get(name or "", ())}
        found = [(text, "") for text in said]
        if name == "described":
            picture = read_picture(self.folder / PICTURES / file).image
            found = differences(picture, example.prompt) if picture is not None else []
        ratios = {key: numbers[0] / numbers[1] for key, numbers in scores.items() if numbers[1]}
        failure = None if result is None else result.failure
        return Drawn(example.id, file, seed, name, overall_of(counted), ratios, found, failure)
