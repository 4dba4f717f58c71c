"""`scienceflow prefer WHAT --figures SPEC`: own pictures become groups of preferences, in a store that `dpo` and `mdpo` read.

In the folder (`--out`, or preferences/ in the run):

    pictures/, drawn*.jsonl, results*.jsonl, settings.json   as of an evaluation: drawn once, scored once
    scores.parquet           each picture's reward and scores
    left_out.jsonl           the prompts without a group, each with the reason
    contact_sheet.html       winners and losers to look at
    prefer.json              counts, rules, settings; the last file that is written
    NAME-figures/, NAME/     winners and losers with their prompts as captions, and their store with groups.parquet (NAME: --store)

Processes that `accelerate launch` or `torchrun` starts share the prompts: prompt i belongs to process i mod n. The last to finish
makes the groups. A command that was killed goes on where it stopped, with as many processes or others, and gives the same bytes.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from OpenSciDraw.config import Config, EvaluateConfig, PreferConfig
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.evaluator import PICTURES
from OpenSciDraw.evaluation.examples import Example, load_examples
from OpenSciDraw.evaluation.results import Results, digest
from OpenSciDraw.evaluation.run import Target, default_folder, find_target, make_metrics, settings_of
from OpenSciDraw.utils.files import (
    locked,
    make_folder,
    naming_full_disk,
    unfinished,
    write_json,
    write_text,
)
from OpenSciDraw.utils.sole_user import sole_user

if TYPE_CHECKING:
    from OpenSciDraw.encode.work import Place
    from OpenSciDraw.inference.export import Trained
    from OpenSciDraw.preferences.groups import Scored
    from OpenSciDraw.preferences.seeds import SeveralPictures

_LOG = logging.getLogger("OpenSciDraw")
SUMMARY, SCORES, LEFT_OUT, SHEET = "prefer.json", "scores.parquet", "left_out.jsonl", "contact_sheet.html"
_JUDGED = {"component": "judge/components", "arrow": "judge/arrows", "text": "judge/text"}
_EVALUATE = ("steps", "guidance", "seed", "batch_size", "reader", "judge_model")
_STORE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")


# -- what was asked for --------------------------------------------------------------------------
def asked_for(arguments: Namespace, config: Config, overrides: Sequence[str]) -> tuple[PreferConfig, EvaluateConfig]:
    """The config's sections `prefer` and `evaluate` with the command line's options in them.

    Raises:
        UserError: a wrong value; no prompts; prompts that evaluations measure with; an axis that is no score of a metric.
    """
    given = {name: value for name in ("figures", "limit", "pictures") if (value := getattr(arguments, name)) is not None}
    values = config.prefer.model_dump(exclude_unset=True) | given
    if arguments.judge is not None and "axes" not in values:
        values["axes"] = _JUDGED
    try:
        settings = PreferConfig(**values)
    except ValidationError as error:
        problems = "; ".join(f"prefer.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(f"{problems}. `scienceflow config --schema` lists what is allowed.") from error
    if settings.figures is None:
        raise UserError("Which prompts? Give --figures, e.g. drawn:500:seed=31:style=small, or set prefer = dict(figures=...).")
    if settings.figures == config.evaluate.figures:
        raise UserError(
            f"prefer.figures = {settings.figures!r} are the prompts of evaluate.figures: what is trained on them cannot be "
            "measured with them. Draw others, for example with another seed."
        )
    scores = [score for score in settings.axes.model_dump().values() if score is not None]
    if not scores:
        raise UserError("prefer.axes: every axis is None, so that nothing is scored. Name a score for one at least.")
    measured = {name: value for name in _EVALUATE if (value := getattr(arguments, name)) is not None}
    if arguments.judge is not None:
        measured["judge_url"] = arguments.judge
    metrics = list(dict.fromkeys(score.partition("/")[0] for score in scores))
    measured |= {"figures": settings.figures, "limit": settings.limit, "metrics": metrics}
    evaluate = settings_of(config, measured, overrides)
    if extra := [name for name in evaluate.metrics if name not in metrics]:
        raise UserError(f"--judge is given, and no axis of prefer.axes is a score of {', '.join(extra)}. Name one.")
    return settings, evaluate


def _metrics(evaluate: EvaluateConfig, folder: Path, target: Target) -> dict[str, Any]:
    from OpenSciDraw.evaluation.base import PictureMetric

    metrics = make_metrics(evaluate, folder, target)
    wrong = [name for name, metric in metrics.items() if not isinstance(metric, PictureMetric)]
    if wrong:
        raise UserError(f"prefer.axes: {', '.join(wrong)} does not score single pictures. Use structure, text or judge.")
    return metrics


def _prompts(config: Config, settings: PreferConfig) -> list[Example]:
    encode = config.encode
    columns = (encode.image_column, encode.caption_column, encode.where, encode.reference_column)
    assert settings.figures is not None
    found = load_examples(settings.figures, settings.limit, encode.resolution, *columns)
    if edits := [example.id for example in found if example.sources]:
        raise UserError(f"{settings.figures}: {edits[0]} is an edit. Preferences of edits are not trained on: give other prompts.")
    if settings.include_figure and (alone := [example.id for example in found if example.reference is None]):
        raise UserError(
            f"prefer.include_figure: the prompt {alone[0]} has no figure, nor have {len(alone) - 1} others. Give figures with "
            "captions or drawn ones as --figures, or set it to False."
        )
    return found


# -- the stages ----------------------------------------------------------------------------------
def main(arguments: Namespace) -> int:
    """Draw, score, make groups, encode; print counts and how to train on them."""
    target = find_target(arguments.what, arguments.cfg_options, arguments.ema)
    if target.config is None:
        raise UserError(f"{arguments.what} holds pictures, and prefer draws its own. Give a run, a checkpoint or a config.")
    if not _STORE_NAME.fullmatch(arguments.store):
        raise UserError(f"--store {arguments.store!r} is not a plain name of letters, digits, '.', '_' and '-'.")
    settings, evaluate = asked_for(arguments, target.config, arguments.cfg_options)
    _metrics(evaluate, target.path, target)  # refused here, before torch is imported
    prompts = _prompts(target.config, settings)
    trained = _trained(target)
    folder = Path(arguments.out).expanduser().absolute() if arguments.out else _folder(target, trained, evaluate)
    from OpenSciDraw.encode.work import Place

    place = Place.here()
    full = naming_full_disk(folder, "What was drawn and scored is kept: free space and run it again.")
    with sole_user(folder, "prefer", place.rank, place.world_size), full:
        _draw_and_score(target, trained, prompts, settings, evaluate, folder, place)
        everything = _evaluator(prompts, settings, evaluate, folder, target)
        if undone := everything.undone():
            _LOG.info("process %d is done; %d pictures are still with other processes", place.rank, undone)
            return 0
        with locked(folder / ".finish"):  # of two that end at once the other finds the work done
            return _finish(target.config, everything.results, prompts, settings, folder, arguments.store)


def _trained(target: Target) -> Trained | None:
    if target.kind != "run":
        return None
    from dataclasses import replace

    from OpenSciDraw.inference.export import find_trained

    assert target.config is not None
    return replace(find_trained(str(target.path), target.ema), config=target.config)


def _folder(target: Target, trained: Trained | None, evaluate: EvaluateConfig) -> Path:
    place = default_folder(target, trained, evaluate)
    return place.parents[1] / "preferences" / place.name


def _evaluator(
    prompts: Sequence[Example], settings: PreferConfig, evaluate: EvaluateConfig, folder: Path, target: Target, part: str = ""
) -> SeveralPictures:
    from OpenSciDraw.preferences.seeds import SeveralPictures, picture_id, pictures_of

    examples = [example for prompt in prompts for example in pictures_of(prompt, settings.pictures)]
    given = prompts if settings.include_figure else ()
    figures = frozenset(picture_id(prompt.id, settings.pictures - 1) for prompt in given)
    return SeveralPictures(folder, examples, _metrics(evaluate, folder, target), evaluate, part, figures)


def _draw_and_score(
    target: Target, trained: Trained | None, prompts: Sequence[Example], settings: PreferConfig, evaluate: EvaluateConfig,
    folder: Path, place: Place,
) -> None:  # fmt: skip
    """This process's prompts."""
    import torch

    from OpenSciDraw.utils.files import clear_unfinished

    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
    part = "" if place.world_size == 1 else f"-{place.rank}"
    evaluator = _evaluator(prompts[place.rank :: place.world_size], settings, evaluate, folder, target, part)
    clear_unfinished(evaluator.scratch)
    assert target.config is not None
    evaluator.draw(target.config, trained)
    if part:
        shutil.rmtree(evaluator.scratch, ignore_errors=True)
    evaluator.measure()


