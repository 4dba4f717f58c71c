"""`scienceflow caption SOURCE --out DIR`: captions for figures, by a vision-language model.

In the folder:

    figures/             captions.jsonl, or Parquet files with the pictures in them: what every command reads as figures
    answers.jsonl        every answer that was given, with what it answers: nothing is asked for twice
    failures.jsonl       captions that are missing, each with the reason; the next run asks for them again
    rejected.jsonl       figures of the source that cannot be captioned, each with the reason
    too_long.jsonl       captions with more tokens than the config's model reads (--config)
    contact_sheet.html   figures with their captions to look at
    caption.json         counts and settings; the last file that is written

A command that was killed goes on where it stopped. The source is only read.
"""

from __future__ import annotations

import json
import logging
import os
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from OpenSciDraw.captions.answers import Answers
from OpenSciDraw.captions.asking import Asker, ChatAsker, Outcome, ask_all
from OpenSciDraw.captions.lists import Captioned, captioned, pictures_are_files, write_list
from OpenSciDraw.captions.options import NOTES
from OpenSciDraw.captions.sheet import MOST, write_sheet
from OpenSciDraw.captions.styles import Style, parse_styles
from OpenSciDraw.config import Config, EncodeConfig, load_config
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.listing import FigureRef, Rejection, figures_of, load_figure, write_rejected
from OpenSciDraw.utils.endpoint import Endpoint
from OpenSciDraw.utils.files import naming_full_disk, write_json, write_text
from OpenSciDraw.utils.sole_user import sole_user

if TYPE_CHECKING:
    from OpenSciDraw.captions.lengths import Lengths

_LOG = logging.getLogger("OpenSciDraw")
FIGURES, ANSWERS, FAILURES, REJECTED, TOO_LONG = "figures", "answers.jsonl", "failures.jsonl", "rejected.jsonl", "too_long.jsonl"
SHEET, SUMMARY = "contact_sheet.html", "caption.json"
_STOPPED = 75  # exit code, as of a training that was stopped
_LEAST = {"limit": 1, "requests": 1, "retries": 0, "max_tokens": 1, "max_side": 64, "timeout": 0.001}


# -- what was asked for --------------------------------------------------------------------------
def _check(arguments: Namespace, folder: Path) -> None:
    """Raises UserError for options that do not go together or are out of bounds."""
    for name, least in _LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: at least {least}.")
    if arguments.local is not None and (arguments.url is not None or arguments.model is not None):
        raise UserError("--local is a model on this machine, --url with --model one behind an endpoint: give one of them.")
    if arguments.local is None and (arguments.url is None or arguments.model is None):
        raise UserError("Who writes the captions? Give --url URL --model NAME, or --local MODEL.")
    if arguments.cfg_options and arguments.config is None:
        raise UserError("--cfg_options are keys of a config: give --config too.")
    source = Path(arguments.source).expanduser().absolute()
    if source.is_dir() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(source)):
        raise UserError(f"--out {arguments.out} lies in {arguments.source}, whose files are figures. Choose a folder beside it.")


def _figures(arguments: Namespace, config: Config | None) -> tuple[list[FigureRef], list[Rejection], EncodeConfig]:
    """The figures to caption, what is left out, and how pictures are read."""
    encode = EncodeConfig() if config is None else config.encode
    encode = encode.model_copy(update={"figures": arguments.source, "max_figures": arguments.limit or encode.max_figures})
    notes = NOTES if arguments.notes is None else arguments.notes
    refs, rejections = figures_of(encode, optional_captions=True, note_columns=notes)
    if arguments.notes and (missing := set(notes) - {name for ref in refs for name, _ in ref.notes}):
        raise UserError(f"--notes {' '.join(sorted(missing))}: no figure of {arguments.source} has such a column with a text.")
    reason = "edit: its caption says what changes, and cannot be written from the picture alone"
    rejections += [Rejection(ref.id, ref.source, reason) for ref in refs if ref.references]
    figures = [ref for ref in refs if not ref.references]
    if not figures:
        raise UserError(f"{arguments.source} holds edits alone ({len(refs)}), whose captions are instructions. Give figures.")
    return figures, rejections, encode


