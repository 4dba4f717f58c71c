"""Every figure's captions, asked for: several at once, each kept as soon as it is there, failures named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image
from tqdm import tqdm

from OpenSciDraw.captions.answers import Answers, key_of, place_of
from OpenSciDraw.captions.prompts import caption_in, chat_messages, request_text
from OpenSciDraw.captions.styles import Style
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.decode import RejectedFigure
from OpenSciDraw.figures.refs import FigureRef, load_figure
from OpenSciDraw.utils.endpoint import BadAnswer, Endpoint, picture_url

_MOST_IN_A_ROW = 20  # figures without an answer, after which the server counts as out of order
_BY_SERVER = ("HTTP", "no answer", "not an answer")  # how failures begin that are the server's, whatever the figure is


class Asker(Protocol):
    """Who answers. `who` names it for the kept answers; `threads` requests are made at the same time."""

    who: str
    threads: int

    def ask(self, style: Style, text: str, picture: Image.Image) -> dict[str, Any]:
        """The answer {"text", "usage"}, of which `caption_in` makes a caption. Raises BadAnswer."""
        ...


class ChatAsker:
    """An OpenAI-compatible endpoint. The model's name stands for the model, wherever it is served."""

    def __init__(self, endpoint: Endpoint, threads: int, most_side: int):
        self._endpoint, self.threads, self._most_side = endpoint, threads, most_side
        self.who = endpoint.model

    def ask(self, style: Style, text: str, picture: Image.Image) -> dict[str, Any]:
        return self._endpoint.ask(chat_messages(style, text, picture_url(picture, self._most_side)), caption_in)


@dataclass(frozen=True)
class Failure:
    """A caption that is missing. `reason` is 'kind: details'."""

    id: str
    source: str
    style: str
    reason: str


@dataclass
class Outcome:
    """`found`: where an answer lies in the file of answers, by (number of the figure, name of the style)."""

    found: dict[tuple[int, str], int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    asked: int = 0  # answers that are new

    def kinds(self) -> dict[str, int]:
        """How many failures of each kind, the most frequent first."""
        return dict(Counter(failure.reason.split(":")[0] for failure in self.failures).most_common())


def ask_all(
    refs: Sequence[FigureRef], styles: Sequence[Style], asker: Asker, answers: Answers, most_side: int,
    decode: Callable[[bytes], Image.Image] = load_figure,
) -> Outcome:  # fmt: skip
    """Ask for what has no answer yet. `decode` makes a picture of a file's bytes, or raises RejectedFigure.

    Raises:
        UserError: many figures in a row failed by the server's doing. What was answered is kept.
    """
    outcome, jobs = Outcome(), []
    asked = [style for style in styles if style.is_asked]
    for number, ref in enumerate(refs):
        missing = []
        for style in asked:
            at = answers.at(place_of(asker.who, style, ref, most_side))
            if at is not None:
                outcome.found[number, style.name] = at
            else:
                missing.append(style)
        if missing:
            jobs.append((number, missing))
    work = _Work(refs, asker, answers, most_side, decode)
    in_a_row = 0
    with tqdm(total=len(refs), initial=len(refs) - len(jobs), desc="captions", unit="figure") as bar:
        for number, found, failures, new in _side_by_side(work, jobs, asker.threads):
            outcome.found |= {(number, name): at for name, at in found.items()}
            outcome.failures += failures
            outcome.asked += new
            by_server = bool(failures) and failures[-1].reason.startswith(_BY_SERVER)
            in_a_row = in_a_row + 1 if by_server and not found else 0
            bar.update()
            if outcome.failures:
                bar.set_postfix_str(f"{len(outcome.failures)} failed")
            if in_a_row == _MOST_IN_A_ROW:
                raise UserError(
                    f"{_MOST_IN_A_ROW} figures in a row got no answer; the last, {failures[-1].id}: {failures[-1].reason}. "
                    "What was answered is kept: mend that, and run the same command again."
                )
    outcome.failures.sort(key=lambda failure: (failure.id, failure.style))
    return outcome


Done = tuple[int, dict[str, int], list[Failure], int]  # the figure's number, found, failures, new answers


def _side_by_side(work: _Work, jobs: Sequence[tuple[int, list[Style]]], threads: int) -> Iterator[Done]:
    """Jobs as they end. Few are submitted ahead, so that pictures of many figures never wait in memory."""
    left, running = iter(jobs), set[Future[Done]]()
    with ThreadPoolExecutor(threads, thread_name_prefix="caption") as pool:
        try:
            while True:
                while len(running) < 2 * threads and (job := next(left, None)) is not None:
                    running.add(pool.submit(work.do, *job))
                if not running:
                    return
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield future.result()
        except BaseException:  # the requests that are on their way are waited for, and their answers kept
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Work:
    """One figure: its picture is read once, and each missing style is asked for."""

    def __init__(
        self, refs: Sequence[FigureRef], asker: Asker, answers: Answers, most_side: int, decode: Callable[[bytes], Image.Image]
    ):
        self._refs, self._asker, self._answers, self._most_side, self._decode = refs, asker, answers, most_side, decode

    def do(self, number: int, styles: Sequence[Style]) -> Done:
        ref = self._refs[number]
        found: dict[str, int] = {}
        failures: list[Failure] = []
        new = 0
        try:
            file = ref.read()
            picture = self._decode(file)
        except RejectedFigure as error:
            return number, found, [Failure(ref.id, ref.source, style.name, str(error)) for style in styles], new
        for style in styles:
            key = key_of(self._asker.who, style, ref, self._most_side, file)
            try:
                found[style.name], is_new = self._ask(key, style, ref, picture)
                new += is_new
            except BadAnswer as error:
                failures.append(Failure(ref.id, ref.source, style.name, str(error)))
        return number, found, failures, new

    def _ask(self, key: str, style: Style, ref: FigureRef, picture: Image.Image) -> tuple[int, bool]:
        """Where the answer lies, and whether it is a new one. Raises BadAnswer."""
        with self._answers.asking(key):
            if (at := self._answers.at(key)) is not None:
                return at, False
            answer = self._asker.ask(style, request_text(ref), picture)
            place = place_of(self._asker.who, style, ref, self._most_side)
            record = {"id": ref.id, "style": style.name, "model": self._asker.who}
            record |= {"text": answer["text"], "usage": answer["usage"]}
            return self._answers.add(key, place, record), True
