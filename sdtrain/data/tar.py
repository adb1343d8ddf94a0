"""A strict walk through a tar file: ustar with plain members and a few pax keys, every checksum verified.

`tarfile` takes a damaged header for the end of the archive and follows sparse members, links and compression; over
untrusted shards it loses samples silently or fills the memory. This walk says what it met and where. It never goes
back, so that one pass over a file or a download does, and yields the sha256 of the whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_BLOCK = 512
_CHUNK = 1 << 20
_PAX_KEYS = {"path", "size", "mtime", "atime", "ctime", "uid", "gid", "uname", "gname"}
_MAX_PAX_BYTES = 64 * 1024
_PLAIN, _PAX, _FOLDER = (b"0", b"\0"), b"x", b"5"
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")  # int() would take signs and underscores too
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}


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


class Tape:
    """A file that is read once, from front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.position = file, hashlib.sha256(), 0

    def read(self, num_bytes: int) -> bytes:
        """Fewer bytes only at the end of the file."""
        data = self._file.read(num_bytes)
        while data and len(data) < num_bytes and (more := self._file.read(num_bytes - len(data))):
            data += more  # a download gives what it has
        self._digest.update(data)
        self.position += len(data)
        return data

    def skip_to(self, position: int) -> None:
        """Ends early at the end of the file."""
        while self.position < position and self.read(min(_CHUNK, position - self.position)):
            pass

    def sha256(self) -> str:
        """Of all bytes of the file, the rest of which is read now."""
        while self.read(_CHUNK):
            pass
        return self._digest.hexdigest()


def walk(tape: Tape, num_bytes: int) -> Iterator[Member]:
    """Every plain member in order, the tape standing at its first byte.

    Raises Defect where the archive is cut off, damaged, or holds what we refuse.
    """
    offset, pax = 0, {}
    while True:
        tape.skip_to(offset)
        header = tape.read(_BLOCK)
        if len(header) < _BLOCK:
            reason = "bad_header" if header and not offset else "cut_off"
            raise Defect(reason, offset, "the file ends without the two closing blocks")
        if not any(header):
            return _check_end(tape, offset, bool(pax))
        name, size, kind = _parse(header, offset)
        if kind != _PAX:
            size, name = int(pax.get("size", size)), pax.get("path", name)
        data = offset + _BLOCK
        if data + size > num_bytes:
            raise Defect("cut_off", offset, f"{name!r} wants {size} bytes, {num_bytes - data} are there")
        if kind == _PAX:
            if pax:
                raise Defect("refused_member", offset, "a pax header of a pax header")
            pax = _parse_pax(tape, size, offset)
        elif kind in _PLAIN:
            yield Member(name, data, size)
            pax = {}
        elif kind == _FOLDER and size == 0:
            pax = {}
        else:
            raise Defect("refused_member", offset, f"{name!r} has type {kind!r}; only plain files are read")
        offset = data + -(-size // _BLOCK) * _BLOCK


def _check_end(tape: Tape, offset: int, is_pax_open: bool) -> None:
    if is_pax_open:
        raise Defect("bad_header", offset, "the pax header before the closing blocks belongs to no member")
    if len(second := tape.read(_BLOCK)) < _BLOCK:
        raise Defect("cut_off", offset, "the second closing block is missing")
    while second:
        if any(second):
            raise Defect("data_after_end", offset, "there are bytes behind the closing blocks")
        second = tape.read(_CHUNK)


def _octal(field: bytes, offset: int) -> int:
    found = _OCTAL.fullmatch(field)
    if not found:
        raise Defect("bad_header", offset, "its numbers are not octal")
    return int(found[1] or b"0", 8)


def _parse(header: bytes, offset: int) -> tuple[str, int, bytes]:
    packed = next((kind for magic, kind in _COMPRESSED.items() if header.startswith(magic)), None)
    if packed and not offset:
        raise Defect("compressed", offset, f"it is a {packed} file; shards are read as they are, so unpack it")
    checksum, size = _octal(header[148:156], offset), _octal(header[124:136], offset)
    if sum(header) - sum(header[148:156]) + 8 * 32 != checksum:
        raise Defect("bad_header", offset, "its checksum is wrong")
    if header[257:262] != b"ustar":
        raise Defect("bad_header", offset, "it is not a ustar header")
    name = header[:100].rstrip(b"\0")
    prefix = header[345:500].rstrip(b"\0")
    if prefix and header[262:263] == b"\0":  # GNU headers have other things there
        name = prefix + b"/" + name
    return name.decode("utf-8", "backslashreplace"), size, header[156:157]


def _parse_pax(tape: Tape, size: int, offset: int) -> dict[str, str]:
    """Records of the form "length key=value\\n"."""
    if size > _MAX_PAX_BYTES:
        raise Defect("refused_member", offset, f"a pax header of {size} bytes")
    data, fields = tape.read(size), {}
    if not data:
        raise Defect("bad_header", offset, "an empty pax header")
    try:
        while data:
            length = _decimal(data[: data.index(b" ")].decode())
            record, data = data[:length].decode(), data[length:]
            if not record.endswith("\n") or len(record.encode()) != length:
                raise ValueError
            key, value = record[record.index(" ") + 1 : -1].split("=", 1)
            if key not in _PAX_KEYS:
                raise Defect("refused_member", offset, f"pax key {key!r}")
            if key in fields:
                raise ValueError
            fields[key] = value
        _decimal(fields.get("size", "0"))
        if "\0" in fields.get("path", ""):
            raise ValueError
    except ValueError:
        raise Defect("bad_header", offset, "its pax records are damaged") from None
    return fields


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 20:
        raise ValueError
    return int(text)
