"""`scienceflow evaluate WHAT --figures SPEC`: how well a run, a base model or a folder of pictures draws, in numbers."""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from OpenSciDraw.config import Config, EvaluateConfig, load_config, load_saved_config
from OpenSciDraw.config.files import parse_value
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.base import Metric
from OpenSciDraw.evaluation.evaluator import SUMMARY, Evaluator
from OpenSciDraw.evaluation.examples import load_examples
from OpenSciDraw.evaluation.results import Results
from OpenSciDraw.evaluation.summary import Measured, compare_results, table
from OpenSciDraw.registry import METRICS
from OpenSciDraw.utils.files import naming_full_disk, write_json
from OpenSciDraw.utils.sole_user import sole_user

if TYPE_CHECKING:
    from OpenSciDraw.inference.export import Trained

_LOG = logging.getLogger("OpenSciDraw")
_PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp"))
_SECTION = "evaluate."
_OPTIONS = ("figures", "metrics", "limit", "steps", "guidance", "seed", "batch_size", "reader", "features", "judge_model")


@dataclass(frozen=True)
class Target:
    """What is evaluated: a run (`config` and `path`), a config before training (`config`), or pictures (`path`)."""

    given: str
    kind: str  # "run", "config", "pictures"
    path: Path
    config: Config | None
    ema: bool = False
    base: str | None = None  # another base for the run's adapter
    rebuilt: bool = False  # its VAE alone


# -- what was asked for --------------------------------------------------------------------------
def find_target(given: str, overrides: Sequence[str], ema: bool) -> Target:
    """Raises UserError for what is neither a config, a run, nor a folder with pictures; nothing heavy is imported."""
    path = Path(given).expanduser().absolute()
    if path.suffix == ".py":
        config: Config | None = load_config(path, overrides)
        kind = "config"
    elif _is_trained(path):
        folder = next((p for p in [path, *path.parents][:4] if (p / "config.py").is_file()), None)
        if folder is None:
            raise UserError(f"{given}: no config.py beside the weights, so their model is not known. Give a folder of training.")
        config, kind = load_saved_config(folder / "config.py", overrides), "run"
    elif path.is_dir() and any(file.suffix.lower() in _PICTURES for file in path.rglob("*")):
        config, kind = None, "pictures"
    else:
        what = "holds neither a run (config.py) nor pictures" if path.is_dir() else "is not there"
        raise UserError(
            f"{given} {what}. Give a run folder or checkpoint, a config file (the model before training), or a folder of "
            "pictures named <id>.png."
        )
    if ema and kind != "run":
        raise UserError(f"--ema is for a run, which may hold an average of its weights; {given} is none.")
    return Target(given, kind, path, config, ema)


def _is_trained(path: Path) -> bool:
    """By names alone: `export.find_trained` looks for the weights themselves, and needs torch."""
    files = ("config.py", "pytorch_lora_weights.safetensors", "transformer/config.json")
    return path.suffix == ".safetensors" or path.name == "transformer" or any((path / name).is_file() for name in files)


def settings_of(config: Config | None, given: dict[str, Any], overrides: Sequence[str]) -> EvaluateConfig:
    """The config's section with the command line's options in it.

    Raises:
        UserError: a wrong value, or, without a config, overrides of other keys than evaluate's.
    """
    values = config.evaluate.model_dump(exclude_unset=True) if config is not None else {}
    if config is None:
        for text in overrides:
            name, equals, raw = text.partition("=")
            if not (equals and name.startswith(_SECTION)):
                raise UserError(f"--cfg_options {text}: pictures have no config; only {_SECTION}KEY=VALUE is possible here.")
            values[name.removeprefix(_SECTION)] = parse_value(raw)
    values |= given
    if given.get("judge_url") and not {"judge", "judge_published"} & set(metrics := values.get("metrics", [])):
        values["metrics"] = [*metrics, "judge"]
    try:
        return EvaluateConfig(**values)
    except ValidationError as error:
        problems = "; ".join(f"evaluate.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(f"{problems}. `scienceflow config --schema` lists what is allowed.") from error


def _options(arguments: Namespace) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in _OPTIONS} | {"judge_url": arguments.judge}
    given = {name: value for name, value in given.items() if value is not None}
    if "metrics" in given:
        given["metrics"] = [name for name in re.split(r"[,\s]+", given["metrics"]) if name]
    if arguments.no_arrow_direction:
        given["judge_arrow_direction"] = False
    return given