def _local_asker(arguments: Namespace) -> Asker:
    from OpenSciDraw.captions.local import LocalAsker

    return LocalAsker(arguments.local, arguments.max_tokens, arguments.max_side)


def _chat_asker(arguments: Namespace) -> Asker:
    endpoint = Endpoint(
        arguments.url, arguments.model, arguments.key_variable, arguments.timeout, arguments.retries, arguments.max_tokens, "--url"
    )
    return ChatAsker(endpoint, arguments.requests, arguments.max_side)


# -- the command ---------------------------------------------------------------------------------
def main(arguments: Namespace) -> int:
    """Ask, write, say counts. 1 where captions are missing at the end, 75 where Ctrl-C stopped it."""
    folder = Path(arguments.out).expanduser().absolute()
    _check(arguments, folder)
    styles = parse_styles(arguments.styles)
    config = None if arguments.config is None else load_config(arguments.config, arguments.cfg_options)
    chat = None if arguments.local is not None else _chat_asker(arguments)  # refused here, before figures are listed
    refs, rejections, encode = _figures(arguments, config)
    asker = chat or _local_asker(arguments)
    lengths = _lengths(config)
    decode = partial(
        load_figure, max_image_pixels=encode.max_image_pixels, min_side=encode.min_side, max_aspect_ratio=encode.max_aspect_ratio
    )
    full = naming_full_disk(folder, "What was answered is kept: free space and run it again.")
    with sole_user(folder, "caption"), full:
        answers = Answers(folder / ANSWERS)
        try:
            asked = [style.name for style in styles if style.is_asked]
            _LOG.info("%d figures, %s: %s", len(refs), " and ".join(asked), asker.who)
            outcome = ask_all(refs, styles, asker, answers, arguments.max_side, decode)
            finish = _Finish(refs, styles, outcome, answers, lengths, folder)
            return finish.write(arguments.pictures_inside, rejections, asker.who)
        except KeyboardInterrupt:
            print(f"stopped: what was answered is kept in {folder / ANSWERS}, and the same command goes on")
            return _STOPPED
        finally:
            answers.close()


def _lengths(config: Config | None) -> Lengths | None:
    if config is None:
        return None
    from OpenSciDraw.captions.lengths import Lengths

    return Lengths(config)


