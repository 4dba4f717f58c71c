"""`scienceflow illustrate SOURCE --from WHAT`: a paper or a paragraph becomes figures, kept with all that made them.

In the folder (`--out`, or illustrations/ in the run):

    pictures/                every picture                 writer/, judge/   answers of the endpoints, each asked for once
    illustrate.json          subjects, descriptions, pictures with seed, score, findings and model
    illustrate.html          the same to look at
    drawn.jsonl, results.jsonl, settings.json              as of an evaluation

A command that was killed goes on where it stopped, and gives the same pictures.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from OpenSciDraw.config import EvaluateConfig
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.evaluator import PICTURES
from OpenSciDraw.evaluation.run import Target, default_folder, find_target, settings_of
from OpenSciDraw.illustrate.drawing import Candidate, Drawn, Easel
from OpenSciDraw.illustrate.page import PAGE, page_of
from OpenSciDraw.illustrate.sources import Subject, read_subjects, subjects_of_text
from OpenSciDraw.illustrate.writing import Writer, own_words
from OpenSciDraw.registry import MODELS
from OpenSciDraw.utils.endpoint import BadAnswer, Endpoint
from OpenSciDraw.utils.files import make_folder, naming_full_disk, write_json, write_text
from OpenSciDraw.utils.sole_user import sole_user

SUMMARY = "illustrate.json"
_OPTIONS = ("steps", "guidance", "seed", "batch_size", "reader", "judge_model")
_STYLE_EXAMPLES = 3  # of the config's validation prompts
_MOST_FINDINGS = 8  # that the writer is told of


@dataclass(frozen=True)
class IllustrateSettings:
    """What is asked for.

    `source`: a LaTeX project, an e-print's archive, or a .txt or .md file; `text`: a paragraph in its place. `only` and `limit`
    choose figures of a paper. `candidates` descriptions of each, `pictures` of each description; `refine` rounds, by a better
    description ("text") or by an edit of the best picture ("edit"). `width`, `height` in px, None: as in validation.
    """

    source: str
    text: str | None = None
    only: tuple[str, ...] = ()
    limit: int | None = None
    candidates: int = 2
    pictures: int = 4
    refine: int = 0
    refine_by: str = "text"
    width: int | None = None
    height: int | None = None
    writer_url: str | None = None
    writer_model: str | None = None


def illustrate(
    settings: IllustrateSettings, target: Target, measuring: EvaluateConfig, out: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Read, describe, draw, score, refine; the folder, and what illustrate.json holds. `say` hears of each stage.

    `measuring`: how is drawn and judged; its figures, metrics and limit are not looked at.

    Raises:
        UserError: see the parts; nothing is loaded before what was asked for was checked.
    """
    check(settings, target)
    endpoint = _endpoint(settings, measuring)
    trained = _trained(target)
    folder = make_folder(out if out is not None else _folder(target, trained, measuring, settings))
    full = naming_full_disk(folder, "What was drawn and scored is kept: free space and run it again.")
    with sole_user(folder, "illustrate"), full:
        work = _Work(settings, target, folder, Easel(folder, target, trained, measuring, settings.pictures), endpoint, say)
        return folder, work.run()


