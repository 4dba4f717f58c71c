"""One bucket per batch, split over ranks, the same on every machine for the same (seed, epoch)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from OpenSciDraw.errors import UserError
from OpenSciDraw.registry import SAMPLERS


def splitmix64(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser on uint64 (Steele et al. 2014): the same permutation of keys on any machine."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def epoch_keys(count: int, seed: int, epoch: int, salt: int) -> np.ndarray:
    """Pseudo-random uint64 keys of rows 0 … count - 1: a pure function of (seed, epoch, row)."""
    start = splitmix64(splitmix64(splitmix64(np.array([seed % 2**64], dtype=np.uint64)) ^ np.uint64(epoch)) ^ np.uint64(salt))
    return splitmix64(np.arange(count, dtype=np.uint64) ^ start)


Plan = tuple[np.ndarray, np.ndarray, np.ndarray]  # order of rows; start and size (steps, ranks) of each batch in it


@SAMPLERS.register(
    "ArXiVMixScaleBatchSampler", "DistributedBucketSampler", "DistributedBucketSamplerV2", "DistributedBucketSamplerV3"
)
class ArXiVMixScaleBatchSampler:
    """Batches of row numbers; iterating gives this rank's batches of the current epoch, from `position` on.

    At every step all ranks get one batch each; where a bucket has enough rows, all of the same bucket.
    Over the ranks an epoch is disjoint and, unless `drop_last`, complete: the rest of each bucket goes
    into shorter batches, which are split until they divide among the ranks. (Only when that is
    impossible - batch size 1 and a row count that the ranks do not divide - does the last step repeat
    up to `num_replicas` - 1 rows.) `drop_last` drops short batches of buckets that fill at least one.

    An epoch that was begun with another batch size or number of ranks goes on with the rows that are left.

    Args:
        bucket_of: (rows,) integer bucket of each row; row numbers that are yielded index `rows`.
        rows: (rows,) dataset indices, or None for 0 … n - 1.
        lengths: (rows,) text lengths; where they differ, batches are made of rows of like length, so that little is padded.

    Raises:
        UserError: no rows, or fewer rows than ranks.
    """

    def __init__(
        self, bucket_of: np.ndarray, *, rows: np.ndarray | None = None, lengths: np.ndarray | None = None, batch_size: int = 1,
        num_replicas: int = 1, rank: int = 0, drop_last: bool = False, shuffle: bool = True, seed: int = 42,
    ):  # fmt: skip
        self.rows = np.arange(len(bucket_of)) if rows is None else np.asarray(rows)
        self.bucket_of = np.asarray(bucket_of)
        self.lengths = None if lengths is None or len(np.unique(lengths)) < 2 else np.asarray(lengths)
        self.batch_size, self.num_replicas, self.rank = batch_size, num_replicas, rank
        self.drop_last, self.shuffle, self.seed = drop_last, shuffle, seed
        if len(self.bucket_of) < num_replicas:
            raise UserError(
                f"The dataset has {len(self.bucket_of)} row(s) for training and there are {num_replicas} rank(s): "
                "each rank needs at least one. Check num_train_examples, held_out_examples and rejected.jsonl."
            )
        self.epoch = 0
        self.position = 0  # batches of this epoch that this rank has been through, since `_before`
        self._before: list[list[int]] = []  # [batch_size, num_replicas, steps] of earlier parts of this epoch
        self._planned: tuple[int, Plan] | None = None

    # -- the plan of an epoch ----------------------------------------------------------------------
    def _plan(self) -> Plan:
        if self._planned is None or self._planned[0] != self.epoch:
            rows = self._rows_of_epoch()
            for batch_size, world, steps in self._before:
                rows = np.setdiff1d(rows, _covered(self._make_plan(rows, batch_size, world), steps), assume_unique=True)
            self._planned = (self.epoch, self._make_plan(rows, self.batch_size, self.num_replicas))
        return self._planned[1]

    def _rows_of_epoch(self) -> np.ndarray:
        """Places of the epoch's rows in `bucket_of`, sorted: all of them."""
        return np.arange(len(self.bucket_of))

    def _make_plan(self, rows: np.ndarray, batch: int, world: int) -> Plan:
        order = self._order(rows)
        _, first, rows_in = np.unique(self.bucket_of[order], return_index=True, return_counts=True)
        full = rows_in // (batch * world)  # steps in which every rank has a full batch of the bucket
        starts = [f + np.arange(n * world) * batch for f, n in zip(first, full, strict=True)]
        even = np.concatenate(starts).reshape(-1, world) if full.any() else np.zeros((0, world), dtype=np.int64)
        rest = [
            (int(f + n * batch * world), int(r - n * batch * world), bool(r >= batch))
            for f, n, r in zip(first, full, rows_in, strict=True)
            if r > n * batch * world
        ]
        mixed_start, mixed_size, even = self._deal(rest, even, batch, world)
        start = np.concatenate([even, mixed_start])
        size = np.concatenate([np.full_like(even, batch), mixed_size])
        if self.shuffle:
            steps = np.argsort(epoch_keys(len(start), self.seed, self.epoch, 1), kind="stable")
            start, size = start[steps], size[steps]
        return order, start, size

    def _order(self, rows: np.ndarray) -> np.ndarray:
        """`rows` bucket by bucket, in this epoch's random order; by text length where lengths differ."""
        keys = epoch_keys(len(self.bucket_of), self.seed, self.epoch, 0)[rows] if self.shuffle else rows.astype(np.uint64)
        buckets = self.bucket_of[rows]
        if self.lengths is None:
            return rows[np.lexsort((keys, buckets))]
        order = np.lexsort((keys, self.lengths[rows], buckets))
        if self.shuffle:  # each bucket starts at another length each epoch, so that its rest is not always the longest
            ends = np.flatnonzero(np.diff(buckets[order])) + 1
            parts = np.split(order, ends)
            turns = epoch_keys(len(parts), self.seed, self.epoch, 2)
            order = np.concatenate([np.roll(part, int(turn % len(part))) for part, turn in zip(parts, turns, strict=True)])
        return rows[order]

    def _deal(self, rest: list[tuple[int, int, bool]], even: np.ndarray, batch: int, world: int) -> Plan:
        """Cut the buckets' rests into batches whose number the ranks divide; may break up a full step for it."""
        pool: list[tuple[int, int]] = []
        for start, rows, has_full in rest:
            cuts = [(start + at, min(batch, rows - at)) for at in range(0, rows, batch)]
            pool += [cut for cut in cuts if not (self.drop_last and has_full and cut[1] < batch)]
        if self.drop_last and (len(even) or len(pool) >= world):
            pool = pool[: len(pool) // world * world]
        while len(pool) % world:
            widest = max(range(len(pool)), key=lambda at: pool[at][1])
            start, rows = pool[widest]
            if rows > 1:  # split it where it stands, so that neighbours keep like sizes
                pool[widest : widest + 1] = [(start, rows - rows // 2), (start + rows - rows // 2, rows // 2)]
            elif len(even) and batch > 1:
                pool += [(int(at), batch) for at in even[-1]]
                even = even[:-1]
            else:
                pool += pool[: world - len(pool) % world] or pool
        shape = (-1, world)
        return (
            np.array([s for s, _ in pool], dtype=np.int64).reshape(shape),
            np.array([n for _, n in pool], dtype=np.int64).reshape(shape),
            even,
        )

    # -- iteration and state ----------------------------------------------------------------------
    def __len__(self) -> int:
        """Batches of this rank in the current epoch (the same on every rank)."""
        return len(self._plan()[1])

    def __iter__(self) -> Iterator[list[int]]:
        order, start, size = self._plan()
        for step in range(self.position, len(start)):
            at = start[step, self.rank]
            yield self._yielded(order[at : at + size[step, self.rank]])

    def _yielded(self, places: np.ndarray) -> list[int]:
        """What the dataset is asked for, of places in `bucket_of`."""
        found: list[int] = self.rows[places].tolist()
        return found

    def set_epoch(self, epoch: int, position: int = 0) -> None:
        """Choose the epoch, and how many of its batches are already done."""
        self.epoch, self.position, self._before = epoch, position, []
        self._planned = None

    def _identity(self) -> dict[str, Any]:
        return {"rows": len(self.bucket_of), "drop_last": self.drop_last, "shuffle": self.shuffle, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        parts = [*self._before, [self.batch_size, self.num_replicas, self.position]]
        return {"epoch": self.epoch, "parts": parts, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, with any batch size and number of ranks.

        Where batch size x ranks is as before (and the rows so far are the same), the order stays what it would have
        been; else the rest of the epoch is dealt anew.

        Raises:
            UserError: other data, so the position means nothing here.
        """
        own = self._identity()
        changed = [f"{k}: {state.get(k)} in the checkpoint, {v} now" for k, v in own.items() if state.get(k) != v]
        if changed:
            raise UserError(
                "The data order of the checkpoint does not fit this run: " + "; ".join(changed) + ". Resume with the "
                "same data and seed, or start a new run from the checkpoint's weights with pretrained_lora_ckpt_path or "
                "pretrained_full_ckpt_path."
            )
        *before, (batch_size, world, steps) = state["parts"]
        self.set_epoch(state["epoch"], steps)
        self._before = before
        if (batch_size, world) == (self.batch_size, self.num_replicas):
            return
        then = self._twin(batch_size, world)
        then.set_epoch(state["epoch"])
        then._before = before
        if not np.array_equal(np.sort(_covered(then._plan(), steps)), np.sort(_covered(self._plan(), steps))):
            self.set_epoch(state["epoch"])
            self._before = state["parts"]

    def _twin(self, batch_size: int, num_replicas: int) -> ArXiVMixScaleBatchSampler:
        """Of the same rows and order, for another batch size and number of ranks."""
        return ArXiVMixScaleBatchSampler(
            self.bucket_of, lengths=self.lengths, batch_size=batch_size, num_replicas=num_replicas, drop_last=self.drop_last,
            shuffle=self.shuffle, seed=self.seed,
        )  # fmt: skip

    def log_size(self) -> None:
        logging.getLogger("OpenSciDraw").info(
            "%d rows in %d buckets: %d batches a rank and epoch", len(self.bucket_of), len(np.unique(self.bucket_of)), len(self)
        )


def _covered(plan: Plan, steps: int) -> np.ndarray:
    """Rows of the first `steps` steps of all ranks."""
    order, start, size = plan
    starts, sizes = start[:steps].ravel(), size[:steps].ravel()
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.unique(order[np.repeat(starts, sizes) + within])
