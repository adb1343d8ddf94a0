"""Ranges of objects over http(s) and s3: bounded in time and size, tried again, never of another version.

All runs on one event loop in a thread of its own; `fetch` may be called from many threads at once. After a fork, and
after pickling, a process starts its own.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple

from sdtrain.data.address import check_numbers, follow, scheme_of, shown
from sdtrain.data.retry import Retry, may_pass
from sdtrain.errors import ConfigError

_SLOWEST_BYTES_PER_SECOND = 64 * 1024  # what comes slower than this has stalled
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_CHANGED = (412, 416)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)$")


class Transient(Exception):
    """What may go well next time."""


class Changed(Exception):
    """The object is not the one that was indexed."""


class _Answer(NamedTuple):
    data: bytes
    num_bytes: int  # of the whole object
    versions: tuple[str, ...]


class Remote:
    """Reads parts of remote objects.

    Args:
        retry: after which error is fatal.
        timeout_seconds: of a connection, and of a silence; a try has this and what the slowest rate allows.
    """

    def __init__(self, retry: Retry | None = None, timeout_seconds: float = 30.0) -> None:
        self.retry, self.timeout_seconds = retry or Retry(), timeout_seconds
        self.num_retries = 0
        self._clients: list[_Client] = []  # the last is this process's; those of its parents keep their sockets open
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_clients": [], "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def fetch(self, address: str, start: int, end: int, num_bytes: int, version: str) -> bytes:
        """Bytes [start, end) of an object that had this size and version when it was indexed.

        Raises:
            ConfigError: where it changed, is refused, or cannot be read in all tries.
        """
        answer = self._run(address, start, end)
        if answer.num_bytes != num_bytes or (version and version.strip('"') not in answer.versions):
            raise ConfigError(
                f"data: shard_changed: {shown(address)} is not what was indexed ({num_bytes} bytes, version {version}; "
                f"now {answer.num_bytes}, {' '.join(answer.versions)}); index it again"
            )
        return answer.data

    def stat(self, address: str) -> tuple[int, str]:
        """An object's size and version: its ETag, or else its date; "" where the server says neither."""
        answer = self._run(address, 0, 1)
        return answer.num_bytes, next(iter(answer.versions), "")

    def list(self, pattern: str) -> list[str]:
        """The addresses of the S3 objects that one with * stands for, sorted."""
        client = self._here()
        return asyncio.run_coroutine_threadsafe(client.list(pattern), client.loop).result()

    def _run(self, address: str, start: int, end: int) -> _Answer:
        client = self._here()
        return asyncio.run_coroutine_threadsafe(self._tried(client, address, start, end), client.loop).result()

    def _here(self) -> _Client:
        with self._lock:
            if not self._clients or self._clients[-1].pid != os.getpid():
                self._clients.append(_Client(self.timeout_seconds))
            return self._clients[-1]

    async def _tried(self, client: _Client, address: str, start: int, end: int) -> _Answer:
        waits = self.retry.waits()
        while True:
            try:
                async with asyncio.timeout(self.timeout_seconds + (end - start) / _SLOWEST_BYTES_PER_SECOND):
                    return await client.range(address, start, end)
            except Changed as error:
                raise ConfigError(f"data: shard_changed: {shown(address)}: {error}; index it again") from error
            except (Transient, OSError, EOFError, *client.errors) as error:
                if (wait := next(waits, None)) is None:
                    said = re.sub(r"\?\S*", "?...", str(error) or type(error).__name__)  # a query may be secret
                    tries = f"bytes {start} to {end}, tried {self.retry.num_tries} times"
                    raise ConfigError(f"data: {shown(address)}: {said} ({tries})") from error
            self.num_retries += 1
            await asyncio.sleep(wait)


