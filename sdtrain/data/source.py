"""Where the samples come from: shards under a name, with a weight and a filter; what is left out, and what held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from sdtrain.data.bucket import REASONS, Table
from sdtrain.data.filter import apply
from sdtrain.data.index import Index, Rows, build_index, find_shards
from sdtrain.data.order import Order
from sdtrain.errors import ConfigError

MAX_VAL_SAMPLES = 2000
_CHUNK_KEYS = 1 << 16

Shards = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Source:
    """Shards that are mixed with others by their weight.

    Args:
        name: "" where it is the only one and has none.
        shards: a .tar file, a glob, a folder of .tar files, or a list of these.
        weight: its part of the samples, exact, beside the other sources' weights; 0 leaves it out.
        filter: comparisons with the samples' metadata, such as "aesthetic >= 5", see `filter.py`.
        option: where the configuration names its shards.
    """

    name: str
    shards: Shards
    weight: Fraction = Fraction(1)
    filter: Sequence[str] = ()
    option: str = "data.shards"


def read_sources(sources: Mapping[str, Mapping[str, Any]]) -> list[Source]:
    """`data.sources` as it is configured: {name: {shards, weight, filter}}."""
    found = []
    for name, given in sources.items():
        where = f"data.sources.{name}"
        unknown = set(given) - {"shards", "weight", "filter"} if isinstance(given, Mapping) else {given}
        if unknown or not given.get("shards"):
            what = f"unknown {sorted(map(str, unknown))}" if unknown else "shards are missing"
            raise ConfigError(f"{where}: {what}; write {{shards: PATH, weight: '0.7', filter: []}}")
        try:
            weight = Fraction(str(given.get("weight", 1)))
        except (ValueError, ZeroDivisionError) as error:
            raise ConfigError(f"{where}.weight: {given['weight']!r} is no number; write '0.7' or '7/10'") from error
        if weight < 0:
            raise ConfigError(f"{where}.weight: {weight} is less than 0")
        if isinstance(given.get("filter"), str):
            raise ConfigError(f"{where}.filter: write a list, ['{given['filter']}']")
        found.append(Source(name, given["shards"], weight, given.get("filter") or (), f"{where}.shards"))
    if not any(source.weight for source in found):
        raise ConfigError("data.sources: no source has a weight above 0")
    return found


def hash_keys(keys: np.ndarray | Rows) -> np.ndarray:
    """(N,) uint64, a key's own however wide the keys are stored: splitmix64 over its words of eight bytes."""
    hashes = np.empty(len(keys), np.uint64)
    for first in range(0, len(keys), _CHUNK_KEYS):
        part = np.asarray(keys[first : first + _CHUNK_KEYS])
        words = part.astype(f"S{-(-part.dtype.itemsize // 8) * 8}").view("<u8").reshape(len(part), -1)  # (n, W)
        found = np.zeros(len(part), np.uint64)
        for word in words.T:
            mixed = (found ^ word) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            found = np.where(word == 0, found, mixed ^ (mixed >> np.uint64(31)))  # a key has no zero byte
        hashes[first : first + len(part)] = found
    return hashes


@dataclass
class Corpus:
    """The samples of every split, and how they came to be.

    Args:
        sources: the training samples.
        others: other splits, each a source under the split's name.
        val_fraction: of the training samples to hold out where there is no split "val".
    """

    sources: Sequence[Source]
    others: Sequence[Source]
    val_fraction: float
    indices: dict[str, Index] = field(default_factory=dict)
    num_shards: list[int] = field(default_factory=list)  # of each source
    counts: Counter[str] = field(default_factory=Counter)  # what was lost and left out, and the samples of each bucket
    notes: list[str] = field(default_factory=list)  # the same for people

    def build(self, table: Table | None, max_samples: int | None) -> None:
        """Indexes the shards of every split. Several ranks may do this at once.

        Args:
            table: train on what has one of its shapes.
            max_samples: train on the first so many.
        """
        parts = [self._index(source) for source in self.sources]
        self.num_shards = [len(part.shards) for part in parts]
        self.indices["train"] = parts[0] if len(parts) == 1 else Index.concat(parts)
        self.indices |= {source.name: self._index(source) for source in self.others}
        if "val" not in self.indices:
            self.indices["train"], self.indices["val"] = self._hold_out(self.indices["train"])
        if table is not None:
            self.indices["train"] = self._fitting(self.indices["train"], table)
        if max_samples is not None:
            index = self.indices["train"]
            self.indices["train"] = index.subset(np.arange(min(max_samples, len(index))))

    def orders(self) -> list[Order]:
        """The sources' orders. Their shards stand in the index one source after the other."""
        index, found, first = self.indices["train"], [], 0
        for source, num in zip(self.sources, self.num_shards):
            starts = np.searchsorted(index.shard, np.arange(first, first + num + 1)).astype(np.int64)
            found.append(Order(source.name, starts))
            first += num
            if source.weight and not len(found[-1]):
                raise ConfigError(f"{source.option}: no sample is left to train on")
        return found

    def _index(self, source: Source) -> Index:
        index = build_index(find_shards(source.shards, source.option))
        for loss in index.losses:
            self.counts[f"lost/{loss.reason}"] += loss.count
            self.notes.append(f"{loss.shard}: {loss.reason} {loss.count} ({loss.note})")
        if not len(index):
            raise ConfigError(
                f"{source.option}: no sample with an image in {len(index.shards)} shards, "
                f"{index.shards[0].address} first"
            )
        option = source.option.removesuffix("shards") + "filter"
        index, counts = apply(index, source.filter, option)
        self.counts.update({f"filtered/{text}": count for text, count in counts.items()})
        self.notes += [f"{option}: '{text}' takes out {count}" for text, count in counts.items()]
        return index

    def _hold_out(self, index: Index) -> tuple[Index, Index]:
        """Chosen by a hash of the key: the same samples whatever shards they stand in."""
        if len(index) == 1:
            self.notes.append("there is one sample only; it is used for training and for validation")
            return index, index
        num_val = min(max(1, round(self.val_fraction * len(index))), MAX_VAL_SAMPLES, len(index) - 1)
        hashes = hash_keys(index.key)
        last = np.partition(hashes, num_val - 1)[num_val - 1]
        is_held = hashes < last
        is_held[np.flatnonzero(hashes == last)[: num_val - int(is_held.sum())]] = True  # shards may share keys
        return index.subset(~is_held), index.subset(is_held)

    def _fitting(self, index: Index, table: Table) -> Index:
        has_bucket, counts = table.sort_out(index.side)
        self.counts.update(counts)
        num = int(has_bucket.sum())
        left_out = {reason: counts.get(f"rejected/{reason}", 0) for reason in REASONS.values()}
        why = ", ".join(f"{count} by data.buckets.max_{reason}" for reason, count in left_out.items() if count)
        if not num:
            raise ConfigError(f"no picture has a bucket: {why}")
        if num < len(index):
            self.notes.append(f"{len(index) - num} of {len(index)} pictures have no bucket and are left out: {why}")
        return index.subset(has_bucket)
