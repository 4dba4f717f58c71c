"""One evaluation in its folder: pictures drawn once, metrics measured once, and evaluation.json of all.

    pictures/<id>.png   what was drawn       drawn.jsonl   of which prompt, at which size, in which time
    settings.json       by which weights, steps, guidance, seed …: pictures of other settings are not mixed in
    results.jsonl       every picture by every metric (results.py)
    evaluation.json     the summary
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from OpenSciDraw.config import Config, EvaluateConfig, drawing_as_asked
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.base import Metric, PictureMetric, SetMetric
from OpenSciDraw.evaluation.examples import Example, find_picture, picture_name
from OpenSciDraw.evaluation.held_out import HeldOutLoss, HeldOutRows
from OpenSciDraw.evaluation.results import WHOLE_SET, Results, digest
from OpenSciDraw.evaluation.scoring import Drawn, score_pictures, score_set
from OpenSciDraw.evaluation.summary import Measured, failures_of, summarize
from OpenSciDraw.utils.files import json_objects, parse_json, write_json
from OpenSciDraw.utils.versions import versions

if TYPE_CHECKING:
    from OpenSciDraw.evaluation.drawing import Artist, DrawingBatch, Sampler
    from OpenSciDraw.inference.export import Trained

SUMMARY, SETTINGS, DRAWN, PICTURES = "evaluation.json", "settings.json", "drawn.jsonl", "pictures"
_LOG = logging.getLogger("OpenSciDraw")
_DRAWN_KEYS = {"id", "file", "prompt", "width", "height"}
_SAMPLING = ("steps", "guidance", "seed", "negative_prompt")  # of the settings, what no weights depend on


class Evaluator:
    """Draws, measures and summarises `examples` in `folder`, going on with what is there.

    Processes that share a folder have a `part` each, a text in the names of the files that they add to.
    """

    def __init__(self, folder: Path, examples: Sequence[Example], metrics: Mapping[str, Metric], settings: EvaluateConfig,
                 part: str = ""):  # fmt: skip
        for metric in metrics.values():
            metric.check(examples)
        self.folder, self.examples, self.metrics, self.settings = folder, examples, metrics, settings
        self.results = Results(folder, part)
        self.pictures = folder / PICTURES
        self.drawn_file = folder / f"{Path(DRAWN).stem}{part}.jsonl"
        self.scratch = folder / f"part{part}" if part else folder  # for what is deleted at the end
        self.identity: dict[str, Any] = {}
        self._held_out: HeldOutRows | None = None

    # -- pictures ----------------------------------------------------------------------------------
    def use_pictures(self, folder: Path) -> None:
        """Measure the pictures in `folder`, which someone else drew: `<id>.png`, or an id that is a picture's path.

        Raises:
            UserError: there is none of the examples'.
        """
        self.pictures = folder
        if self.examples and not any(self._path(example).is_file() for example in self.examples):
            raise UserError(
                f"{folder} holds no picture of any of the {len(self.examples)} examples: the first should be "
                f"{self._path(self.examples[0]).name}. Name pictures after the ids of the examples."
            )

    def _path(self, example: Example) -> Path:
        return find_picture(self.pictures, example.id)

    def draw(self, config: Config, trained: Trained | None, rebuilt: bool = False) -> None:
        """Draw what is not drawn yet, and measure the held-out loss while the model is there; or what the VAE makes of the figures.

        Raises:
            UserError: the folder's pictures are of other settings or prompts.
        """
        from OpenSciDraw.evaluation.drawing import Artist, Rebuilder, Sampler
        from OpenSciDraw.inference.pictures import drawing_of_trained

        self.scratch.mkdir(parents=True, exist_ok=True)
        artist, asked = (Rebuilder if rebuilt else Artist)(config, trained, self.scratch), self.settings
        drawing = drawing_as_asked(config)  # of a model before training
        if trained is not None:
            drawing = drawing_of_trained(artist.model, config, asked.steps, asked.guidance)
        sampler = Sampler.of(asked, drawing)
        self.identity = self._identity(artist, sampler)
        drawn = self._drawn_before()
        self._check_settings(bool(drawn) or bool(self.results.of("held_out")))
        to_draw = self._to_draw(drawn)
        metric = self.metrics.get("held_out")
        if isinstance(metric, HeldOutLoss):
            weights = digest({name: value for name, value in self.identity.items() if name not in _SAMPLING})
            self._held_out = HeldOutRows(config, metric, self.results, weights)
        rows = self._held_out.to_do if self._held_out else []
        if not (to_draw or rows):
            return
        try:
            artist.load(self._held_out.captions() if self._held_out else [], to_draw)
            if to_draw:
                self._draw(artist, to_draw, sampler)
            if self._held_out:
                self._held_out.measure(artist)
        finally:
            artist.close()

    def _identity(self, artist: Artist, sampler: Sampler) -> dict[str, Any]:
        return artist.identity(sampler)

    def _batches(self, examples: Sequence[Example], multiple: int) -> list[DrawingBatch]:
        from OpenSciDraw.evaluation.drawing import batches_of

        return batches_of(examples, multiple, self.settings.batch_size)

    def _check_settings(self, in_use: bool) -> None:
        """The folder's settings must be today's, or be made so while it holds nothing."""
        path = self.folder / SETTINGS
        before = self.identity
        if path.is_file():
            try:
                found = parse_json(path.read_bytes())
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise UserError(f"{path} is damaged: how its pictures were drawn is not known. Choose another --out, or delete it.")
            before = found
        differences = [
            f"{name}: {before.get(name)!r} there, {self.identity.get(name)!r} now"
            for name in {**before, **self.identity}
            if before.get(name) != self.identity.get(name)
        ]
        if differences and in_use:
            raise UserError(
                f"{self.folder} holds what was drawn with other settings ({'; '.join(differences)}). "
                "Choose another --out, set them back, or delete this folder."
            )
        write_json(path, self.identity)

    def _drawn_before(self) -> dict[str, dict[str, Any]]:
        """The record of each picture that is there; a last line that was cut off has no picture yet."""
        found: list[dict[str, Any]] = []
        broken = 0
        for path in sorted(self.folder.glob(f"{Path(DRAWN).stem}*.jsonl")):
            raw = path.read_bytes()
            whole = raw[: raw.rfind(b"\n") + 1]
            if len(whole) < len(raw) and path == self.drawn_file:  # another process may be writing its own
                with path.open("r+b") as file:
                    file.truncate(len(whole))
            records_here, broken_here = json_objects(whole)
            found, broken = found + records_here, broken + broken_here
        records = {record["id"]: record for record in found if _DRAWN_KEYS <= record.keys()}
        if broken := broken + sum(not _DRAWN_KEYS <= record.keys() for record in found):
            _LOG.warning("%s: %d line(s) cannot be read; their pictures are drawn again", self.folder / DRAWN, broken)
        return {identity: record for identity, record in records.items() if (self.pictures / str(record["file"])).is_file()}

    def _to_draw(self, drawn: Mapping[str, Mapping[str, Any]]) -> list[Example]:
        for example in self.examples:
            record = drawn.get(example.id)
            if record and [record[key] for key in ("prompt", "width", "height")] != [example.prompt, example.width, example.height]:
                raise UserError(
                    f"{self.folder} holds a picture of {example.id!r} for another prompt or size: {record['prompt']!r:.80}, "
                    f"{record['width']} x {record['height']} px. Choose another --out, or delete this folder."
                )
        return [example for example in self.examples if example.id not in drawn]

    def _draw(self, artist: Artist, examples: Sequence[Example], sampler: Sampler) -> None:
        from OpenSciDraw.evaluation.drawing import save_picture

        batches = self._batches(examples, artist.model.pixel_multiple)
        self.pictures.mkdir(exist_ok=True)
        bar = tqdm(total=len(self.examples), initial=len(self.examples) - len(examples), desc="pictures", unit="picture")
        with bar, self.drawn_file.open("a", encoding="utf-8") as records:
            for batch in batches:
                start = time.perf_counter()
                pictures = artist.draw(batch, sampler)
                seconds = (time.perf_counter() - start) / len(pictures)
                for example, picture in zip(batch.examples, pictures, strict=True):
                    path = self.pictures / picture_name(example.id)
                    save_picture(picture, path)
                    records.write(self.record(example, seconds))
                records.flush()
                bar.update(len(pictures))

    @staticmethod
    def record(example: Example, seconds: float) -> str:
        """The line that says that an example's picture is there, drawn in so many seconds."""
        record = {"id": example.id, "file": picture_name(example.id), "prompt": example.prompt, "width": example.width,
                  "height": example.height, "seconds": round(seconds, 4)}  # fmt: skip
        return json.dumps(record, ensure_ascii=False) + "\n"

    # -- numbers -----------------------------------------------------------------------------------
    def measure(self) -> list[Measured]:
        """Every metric over every picture."""
        drawn = [Drawn(example, self._path(example)) for example in self.examples]
        ids = [example.id for example in self.examples]
        found = []
        for name, metric in self.metrics.items():
            if isinstance(metric, PictureMetric):
                for result in score_pictures(name, metric, drawn, self.results):
                    self.results.add([result])
                found.append(Measured(name, metric, ids, len(ids), failures_of(name, ids, self.results)))
            elif isinstance(metric, SetMetric):
                failures = score_set(name, metric, drawn, self.results)
                count = sum(example.reference is not None for example in self.examples)
                found.append(Measured(name, metric, (WHOLE_SET,), count, failures))
            elif self._held_out is not None:
                rows = self._held_out.ids
                found.append(Measured(name, metric, rows, len(rows), failures_of(name, rows, self.results)))
        return found

    def summary(self, measured: Sequence[Measured], origin: Mapping[str, Any]) -> dict[str, Any]:
        """What evaluation.json holds; `origin` says what was evaluated."""
        values: dict[str, dict[str, Any]] = {}
        applied: dict[str, int] = {}
        for item in measured:
            values |= summarize(item, self.results, self.settings.seed)
            found = sum(bool(result.scores) for result in self.results.of(item.name, item.ids))
            applied[item.name] = item.examples * found if item.of_sets else found
        asked = {name: value for name, value in self.settings.model_dump().items() if value is not None}
        return {
            "name": self.folder.name, "created": datetime.now(timezone.utc).isoformat(timespec="seconds"), **origin,
            "pictures": self.pictures.name if self.pictures.parent == self.folder else str(self.pictures),
            "examples": len(self.examples), "settings": {**asked, **self.identity}, "versions": versions(),
            "seconds_per_picture": self._seconds(), "metrics": values,
            "not_applicable": {
                item.name: (len(self.examples) if item.of_sets else item.examples) - applied[item.name] for item in measured
            },
            "failures": [
                {"id": identity, "metric": item.name, "reason": reason} for item in measured for identity, reason in item.failures
            ],
            "comparison": None,
        }  # fmt: skip

    def _seconds(self) -> float | None:
        """Mean time of a drawn picture, without loading the model."""
        records = self._drawn_before()
        times = [records[example.id]["seconds"] for example in self.examples if example.id in records]
        return round(sum(times) / len(times), 4) if times else None