class _Client:
    """One process's loop and connections."""

    def __init__(self, timeout_seconds: float) -> None:
        try:
            import aiohttp
            import s3fs
            from botocore.exceptions import BotoCoreError
        except ImportError as error:
            raise ConfigError(
                f"data.shards: http(s) and s3 need the extra 'remote' ({error}): pip install 'sdtrain[remote]'"
            ) from None
        self.pid, self._timeout_seconds = os.getpid(), timeout_seconds
        self.errors = (aiohttp.ClientError, BotoCoreError)
        self.loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_serve, args=(self.loop,), name="sdtrain-remote", daemon=True)
        thread.start()
        self._http = self._s3 = None
        self._s3_lock = asyncio.Lock()
        self._s3fs = s3fs
        self._closing: dict[str, Callable[[], Awaitable[Any]]] = {}
        weakref.finalize(self, _close, self.pid, self.loop, thread, self._closing)

    async def range(self, address: str, start: int, end: int) -> _Answer:
        """One try."""
        return await (self._of_s3 if scheme_of(address) == "s3" else self._of_http)(address, start, end)

    async def list(self, pattern: str) -> list[str]:
        """Of S3."""
        system = await self._s3_system()
        return [f"s3://{path}" for path in sorted(await system._glob(pattern.removeprefix("s3://")))]

    async def _of_http(self, address: str, start: int, end: int) -> _Answer:
        session, url = self._http_session(), address
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        for _ in range(_MAX_REDIRECTS + 1):
            async with session.get(url, headers=headers, allow_redirects=False) as answer:
                if answer.status in _REDIRECTS:
                    url = follow(url, answer.headers.get("Location", ""))
                    continue
                _check_status(address, answer.status, answer.reason or "")
                num_bytes = _check_range(answer.headers.get("Content-Range", ""), start, end)
                data = await answer.content.readexactly(end - start)
                if not answer.content.at_eof() and await answer.content.read(1):
                    raise Transient("the server sent more than was asked for")
                versions = (answer.headers.get("ETag"), answer.headers.get("Last-Modified"))
                return _Answer(data, num_bytes, tuple(version.strip('"') for version in versions if version))
        raise ConfigError(f"data: {shown(address)}: more than {_MAX_REDIRECTS} redirects")

    async def _of_s3(self, address: str, start: int, end: int) -> _Answer:
        from botocore.exceptions import ClientError

        bucket, _, key = address[len("s3://") :].partition("/")
        try:
            client = (await self._s3_system()).s3
            answer = await client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
        except ClientError as error:
            status, said = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]
            _check_status(address, status, said.get("Code", ""))
            raise Transient(said.get("Code", "an error without a code")) from error
        data, most = bytearray(), end - start + 1
        async with answer["Body"] as body:
            while len(data) < most and (part := await body.read(most - len(data))):  # a part is what has arrived
                data += part
        if len(data) != end - start:
            raise Transient(f"the server sent {len(data)} bytes, not {end - start}")
        num_bytes = _check_range(answer.get("ContentRange", ""), start, end)
        return _Answer(bytes(data), num_bytes, (answer["ETag"].strip('"'),))

    def _http_session(self) -> Any:
        if self._http is None:
            import aiohttp

            class Resolver(aiohttp.ThreadedResolver):
                """A name may not stand for a metadata service either."""

                async def resolve(self, host: str, *arguments: Any, **options: Any) -> list[Any]:
                    found = await super().resolve(host, *arguments, **options)
                    check_numbers(host, [entry["host"] for entry in found])
                    return found

            wait = self._timeout_seconds
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=Resolver(), limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=wait, sock_read=wait),
                auto_decompress=False,
                trust_env=True,
            )
            self._closing["http"] = self._http.close
        return self._http

    async def _s3_system(self) -> Any:
        async with self._s3_lock:
            if self._s3 is None:
                from aiobotocore.session import get_session

                wait = self._timeout_seconds
                options = {"connect_timeout": wait, "read_timeout": wait, "retries": {"total_max_attempts": 1}}
                session = get_session()
                system = self._s3fs.S3FileSystem(
                    session=session,
                    anon=await session.get_credentials() is None,  # a public bucket needs none
                    config_kwargs={**options, "max_pool_connections": 64},
                    asynchronous=True,
                    loop=self.loop,
                    skip_instance_cache=True,
                )
                self._closing["s3"] = (await system.set_session()).close
                self._s3 = system
        return self._s3


_CREDENTIALS = (
    "access denied; the credentials come from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, "
    "AWS_PROFILE, or the machine's role, the endpoint from AWS_ENDPOINT_URL"
)


def _check_status(address: str, status: int, reason: str) -> None:
    if status == 206:
        return
    if may_pass(status):
        raise Transient(f"the server answers {status} {reason}")
    if status in _CHANGED:
        raise Changed(f"the server answers {status} {reason}")
    if status in (401, 403) or reason in ("ExpiredToken", "InvalidToken"):
        told = _CREDENTIALS if scheme_of(address) == "s3" else "access denied"
        raise ConfigError(f"data: {shown(address)}: {told} ({status} {reason})")
    if status == 200:
        raise ConfigError(f"data: {shown(address)}: the server answers no ranges; use one that does")
    raise ConfigError(f"data: {shown(address)}: the server answers {status} {reason}")


def _check_range(said: str, start: int, end: int) -> int:
    """The size of the whole object."""
    found = _CONTENT_RANGE.match(said)
    if not found:
        raise Transient(f"the server says no size ({said[:40]!r})")
    first, last, num_bytes = map(int, found.groups())
    if num_bytes < end:
        raise Changed(f"it has {num_bytes} bytes now")
    if (first, last) != (start, end - 1):
        raise Transient(f"the server sent bytes {first} to {last + 1}, not {start} to {end}")
    return num_bytes


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _close(
    pid: int,
    loop: asyncio.AbstractEventLoop,
    thread: threading.Thread,
    closing: dict[str, Callable[[], Awaitable[Any]]],
) -> None:
    if pid != os.getpid():  # a fork's copy: the connections are the parent's
        return

    async def close() -> None:
        for one in closing.values():
            with suppress(Exception):  # the process is ending; the system closes what is left
                await one()
        loop.call_soon(loop.stop)  # after this is known to be done

    if not loop.is_running():
        return
    closed = asyncio.run_coroutine_threadsafe(close(), loop)
    if threading.current_thread() is not thread:  # the loop itself may drop the last reference, and cannot wait
        with suppress(TimeoutError):
            closed.result(timeout=2)
        thread.join(timeout=2)