def _finish(
    config: Config, results: Results, prompts: list[Example], settings: PreferConfig, folder: Path, store: str
) -> int:
    from OpenSciDraw.preferences.groups import Scored, counts, group_table, groups_of, write_scores
    from OpenSciDraw.preferences.sheet import write_sheet

    scored = Scored.of(prompts, results, settings)
    groups = groups_of(scored, settings)
    found = counts(groups)
    write_scores(scored, folder / SCORES)
    lines = [json.dumps({"group_id": name, "reason": reason}, ensure_ascii=False) for name, reason in groups.left_out]
    write_text(folder / LEFT_OUT, "".join(line + "\n" for line in lines))
    write_sheet(scored, groups, folder / PICTURES, folder / SHEET)
    _say(found, scored, settings, folder)
    if not groups.ids:
        raise UserError(
            f"No group of {len(prompts)} prompts: {', '.join(f'{count} for {why}' for why, count in found['left out'].items())}. "
            "The pictures are kept. Draw more pictures of a prompt, take harder prompts, or lower prefer.min_gap (docs/prefer.md)."
        )
    table = group_table(scored, groups)
    _encode(config, table, folder, store)
    rules = settings.model_dump()
    write_json(folder / SUMMARY, {"store": store, "prompts": len(prompts), **found, "settings": rules,
                                  "groups_digest": digest(table.to_pylist())})  # fmt: skip
    print(f"\ndataset = dict(type='PreferenceGroups', base_dir={str(folder)!r}, parquet_base_path={store!r})")
    return 0


