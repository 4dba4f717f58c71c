"""The metrics of `scienceflow evaluate`, on pictures drawn with the weights in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from OpenSciDraw.config import Config, drawing_of_run
from OpenSciDraw.config.checks import metrics_in_training
from OpenSciDraw.evaluation.base import Metric, PictureMetric, SetMetric
from OpenSciDraw.evaluation.drawing import Sampler, batches_of, draw, save_picture
from OpenSciDraw.evaluation.examples import Example, load_examples, picture_name
from OpenSciDraw.evaluation.results import WHOLE_SET, Result, Results
from OpenSciDraw.evaluation.scoring import Drawn, score_pictures, score_set
from OpenSciDraw.evaluation.summary import Measured, summarize
from OpenSciDraw.models.base import FigureModel
from OpenSciDraw.parallel.ranks import evaluating, share_of
from OpenSciDraw.registry import METRICS, VALIDATION_FUNCS
from OpenSciDraw.utils.background import Background
from OpenSciDraw.validation_funcs.sample_prompts import PromptSet, image_folder, sample_prompts


def examples_in_training(config: Config) -> list[Example]:
    """What the config's validation function draws and measures; [] for one that measures nothing.

    Raises:
        UserError: the figures cannot be listed, or what a metric needs is missing.
    """
    if not metrics_in_training(config):
        return []
    metrics = _metrics(config, Path(config.model_output_dir))
    section, encode = config.evaluate, config.encode
    examples = load_examples(
        str(section.figures), section.limit, encode.resolution, encode.image_column, encode.caption_column, encode.where,
        encode.reference_column,
    )
    for metric in metrics.values():
        metric.check(examples)
    return examples


def _metrics(config: Config, folder: Path) -> dict[str, Metric]:
    return {name: METRICS.get(name)(config.evaluate, folder) for name in metrics_in_training(config)}


@VALIDATION_FUNCS.register(
    "structure_validation_func",
    "text_validation_func",
    "distribution_validation_func",
    "judge_validation_func",
    "evaluate_validation_func",
)
@torch.no_grad()
def evaluate_examples(
    model: FigureModel, config: Config, prompts: PromptSet, step: int, accelerator: Accelerator
) -> dict[str, float]:
    """Draw evaluate.figures into `validation_images/step_NNNNNN/evaluate/` and measure them, beside the ordinary pictures.

    The metric is the one in the function's name, or all of evaluate.metrics. Returns 'metric/key' -> value (rank 0; {} on
    others); `results.jsonl` in that folder has every picture's. Drawing and measuring are shared out over the ranks.
    """
    values = sample_prompts(model, config, prompts, step, accelerator)
    folder = image_folder(config, step) / "evaluate"
    folder.mkdir(parents=True, exist_ok=True)
    _draw(model, config, prompts, folder, accelerator)
    accelerator.wait_for_everyone()
    drawn = [Drawn(example, folder / picture_name(example.id)) for example in prompts.examples]
    results, ids = Results(folder), [example.id for example in prompts.examples]
    for name, metric in _metrics(config, folder).items():
        if isinstance(metric, PictureMetric):
            found = _share_scored(name, metric, drawn, accelerator)
            measured = Measured(name, metric, ids, len(ids))
        elif isinstance(metric, SetMetric):
            found, measured = [], Measured(name, metric, (WHOLE_SET,), len(ids))
        if not accelerator.is_main_process:
            continue
        results.add(found)
        if isinstance(metric, SetMetric):
            score_set(name, metric, drawn, results)
        summary = summarize(measured, results, config.evaluate.seed)
        values |= {key: found["value"] for key, found in summary.items() if found["value"] is not None}
    accelerator.wait_for_everyone()
    return values


def _draw(model: FigureModel, config: Config, prompts: PromptSet, folder: Path, accelerator: Accelerator) -> None:
    """This rank's share of the batches; every rank draws as many, as a sharded model needs it."""
    rows = {example.id: row for example, row in zip(prompts.examples, prompts.example_rows, strict=True)}
    negatives = {example.id: prompts.negative_of(at) for at, example in enumerate(prompts.examples, len(prompts.prompts))}
    batches = batches_of(prompts.examples, model.pixel_multiple, config.evaluate.batch_size)
    sampler, alone = Sampler.of(config.evaluate, drawing_of_run(config)), accelerator.num_processes == 1
    with evaluating(model.transformer, accelerator) as transformer, Background(ahead=config.evaluate.batch_size) as writer:
        pipe: Any = model.pipeline(transformer)
        for at, counts in share_of(len(batches), accelerator):
            batch = batches[at]
            with accelerator.autocast():
                negative = negatives[batch.examples[0].id]  # an edit is a batch of its own
                pictures = draw(model, pipe, batch, [rows[e.id] for e in batch.examples], negative, sampler, alone)
            for example, picture in zip(batch.examples, pictures, strict=True):
                if counts:
                    writer.submit(save_picture, picture, folder / picture_name(example.id))


def _share_scored(name: str, metric: PictureMetric, drawn: Sequence[Drawn], accelerator: Accelerator) -> list[Result]:
    """Every picture's result, on all ranks; each rank scored its share."""
    own = [drawn[at] for at, counts in share_of(len(drawn), accelerator) if counts]
    found = list(score_pictures(name, metric, own, show=accelerator.is_main_process))
    return gather_object(found)
