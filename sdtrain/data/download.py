"""Shards read from front to back to be indexed: local files, or http(s) and s3 in large ranges, one ahead."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import BinaryIO

from sdtrain.data.address import check_address, is_remote, scheme_of, shown
from sdtrain.data.remote import Remote
from sdtrain.errors import ConfigError

_RANGE_BYTES = 8 << 20
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find_version(address: str) -> tuple[int, str]:
    """Bytes, and what changes when the file does: local mtime in ns, remote etag. Raises OSError or ConfigError."""
    if is_remote(address):
        return _remote().stat(address)
    status = os.stat(address)
    return status.st_size, str(status.st_mtime_ns)


def open_address(address: str, num_bytes: int, version: str) -> BinaryIO | Download:
    """For reading from front to back. Raises OSError or ConfigError."""
    if is_remote(address):
        return Download(_remote(), address, num_bytes, version)
    return open(address, "rb", buffering=1 << 20)


def expand(pattern: str, option: str) -> list[str]:
    """The addresses that a remote one with {00000..00123}, or with * in S3, stands for."""
    check_address(pattern, option)
    found = _NUMBERS.search(pattern)
    if found:
        first, last = found.groups()
        numbers = range(int(first), int(last) + 1)
        return [a for n in numbers for a in expand(pattern.replace(found[0], f"{n:0{len(first)}}", 1), option)]
    return _list_s3(pattern) if scheme_of(pattern) == "s3" and "*" in pattern else [pattern]


class Download:
    """A remote file of a known version, read once from front to back; the next range is on its way meanwhile."""

    def __init__(self, remote: Remote, address: str, num_bytes: int, version: str) -> None:
        self._pool = ThreadPoolExecutor(1)
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

    def __enter__(self) -> Download:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


@cache
def _remote() -> Remote:
    return Remote()


def _list_s3(pattern: str) -> list[str]:
    try:
        import s3fs
        from botocore.session import get_session
    except ImportError as error:
        raise ConfigError(f"{shown(pattern)}: reading it needs {error.name}: pip install 'sdtrain[remote]'") from error
    system = s3fs.S3FileSystem(anon=get_session().get_credentials() is None)
    return [f"s3://{path}" for path in sorted(system.glob(pattern.removeprefix("s3://")))]
