"""A strict walk through a tar file: ustar with plain members and a few pax keys, every checksum verified.

`tarfile` takes a damaged header for the end of the archive and follows sparse members, links and compression; over
untrusted shards it loses samples silently or fills the memory. This walk says what it met and where.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_BLOCK = 512
_PAX_KEYS = {"path", "size", "mtime", "atime", "ctime"}
_MAX_PAX_BYTES = 64 * 1024
_PLAIN, _PAX, _FOLDER = (b"0", b"\0"), b"x", b"5"


class Member(NamedTuple):
    """A plain file in the archive; its bytes lie at [offset, offset + size)."""

    name: str
    offset: int
    size: int


class Defect(Exception):
    """Why the walk stopped before the end of the archive."""

    def __init__(self, reason: str, offset: int, detail: str) -> None:
        super().__init__(f"{reason} at byte {offset}: {detail}")
        self.reason, self.offset = reason, offset


def walk(file: BinaryIO, num_bytes: int) -> Iterator[Member]:
    """Every plain member in order. Raises Defect where the archive is cut off, damaged, or holds what we refuse."""
    offset, pax = 0, {}
    while True:
        file.seek(offset)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            reason = "bad_header" if header and not offset else "cut_off"
            raise Defect(reason, offset, "the file ends without the two closing blocks")
        if not any(header):
            return _check_end(file, offset)
        name, size, kind = _parse(header, offset)
        if kind != _PAX:
            size, name = int(pax.get("size", size)), pax.get("path", name)
        data = offset + _BLOCK
        if data + size > num_bytes:
            raise Defect("cut_off", offset, f"{name!r} wants {size} bytes, {num_bytes - data} are there")
        if kind == _PAX:
            pax = _parse_pax(file, size, offset)
        elif kind in _PLAIN:
            yield Member(name, data, size)
            pax = {}
        elif kind == _FOLDER and size == 0:
            pax = {}
        else:
            raise Defect("refused_member", offset, f"{name!r} has type {kind!r}; only plain files are read")
        offset = data + -(-size // _BLOCK) * _BLOCK


def _check_end(file: BinaryIO, offset: int) -> None:
    if len(second := file.read(_BLOCK)) < _BLOCK:
        raise Defect("cut_off", offset, "the second closing block is missing")
    while second:
        if any(second):
            raise Defect("data_after_end", offset, "there are bytes behind the closing blocks")
        second = file.read(1 << 20)


def _parse(header: bytes, offset: int) -> tuple[str, int, bytes]:
    try:
        checksum = int(header[148:156].strip(b" \0"), 8)
        size = int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        raise Defect("bad_header", offset, "its numbers are not octal") from None
    if sum(header) - sum(header[148:156]) + 8 * 32 != checksum or size < 0:
        raise Defect("bad_header", offset, "its checksum is wrong")
    if header[257:262] != b"ustar":
        raise Defect("bad_header", offset, "it is not a ustar header")
    name = header[:100].rstrip(b"\0")
    prefix = header[345:500].rstrip(b"\0")
    if prefix and header[262:263] == b"\0":  # GNU headers have other things there
        name = prefix + b"/" + name
    return name.decode("utf-8", "backslashreplace"), size, header[156:157]


def _parse_pax(file: BinaryIO, size: int, offset: int) -> dict[str, str]:
    """Records of the form "length key=value\\n"."""
    if size > _MAX_PAX_BYTES:
        raise Defect("refused_member", offset, f"a pax header of {size} bytes")
    data, fields = file.read(size), {}
    try:
        while data:
            length = int(data[: data.index(b" ")])
            record, data = data[:length].decode(), data[length:]
            if length <= 0 or not record.endswith("\n"):
                raise ValueError
            key, value = record[record.index(" ") + 1 : -1].split("=", 1)
            if key not in _PAX_KEYS:
                raise Defect("refused_member", offset, f"pax key {key!r}")
            fields[key] = value
        if int(fields.get("size", 0)) < 0 or "\0" in fields.get("path", ""):
            raise ValueError
    except ValueError:
        raise Defect("bad_header", offset, "its pax records are damaged") from None
    return fields
