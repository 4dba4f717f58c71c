"""`scienceflow prefer WHAT --figures SPEC`: a model draws each prompt several times, our metrics score the pictures, and the best
and the worst of a prompt become groups in a store that the objectives `dpo` and `mdpo` train on. No judge and no person is needed.

Every process draws and scores its share of the prompts in a folder of its own, and goes on there after a stop. The first makes the
groups when all are done; then all encode.
"""

from __future__ import annotations

import logging
import shutil
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from OpenSciDraw.config import Config, EvaluateConfig
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.evaluator import Evaluator
from OpenSciDraw.evaluation.examples import Example, load_examples
from OpenSciDraw.evaluation.results import Results, digest
from OpenSciDraw.evaluation.run import Target, find_target, make_metrics, options_of, settings_of
from OpenSciDraw.utils.files import make_folder, naming_full_disk, parse_json, unfinished, write_json
from OpenSciDraw.utils.sole_user import sole_user

if TYPE_CHECKING:
    from OpenSciDraw.encode.work import Place
    from OpenSciDraw.inference.export import Trained

STORE, DONE = "store", "done.json"
_WAIT = 2.0  # s between two looks at what other processes have done
_LOG = logging.getLogger("OpenSciDraw")
_SOURCES = {
    "structure": {"component": "structure/components", "arrow": "structure/arrows", "text": "structure/labels"},
    "judge": {"component": "judge/components", "arrow": "judge/arrows", "text": "judge/text"},
}


def main(arguments: Namespace) -> int:
    target = find_target(arguments.what, arguments.cfg_options, arguments.ema)
    if target.config is None:
        raise UserError(f"{arguments.what} holds pictures. Give a run, a checkpoint or a config: `prefer` draws anew.")
    settings = settings_of(target.config, options_of(arguments), arguments.cfg_options)
    if settings.figures is None:
        raise UserError("Which prompts? Give --figures, e.g. drawn:500:seed=7:style=small, or a .jsonl of prompts.")
    sources = scores_of_axes(target.config, settings)
    folder = Path(arguments.out).expanduser().absolute()
    make_metrics(settings, folder, target)  # refused here, before torch is imported
    from OpenSciDraw.encode.work import Place

    place = Place.here()
    make_folder(folder)
    _refuse_other_counts(folder, place)
    trained = None
    if target.kind == "run":
        from OpenSciDraw.inference.export import find_trained

        trained = replace(find_trained(str(target.path), target.ema), config=target.config)
    full = naming_full_disk(folder, "What was drawn and scored is kept: free space and run it again.")
    with sole_user(folder, "prefer", place.rank, place.world_size), full:
        examples = _prompts(target.config, settings)
        _draw_and_score(_share(examples, place), target, settings, trained, folder / _part(place))
        if place.rank == 0:
            _wait_for_shares(folder, examples, target.config, settings, place)
            _make_groups(folder, examples, target, settings, sources, place)
            write_json(folder / DONE, _done(examples, target.config, settings))
        while not _is_done(folder / DONE, _done(examples, target.config, settings)):
            time.sleep(_WAIT)
        _encode(target.config, folder, place)
    return 0


def scores_of_axes(config: Config, settings: EvaluateConfig) -> dict[str, str]:
    """`metric/name` of each axis: the config's `preference.scores`, or those of the one metric that has all axes.

    Raises:
        UserError: no such metric, or two; a score of a metric that is not asked for.
    """
    given, able = config.preference.scores, [name for name in settings.metrics if name in _SOURCES]
    if not given and len(able) != 1:
        raise UserError(
            f"metrics {', '.join(settings.metrics)}: which scores are the axes component, arrow and text? Give one of "
            f"{', '.join(_SOURCES)} alone, or set preference.scores = dict(component='structure/components', arrow=…, text=…)."
        )
    found: dict[str, str] = dict(_SOURCES[able[0]]) if able else {}
    found |= {str(axis): score for axis, score in (given or {}).items()}
    for axis in ("component", "arrow", "text"):
        metric, slash, name = found.get(axis, "").partition("/")
        if not (slash and name) or metric not in settings.metrics:
            raise UserError(
                f"preference.scores: {axis!r} is {found.get(axis)!r}. Give metric/name with one of the metrics "
                f"{', '.join(settings.metrics)}, as 'structure/labels'."
            )
    return found


# -- pictures --------------------------------------------------------------------------------------------
def _prompts(config: Config, settings: EvaluateConfig) -> list[Example]:
    encode = config.encode
    named = (encode.image_column, encode.caption_column, encode.where, encode.reference_column)
    assert settings.figures is not None
    examples = load_examples(settings.figures, settings.limit, encode.resolution, *named)
    if edits := sum(bool(example.sources) for example in examples):
        raise UserError(f"{settings.figures}: {edits} of {len(examples)} are edits, and preferences of edits are not trained on.")
    return examples


def _share(examples: Sequence[Example], place: Place) -> list[Example]:
    return list(examples[place.rank :: place.world_size])


