"""Where every sample lies, over all shards: found beside each shard, in one index folder, or made on the spot.

The index turns shards into random access: byte offsets, sizes and checksums of each sample's image, .txt and .json
members, and what filters and buckets ask for. `shard_walk` says what is left out; what was lost stands in `losses`.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdtrain.data.address import is_remote, scheme_of, shown
from sdtrain.data.download import expand
from sdtrain.data.layout import ABSENT, COMPANIONS, JSON
from sdtrain.data.manifest import ShardRecord, fingerprint_of, is_index_folder, merge_losses, open_folder
from sdtrain.data.metadata import COMPANION_COLUMNS
from sdtrain.data.shard_index import Shard, index_shard
from sdtrain.data.shard_walk import ARRAYS, Loss
from sdtrain.errors import ConfigError

_CHUNK_ROWS = 1 << 20


class Origin(NamedTuple):
    """Rows `start` to `stop` of an index folder that had this fingerprint."""

    folder: str
    fingerprint: str
    start: int
    stop: int


class Rows:
    """Some rows of an array that stays where it is, on disk; an array to whoever takes some of them."""

    def __init__(self, array: np.ndarray, chosen: np.ndarray) -> None:
        self.array, self.chosen, self.dtype = array, chosen, array.dtype

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, places: Any) -> Any:  # noqa: ANN401 whatever numpy takes, and gives
        rows, *rest = places if isinstance(places, tuple) else (places,)
        return self.array[(self.chosen[rows], *rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:  # noqa: ANN401, ARG002
        return np.asarray(self.array[self.chosen], dtype)


@dataclass(frozen=True, eq=False)
class Index:
    """N samples, sorted by shard. A sample's number is its row. The arrays may be mapped from disk: look, do not copy.

    `fingerprint` is the same for the same data wherever it lies; a subset has another. Of a subset of a mapped index
    all arrays but `shard` are `Rows`.
    """

    shards: tuple[Shard, ...]
    shard: np.ndarray  # (N,) int32, a place in `shards`
    offset: np.ndarray  # (N, 3) int64: IMAGE, CAPTION, JSON
    size: np.ndarray  # (N, 3) int64, ABSENT where the sample has no such member
    crc: np.ndarray  # (N, 3) uint32
    side: np.ndarray  # (N, 2) int32: width and height after EXIF orientation; 0 where the header is unreadable
    key: np.ndarray  # (N,) bytes, UTF-8
    caption_length: np.ndarray  # (N,) int32, characters after cleaning
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)  # (N,) float64 or bytes; NaN or b"" where absent
    losses: tuple[Loss, ...] = ()
    fingerprint: str = ""
    origin: Origin | None = None  # where the arrays are mapped from
    chosen: np.ndarray | None = None  # (N,) uint32 or int64, which rows of the origin; None: all

    def __len__(self) -> int:
        return len(self.shard)

    def __reduce__(self) -> tuple:
        """Rows of an index folder travel to DataLoader workers as its name: they map the same pages."""
        if self.origin is not None:
            return _reopen, (self.origin, self.fingerprint, self.chosen)
        return Index, tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def name(self, sample: int) -> str:
        """ "shard/key", for people."""
        return f"{self.shards[self.shard[sample]].stem}/{self.key[sample].decode()}"

    def has(self, name: str) -> bool:
        """Whether any sample has this companion."""
        return COMPANION_COLUMNS[name][0] in self.columns

    def places(self, samples: np.ndarray, kinds: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Offset, size (ABSENT where there is none) and checksum of some members, (B, K) each."""
        own = [kind for kind in kinds if kind <= JSON]
        offset, size, crc = (array[samples][:, own].astype(np.int64) for array in (self.offset, self.size, self.crc))
        for name in (name for name, kind in COMPANIONS.items() if kind in kinds):  # they stand last
            found = [np.nan_to_num(self.columns[column][samples], nan=ABSENT) for column in COMPANION_COLUMNS[name]]
            offset, size, crc = (
                np.column_stack((array, value.astype(np.int64))) for array, value in zip((offset, size, crc), found)
            )
        return offset, size, crc

    def subset(self, samples: np.ndarray | slice) -> Index:
        """Some of the samples, renumbered; the losses stay with the whole. Of a mapped index little is copied."""
        rows = _as_slice(samples, len(self))
        fingerprint = hashlib.sha256(self.fingerprint.encode())
        if isinstance(rows, slice):
            if (rows.start, rows.stop) == (0, len(self)):
                return self
            fingerprint.update(f"{rows.start}:{rows.stop}".encode())
        else:
            for first in range(0, len(rows), _CHUNK_ROWS):
                fingerprint.update(rows[first : first + _CHUNK_ROWS].astype("<i8").tobytes())
        return self._picked(rows, fingerprint.hexdigest())

    def _picked(self, rows: np.ndarray | slice, fingerprint: str) -> Index:
        origin, chosen = self.origin, self.chosen
        if origin is not None and chosen is None and isinstance(rows, slice):
            origin = origin._replace(start=origin.start + rows.start, stop=origin.start + rows.stop)
        elif origin is not None:
            chosen = _small(rows) if chosen is None else chosen[rows]

        def pick(array: np.ndarray | Rows) -> np.ndarray | Rows:
            return array[rows] if chosen is None else Rows(getattr(array, "array", array), chosen)

        return Index(
            self.shards,
            self.shard[rows],
            **{name: pick(getattr(self, name)) for name in ARRAYS},
            columns={name: pick(column) for name, column in self.columns.items()},
            fingerprint=fingerprint,
            origin=origin,
            chosen=chosen,
        )

    def gathered(self) -> Index:
        """The same with all of it in memory, for what looks at whole columns."""
        arrays = {name: np.asarray(getattr(self, name)) for name in ARRAYS}
        columns = {name: np.asarray(column) for name, column in self.columns.items()}
        return replace(self, **arrays, columns=columns, origin=None, chosen=None)

    @staticmethod
    def concat(indexes: Sequence[Index]) -> Index:
        """All samples of several, one after the other, with the columns of any. Copies, where there are two or more."""
        if len(indexes) == 1:
            return indexes[0]
        firsts = np.cumsum([0, *(len(index.shards) for index in indexes)])
        arrays = {name: np.concatenate([getattr(index, name) for index in indexes]) for name in ARRAYS}
        return Index(
            tuple(shard for index in indexes for shard in index.shards),
            np.concatenate([index.shard + np.int32(first) for index, first in zip(indexes, firsts)]),
            **arrays,
            columns=_concat_columns([(len(index), index.columns) for index in indexes]),
            losses=merge_losses(loss for index in indexes for loss in index.losses),
            fingerprint=hashlib.sha256("".join(index.fingerprint for index in indexes).encode()).hexdigest(),
        )


