"""Shards read from front to back: local files, http(s), s3, and pipes where they are allowed.

To be indexed, in large ranges of a known version, one ahead; or once, their size unknown beforehand, from any server.
"""

from __future__ import annotations

import http.client
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from sdtrain.data.address import check_address, check_numbers, follow, is_remote, scheme_of, shown
from sdtrain.data.remote import Remote
from sdtrain.data.retry import Retry, may_pass

_RANGE_BYTES = 8 << 20
_PIPE_END_SECONDS = 10
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")


BROKEN = (OSError, http.client.HTTPException)  # what reading from `open_once` may raise


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
    return _remote().list(pattern) if scheme_of(pattern) == "s3" and "*" in pattern else [pattern]


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


@contextmanager
def open_once(address: str, retry: Retry, timeout_seconds: float = 30.0) -> Iterator[BinaryIO | Any]:
    """The shard's bytes, to be read to their end. Raises one of BROKEN, or ConfigError for what is refused."""
    scheme = scheme_of(address)
    if scheme == "pipe":
        with _piped(address.partition(":")[2]) as file:
            yield file
    elif scheme in ("http", "https"):
        with closing(Transfer(address, retry, timeout_seconds)) as file:
            yield file
    else:
        version = find_version(address) if scheme else (0, "")  # of s3; a file's is of no use here
        with open_address(address, *version) as file:
            yield file


@contextmanager
def _piped(command: str) -> Iterator[BinaryIO]:
    """What a command writes. It is run without a shell; `pipe:sh -c '...'` asks for one."""
    process = subprocess.Popen(shlex.split(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        yield process.stdout
        if code := process.wait(_PIPE_END_SECONDS):
            raise OSError(f"the command ends with {code}")
    except subprocess.TimeoutExpired as error:
        raise OSError("the command does not end") from error
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Transfer:
    """An object over http(s), from any server: one that answers no ranges is asked for all of it again after a break.

    Args:
        address: of the object.
        retry: of each break; a silence of `timeout_seconds` is one.
    """

    def __init__(self, address: str, retry: Retry, timeout_seconds: float) -> None:
        self.address, self.retry, self.timeout_seconds = address, retry, timeout_seconds
        self._opener = urllib.request.build_opener(_Redirects)
        self._response: http.client.HTTPResponse | None = None
        self._position, self._size, self._version = 0, -1, ""

    def read(self, num_bytes: int) -> bytes:
        """At least a byte, unless the object ends or none is wanted."""
        if not num_bytes:
            return b""
        waits = self.retry.waits()
        while True:
            try:
                self._response = self._response or self._open()
                data = self._response.read1(num_bytes)
                if not data and self._position < self._size:
                    raise http.client.IncompleteRead(b"", self._size - self._position)
            except BROKEN as error:
                self.close()
                wait = None if _is_final(error) else next(waits, None)
                if wait is None:
                    raise
                time.sleep(wait)
            else:
                self._position += len(data)
                return data

    def close(self) -> None:
        """Ends the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def _open(self) -> http.client.HTTPResponse:
        _check_host(self.address)
        headers = {"Accept-Encoding": "identity"}
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
        request = urllib.request.Request(self.address, headers=headers)
        response = self._opener.open(request, timeout=self.timeout_seconds)
        try:
            self._check(response)
        except BaseException:
            response.close()
            raise
        return response

    def _check(self, response: http.client.HTTPResponse) -> None:
        """The same object as before, from where it broke off."""
        said = response.headers
        version = said.get("ETag") or said.get("Last-Modified") or ""
        start, size = 0, int(said.get("Content-Length", -1))
        if response.status == 206:
            span, _, total = said.get("Content-Range", "").removeprefix("bytes ").partition("/")
            start, size = int(span.partition("-")[0] or 0), int(total) if total.isdigit() else self._size
        if self._position and (version, size) != (self._version, self._size):
            raise _Changed(f"{shown(self.address)} changed while it was read")
        if start not in (0, self._position):
            raise OSError(f"the server sent bytes from {start} on, not from {self._position}")
        self._version, self._size = version, size
        while start < self._position:
            skipped = response.read1(min(self._position - start, 1 << 20))
            if not skipped:
                raise OSError("the transfer broke off before the place where it had broken off")
            start += len(skipped)


class _Changed(OSError):
    pass


def _is_final(error: BaseException) -> bool:
    """Whether it would be the same next time."""
    if isinstance(error, urllib.error.HTTPError):
        return not may_pass(error.code)
    return isinstance(error, _Changed)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_host(follow(req.full_url, newurl))
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_host(address: str) -> None:
    """Neither it nor what its name stands for may be a metadata service."""
    check_address(address)
    parts = urlsplit(address)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or parts.scheme)
    except OSError:
        return  # a proxy may know the name; or connecting says that nobody does
    check_numbers(parts.hostname, [entry[4][0] for entry in found])
