"""Shards read once from front to back, from files, http(s), s3, and commands where they are allowed: what breaks is
opened again, and goes on from where it broke.
"""

from __future__ import annotations

import http.client
import io
import os
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

from zlib_ng.zlib_ng import crc32

from sdtrain.data.address import check_address, check_numbers, follow, scheme_of, shown
from sdtrain.data.download import Download, find_version, open_address
from sdtrain.data.retry import Retry, may_pass

BROKEN = (OSError, http.client.HTTPException)  # what reading from `open_once` may raise
_COMMAND_END_SECONDS = 10
_SKIP_BYTES = 1 << 20
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@contextmanager
def open_once(address: str, retry: Retry, timeout_seconds: float = 30.0) -> Iterator[Steady | Download]:
    """The shard's bytes, to be read to their end. Raises one of BROKEN, or ConfigError for what is refused."""
    scheme = scheme_of(address)
    if scheme == "s3":
        with open_address(address, *find_version(address, retry), retry) as file:
            yield file
        return
    if scheme == "pipe":
        source: Steady = Command(address.partition(":")[2], retry)
    else:
        source = Transfer(address, retry, timeout_seconds) if scheme else LocalFile(address, retry)
    with closing(source) as file:
        yield file


class Steady(ABC):
    """Bytes that are asked for again where they break off, after a wait.

    Args:
        retry: of each break.
    """

    def __init__(self, retry: Retry) -> None:
        self.retry, self.num_retries = retry, 0
        self._position, self._crc, self._file = 0, 0, None

    def read(self, num_bytes: int) -> bytes:
        """At least a byte, unless the source ends or none is wanted."""
        if not num_bytes:
            return b""
        waits = self.retry.waits()
        while True:
            try:
                self._file = self._file or self._open()
                data = self._file.read1(num_bytes)
                if not data:
                    self._check_end()
            except BROKEN as error:
                self.close()
                wait = None if _is_final(error) else next(waits, None)
                if wait is None:
                    raise
                self.num_retries += 1
                time.sleep(wait)
            else:
                self._position += len(data)
                self._crc = crc32(data, self._crc)
                return data

    def close(self) -> None:
        """Ends the connection."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    @abstractmethod
    def _open(self) -> Any:  # noqa: ANN401  a file with `read1`
        """From `_position` on."""

    @abstractmethod
    def _check_end(self) -> None:
        """Raises one of BROKEN where the end came too early."""

    def _skip(self, file: Any) -> None:  # noqa: ANN401  a file with `read1`
        """Past all that was read before, which must be the same."""
        left, crc = self._position, 0
        while left:
            data = file.read1(min(left, _SKIP_BYTES))
            if not data:
                raise OSError("it broke off before the place where it had broken off")
            left, crc = left - len(data), crc32(data, crc)
        if crc != self._crc:
            raise Changed("it begins with other bytes than before")


class LocalFile(Steady):
    """A file, on a disk that may be a network's and gone for a moment."""

    def __init__(self, path: str, retry: Retry) -> None:
        super().__init__(retry)
        self.path, self._version = path, None

    def _open(self) -> io.BufferedReader:
        file = open(self.path, "rb", buffering=1 << 20)  # noqa: SIM115  closed by `close`
        try:
            status = os.fstat(file.fileno())
            version = (status.st_size, status.st_mtime_ns)
            if self._version not in (None, version):
                raise Changed(f"{self.path} changed while it was read")
            self._version = version
            file.seek(self._position)
        except BaseException:
            file.close()
            raise
        return file

    def _check_end(self) -> None:
        if self._position < self._version[0]:
            raise Changed(f"{self.path} became shorter while it was read")


class Command(Steady):
    """What a command writes. It is run without a shell; `pipe:sh -c '...'` asks for one.

    One that fails is run again, and must begin with the bytes that it began with before.
    """

    def __init__(self, command: str, retry: Retry) -> None:
        super().__init__(retry)
        self.command = command
        self._process: subprocess.Popen | None = None

    def close(self) -> None:
        """Ends the command."""
        super().close()
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _open(self) -> Any:  # noqa: ANN401  its output
        words = shlex.split(self.command)
        self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._file = self._process.stdout
        self._skip(self._file)
        return self._file

    def _check_end(self) -> None:
        try:
            code = self._process.wait(_COMMAND_END_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise OSError("the command does not end") from error
        if code:
            raise OSError(f"the command ends with {code}")


class Transfer(Steady):
    """An object over http(s), from any server: one that answers no ranges is asked for all of it again after a break.

    Args:
        address: of the object.
        retry: of each break; a silence of `timeout_seconds` is one.
    """

    def __init__(self, address: str, retry: Retry, timeout_seconds: float) -> None:
        super().__init__(retry)
        self.address, self.timeout_seconds = address, timeout_seconds
        self._opener = urllib.request.build_opener(_Redirects)
        self._size, self._version = -1, ""

    def _check_end(self) -> None:
        if self._position < self._size:
            raise http.client.IncompleteRead(b"", self._size - self._position)

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
            raise Changed(f"{shown(self.address)} changed while it was read")
        if start not in (0, self._position):
            raise OSError(f"the server sent bytes from {start} on, not from {self._position}")
        self._version, self._size = version, size
        if start < self._position:
            self._skip(response)


class Changed(OSError):
    """It is not what it was when it broke off."""


def _is_final(error: BaseException) -> bool:
    """Whether it would be the same next time."""
    if isinstance(error, urllib.error.HTTPError):
        return not may_pass(error.code)
    return isinstance(error, (Changed, *_FINAL))


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