def find_shards(shards: str | Path | Sequence[str | Path], option: str = "data.shards") -> list[str]:
    """Paths, globs, folders, addresses and index folders -> shards and index folders, sorted, each once."""
    found = set()
    for pattern in [shards] if isinstance(shards, (str, Path)) else list(shards):
        addresses = expand(str(pattern), option)
        matches = {one: [one] if scheme_of(one) else _find_local(Path(one).expanduser()) for one in addresses}
        missing = [one for one, shards_there in matches.items() if not shards_there]
        if missing or not matches:
            raise ConfigError(
                f"{option}: no shard matches '{[*missing, pattern][0]}' (looked from {Path.cwd()}). Give a .tar file, "
                "a folder of them, a glob in quotes such as 'OUT/*.tar', or a folder that tools/index_shards.py made; "
                "`python tools/make_shards.py FOLDER OUT` makes shards"
            )
        found.update(*matches.values())
    if not found:
        raise ConfigError(f"{option}: the list is empty; give a .tar file, a folder of them, or a glob in quotes")
    return sorted(found)


def build_index(shards: Iterable[str | Path]) -> Index:
    """The index of what `find_shards` found. Local shards that have none are walked, and it is saved beside them."""
    addresses = [str(address) for address in shards]
    folders = [address for address in addresses if not is_remote(address) and is_index_folder(address)]
    loose = [address for address in addresses if address not in set(folders)]
    return Index.concat([*map(_open, folders), *([_index_loose(loose)] if loose else [])])


