"""Shards to be indexed, read from front to back: local files, and remote ones in large ranges of a known version, one
ahead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import BinaryIO

from sdtrain.data.address import check_address, is_remote, scheme_of
from sdtrain.data.remote import Remote
from sdtrain.data.retry import Retry

_RANGE_BYTES = 8 << 20
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find_version(address: str, retry: Retry | None = None) -> tuple[int, str]:
    """Bytes, and what changes when the file does: local mtime in ns, remote etag. Raises OSError or ConfigError."""
    if is_remote(address):
        return _remote(retry).stat(address)
    status = os.stat(address)
    return status.st_size, str(status.st_mtime_ns)


def open_address(address: str, num_bytes: int, version: str, retry: Retry | None = None) -> BinaryIO | Download:
    """For reading from front to back. Raises OSError or ConfigError."""
    if is_remote(address):
        return Download(_remote(retry), address, num_bytes, version)
    return open(address, "rb", buffering=1 << 20)


def expand(pattern: str, option: str) -> list[str]:
    """The addresses that one with {00000..00123}, or with * in S3, stands for."""
    check_address(pattern, option)
    found = _NUMBERS.search(pattern)
    if found:
        first, last = found.groups()
        numbers = range(int(first), int(last) + 1)
        return [a for n in numbers for a in expand(pattern.replace(found[0], f"{n:0{len(first)}}", 1), option)]
    return _remote().list(pattern) if scheme_of(pattern) == "s3" and "*" in pattern else [pattern]


class Download:
    """A remote file of a known version, read once from front to back; the next range is on its way meanwhile."""

    def __init__(self, remote: Remote, address: str, num_bytes: int, version: str) -> None:
        self._pool, self._remote, self._retries_before = ThreadPoolExecutor(1), remote, remote.num_retries
        starts = range(0, num_bytes, _RANGE_BYTES)
        spans = [(start, min(start + _RANGE_BYTES, num_bytes)) for start in starts]
        self._ranges = self._fetch(lambda start, end: remote.fetch(address, start, end, num_bytes, version), spans)
        self._data, self._place = b"", 0

    def _fetch(self, fetch: Callable[[int, int], bytes], spans: list[tuple[int, int]]) -> Iterator[bytes]:
        ahead = None
        for span in spans:
            ready, ahead = ahead, self._pool.submit(fetch, *span)
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()

    def read(self, num_bytes: int = -1) -> bytes:
        """At least a byte, unless the file ends or none is wanted; all that is left where num_bytes is negative."""
        if num_bytes < 0:
            return self._data[self._place :] + b"".join(self._ranges)
        if self._place == len(self._data):
            self._data, self._place = next(self._ranges, b""), 0
        data = self._data[self._place : self._place + num_bytes]
        self._place += len(data)
        return data

    @property
    def num_retries(self) -> int:
        """Tries that failed since it was opened."""
        return self._remote.num_retries - self._retries_before

    def __enter__(self) -> Download:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


@cache
def _remote(retry: Retry | None = None) -> Remote:
    return Remote(retry)
