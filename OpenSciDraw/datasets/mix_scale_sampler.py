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


@SAMPLERS.register("ArXiVMixScaleBatchSampler", "DistributedBucketSampler", "DistributedBucketSamplerV2")
class ArXiVMixScaleBatchSampler:
    """Batches of row numbers; iterating gives this rank's batches of the current epoch, from `position` on.

    At every step all ranks get one batch each; where a bucket has enough rows, all of the same bucket.
    Over the ranks an epoch is disjoint and, unless `drop_last`, complete: the rest of each bucket goes
    into shorter batches, which are split until they divide among the ranks. (Only when that is
    impossible - batch size 1 and a row count that the ranks do not divide - does the last step repeat
    up to `num_replicas` - 1 rows.) `drop_last` drops short batches of buckets that fill at least one.

    Args:
        bucket_of: (rows,) integer bucket of each row; row numbers that are yielded index `rows`.
        rows: (rows,) dataset indices, or None for 0 … n - 1.

    Raises:
        UserError: no rows, or fewer rows than ranks.
    """

    def __init__(
        self, bucket_of: np.ndarray, *, rows: np.ndarray | None = None, batch_size: int = 1, num_replicas: int = 1,
        rank: int = 0, drop_last: bool = False, shuffle: bool = True, seed: int = 42,
    ):  # fmt: skip
        self.rows = np.arange(len(bucket_of)) if rows is None else np.asarray(rows)
        self.bucket_of = np.asarray(bucket_of)
        self.batch_size, self.num_replicas, self.rank = batch_size, num_replicas, rank
        self.drop_last, self.shuffle, self.seed = drop_last, shuffle, seed
        if len(self.bucket_of) < num_replicas:
            raise UserError(
                f"The dataset has {len(self.bucket_of)} row(s) for training and there are {num_replicas} rank(s): "
                "each rank needs at least one. Check num_train_examples, held_out_examples and rejected.jsonl."
            )
        self.epoch = 0
        self.position = 0  # batches of this epoch that this rank has been through
        self._planned: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    # -- the plan of an epoch: `order` holds rows; batch b is order[start[b] : start[b] + size[b]] ----
    def _plan(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(order, start (steps, ranks), size (steps, ranks)) of the current epoch."""
        if self._planned is None or self._planned[0] != self.epoch:
            self._planned = (self.epoch, *self._make_plan())
        return self._planned[1:]

    def _make_plan(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        count, world, batch = len(self.bucket_of), self.num_replicas, self.batch_size
        keys = epoch_keys(count, self.seed, self.epoch, 0) if self.shuffle else np.arange(count, dtype=np.uint64)
        order = np.lexsort((keys, self.bucket_of))
        _, first, rows_in = np.unique(self.bucket_of[order], return_index=True, return_counts=True)
        full = rows_in // (batch * world)  # steps in which every rank has a full batch of the bucket
        starts = [f + np.arange(n * world) * batch for f, n in zip(first, full, strict=True)]
        even = np.concatenate(starts).reshape(-1, world) if full.any() else np.zeros((0, world), dtype=np.int64)
        rest = [
            (int(f + n * batch * world), int(r - n * batch * world), bool(r >= batch))
            for f, n, r in zip(first, full, rows_in, strict=True)
            if r > n * batch * world
        ]
        mixed_start, mixed_size, even = self._deal(rest, even)
        start = np.concatenate([even, mixed_start])
        size = np.concatenate([np.full_like(even, batch), mixed_size])
        if self.shuffle:
            steps = np.argsort(epoch_keys(len(start), self.seed, self.epoch, 1), kind="stable")
            start, size = start[steps], size[steps]
        return order, start, size

    def _deal(self, rest: list[tuple[int, int, bool]], even: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cut the buckets' rests into batches whose number the ranks divide; may break up a full step for it."""
        batch, world = self.batch_size, self.num_replicas
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
            yield self.rows[order[at : at + size[step, self.rank]]].tolist()

    def set_epoch(self, epoch: int, position: int = 0) -> None:
        """Choose the epoch, and how many of its batches are already done."""
        self.epoch, self.position = epoch, position

    def _identity(self) -> dict[str, Any]:
        return {
            "rows": len(self.bucket_of), "batch_size": self.batch_size, "num_replicas": self.num_replicas,
            "drop_last": self.drop_last, "shuffle": self.shuffle, "seed": self.seed,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            UserError: other data or another way of splitting them, so the position means nothing here.
        """
        own = self._identity()
        changed = [f"{k}: {state.get(k)} in the checkpoint, {v} now" for k, v in own.items() if state.get(k) != v]
        if changed:
            raise UserError(
                "The data order of the checkpoint does not fit this run: " + "; ".join(changed) + ". Resume with the "
                "same data, batch size, seed and number of processes, or start a new run from the checkpoint's weights "
                "with pretrained_lora_ckpt_path."
            )
        self.set_epoch(state["epoch"], state["position"])

    def log_size(self) -> None:
        logging.getLogger("OpenSciDraw").info(
            "%d rows in %d buckets: %d batches a rank and epoch", len(self.bucket_of), len(np.unique(self.bucket_of)), len(self)
        )
