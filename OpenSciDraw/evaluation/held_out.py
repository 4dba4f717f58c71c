"""The loss on rows that were kept from training, by noise level: the only metric that draws nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.base import Metric
from OpenSciDraw.evaluation.results import Result, Results, digest
from OpenSciDraw.registry import DATASETS, METRICS, MODELS

if TYPE_CHECKING:
    from OpenSciDraw.config import Config
    from OpenSciDraw.datasets.arxiv_parquet import RowDataset
    from OpenSciDraw.datasets.batch import BadRow, Sample
    from OpenSciDraw.evaluation.drawing import Artist

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # sigma: the middles of five equal bins


@METRICS.register("held_out")
class HeldOutLoss(Metric):
    """`loss`, and `loss_sigma_0.1` … at each of LEVELS: the mean over rows of the unweighted flow-matching loss.

    The rows are those that training held out (the config's `held_out_examples`); noise is keyed by (seed, row), and the
    levels are fixed ones of sigma, so that runs with other densities of noise levels can be compared. (The numbers of
    the same meaning in metrics.jsonl are at quantiles of the density that the run trains on.)
    """

    higher_is_better = False

    def identity(self) -> dict[str, Any]:
        return {"version": 1, "levels": LEVELS, "seed": self.settings.seed}


class HeldOutRows:
    """The held-out rows of a config's dataset, and what is still to be measured of them."""

    def __init__(self, config: Config, metric: HeldOutLoss, results: Results, weights: str):
        self.config, self.metric, self.results, self.weights = config, metric, results, weights
        self.dataset: RowDataset = DATASETS.get(config.dataset.type)(**config.dataset_arguments())
        if config.text == "online" and self.dataset.has_edits and MODELS.get(config.model_type).text_sees_pictures:
            raise UserError(
                f"held_out: the text encoder of {config.model_type} reads the pictures that edits start from; this metric takes "
                "such text from a store alone. Set text = 'stored' and encode the figures, or leave the metric out."
            )
        self.rows: list[int] = self.dataset.held_out(config.held_out_examples).tolist()
        if not self.rows:
            raise UserError(
                f"held_out: {config.dataset.location} has {len(self.dataset)} rows and held_out_examples is "
                f"{config.held_out_examples}, so no row is held out (at most a tenth of the rows is). Leave the metric out."
            )
        self.ids = [self.dataset.rows.sample_id(row) for row in self.rows]
        self.to_do = [(row, identity) for row, identity in zip(self.rows, self.ids, strict=True) if not self._is_done(identity)]

    @property
    def _method(self) -> str:
        return digest(self.metric.identity())

    def _is_done(self, identity: str) -> bool:
        known = self.results.get("held_out", identity)
        return known is not None and known.is_of(digest(identity), self.weights, self._method)

    def captions(self) -> list[str]:
        """Of the rows to do, where the dataset does not hold their text: to be encoded before the transformer loads."""
        if self.config.text == "stored":
            return []
        samples = (self.dataset.read(row) for row, _ in self.to_do)
        return [sample.caption for sample in samples if hasattr(sample, "caption")]

    def measure(self, artist: Artist) -> None:
        """Add every row's losses; a row that cannot be read is a failure without scores."""
        found, parts = self.dataset.contract, ("latents", "text") if self.config.text == "stored" else ("latents",)
        if found is not None:
            artist.model.contract().require(found, parts, self.config.dataset.location)
        for row, identity in tqdm(self.to_do, desc="held_out", unit="row"):
            sample = self.dataset.read(row)
            scores, failure = self._scores(artist, sample)
            self.results.add([Result(identity, "held_out", scores, digest(identity), self.weights, self._method, failure)])

    def _scores(self, artist: Artist, sample: Sample | BadRow) -> tuple[dict[str, tuple[float, ...]], str | None]:
        import torch

        from OpenSciDraw.datasets.batch import BadRow, collate
        from OpenSciDraw.evaluation.losses import clean_latents, losses_at

        if isinstance(sample, BadRow):
            return {}, f"unreadable: {sample.reason}"
        batch, model = collate([sample]), artist.model
        text = batch.text if batch.text is not None else artist.rows_of(batch.captions)
        losses = losses_at(model, batch, clean_latents(model, batch), text, torch.tensor(LEVELS), self.metric.settings.seed)
        by_level = {f"loss_sigma_{level}": (loss, 1.0) for level, loss in zip(LEVELS, losses.tolist(), strict=True)}
        return {"loss": (losses.mean().item(), 1.0), **by_level}, None