def _part(place: Place) -> str:
    return "drawn" if place.world_size == 1 else f"drawn-{place.rank}-of-{place.world_size}"


def _refuse_other_counts(folder: Path, place: Place) -> None:
    mine = {_part(replace(place, rank=rank)) for rank in range(place.world_size)}
    others = sorted(path.name for path in folder.glob("drawn*") if path.name not in mine)
    if others:
        raise UserError(
            f"{folder} was begun with another number of processes ({others[0]}). Start as many again, or choose another --out."
        )


def repeated(examples: Sequence[Example], pictures: int) -> list[Example]:
    """Each example `pictures` times, under ids that give each its own noise."""
    return [replace(example, id=f"{example.id}={number}") for example in examples for number in range(pictures)]


def _draw_and_score(
    mine: Sequence[Example], target: Target, settings: EvaluateConfig, trained: Trained | None, folder: Path
) -> None:
    assert target.config is not None
    make_folder(folder)
    pictures = repeated(mine, target.config.preference.pictures)
    if pictures:
        evaluator = Evaluator(folder, pictures, make_metrics(settings, folder, target), settings)
        evaluator.draw(target.config, trained)
        evaluator.measure()
    write_json(folder / DONE, _done(mine, target.config, settings))


def _done(examples: Sequence[Example], config: Config, settings: EvaluateConfig) -> dict[str, str]:
    """What is left behind when `examples` are done; of others, other settings or other rules it is another one."""
    return {"of": digest([[example.id for example in examples], settings.model_dump(), config.preference.model_dump()])}


def _is_done(file: Path, wanted: dict[str, str]) -> bool:
    return file.is_file() and parse_json(file.read_bytes()) == wanted


def _wait_for_shares(
    folder: Path, examples: Sequence[Example], config: Config, settings: EvaluateConfig, place: Place
) -> None:
    shares = [replace(place, rank=rank) for rank in range(1, place.world_size)]
    wanted = {folder / _part(other) / DONE: _done(_share(examples, other), config, settings) for other in shares}
    missing = [file for file, done in wanted.items() if not _is_done(file, done)]
    if missing:
        _LOG.info("own share done; waiting for %d of %d processes", len(missing), place.world_size)
    for file in missing:
        while not _is_done(file, wanted[file]):
            time.sleep(_WAIT)


# -- groups and their store ------------------------------------------------------------------------------
def _make_groups(
    folder: Path, examples: Sequence[Example], target: Target, settings: EvaluateConfig, sources: dict[str, str], place: Place
) -> None:
    from OpenSciDraw.preferences.scored import SHEET, Scored, counts

    assert target.config is not None
    rules = target.config.preference
    places = [replace(place, rank=rank) for rank in range(place.world_size)]
    results = {_part(other): Results(folder / _part(other)) for other in places}
    pictures = []
    for other in places:
        evaluator = Evaluator(folder / _part(other), [], {}, settings)
        for example in _share(examples, other):
            for picture in repeated([example], rules.pictures):
                file = evaluator.path_of(picture).relative_to(folder).as_posix()
                pictures.append((example.id, picture, file))
    scored = Scored.of(pictures, results, sources, rules)
    groups = scored.groups(rules)
    title = f"Preferences: {target.given}, {settings.figures}"
    scored.write(folder, groups, title)
    for name, count in counts(scored, groups)[1:]:
        print(f"{count:>7}  {name}")
    print(f"\n{folder / SHEET}")
    if not groups.ids:
        raise UserError(
            f"{folder}: no group by these rules. Draw more pictures of a prompt (preference.pictures), take harder prompts or an "
            "earlier checkpoint, or ask for smaller gaps (preference.min_gap, min_total_gap; docs/preferences.md)."
        )


def _encode(config: Config, folder: Path, place: Place) -> None:
    """The pictures of groups to `folder`/store, in the config's way, by all processes; groups.parquet goes into it last."""
    from OpenSciDraw.encode import run as encode
    from OpenSciDraw.preferences.scored import FIGURES, GROUPS

    data = {"type": "ArXiVParquetDatasetV2", "base_dir": str(folder), "parquet_base_path": STORE, "cache_dir": None}
    asked = dict.fromkeys(("image_column", "caption_column", "max_figures", "min_quality", "reference_column"))
    own: dict[str, object] = {**asked, "figures": str(folder / FIGURES), "where": {}}
    changed = {"dataset": config.dataset.model_copy(update=data), "encode": config.encode.model_copy(update=own)}
    encode.main(config.model_copy(update=changed))
    if place.rank == 0:
        with unfinished(folder / STORE / GROUPS) as part:
            shutil.copyfile(folder / GROUPS, part)
        print(
            f"{folder / STORE}\n\nTrain on it:\n"
            f"train_iteration_func_name = 'mdpo'\ndataset = dict(type='PreferenceGroups', base_dir={str(folder)!r}, "
            f"parquet_base_path={STORE!r})"
        )