class _Work:
    """One illustration in its folder."""

    def __init__(
        self, settings: IllustrateSettings, target: Target, folder: Path, easel: Easel, endpoint: Endpoint | None,
        say: Callable[[str], None],
    ):  # fmt: skip
        assert target.config is not None
        self.settings, self.target, self.folder, self.easel, self.say = settings, target, folder, easel, say
        style = target.config.validation_prompts[:_STYLE_EXAMPLES]
        self.writer = None if endpoint is None else Writer(endpoint, folder, style)
        self.remarks: list[str] = []
        self.candidates: list[Candidate] = []
        self.drawn: dict[str, list[Drawn]] = {}
        self.kept: dict[str, Candidate] = {}  # the best so far of each first description

    def run(self) -> dict[str, Any]:
        asked = self.settings
        problems: list[str] = []
        if asked.text is not None:
            subjects = subjects_of_text(asked.text)
        else:
            subjects, problems = read_subjects(asked.source, asked.only, self.folder)
        self.remarks += [f"the paper's source: {problem}" for problem in problems]
        subjects = subjects[: asked.limit]
        self.say(f"{len(subjects)} to illustrate")
        first = [candidate for subject in subjects for candidate in self._first(subject)]
        self._draw(first)
        self.kept = {candidate.id: candidate for candidate in first}
        summary = self._write(subjects)
        for number in range(1, asked.refine + 1):
            better = [new for root, old in self.kept.items() if (new := self._refined(root, old, number)) is not None]
            if not better:
                return self._write(subjects)
            self.say(f"round {number}: {len(better)} of {len(self.kept)} descriptions are tried again")
            self._draw(better)
            for new in better:
                root = new.id.rpartition("-r")[0]
                if self.drawn[new.id][0].rank > self.drawn[self.kept[root].id][0].rank:
                    self.kept[root] = new
            summary = self._write(subjects)
        return summary

    def _draw(self, candidates: Sequence[Candidate]) -> None:
        self.candidates += candidates
        self.drawn |= self.easel.draw(candidates)

    def _first(self, subject: Subject) -> list[Candidate]:
        asked, (width, height) = self.settings, _size(self.settings, self.target)
        if self.writer is None:
            found = own_words(subject, asked.candidates)
        else:
            self.say(f"descriptions of {subject.id}")
            try:
                found = self.writer.describe(subject, asked.candidates)
            except BadAnswer as error:
                who = asked.writer_model
                raise UserError(f"No descriptions of {subject.id} from {who}: {error}. Run it again later.") from error
        return [Candidate(f"{subject.id}-{at}", subject.id, item, item, width, height) for at, item in enumerate(found, 1)]

    def _refined(self, root: str, old: Candidate, number: int) -> Candidate | None:
        """The next try of a description, or None where nothing was found that could be mended."""
        best = self.drawn[old.id][0]
        if not best.findings:
            return None
        said, identity = [text for text, _ in best.findings[:_MOST_FINDINGS]], f"{root}-r{number}"
        try:
            if self.settings.refine_by == "text":
                assert self.writer is not None
                written = self.writer.improve(old.written.text, said, identity)
                return replace(old, id=identity, written=written, round=number, parent=old.id, instruction=None, source=None)
            instruction = best.findings[0][1]
            if self.writer is not None:
                instruction = self.writer.instruction(old.written.text, said, identity)
        except BadAnswer as error:
            self.remarks.append(f"{old.id} is not tried again in round {number}: {self.settings.writer_model}: {error}")
            return None
        if not instruction:
            self.remarks.append(f"{old.id} is not edited: only a writer makes instructions of what a judge finds")
            return None
        source = self.folder / PICTURES / best.file
        return replace(old, id=identity, round=number, parent=old.id, instruction=instruction, source=source)

    def _write(self, subjects: Sequence[Subject]) -> dict[str, Any]:
        """illustrate.json and the page, after each round."""
        unscored = [c.id for c in self.candidates if self.drawn[c.id][0].metric is None]
        said = [f"not scored, as nothing in the description can be checked: {', '.join(unscored)}"] if unscored else []
        kept = {candidate.id for candidate in self.kept.values()}
        summary = {
            "what": self.target.given, "source": self.settings.source, "settings": {**asdict(self.settings), **self.easel.identity},
            "remarks": [*self.remarks, *self.easel.remarks, *said],
            "subjects": [
                {**asdict(subject), "candidates": [self._said(c, c.id in kept) for c in self.candidates if c.subject == subject.id]}
                for subject in subjects
            ],
        }  # fmt: skip
        write_json(self.folder / SUMMARY, summary)
        write_text(self.folder / PAGE, page_of(self.folder / PICTURES, summary))
        return summary

    def _said(self, candidate: Candidate, kept: bool) -> dict[str, Any]:
        pictures = []
        for drawn in self.drawn[candidate.id]:
            found = {**asdict(drawn), "findings": [text for text, _ in drawn.findings]}
            made = {"model": self.easel.identity.get("model"), "prompt": candidate.instruction or candidate.written.text}
            pictures.append({**found, **made})
        written = candidate.written
        return {
            "id": candidate.id, "text": written.text, "by": written.by, "checklist": candidate.wanted.rubric,
            "round": candidate.round, "parent": candidate.parent, "instruction": candidate.instruction,
            "edited": None if candidate.source is None else candidate.source.name, "width": candidate.width,
            "height": candidate.height, "kept": kept, "score": self.drawn[candidate.id][0].score, "pictures": pictures,
        }  # fmt: skip


