"""PreferenceGroups: winners with their losers, from a store with groups.parquet or made of scored pictures."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from OpenSciDraw.config import PreferenceConfig
from OpenSciDraw.datasets.arxiv_parquet import RowDataset, StoreRows
from OpenSciDraw.datasets.batch import AXES, BadRow, Sample
from OpenSciDraw.datasets.group_making import NOBODY, Groups, make_groups
from OpenSciDraw.datasets.scored_rows import ScoredRows
from OpenSciDraw.errors import UserError
from OpenSciDraw.registry import DATASETS
from OpenSciDraw.store.contract import Contract
from OpenSciDraw.store.encoded import EncodedStore

T = TypeVar("T")
_LOG = logging.getLogger("OpenSciDraw")
GROUPS_FILE = "groups.parquet"
_LOSERS = tuple(f"loser_{axis}" for axis in AXES)
_PAIR = ("loser",)  # the one column of plain pairs


class Pictures(Protocol):
    """Rows that groups are made of."""

    contract: Contract | None

    def buckets(self) -> np.ndarray: ...
    def sample_id(self, row: int) -> str: ...
    def sample(self, row: int) -> Sample: ...
    def latents(self, row: int) -> Tensor: ...
    def empty_text(self) -> Tensor | None: ...
    def text_lengths(self) -> np.ndarray | None: ...


class StorePictures(StoreRows):
    """Figures of our store, whose latents can be read alone."""

    def latents(self, row: int) -> Tensor:
        return self.store.figures.tensor(row)

    def captions(self) -> np.ndarray:
        """(rows,) numbers or keys that are the same for the same caption."""
        return self.store.figures.numbers("text_key") if self.store.text is None else self.store.text_row


class GroupRows:
    """One group a row: the winner as any dataset gives a figure, with its losers' latents."""

    def __init__(self, pictures: Pictures, groups: Groups):
        self.pictures, self.groups = pictures, groups
        self.contract = pictures.contract

    def __len__(self) -> int:
        return len(self.groups.ids)

    def buckets(self) -> np.ndarray:
        return self.pictures.buckets()[self.groups.winners]

    def sample_id(self, row: int) -> str:
        return self.groups.ids[row]

    def ids(self) -> Iterable[str]:
        return self.groups.ids

    def sample(self, row: int) -> Sample:
        """Raises ValueError when the winner or a loser cannot be read, which it names, or their shapes differ."""
        winner = self._read(self.pictures.sample, self.groups.winners[row])
        assert winner.latents is not None
        chosen = self.groups.losers[row]
        losers = torch.zeros(len(chosen), *winner.latents.shape, dtype=winner.latents.dtype)
        for axis in np.flatnonzero(chosen != NOBODY).tolist():
            latents = self._read(self.pictures.latents, chosen[axis])
            if latents.shape != winner.latents.shape:
                raise ValueError(f"a loser's latents are {tuple(latents.shape)}, the winner's {tuple(winner.latents.shape)}")
            losers[axis] = latents
        axes = torch.from_numpy(chosen != NOBODY)
        return Sample(self.groups.ids[row], winner.caption, winner.latents, winner.text, losers=losers, axes=axes)

    def _read(self, part: Callable[[int], T], picture: np.int64) -> T:
        try:
            return part(int(picture))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{self.pictures.sample_id(int(picture))}: {error}") from error

    def empty_text(self) -> Tensor | None:
        return self.pictures.empty_text()

    def text_lengths(self) -> np.ndarray | None:
        lengths = self.pictures.text_lengths()
        return None if lengths is None else lengths[self.groups.winners]


@DATASETS.register("PreferenceGroups")
class PreferenceGroups(RowDataset):
    """Groups under `<base_dir>/<parquet_base_path>`: what the objectives `dpo` and `mdpo` train on. Others train on the winners.

    A store of ours with `groups.parquet` beside its figures/: a row a group, with ids of figures in the columns winner,
    loser_component, loser_arrow and loser_text (or empty), or winner and loser for plain pairs. Or scored pictures as published
    (datasets/scored_rows.py), of which the groups are made by the rules of `preference`.

    `left_out` lists the groups that are not used, each with the reason.

    Raises:
        UserError: nothing there, something that is neither, or no group at all.
    """

    def __init__(
        self, *, base_dir: str, parquet_base_path: str = "", num_train_examples: int | None = None,
        with_text: bool = True, stat_data: bool = False, preference: PreferenceConfig | None = None,
        path_remapping: Mapping[str, str] | None = None,
    ):  # fmt: skip
        rules = preference or PreferenceConfig()
        folder = Path(base_dir).expanduser() / parquet_base_path
        if not folder.is_dir():
            raise UserError(f"dataset: no folder {folder} (base_dir / parquet_base_path). Correct the paths.")
        if EncodedStore.is_store(folder):
            rows = _of_store(folder, with_text, rules)
        else:
            rows = _of_scores(ScoredRows(folder, with_text, Path(base_dir).expanduser(), path_remapping), rules)
        groups = rows.groups
        _say(folder, groups)
        self.left_out = [BadRow(name, reason) for name, reason in groups.left_out]
        if not groups.ids:
            first = f" First: {groups.left_out[0][0]}, {groups.left_out[0][1]}." if groups.left_out else ""
            raise UserError(
                f"{folder}: no group to train on, {_counts(groups)}.{first} Correct the data, or the rules (docs/preferences.md)."
            )
        super().__init__(rows, folder, num_train_examples, stat_data)


