"""Which pictures are the same: exactly, by their bytes, or nearly, by their perceptual hashes. At a million rows.

A row is dropped for an earlier row that is itself kept, never for a dropped one, so likeness does not creep along a
chain. That is decided by halves: settle the first half, drop from the second what is near a kept row of the first,
settle the rest of it. Only kept rows are ever searched, so a hundred thousand copies of one picture cost no more than
their number.

Near rows are found by multi-index hashing (Norouzi et al. 2012, "Fast Search in Hamming Space"): cut into more bands
than `bits` can spoil, two near hashes agree in at least one of them (or, with half as many bands, differ there in at
most one bit). No pair is missed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

HASH_BYTES = 32
MAX_BITS = 31  # more would need bands so narrow that most rows share one
_LEAF = 1024  # rows that are compared each with each
_BLOCK = 1 << 20  # candidate pairs looked at together: bounds the memory
_ONE_BIT = 16  # from here on, fewer and wider bands that may differ in one bit are faster

Rows = NDArray[np.int64]
Words = NDArray[np.uint64]


def representatives(identity: NDArray[np.integer], phash: NDArray[np.uint8], bits: int) -> Rows:
    """The row that stands for each row, (n,) int64: itself when it is kept, else the earliest kept row like it.

    Args:
        identity: (n,) integers, equal where the pictures' bytes are.
        phash: (n, 32) perceptual hashes.
        bits: largest distance of two hashes of one picture, 0 to MAX_BITS.
    """
    if not 0 <= bits <= MAX_BITS:
        raise ValueError(f"bits = {bits}: must be 0 to {MAX_BITS}")
    same_bytes = _first_equal([np.asarray(identity)])
    files = np.flatnonzero(same_bytes == np.arange(len(identity)))
    words = np.ascontiguousarray(np.ascontiguousarray(phash[files]).view(np.uint64).T)
    same_hash = _first_equal(list(words))
    distinct = np.flatnonzero(same_hash == np.arange(len(files)))
    near = _Settled(np.ascontiguousarray(words[:, distinct]), bits).stands_for
    position = np.empty(len(files), dtype=np.int64)
    position[distinct] = np.arange(len(distinct))
    of_file = distinct[near[position[same_hash]]]
    of_row = np.empty(len(identity), dtype=np.int64)
    of_row[files] = files[of_file]
    return of_row[same_bytes]


def _first_equal(columns: list[NDArray[np.integer]]) -> Rows:
    """(n,) the first row that is equal to each row in every column."""
    order = np.lexsort(columns)  # stable: equal rows stay in their order
    new = np.zeros(len(order), dtype=bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[order[1:]] != column[order[:-1]]
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    return first


class _Settled:
    """`stands_for` (n,) of `words` (4, n), all different: the earliest kept row within `bits` of each, or itself."""

    def __init__(self, words: Words, bits: int):
        self._words, self._bits = words, bits
        self._spoiled = 1 if bits > _ONE_BIT else 0  # bits of a band that may differ
        self.stands_for = np.arange(words.shape[1])
        if bits:
            self._keys, self._widths = _bands(words, bits // (self._spoiled + 1) + 1)
            self._settle(np.arange(words.shape[1]))

    def _settle(self, rows: Rows) -> Rows:
        """Decide on ascending rows among each other; returns the kept ones."""
        if len(rows) <= _LEAF:
            return self._settle_few(rows)
        first = self._settle(rows[: len(rows) // 2])
        second = rows[len(rows) // 2 :]
        nearest = self._earliest_near(first, second)
        self.stands_for[second] = np.where(nearest < 0, second, nearest)
        return np.concatenate([first, self._settle(second[nearest < 0])])

    def _settle_few(self, rows: Rows) -> Rows:
        words = self._words[:, rows]
        distance = np.zeros((len(rows), len(rows)), dtype=np.uint16)
        for word in words:
            distance += np.bitwise_count(word[:, None] ^ word[None])
        near = np.triu(distance <= self._bits, 1)
        kept = np.ones(len(rows), dtype=bool)
        for row in np.flatnonzero(near.any(axis=1)):
            if kept[row]:
                alike = near[row] & kept
                kept[alike] = False
                self.stands_for[rows[alike]] = rows[row]
        return rows[kept]

    def _earliest_near(self, kept: Rows, rows: Rows) -> Rows:
        """Of each of `rows`, the smallest of `kept` within the distance; -1 where there is none."""
        none = self._words.shape[1]
        earliest = np.full(len(rows), none, dtype=np.int64)
        for key, width in zip(self._keys, self._widths, strict=True):
            there, kept_order = _sorted(key[kept])
            here, row_order = _sorted(key[rows])
            in_there, in_here = kept[kept_order], rows[row_order]
            words = self._words[:, in_here], self._words[:, in_there]  # in the order in which they are compared
            flips = [0, *(1 << bit for bit in range(width))] if self._spoiled else [0]
            for flip in flips:
                wanted = here ^ np.uint32(flip)  # still nearly sorted, which keeps the search in the cache
                begin, end = np.searchsorted(there, wanted, "left"), np.searchsorted(there, wanted, "right")
                for a, b in _pairs(begin, end):
                    close = _close(words, a, b, self._bits)
                    np.minimum.at(earliest, row_order[a[close]], in_there[b[close]])
        return np.where(earliest == none, -1, earliest)


def _close(words: tuple[Words, Words], a: Rows, b: Rows, bits: int) -> Rows:
    """Which of the pairs (a[i] of the first words, b[i] of the second) are within the distance. Most are told apart
    by their first words."""
    left = np.arange(len(a))
    distance = np.zeros(len(a), dtype=np.uint16)
    for first, second in zip(*words, strict=True):
        distance += np.bitwise_count(first[a[left]] ^ second[b[left]])
        near = distance <= bits
        left, distance = left[near], distance[near]
    return left


def _bands(words: Words, count: int) -> tuple[list[NDArray[np.uint32]], list[int]]:
    """For each band, (n,) keys and their number of bits, at most 32. Bits are dealt to the bands in turn: neighbours in
    a hash are alike, and a band of alike bits would tell few rows apart."""
    keys, widths = [], []
    for band in range(count):
        places = range(band, 8 * HASH_BYTES, count)[:32]
        key = np.zeros(words.shape[1], dtype=np.uint32)
        for bit, place in enumerate(places):
            key |= ((words[place // 64] >> np.uint64(place % 64)) & np.uint64(1)).astype(np.uint32) << np.uint32(bit)
        keys.append(key)
        widths.append(len(places))
    return keys, widths


def _sorted(key: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], Rows]:
    """Keys in order, and where each was. One sort of plain integers is several times faster than an argsort."""
    packed = np.sort((key.astype(np.uint64) << np.uint64(32)) | np.arange(len(key), dtype=np.uint64))
    return (packed >> np.uint64(32)).astype(np.uint32), (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _pairs(begin: Rows, end: Rows) -> Iterator[tuple[Rows, Rows]]:
    """(i, j) for every i and every j in begin[i] … end[i] - 1, about _BLOCK at a time."""
    i = np.flatnonzero(end > begin)
    count = end[i] - begin[i]
    sums = np.cumsum(count)
    cuts = np.searchsorted(sums, np.arange(_BLOCK, int(sums[-1]) if len(sums) else 0, _BLOCK), "right")
    for part in np.split(np.arange(len(i)), np.unique(cuts)):
        if len(part):
            offset = np.repeat(begin[i[part]] - (sums[part] - count[part]), count[part])
            yield np.repeat(i[part], count[part]), np.arange(sums[part[0]] - count[part[0]], sums[part[-1]]) + offset
