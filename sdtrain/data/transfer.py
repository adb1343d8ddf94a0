"""Shards read once from front to back, their size unknown beforehand: files, http(s), s3, and pipes where allowed."""

from __future__ import annotations

import http.client
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from sdtrain.data.address import check_address, is_metadata_service, scheme_of, shown
from sdtrain.data.download import find_version, open_address
from sdtrain.data.retry import Retry
from sdtrain.errors import ConfigError

_PIPE_END_SECONDS = 10
_AGAIN = (408, 425, 429)  # and all from 500 on

BROKEN = (OSError, http.client.HTTPException)  # what reading a shard may raise


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
        return error.code < 500 and error.code not in _AGAIN
    return isinstance(error, _Changed)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To http(s) only, never back from https to http, and to no metadata service."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        here, there = scheme_of(req.full_url), scheme_of(newurl)
        if there not in ({"https"} if here == "https" else {"http", "https"}):
            raise ConfigError(f"data: {shown(req.full_url)} redirects to '{shown(newurl)[:80]}'; refused")
        _check_host(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_host(address: str) -> None:
    """Neither it nor what its name stands for may be a metadata service."""
    check_address(address)
    parts = urlsplit(address)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or parts.scheme)
    except OSError:
        return  # a proxy may know the name; or connecting says that nobody does
    if any(is_metadata_service(entry[4][0]) for entry in found):
        raise ConfigError(f"data: {parts.hostname} is a metadata service or a link-local address; refused")
