"""Permutations that never change, and the endless order of one source, entered at any place for the same price."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np


@functools.lru_cache(maxsize=8)
def permutation(num: int, key: str, number: int = 0, epoch: int = 0) -> np.ndarray:
    """0 to num - 1 in an order drawn from Philox: a function of the arguments, on every machine and for ever.

    NumPy promises a bit generator's raw words, its `permutation` it does not. Each word's last bits are its place, so
    that no two are equal and the fastest sort there is gives the one answer.
    """
    words = np.random.Philox(key=_philox_key(key), counter=[0, number, epoch, 0]).random_raw(num)
    places = np.uint64((1 << (num - 1).bit_length()) - 1)
    words &= ~places
    words |= np.arange(num, dtype=np.uint64)
    words.sort()
    words &= places
    words.setflags(write=False)
    return words.view(np.int64)


@functools.lru_cache(maxsize=64)
def _philox_key(key: str) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(key.encode(), digest_size=16).digest(), "<u8")


@dataclass(frozen=True, eq=False)
class Order:
    """A source gone through again and again: in each epoch its shards permuted, and the samples inside of each.

    Args:
        name: of the source; other names give other orders.
        starts: (S + 1,) int64; shard j has the samples from starts[j] up to starts[j + 1].
    """

    name: str
    starts: np.ndarray

    def __len__(self) -> int:
        return int(self.starts[-1] - self.starts[0])

    def take(self, seed: int, first: int, last: int) -> np.ndarray:
        """Sample ids and epochs at the places from `first` up to `last`, (last - first, 2) int64."""
        taken, filled = np.empty((last - first, 2), np.int64), 0
        while filled < len(taken):
            epoch, place = divmod(first + filled, len(self))
            filled += self._fill(taken[filled:], seed, epoch, place)
        return taken

    def _fill(self, taken: np.ndarray, seed: int, epoch: int, place: int) -> int:
        """Writes an epoch from a place on, as far as there is room; returns how many samples that were."""
        sizes = np.diff(self.starts)
        shards = permutation(len(sizes), f"{seed}/shards/{self.name}", 0, epoch)
        ends = np.cumsum(sizes[shards])
        number, filled = int(np.searchsorted(ends, place, side="right")), 0
        skip = place - int(ends[number] - sizes[shards[number]])
        while filled < len(taken) and number < len(shards):
            shard = int(shards[number])
            inside = permutation(int(sizes[shard]), f"{seed}/samples/{self.name}", shard, epoch)
            inside = inside[skip : skip + len(taken) - filled]
            np.add(inside, self.starts[shard], out=taken[filled : filled + len(inside), 0])
            filled, number, skip = filled + len(inside), number + 1, 0
        taken[:filled, 1] = epoch
        return filled
