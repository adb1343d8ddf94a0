"""Sample numbers -> the bytes of their members, each checked against the index's checksum."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from zlib_ng.zlib_ng import crc32

from sdtrain.data.bad_sample import BadSample
from sdtrain.data.layout import MAX_BYTES, TOO_LARGE
from sdtrain.data.storage import Storage

if TYPE_CHECKING:
    from sdtrain.data.index import Index
    from sdtrain.data.shard_index import Shard

_NOWHERE = np.iinfo(np.int64).max
_MAX_GAP_BYTES = 16 * 1024  # members with more than this between them are read one by one

Member = memoryview | None
_Span = tuple["Shard", int, int]


class Members:
    """Reads the members of samples that an index knows.

    Args:
        index: the samples.
        storage: where the bytes come from.
    """

    def __init__(self, index: Index, storage: Storage) -> None:
        self.index, self.storage = index, storage
        self._limit = np.array(MAX_BYTES, np.int64)

    def read(
        self, samples: Sequence[int] | np.ndarray, kinds: Sequence[int]
    ) -> Iterator[tuple[Member, ...] | BadSample]:
        """For each sample its members of these kinds, None for one it lacks; or why they cannot be used.

        All is asked for at once, and one read takes the members of a sample that lie together.
        """
        samples, kinds = np.asarray(samples, np.int64), list(kinds)
        offset, size, crc = self.index.places(samples, kinds)  # (B, K) each
        length = size.clip(min=0)
        start = np.where(size < 0, _NOWHERE, offset).min(axis=1)  # (B,)
        span = (offset + length).max(axis=1, initial=0, where=size >= 0) - start
        is_near = span <= length.sum(axis=1) + _MAX_GAP_BYTES
        is_one = (is_near & (size <= self._limit[kinds]).all(axis=1) & (span > 0)).tolist()
        first = offset - start[:, None]
        shards = [self.index.shards[shard] for shard in self.index.shard[samples].tolist()]
        spans = zip(shards, start.tolist(), span.tolist())
        data = self.storage.read_many(list(itertools.compress(spans, is_one)))
        rows = zip(is_one, first.tolist(), (first + size).tolist(), crc.tolist())
        for number, (is_read, firsts, ends, crcs) in enumerate(rows):
            members = _cut(memoryview(next(data)), firsts, ends, crcs) if is_read else None
            if members is None:
                members = self._one_by_one(shards[number], kinds, offset[number], size[number], crcs)
            yield members

    def _one_by_one(
        self, shard: Shard, kinds: list[int], offsets: np.ndarray, sizes: np.ndarray, crcs: list[int]
    ) -> tuple[Member, ...] | BadSample:
        members: list[Member] = []
        for kind, offset, size, crc in zip(kinds, offsets.tolist(), sizes.tolist(), crcs):
            if size < 0:
                members.append(None)
                continue
            if size > MAX_BYTES[kind]:
                return BadSample(TOO_LARGE[kind], f"{size} bytes")
            data = self.storage.read(shard, offset, size)
            for _ in range(self.storage.retry.num_tries):  # a server, or the cache's disk, may have said it wrong
                if crc32(data) == crc:
                    break
                again = self.storage.read_again(shard, offset, size)
                if again is None:
                    return BadSample("crc_mismatch")
                data = again
            if crc32(data) != crc:
                return BadSample("crc_mismatch")
            members.append(memoryview(data))
        return tuple(members)


def _cut(data: memoryview, firsts: list[int], ends: list[int], crcs: list[int]) -> tuple[Member, ...] | None:
    """The members in what was read; None where one is not what its checksum says."""
    members: list[Member] = []
    for first, end, crc in zip(firsts, ends, crcs):
        if end < first:  # the sample has no such member
            members.append(None)
            continue
        member = data[first:end]
        if crc32(member) != crc:
            return None
        members.append(member)
    return tuple(members)
