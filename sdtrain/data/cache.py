"""A bounded cache of parts of remote shards on a node's disk, shared by all its processes.

A part is a file named by the sha256 of the shard's whole address and version, and its number. It appears by a rename
when it is whole. Who holds the lock on its draft downloads it, the others wait; the kernel lets go of a killed
process's lock, and the next one writes the draft anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SPARE = 10  # eviction makes room for a tenth, so that it does not come with every part


class Cache:
    """Parts by (address, version, number), the least recently used dropped first.

    Args:
        directory: on the node's own disk.
        max_bytes: all parts together stay below this.
    """

    def __init__(self, directory: str | Path, max_bytes: int) -> None:
        self.directory, self.max_bytes = Path(directory).expanduser(), max_bytes
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._total = self.directory / "total"

    def path(self, address: str, version: str, number: int) -> Path:
        """Where a part lies, or would."""
        name = hashlib.sha256(f"{address}\0{version}".encode()).hexdigest()
        return self.directory / f"{name}.{number}"

    def read(self, path: Path, num_bytes: int, start: int, end: int) -> bytes | None:
        """Bytes [start, end) of a part of this size, or None where it is not there."""
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            if os.fstat(file).st_size != num_bytes:
                return None
            os.utime(file)
            data = os.pread(file, end - start, start)
        except OSError:
            return None
        finally:
            os.close(file)
        return data if len(data) == end - start else None

    def fill(self, path: Path, num_bytes: int, download: Callable[[], bytes]) -> bytes | None:
        """Downloads a part and keeps it; None where another process has done so meanwhile.

        A disk that is full or does not lock makes no error: the part is not kept.
        """
        draft, data = path.with_name(f"{path.name}.draft"), None
        try:
            with _locked(draft) as file:
                try:
                    if path.exists():
                        return None
                    data = download()
                    if self._make_room(num_bytes):
                        os.ftruncate(file, 0)
                        _write(file, data)
                        os.replace(draft, path)
                finally:
                    draft.unlink(missing_ok=True)
        except OSError:
            return download() if data is None else data
        return data

    def drop(self, path: Path) -> None:
        """Forgets a part whose bytes turned out wrong."""
        path.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> bool:
        """Counts a new part in, and evicts where the sum of all processes' parts would pass the limit."""
        if num_bytes > self.max_bytes // _SPARE:
            return False
        with _locked(self._total) as file:
            total = int(os.pread(file, 20, 0) or 0) + num_bytes
            if total > self.max_bytes:
                total = self._evict(self.max_bytes - self.max_bytes // _SPARE - num_bytes) + num_bytes
            os.pwrite(file, b"%20d" % total, 0)
        return True

    def _evict(self, keep_bytes: int) -> int:
        """Drops the parts that were not used for longest, until so many bytes are left."""
        found, total = [], 0
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name == self._total.name:
                    continue
                with suppress(FileNotFoundError):  # another process evicts too
                    status = entry.stat()
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
                    total += status.st_size
        for _, num_bytes, path in sorted(found):
            if total <= keep_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= num_bytes
        return total


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file open and locked, and still the one of this name."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_named(file, path):
                yield file
                return
        finally:
            os.close(file)


def _is_named(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _write(file: int, data: bytes) -> None:
    rest, at = memoryview(data), 0
    while rest:
        at += (done := os.pwrite(file, rest, at))
        rest = rest[done:]