# -- what was asked for --------------------------------------------------------------------------
def check(settings: IllustrateSettings, target: Target) -> None:
    """Before anything heavy is imported."""
    if target.config is None:
        raise UserError(f"{target.given} holds pictures, and illustrate draws its own. Give a run, a checkpoint or a config.")
    if (settings.writer_url is None) != (settings.writer_model is None):
        raise UserError("--writer URL and --writer_model NAME go together: give both, or neither.")
    if settings.refine and settings.refine_by == "text" and settings.writer_url is None:
        raise UserError("--refine needs a writer of better descriptions (--writer URL --writer_model NAME), or --refine_by edit.")
    family = target.config.model_type
    if settings.refine and settings.refine_by == "edit" and not MODELS.get(family).edits:
        raise UserError(f"--refine_by edit: the pipeline of {family} takes no picture to edit. Use --refine_by text.")


def _endpoint(settings: IllustrateSettings, measuring: EvaluateConfig) -> Endpoint | None:
    if settings.writer_url is None or settings.writer_model is None:
        return None
    return Endpoint(
        settings.writer_url, settings.writer_model, measuring.judge_key_variable, measuring.judge_timeout, measuring.judge_retries,
        setting="--writer",
    )  # fmt: skip


def _trained(target: Target) -> Any:
    if target.kind != "run" or target.config is None:
        return None
    from OpenSciDraw.inference.export import find_trained

    return replace(find_trained(str(target.path), target.ema), config=target.config)


def _folder(target: Target, trained: Any, measuring: EvaluateConfig, settings: IllustrateSettings) -> Path:
    name = "text" if settings.text is not None else Path(settings.source).expanduser().absolute().name
    place = default_folder(target, trained, measuring.model_copy(update={"figures": name}))
    return place.parents[1] / "illustrations" / place.name


def _size(settings: IllustrateSettings, target: Target) -> tuple[int, int]:
    """Width and height in px: as asked for, else as in validation."""
    from OpenSciDraw.inference.pictures import resolutions

    assert target.config is not None
    side = target.config.encode.resolution
    width, height = (resolutions(target.config) or [(side, side)])[0]
    return settings.width or width, settings.height or height


# -- the command ---------------------------------------------------------------------------------
def main(arguments: Namespace) -> int:
    """Print the best picture of each description, and where the rest lies."""
    target = find_target(arguments.what, arguments.cfg_options, arguments.ema)
    names = ("source", "limit", "candidates", "pictures", "refine", "refine_by", "width", "height", "writer_model")
    text = sys.stdin.read() if arguments.source == "-" else None
    asked = {name: getattr(arguments, name) for name in names}
    settings = IllustrateSettings(**asked, only=tuple(arguments.only), writer_url=arguments.writer, text=text)
    given = {name: value for name in _OPTIONS if (value := getattr(arguments, name)) is not None}
    if arguments.judge is not None:
        given["judge_url"] = arguments.judge
    measuring = settings_of(target.config, given, arguments.cfg_options)
    out = Path(arguments.out).expanduser().absolute() if arguments.out else None
    folder, summary = illustrate(settings, target, measuring, out, say=lambda said: print(said, flush=True))
    for remark in summary["remarks"]:
        print(remark)
    for subject in summary["subjects"]:
        print(f"\n{subject['id']}: {subject['caption'] or subject['context']}"[:130])
        for candidate in subject["candidates"]:
            score = "    -" if candidate["score"] is None else f"{candidate['score']:.3f}"
            best = candidate["pictures"][0]
            print(f"  {score}  {PICTURES}/{best['file']}  {'kept' if candidate['kept'] else ''}".rstrip())
    print(f"\n{folder / SUMMARY}\n{folder / PAGE}")
    return 0