def _say(found: dict[str, dict[str, int]], scored: Scored, settings: PreferConfig, folder: Path) -> None:
    from OpenSciDraw.preferences.groups import chances

    losers = ", ".join(f"{axis} {count}" for axis, count in found["losers"].items())
    print(f"{found['groups']['made']} groups of {len(scored.prompts)} prompts, {settings.pictures} pictures each; losers: {losers}")
    for reason, count in found["left out"].items():
        print(f"  {count} prompts left out: {reason}")
    print("prompts whose best and worst picture lie at least so far apart:")
    for axis, spread in chances(scored).items():
        apart = ", ".join(f"{gap}: {count}" for gap, count in spread.items() if gap != "prompts")
        print(f"  {axis} ({spread['prompts']} prompts): {apart}")
    print(folder / SHEET)


def _encode(config: Config, table: Any, folder: Path, name: str) -> None:
    """Winners and losers into the store `folder / name`; groups.parquet comes last, so that a store with it is whole."""
    import pyarrow.parquet as pq

    from OpenSciDraw.config import EncodeConfig
    from OpenSciDraw.datasets.preference_groups import GROUPS_FILE
    from OpenSciDraw.encode import run as encode
    from OpenSciDraw.encode.work import Place
    from OpenSciDraw.preferences.groups import write_table

    written = folder / name / GROUPS_FILE
    if written.is_file():
        if pq.read_table(written).equals(table):
            return _LOG.info("%s has these groups already", folder / name)
        raise UserError(
            f"{folder / name} holds groups of other rules, prompts or pictures. Give the new ones a store of their own with "
            f"--store NAME, or delete {folder / name}."
        )
    figures = make_folder(folder / f"{name}-figures")
    _copy_figures(table, folder / PICTURES, figures)
    kept = config.encode.model_dump(exclude_unset=True)
    for key in ("image_column", "caption_column", "reference_column", "where", "max_figures", "min_quality"):  # of other figures
        kept.pop(key, None)
    update = {
        "encode": EncodeConfig(**{**kept, "figures": str(figures)}),
        "dataset": type(config.dataset)(type="ArXiVParquetDatasetV2", base_dir=str(folder), parquet_base_path=name),
    }
    encode.main(config.model_copy(update=update), place=Place(0, 1, Place.here().local_rank))
    write_table(table, written)


def _copy_figures(table: Any, pictures: Path, figures: Path) -> None:
    """The folder of figures is these groups' pictures, each with its prompt beside it, and nothing else."""
    captions: dict[str, str] = {}
    for row in table.to_pylist():
        names = (row[column] for column in row if column == "winner" or column.startswith("loser_"))
        captions |= {name: row["caption"] for name in names if name is not None}
    wanted = {*captions, *(Path(name).with_suffix(".txt").name for name in captions)}
    for file in figures.iterdir():
        if file.name not in wanted and file.suffix in (".png", ".txt"):
            file.unlink()
    for name, caption in captions.items():
        if not (figures / name).is_file():
            with unfinished(figures / name) as part:
                shutil.copyfile(pictures / name, part)
        text = (figures / name).with_suffix(".txt")
        if not text.is_file():
            write_text(text, caption + "\n")
