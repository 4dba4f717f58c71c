"""Scores of pictures by axis, and the groups that the rules make of them, as files.

    scores.parquet    every picture: its prompt, its file, its reward and its score on each axis
    figures.jsonl     the pictures of groups, with their prompts as captions: what is encoded
    groups.parquet    who won against whom: ids of figures.jsonl
    left_out.jsonl    the other prompts, each with the reason
    contact_sheet.html  winners with their losers, to look at
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from OpenSciDraw.config import PreferenceConfig
from OpenSciDraw.datasets.batch import AXES
from OpenSciDraw.datasets.group_making import NOBODY, Groups, make_groups
from OpenSciDraw.datasets.scored_rows import SCORES
from OpenSciDraw.evaluation.examples import Example
from OpenSciDraw.evaluation.results import Results
from OpenSciDraw.prepare.contact_sheet import Tile, contact_sheet
from OpenSciDraw.utils.files import unfinished, write_text

GROUPS, FIGURES, SHEET, LEFT_OUT, TABLE = (
    "groups.parquet", "figures.jsonl", "contact_sheet.html", "left_out.jsonl", "scores.parquet"
)  # fmt: skip
_SHOWN = 48  # groups on the contact sheet: about 10 MB


@dataclass(frozen=True)
class Scored:
    """n pictures of prompts: `files` from the folder, `scores` (n, D) in the order of AXES, NaN where an axis has none."""

    prompts: list[str]
    captions: list[str]
    files: list[str]
    sizes: list[tuple[int, int]]
    scores: np.ndarray
    reward: np.ndarray
    failures: int

    @classmethod
    def of(
        cls, pictures: Sequence[tuple[str, Example, str]], results: Mapping[str, Results], sources: Mapping[str, str],
        rules: PreferenceConfig,
    ) -> Scored:  # fmt: skip
        """`pictures`: (prompt's id, example, file) with the file's folder first, which is a key of `results`; `sources`: the score
        of each axis as `metric/name`. The reward is the mean of the scores that there are, by `axis_weights`.

        A picture that a metric could not score (NotScored: a judge without an answer) has no reward and takes no part.
        """
        weights = np.array([rules.axis_weights.model_dump()[axis] for axis in AXES])
        scores, failures = np.full((len(pictures), len(AXES)), np.nan), 0
        for row, (_, example, file) in enumerate(pictures):
            found = [results[file.partition("/")[0]].get(sources[axis].partition("/")[0], example.id) for axis in AXES]
            if any(result is not None and result.retry for result in found):
                failures += 1
                continue
            for axis, result in enumerate(found):
                hits, total = (result.scores if result else {}).get(sources[AXES[axis]].partition("/")[2], (0.0, 0.0))[:2]
                scores[row, axis] = hits / total if total else np.nan
        known = np.isfinite(scores) * weights
        with np.errstate(invalid="ignore"):
            reward = (np.nan_to_num(scores) * known).sum(1) / known.sum(1)
        examples = [example for _, example, _ in pictures]
        return cls(
            [prompt for prompt, _, _ in pictures], [example.prompt for example in examples], [file for _, _, file in pictures],
            [(example.width, example.height) for example in examples], scores, reward, failures,
        )  # fmt: skip

    def groups(self, rules: PreferenceConfig) -> Groups:
        weights = rules.axis_weights.model_dump()
        size = np.array([width << 32 | height for width, height in self.sizes], dtype=np.int64)
        return make_groups(self.prompts, self.reward, self.scores, size, [weights[axis] > 0 for axis in AXES], rules)

    # -- files -------------------------------------------------------------------------------------
    def write(self, folder: Path, groups: Groups, title: str) -> None:
        """All files of the module, whole or not at all, the list to encode last."""
        table = {"group_id": self.prompts, "caption": self.captions, "file": self.files, "reward": self.reward}
        _write_table(folder / TABLE, pa.table(table | {name: self.scores[:, axis] for axis, name in enumerate(SCORES)}))
        chosen: dict[str, list[str | None]] = {"group_id": list(groups.ids), "winner": [self.files[row] for row in groups.winners]}
        for axis, name in enumerate(AXES):
            chosen[f"loser_{name}"] = [None if row == NOBODY else self.files[row] for row in groups.losers[:, axis]]
        _write_table(folder / GROUPS, pa.table({name: pa.array(values, pa.string()) for name, values in chosen.items()}))
        lines = [json.dumps({"id": name, "reason": reason}, ensure_ascii=False) for name, reason in groups.left_out]
        write_text(folder / LEFT_OUT, "".join(f"{line}\n" for line in lines))
        write_text(folder / SHEET, "".join(self._sheet(folder, groups, title)))
        used = sorted({int(row) for row in (*groups.winners, *groups.losers.flatten()) if row != NOBODY})
        lines = [json.dumps({"image": self.files[row], "caption": self.captions[row]}, ensure_ascii=False) for row in used]
        write_text(folder / FIGURES, "".join(f"{line}\n" for line in lines))

    def _sheet(self, folder: Path, groups: Groups, title: str) -> Iterator[str]:
        def tile(row: int, what: str) -> Tile:
            parts = [f"{axis} {score:.2f}" for axis, score in zip(AXES, self.scores[row], strict=True) if np.isfinite(score)]
            return Tile((folder / self.files[row]).read_bytes(), f"{what}: {', '.join(parts)}", self.captions[row])

        shown = []
        for at in np.linspace(0, len(groups.ids) - 1, min(_SHOWN, len(groups.ids))).astype(int).tolist():
            losers = [(f"loses on {axis}", int(row)) for axis, row in zip(AXES, groups.losers[at], strict=True) if row != NOBODY]
            shown.append((groups.ids[at], [tile(row, what) for what, row in (("wins", int(groups.winners[at])), *losers)]))
        yield from contact_sheet(title, [("groups", counts(self, groups))], shown)


def counts(scored: Scored, groups: Groups) -> list[list[str]]:
    """Rows of a table (the first is the header): prompts, groups, losers by axis, and why prompts gave no group."""
    losers = (groups.losers != NOBODY).sum(0).tolist()
    reasons = Counter(reason for _, reason in groups.left_out)
    rows: list[tuple[str, int]] = [("prompts", len(set(scored.prompts))), ("pictures", len(scored.files))]
    rows += [("groups", len(groups.ids)), *((f"losers on {axis}", count) for axis, count in zip(AXES, losers, strict=True))]
    rows += [(f"no group: {reason}", count) for reason, count in reasons.most_common()]
    rows += [("pictures without a score", scored.failures)] * bool(scored.failures)
    return [["", "count"], *([name, str(count)] for name, count in rows)]


def _write_table(path: Path, table: pa.Table) -> None:
    with unfinished(path) as part:
        pq.write_table(table, part)