def make_metrics(settings: EvaluateConfig, folder: Path, target: Target) -> dict[str, Metric]:
    """The metrics asked for, each made once; what they need is checked here.

    Raises:
        UserError: an unknown name; something that one of them needs is missing.
    """
    names = list(dict.fromkeys(settings.metrics))
    problems = [problem for problem in map(METRICS.problem, names) if problem]
    if problems or not names:
        raise UserError(" ".join(problems) or f"No metrics. Known: {', '.join(METRICS.names())}.")
    if "held_out" in names and target.config is None:
        raise UserError(f"held_out is measured with a model, and {target.given} holds pictures. Leave it out of --metrics.")
    if settings.figures is None and names != ["held_out"]:
        raise UserError("Which figures? Give --figures, e.g. drawn:64:seed=9, or set evaluate = dict(figures=...) in the config.")
    return {name: METRICS.get(name)(settings, folder) for name in names}


# -- one evaluation ------------------------------------------------------------------------------
def default_folder(target: Target, trained: Trained | None, settings: EvaluateConfig) -> Path:
    """`RUN/evaluations/<weights>_<figures>`; for pictures in their own folder, with its name for the weights."""
    figures = settings.figures or "held_out"
    name = figures if figures.startswith("drawn:") else Path(figures).stem or Path(figures).name
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
    if target.config is None:
        return target.path / "evaluations" / f"{target.path.name}_{slug}"
    if trained is None:
        name = "rebuilt" if target.rebuilt else "base"
        return Path(target.config.model_output_dir).absolute() / "evaluations" / f"{name}_{slug}"
    if target.base is not None:
        from OpenSciDraw.inference.other_base import base_name

        slug = f"on-{base_name(target.base)}_{slug}"
    return trained.run / "evaluations" / f"{_label(trained)}_{slug}"


def _label(trained: Trained) -> str:
    """'step-1200', 'step-1200-ema', 'checkpoint-400' …"""
    from OpenSciDraw.weights.files import list_checkpoints

    parts = list(trained.path.parent.relative_to(trained.run).parts)
    if not any(part.startswith("checkpoint-") for part in parts):  # the run's own weights are its last step's
        newest = [folder.name.replace("checkpoint", "step") for folder in list_checkpoints(trained.run)[-1:]]
        parts = [*(newest or ["final"]), *parts]
    return "-".join(parts)


def _origin(target: Target, trained: Trained | None, settings: EvaluateConfig) -> dict[str, Any]:
    """The part of evaluation.json that says what was evaluated."""
    kind = "base" if trained is None else "lora" if trained.is_lora else "full"
    weights = None if target.config is None else "vae" if target.rebuilt else kind + (" ema" if target.ema else "")
    label = None if trained is None else re.search(r"(?:step|checkpoint)-(\d+)", _label(trained))
    return {
        "run": None if trained is None else str(trained.run), "weights": weights, "step": int(label[1]) if label else None,
        "what": target.given, "figures": settings.figures,
    }  # fmt: skip


def evaluate(target: Target, settings: EvaluateConfig, out: Path | None) -> tuple[Evaluator, list[Measured], dict[str, Any]]:
    """Draw what is missing, measure it; the evaluator, what it measured, and the summary, which is on disk as well.

    Raises:
        UserError: see the parts; nothing is loaded before what was asked for was checked.
    """
    make_metrics(settings, out or target.path, target)  # refused here, before torch is imported
    config = target.config
    examples = []
    if settings.figures is not None and settings.metrics != ["held_out"]:
        encode = config.encode if config is not None else None
        named = (encode.image_column, encode.caption_column, encode.where, encode.reference_column) if encode is not None else ()
        examples = load_examples(settings.figures, settings.limit, encode.resolution if encode else None, *named)
    trained = None
    if target.kind == "run" and not target.rebuilt:
        from OpenSciDraw.inference.export import find_trained

        assert config is not None
        trained = find_trained(str(target.path), target.ema)
        if target.base is not None:
            from OpenSciDraw.inference.other_base import config_of_adapter

            config = config_of_adapter(trained.path, config, target.base)
        trained = replace(trained, config=config)
    folder = (out or default_folder(target, trained, settings)).absolute()
    full = naming_full_disk(folder, "What was drawn and measured is kept: free space and run it again.")
    with sole_user(folder, "evaluate"), full:
        evaluator = Evaluator(folder, examples, make_metrics(settings, folder, target), settings)
        if config is None:
            evaluator.use_pictures(target.path)
        else:
            evaluator.draw(config, trained, target.rebuilt)
        measured = evaluator.measure()
        summary = evaluator.summary(measured, _origin(target, trained, settings))
        write_json(folder / SUMMARY, summary)
    return evaluator, measured, summary


