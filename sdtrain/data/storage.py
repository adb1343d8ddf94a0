"""Bytes of shards by offset: from local files, or from http(s) and s3 through a cache on the node's disk."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.data.address import is_remote
from sdtrain.data.cache import Cache
from sdtrain.data.remote import Remote
from sdtrain.data.retry import Retry
from sdtrain.errors import ConfigError

if TYPE_CHECKING:
    from sdtrain.data.shard_index import Shard

_MAX_OPEN_FILES = 128
_NUM_AT_ONCE = 16  # ranges in flight


class Storage:
    """Reads parts of shards. Each process has its own descriptors, connections and `counts`; the cache is the node's.

    Args:
        cache_dir: where parts of remote shards are kept; None keeps none, and fetches just the samples' own bytes.
        cache_shard_bytes: all that is kept there stays below this.
        retry: of errors that may pass; after the last try they end the run.
        timeout_seconds: of a connection and of a silence.
        part_bytes: remote shards are fetched and kept in parts of this size.
    """

    def __init__(
        self,
        cache_dir: str | Path | None = None,
        cache_shard_bytes: int = 64 << 30,
        retry: Retry | None = None,
        timeout_seconds: float = 30.0,
        part_bytes: int = 4 << 20,
    ) -> None:
        self.retry = retry or Retry()
        self.remote = Remote(self.retry, timeout_seconds)
        if cache_dir is not None and cache_shard_bytes < 16 * part_bytes:
            raise ConfigError(
                f"data.reader.storage.cache_shard_bytes: {cache_shard_bytes} is too little for parts of {part_bytes}; "
                f"give {16 * part_bytes} or more, or set cache_dir=null"
            )
        self.cache = None if cache_dir is None else Cache(cache_dir, cache_shard_bytes)
        self.part_bytes = part_bytes
        self._start()

    def _start(self) -> None:
        self.counts: Counter[str] = Counter()  # read_bytes, fetched_bytes, cache_hits, retries
        self._retries_told = self.remote.num_retries
        self._files: OrderedDict[str, int] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def enter_worker(self) -> None:
        """From here on this is a forked worker's copy, with descriptors and threads of its own."""
        self.close()
        self._start()

    def close(self) -> None:
        """Closes the descriptors; they open again when they are needed."""
        while self._files:
            os.close(self._files.popitem()[1])

    def take_counts(self) -> Counter[str]:
        """What was counted since this was last asked."""
        with self._lock:
            counts, self.counts = self.counts, Counter()
        counts["retries"] += self.remote.num_retries - self._retries_told
        self._retries_told = self.remote.num_retries
        return counts

    def __getstate__(self) -> dict[str, Any]:
        own = ("counts", "_files", "_pool", "_lock")  # one process's
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        """Some bytes of a shard, all of them.

        Raises:
            ConfigError: where the shard is not what was indexed, or cannot be read in all tries.
        """
        return next(self.read_many([(shard, offset, size)]))

    def read_many(self, wanted: Sequence[tuple[Shard, int, int]]) -> Iterator[bytes]:
        """(shard, offset, size) each, in order. Remote ones are fetched at the same time, local ones as they are asked
        for, so that a sample is still in the processor's cache when it is looked at.
        """
        away = [shard.address not in self._files and is_remote(shard.address) for shard, _, _ in wanted]
        fetch = self._threads().submit if sum(away) > 1 else _Now
        coming = [fetch(self._read_remote, *span) if is_away else None for is_away, span in zip(away, wanted)]
        for future, span in zip(coming, wanted):
            data = self._read_file(*span) if future is None else future.result()
            self.counts["read_bytes"] += len(data)
            yield data

    def read_again(self, shard: Shard, offset: int, size: int) -> bytes | None:
        """The same from where it came from, past the cache; None for a local shard, which has nothing else to say."""
        if not is_remote(shard.address):
            return None
        if self.cache:
            for number in range(offset // self.part_bytes, (offset + size - 1) // self.part_bytes + 1):
                self.cache.drop(self.cache.path(shard.address, shard.version, number))
        return self._fetch(shard, offset, offset + size)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_NUM_AT_ONCE, "sdtrain-fetch")
        return self._pool

    def _read_file(self, shard: Shard, offset: int, size: int) -> bytes:
        address = shard.address
        try:
            if address in self._files:
                self._files.move_to_end(address)
            else:
                self._open(shard)
            data = os.pread(self._files[address], size, offset)
        except OSError:
            data = self._try_file(shard, offset, size)
        if len(data) != size:
            raise ConfigError(f"data: shard_changed: {address} is shorter than it was; index it again")
        return data

    def _try_file(self, shard: Shard, offset: int, size: int) -> bytes:
        """A network disk may be gone for a moment; a file that is not there is not awaited."""
        for wait in (*self.retry.waits(), None):
            self.close()
            try:
                self._open(shard)
                return os.pread(self._files[shard.address], size, offset)
            except OSError as error:
                if wait is None or isinstance(error, FileNotFoundError | PermissionError):
                    raise ConfigError(f"data: {shard.address}: {error.strerror}") from error
                self.counts["retries"] += 1
                time.sleep(wait)
        raise AssertionError

    def _open(self, shard: Shard) -> None:
        file = self._files[shard.address] = os.open(shard.address, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(file)
        if status.st_size != shard.num_bytes or shard.version not in ("", str(status.st_mtime_ns)):
            raise ConfigError(f"data: shard_changed: {shard.address} changed after it was indexed; index it again")
        if len(self._files) > _MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])

    def _read_remote(self, shard: Shard, offset: int, size: int) -> bytes:
        if self.cache is None:
            return self._fetch(shard, offset, offset + size)
        parts, end = [], offset + size
        for number in range(offset // self.part_bytes, (end - 1) // self.part_bytes + 1):
            first = number * self.part_bytes
            last = min(first + self.part_bytes, shard.num_bytes)
            parts.append(self._read_part(shard, number, (first, last), (max(offset, first), min(end, last))))
        return b"".join(parts)

    def _read_part(self, shard: Shard, number: int, part: tuple[int, int], span: tuple[int, int]) -> bytes:
        path = self.cache.path(shard.address, shard.version, number)
        (first, last), (start, end) = part, span
        for _ in range(2):
            kept = self.cache.read(path, last - first, start - first, end - first)
            if kept is not None:
                with self._lock:
                    self.counts["cache_hits"] += 1
                return kept
            data = self.cache.fill(path, last - first, lambda: self._fetch(shard, first, last))
            if data is not None:
                return data[start - first : end - first]
        return self._fetch(shard, start, end)  # another process kept it, and a third dropped it

    def _fetch(self, shard: Shard, start: int, end: int) -> bytes:
        data = self.remote.fetch(shard.address, start, end, shard.num_bytes, shard.version)
        with self._lock:
            self.counts["fetched_bytes"] += len(data)
        return data


class _Now:
    """A future of what is not worth a thread."""

    def __init__(self, function: Callable[..., bytes], *arguments: Any) -> None:
        self.result = partial(function, *arguments)