def _of_scores(pictures: ScoredRows, rules: PreferenceConfig) -> GroupRows:
    if pictures.nameless:
        _LOG.warning("%s: %d scored pictures without a group_id left out", pictures.folder, pictures.nameless)
    sides = pictures.buckets().astype(np.int64)
    prompts = pictures.table.column("group_id").cast(pa.string())
    sizes, counted = sides[:, 0] << 32 | sides[:, 1], _counted(rules)
    groups = make_groups(prompts, pictures.numbers("reward"), pictures.scores(), sizes, counted, rules)
    captions = pictures.table.column("caption").combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy()
    return GroupRows(pictures, _without(groups, _unlike(groups, captions), "pictures with different captions"))


def _of_store(folder: Path, with_text: bool, rules: PreferenceConfig) -> GroupRows:
    table = _read_groups(folder / GROUPS_FILE)
    pictures = StorePictures(folder, with_text)
    if pictures.store.references is not None:
        raise UserError(f"{folder} holds edits: figures with references. Preferences of edits are not trained on.")
    if pictures.is_described:
        _LOG.warning("%s: further captions, masks and weights of figures do not act on preferences", folder)
    names = table.column_names[2:]
    wanted = {figure for name in ("winner", *names) for figure in table.column(name).to_pylist()}
    row_of = {figure: row for row, figure in enumerate(pictures.ids()) if figure in wanted}
    counted = _counted(rules) if len(names) == len(AXES) else [True]
    ids, winners, chosen, left_out, own = [], [], [], [], 0
    for group in table.to_pylist():
        winner = group["winner"]
        given = [group[name] if counts else None for name, counts in zip(names, counted, strict=True)]
        losers = [None if figure == winner else figure for figure in given]
        own += sum(figure == winner for figure in given)
        lost = [str(figure) for figure in (winner, *(x for x in losers if x is not None)) if figure not in row_of]
        if lost:
            left_out.append((group["group_id"], f"pictures that are not in the store: {', '.join(lost)}"))
        elif not any(figure is not None for figure in losers):
            left_out.append((group["group_id"], "no loser"))
        else:
            ids.append(group["group_id"])
            winners.append(row_of[winner])
            chosen.append([NOBODY if figure is None else row_of[figure] for figure in losers])
    if own:
        _LOG.warning("%s: %d losers are their own group's winner: no losers on those axes", folder / GROUPS_FILE, own)
    groups = Groups(ids, np.array(winners, np.int64), np.array(chosen, np.int64).reshape(-1, len(names)), left_out)
    groups = _without(groups, _unlike(groups, pictures.captions()), "pictures with different captions")
    shapes = np.unique(pictures.store.figures.numbers("shape"), axis=0, return_inverse=True)[1].reshape(-1)
    return GroupRows(pictures, _without(groups, _unlike(groups, shapes), "pictures of different sizes"))


def _read_groups(path: Path) -> pa.Table:
    """Strings: group_id, winner, and the losers' columns in the order of AXES, or the one of pairs."""
    if not path.is_file():
        raise UserError(
            f"{path.parent} is a store without {GROUPS_FILE}, which says who won against whom. Write it (docs/preferences.md), or "
            "use dataset.type = 'ArXiVParquetDatasetV2' with another objective."
        )
    try:
        there = pq.read_schema(path).names
        wanted = ["group_id", "winner", *(_PAIR if _PAIR[0] in there else _LOSERS)]
        lacking = [name for name in wanted if name not in there]
        if not lacking:
            return pq.read_table(path, columns=wanted).cast(pa.schema([(name, pa.string()) for name in wanted]))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}. Write it again.") from error
    raise UserError(f"{path} lacks the columns {', '.join(lacking)}. Found: {', '.join(there)}. See docs/preferences.md.")


def _counted(rules: PreferenceConfig) -> list[bool]:
    """Of each axis whether its losers are used at all."""
    weights = rules.axis_weights.model_dump()
    return [weights[axis] > 0 for axis in AXES]


def _unlike(groups: Groups, kind: np.ndarray) -> np.ndarray:
    """(G,) bool: whether a loser's `kind` (pictures,) is another than the winner's."""
    of_winner = kind[groups.winners][:, None]
    return ((groups.losers != NOBODY) & (kind[groups.losers] != of_winner)).any(1)


def _without(groups: Groups, wrong: np.ndarray, reason: str) -> Groups:
    """The groups that are not `wrong` (G,)."""
    kept = np.flatnonzero(~wrong)
    names = [(groups.ids[at], reason) for at in np.flatnonzero(wrong).tolist()]
    ids = [groups.ids[at] for at in kept.tolist()]
    return Groups(ids, groups.winners[kept], groups.losers[kept], groups.left_out + names)


def _say(folder: Path, groups: Groups) -> None:
    """One line: how many groups there are, with losers on which axes, and why others are left out."""
    names = AXES if groups.losers.shape[1] == len(AXES) else ("pair",)
    counts = (groups.losers != NOBODY).sum(0).tolist()
    with_losers = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    _LOG.info("%s: %d groups (losers by axis: %s); %s", folder, len(groups.ids), with_losers, _counts(groups))


def _counts(groups: Groups) -> str:
    reasons = Counter(reason.partition(":")[0] for _, reason in groups.left_out)
    said = ", ".join(f"{count} for {reason}" for reason, count in reasons.most_common())
    return f"{len(groups.left_out)} left out" + (f": {said}" if said else "")