def compare(given: str, settings: EvaluateConfig, evaluator: Evaluator, measured: Sequence[Measured]) -> dict[str, Any]:
    """The comparison with another evaluation's folder, or with a run, config or pictures that are evaluated now."""
    folder = Path(given).expanduser().absolute()
    if not (folder / SUMMARY).is_file():
        _LOG.info("evaluating %s, to compare with", given)
        other, _, _ = evaluate(find_target(given, (), False), settings, None)
        folder = other.folder
    if folder == evaluator.folder:
        raise UserError(f"--compare {given} is this evaluation itself. Name another one.")
    results = Results(folder)
    compared: dict[str, Any] = {}
    for item in measured:
        compared |= compare_results(item, evaluator.results, results, str(folder), settings.seed)
    if not compared:
        raise UserError(f"--compare {given}: it has no results of these metrics and figures. Evaluate it on the same ones first.")
    return {"other": folder.name, "folder": str(folder), "metrics": compared}


def main(arguments: Namespace) -> int:
    """Evaluate, compare, and print the table and where the rest lies."""
    target = find_target(arguments.what, arguments.cfg_options, arguments.ema)
    target = replace(target, base=arguments.base, rebuilt=arguments.rebuilt)
    if target.base is not None and target.kind != "run":
        raise UserError(f"--base is for a run's adapter, and {target.given} is no run.")
    settings = settings_of(target.config, _options(arguments), arguments.cfg_options)
    if target.rebuilt and (target.config is None or target.base is not None or target.ema or "held_out" in settings.metrics):
        raise UserError(
            f"--rebuilt measures the VAE of a config or run, without drawing (given: {target.given}): no folder of pictures, "
            "and without --base, --ema and the metric held_out."
        )
    of_drawing = [f"--{name}" for name in ("steps", "guidance", "seed") if getattr(arguments, name) is not None]
    if target.rebuilt and of_drawing:
        raise UserError(f"--rebuilt draws nothing, so {' and '.join(of_drawing)} would do nothing. Leave it out.")
    if arguments.compare is not None and not (Path(arguments.compare).expanduser() / SUMMARY).is_file():
        find_target(arguments.compare, (), False)  # refused here, before anything is drawn
    evaluator, measured, summary = evaluate(target, settings, Path(arguments.out).expanduser() if arguments.out else None)
    if arguments.compare is not None:
        summary["comparison"] = compare(arguments.compare, settings, evaluator, measured)
        write_json(evaluator.folder / SUMMARY, summary)
    what = f"{target.given}, figures rebuilt by its VAE" if target.rebuilt else target.given
    print(f"{what}: {summary['examples']} figures of {settings.figures}\n" if summary["examples"] else f"{what}\n")
    print(table(summary))
    if summary["comparison"] is not None:
        print(f"\ndifference: this - other; other: {summary['comparison']['other']}; p: how likely, were both equally good")
    for line in _remarks(summary):
        print(line)
    print(f"\n{evaluator.folder / SUMMARY}")
    return 0


def _remarks(summary: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know: failures by name, and examples that a metric says nothing of."""
    lines = [f"{name} does not apply to {count} examples" for name, count in summary["not_applicable"].items() if count]
    failures = {(item["id"], item["reason"]) for item in summary["failures"]}
    shown = [f"  {identity}: {reason}" for identity, reason in sorted(failures)[:10]]
    if failures:
        more = [f"  … all are in {SUMMARY}"] if len(failures) > len(shown) else []
        lines += [f"{len(failures)} failures, counted as wrong:", *shown, *more]
    return ["", *lines] if lines else []
