"""What is to be illustrated: the figures of a paper with captions and contexts, or a paragraph."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from OpenSciDraw.errors import UserError
from OpenSciDraw.prepare.archives import unpack
from OpenSciDraw.prepare.isolation import IsolationError, run_isolated
from OpenSciDraw.prepare.latex.figures import LatexFigure, read_figures
from OpenSciDraw.prepare.papers import PaperSource, RejectedPaper, find_papers
from OpenSciDraw.prepare.settings import Limits

_TEXT = (".txt", ".md")
_MOST_CHARACTERS = 20_000  # of a paragraph


@dataclass(frozen=True)
class Subject:
    """One figure to be: `caption` as the authors wrote it ("" for a paragraph), `context` the text that speaks of it."""

    id: str
    caption: str
    context: str
    label: str = ""


@dataclass(frozen=True)
class _Task:
    source: PaperSource
    limits: Limits
    scratch: Path


def subjects_of_text(text: str) -> list[Subject]:
    """A paragraph as the one subject. Raises UserError for an empty one, or one as long as a paper."""
    text = text.strip()
    if not text:
        raise UserError("The text to illustrate is empty.")
    if len(text) > _MOST_CHARACTERS:
        raise UserError(f"The text has {len(text)} characters; at most {_MOST_CHARACTERS} are read. Give the part to illustrate.")
    return [Subject("text", "", text)]


def read_subjects(source: str, only: Sequence[str], scratch: Path) -> tuple[list[Subject], list[str]]:
    """The figures of a LaTeX project or e-print, or the text of a .txt or .md file; and what was left out, in words.

    The paper's archive is unpacked and its LaTeX is read in a process of its own with bounded time and memory, as by `prepare`.
    `only`: ids (fig2) or labels (fig:overview) of the figures that are wanted.

    Raises:
        UserError: nothing to illustrate in the source, or a figure in `only` that it does not have.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in _TEXT and path.is_file():
        if only:
            raise UserError(f"--only names figures of a paper, and {source} is a text. Leave it out.")
        try:
            return subjects_of_text(path.read_bytes()[: 4 * _MOST_CHARACTERS + 4].decode("utf-8", "replace")), []
        except OSError as error:
            raise UserError(f"{source} cannot be read: {error.strerror}.") from error
    papers, _ = find_papers([source])
    if len(papers) > 1:
        names = ", ".join(paper.paper_id for paper in papers[:5])
        raise UserError(f"{source} holds {len(papers)} papers ({names} …). Give the folder or file of one.")
    found, problems = _read_paper(papers[0], scratch)
    subjects = _of_figures(found)
    if not subjects:
        why = f" ({'; '.join(problems[:3])})" if problems else ""
        raise UserError(f"{source}: no figure with a caption{why}. Give the passage to illustrate as a .txt file.")
    return _chosen(subjects, only, source) if only else subjects, problems


def _read_paper(source: PaperSource, scratch: Path) -> tuple[list[LatexFigure], list[str]]:
    limits = Limits.model_validate({})
    folder = Path(tempfile.mkdtemp(prefix=".paper-", dir=scratch))
    try:
        task = _Task(source, limits, folder)
        return run_isolated(_figures, task, seconds=limits.seconds, memory_bytes=limits.memory_bytes)
    except IsolationError as error:
        raise UserError(f"{source.name}: the paper could not be read: {error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _figures(task: _Task) -> tuple[list[LatexFigure], list[str]]:
    """In the process of its own. Pictures are not drawn: captions and contexts are all that is wanted."""
    try:
        root, notes = unpack(task.source, task.scratch / "source", task.limits)
    except RejectedPaper as error:
        return [], [str(error)]
    paper = read_figures(root, task.limits)
    figures = [replace(figure, graphic=None, tikz=None, preamble="") for figure in paper.figures]
    return figures, notes + paper.problems


def _of_figures(found: Sequence[LatexFigure]) -> list[Subject]:
    """One subject a figure: the panels' captions behind the figure's own."""
    by_id: dict[str, list[LatexFigure]] = {}
    for figure in found:
        by_id.setdefault(figure.figure_id, []).append(figure)
    subjects = []
    for identity, panels in by_id.items():
        whole = next((panel.parent_caption for panel in panels if panel.parent_caption), "")
        own = [f"({panel.panel}) {panel.caption}" for panel in panels if panel.parent_caption and panel.caption]
        caption = " ".join([whole, *own]) if whole else next((panel.caption for panel in panels if panel.caption), "")
        if caption.strip():
            context = next((panel.context for panel in panels if panel.context), "")
            subjects.append(Subject(identity, caption.strip(), context, panels[0].label))
    return subjects


def _chosen(subjects: list[Subject], only: Sequence[str], source: str) -> list[Subject]:
    known = {name: subject for subject in subjects for name in (subject.id, subject.label) if name}
    missing = [name for name in only if name not in known]
    if missing:
        raise UserError(f"{source} has no figure {', '.join(missing)}. It has: {', '.join(known)}.")
    chosen = {known[name].id for name in only}
    return [subject for subject in subjects if subject.id in chosen]