def _find_local(path: Path) -> list[str]:
    if path.is_dir():
        matches = [path] if is_index_folder(path) else list(path.glob("*.tar"))
    elif path.is_file():
        matches = [path]
    else:
        matches = [Path(match) for match in glob.glob(str(path)) if os.path.isfile(match)]
    return [os.path.abspath(match) for match in matches]


def _open(folder: str) -> Index:
    opened = open_folder(folder)
    return Index(
        tuple(record.shard for record in opened.records),
        **opened.arrays,
        columns=opened.columns,
        losses=opened.losses,
        fingerprint=opened.fingerprint,
        origin=Origin(os.path.abspath(folder), opened.fingerprint, 0, len(opened.arrays["shard"])),
    )


def _reopen(origin: Origin, fingerprint: str, chosen: np.ndarray | None) -> Index:
    index = _open(origin.folder)
    if index.fingerprint != origin.fingerprint:
        raise ConfigError(f"{origin.folder}: the index changed while a run was using it; start the run again")
    index = index.subset(slice(origin.start, origin.stop))
    return replace(index, fingerprint=fingerprint) if chosen is None else index._picked(chosen, fingerprint)


def _index_loose(addresses: list[str]) -> Index:
    found = []
    for address in addresses:
        if is_remote(address):
            raise ConfigError(
                f"data.shards: {shown(address)} is not indexed; `python tools/index_shards.py ADDRESS --out DIR` reads "
                "it once and makes an index folder, then data.shards=DIR"
            )
        index = index_shard(os.path.abspath(address))
        if index.found.refused:
            raise ConfigError(f"data.shards: {address} is not a tar shard ({index.found.refused})")
        found.append(index)
    counts = [len(index.found.arrays["key"]) for index in found]
    return Index(
        tuple(index.shard for index in found),
        np.repeat(np.arange(len(found), dtype=np.int32), counts),
        **{name: np.concatenate([index.found.arrays[name] for index in found]) for name in ARRAYS},
        columns=_concat_columns([(count, index.found.columns) for count, index in zip(counts, found)]),
        losses=tuple(loss for index in found for loss in index.found.losses),
        fingerprint=fingerprint_of(
            ShardRecord(index.shard, count, index.found.sha256, index.digest) for index, count in zip(found, counts)
        ),
    )


def _concat_columns(parts: Sequence[tuple[int, Mapping[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Columns of any part, filled where another does not have them. Each part says how many rows it has."""
    kinds = {name: column.dtype.kind for _, columns in parts for name, column in columns.items()}
    missing = {name: np.array([b""]) if kind == "S" else np.array([np.nan]) for name, kind in kinds.items()}
    return {
        name: np.concatenate([columns.get(name, missing[name].repeat(count)) for count, columns in parts])
        for name in sorted(kinds)
    }


def _small(rows: np.ndarray) -> np.ndarray:
    """Half the memory, where the numbers allow."""
    return rows.astype(np.uint32) if len(rows) and rows.min() >= 0 and rows.max() < 1 << 32 else rows


def _as_slice(samples: np.ndarray | slice, num_samples: int) -> np.ndarray | slice:
    """Neighbours in order as a slice, however they were given."""
    if isinstance(samples, slice):
        start, stop, step = samples.indices(num_samples)
        return slice(start, max(start, stop)) if step == 1 else np.arange(num_samples)[samples]
    samples = np.asarray(samples)
    samples = np.flatnonzero(samples) if samples.dtype == bool else samples.astype(np.int64, copy=False)
    if (
        len(samples)
        and samples[0] >= 0
        and samples[-1] - samples[0] == len(samples) - 1
        and (np.diff(samples) == 1).all()
    ):
        return slice(int(samples[0]), int(samples[-1]) + 1)
    return samples