class _Finish:
    """What is written once every figure was asked about."""

    def __init__(
        self, refs: Sequence[FigureRef], styles: Sequence[Style], outcome: Outcome, answers: Answers, lengths: Lengths | None,
        folder: Path,
    ):  # fmt: skip
        self.refs, self.styles, self.outcome, self.answers = refs, styles, outcome, answers
        self.lengths, self.folder = lengths, folder
        self.count = 0
        self.written: Counter[str] = Counter()  # captions of each style
        self.too_long: list[dict[str, Any]] = []
        self.shown: list[Captioned] = []

    def write(self, pictures_inside: bool, rejections: Sequence[Rejection], who: str) -> int:
        """The files, and what is said at the end."""
        write_rejected(self.folder / REJECTED, rejections)
        _write_lines(self.folder / FAILURES, [vars(failure) for failure in self.outcome.failures])
        inside = pictures_inside or not pictures_are_files(self.refs)
        has_masks = any(ref.mask is not None for ref in self.refs)
        needs = write_list(self._figures(), self.folder / FIGURES, inside, has_masks)
        if self.lengths is not None:
            _write_lines(self.folder / TOO_LONG, self.too_long)
        counts = self._counts(rejections)
        tables = [(heading.capitalize(), [["", "count"], *([name, str(count)] for name, count in rows.items())])
                  for heading, rows in counts.items() if rows]  # fmt: skip
        write_sheet(tables, self.shown, self.count, self.outcome.failures, self.refs, self.folder / SHEET)
        settings = {"model": who, "styles": {style.name: style.weight for style in self.styles}}
        write_json(self.folder / SUMMARY, {**counts, "settings": settings})
        self._say(counts, needs)
        return 1 if self.outcome.failures else 0

    def _figures(self) -> Iterator[Captioned]:
        """Every figure with a caption, counted and measured on its way into the list; some are kept for the page."""
        some = random.Random(0)
        waiting: list[Captioned] = []
        for figure in captioned(self.refs, self.styles, self.outcome, self.answers):
            self.count += 1
            self.written.update({style for style, *_ in figure.texts})
            if len(self.shown) < MOST:
                self.shown.append(figure)
            elif (at := some.randrange(self.count)) < MOST:  # each figure is as likely as any other
                self.shown[at] = figure
            waiting.append(figure)
            if len(waiting) == 256:
                self._measure(waiting)
            yield figure
        self._measure(waiting)

    def _measure(self, waiting: list[Captioned]) -> None:
        if self.lengths is not None:
            texts = [(figure.ref.id, style, text) for figure in waiting for style, text, _ in figure.texts]
            for (identity, style, _), tokens in zip(texts, self.lengths.of([text for *_, text in texts]), strict=True):
                if tokens > self.lengths.limit:
                    self.too_long.append({"id": identity, "style": style, "tokens": tokens, "limit": self.lengths.limit})
        waiting.clear()

    def _counts(self, rejections: Sequence[Rejection]) -> dict[str, dict[str, int]]:
        left_out = Counter(rejection.reason.split(":")[0] for rejection in rejections)
        figures = {"in the source": len(self.refs) + len(rejections), "with captions": self.count, "left out": len(rejections)}
        return {
            "figures": figures,
            "captions": {**dict(self.written), **({"too long": len(self.too_long)} if self.lengths is not None else {})},
            "missing": self.outcome.kinds(),
            "left out": dict(left_out.most_common()),
            "answers": {"new": self.outcome.asked, "kept": len(self.outcome.found) - self.outcome.asked},
            "tokens, by the server's count": self.answers.usage(),
        }

    def _say(self, counts: dict[str, dict[str, int]], needs: Counter[str]) -> None:
        print(f"{self.count} of {len(self.refs)} figures have captions: "
              + ", ".join(f"{count} {name}" for name, count in counts["captions"].items())
              + f"; {self.outcome.asked} answers are new")  # fmt: skip
        for kind, count in counts["missing"].items():
            first = next(failure for failure in self.outcome.failures if failure.reason.split(":")[0] == kind)
            print(f"  {count} missing: {kind} (the first: {first.id}: {first.reason[:160]})")
        if self.outcome.failures:
            print(f"  all of them: {self.folder / FAILURES}; the same command asks for them again")
        for kind, count in counts["left out"].items():
            print(f"  {count} left out: {kind}")
        if self.too_long:
            longest = max(self.too_long, key=lambda row: row["tokens"])
            print(f"  {len(self.too_long)} captions have more than max_sequence_length = {longest['limit']} tokens, which training "
                  f"would cut; the longest, of {longest['id']}, has {longest['tokens']}: {self.folder / TOO_LONG}")  # fmt: skip
        if self.answers.broken:
            print(f"  {self.answers.broken} lines of {ANSWERS} are cut or damaged, and were asked for again")
        for name in ("mask", "weight"):
            if needs[name]:
                print(f"  {needs[name]} figures have a {name}: set encode.{name}_column = '{name}'")
        if needs["unreadable"]:
            print(f"  {needs['unreadable']} figures could be read when they were asked about and cannot any more: not in the list")
        print(f"{self.folder / SHEET}\nencode.figures={self.folder / FIGURES}")


def _write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


