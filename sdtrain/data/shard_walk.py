"""One pass through a shard: members become samples; what cannot be one is left out with a reason.

Members of one key must stand together, each once, under a name from the allow-list. A key that comes again is two
halves or two samples, nobody knows which, so neither is used.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32

from sdtrain.data.bad_sample import BadSample
from sdtrain.data.caption import clean_caption
from sdtrain.data.decode import open_image, upright_size
from sdtrain.data.layout import (
    ABSENT,
    CAPTION,
    COMPANIONS,
    IMAGE,
    JSON,
    KINDS,
    MAX_BYTES,
    TOO_LARGE,
    is_forbidden,
    is_safe_key,
    split_name,
)
from sdtrain.data.metadata import COMPANION_COLUMNS, Columns, read_fields
from sdtrain.data.tar import Defect, Member, Tape, walk

ARRAYS = {  # name: dtype, and values a sample
    "offset": (np.int64, 3),
    "size": (np.int64, 3),
    "crc": (np.uint32, 3),
    "side": (np.int32, 2),
    "caption_length": (np.int32, 1),
    "key": (np.bytes_, 1),
}
_MAX_RECORDS = 10_000  # rejections of one shard that are kept by name; the others are counted
_MAX_NAMES = 5  # forbidden members that are told by name
_MAX_SUFFIXES = 20

Check = Callable[[bytes], str]  # a picture's bytes -> why it cannot be used, or ""


class Loss(NamedTuple):
    """Something a shard holds, or held, that is no sample of the index."""

    shard: str
    reason: str
    count: int
    note: str


class Rejection(NamedTuple):
    """A sample that was left out, or a whole shard: then without a key."""

    shard: str
    key: str
    offset: int
    reason: str


class Walked(NamedTuple):
    """What a walk found. `refused` says why the file is no shard at all; else it is empty."""

    arrays: dict[str, np.ndarray]  # as ARRAYS, a row a sample
    columns: dict[str, np.ndarray]  # what the .json members say, see `metadata`
    losses: tuple[Loss, ...]
    rejections: tuple[Rejection, ...]
    sha256: str  # of the whole file
    refused: str


def walk_shard(file: BinaryIO, name: str, num_bytes: int, check: Check | None = None) -> Walked:
    """Every sample of a shard. With `check`, also what the reader would refuse is left out."""
    tape, samples, defect = Tape(file), _Samples(name, check), None
    try:
        for member in walk(tape, num_bytes):
            samples.add(member, tape)
    except Defect as found:
        defect = found
    samples.close(is_cut=defect is not None)
    refused = str(defect) if defect and not defect.offset and defect.reason != "cut_off" else ""
    arrays, columns = samples.arrays()
    losses = samples.losses(defect, arrays)
    return Walked(arrays, columns, losses, tuple(samples.rejections), tape.sha256(), refused)


class _Sample:
    """The members of one key, which stand together."""

    def __init__(self, key: str, offset: int) -> None:
        self.key, self.start = key, offset
        self.side, num = (0, 0), len(MAX_BYTES)
        self.offset, self.size, self.crc = [0] * num, [ABSENT] * num, [0] * num
        self.caption_length = 0
        self.fields: dict[str, float | bytes] = {}
        self.fault = "" if is_safe_key(key) else "bad_key"
        self.doubt = ""  # why the reader will refuse it, as far as one sees from here

    def add(self, kind: int, member: Member, tape: Tape, check: Check | None) -> None:
        if self.size[kind] != ABSENT:
            self.fault = self.fault or "duplicate_member"
            return
        self.offset[kind], self.size[kind] = member.offset, member.size
        if member.size > MAX_BYTES[kind]:
            self.doubt = self.doubt or TOO_LARGE[kind]
            return
        data = tape.read(member.size)
        self.crc[kind] = crc32(data)
        if kind == IMAGE:
            self.doubt = self.doubt or (check(data) if check else "")
            try:
                self.side = (0, 0) if self.doubt else upright_size(open_image(data))
            except BadSample as bad:
                self.doubt = bad.reason
        elif kind == CAPTION:
            try:
                self.caption_length = len(clean_caption(data))
            except BadSample as bad:
                self.doubt = self.doubt or bad.reason
        elif kind == JSON:
            fields = read_fields(data)
            self.fields, self.doubt = fields or {}, self.doubt or ("bad_json" if fields is None else "")

    def columns(self) -> dict[str, float | bytes]:
        """What its .json says, and where its companions lie."""
        found = {
            column: float(value)
            for name, kind in COMPANIONS.items()
            for column, value in zip(COMPANION_COLUMNS[name], (self.offset[kind], self.size[kind], self.crc[kind]))
            if self.size[kind] != ABSENT
        }
        return {**self.fields, **found}


class _Samples:
    """All samples of a shard while it is walked."""

    def __init__(self, shard: str, check: Check | None) -> None:
        self._shard, self._check = shard, check
        self._rows: dict[str, Any] = {"offset": array("q"), "size": array("q"), "crc": array("I"), "side": array("i")}
        self._rows |= {"caption_length": array("i"), "key": []}
        self._columns = Columns()
        self._row_of: dict[str, int] = {}  # -1 where the key was rejected
        self._dropped: list[int] = []
        self._open: _Sample | None = None
        self._faults: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        self._forbidden: list[str] = []
        self._num_forbidden = 0
        self.rejections: list[Rejection] = []

    def add(self, member: Member, tape: Tape) -> None:
        """The next member; the tape stands at its first byte."""
        key, suffix = split_name(member.name)
        kind = KINDS.get(suffix)
        if is_forbidden(suffix):
            self._num_forbidden += 1
            self._forbidden += [ascii(member.name[:80])] * (len(self._forbidden) < _MAX_NAMES)
        elif kind is None or not key:
            suffix = ascii(f".{suffix[:20]}")[1:-1]
            self._ignored[suffix if suffix in self._ignored or len(self._ignored) < _MAX_SUFFIXES else "others"] += 1
        else:
            if self._open is None or self._open.key != key:
                self.close()
                self._open = _Sample(key, member.offset)
            self._open.add(kind, member, tape, self._check)

    def close(self, is_cut: bool = False) -> None:
        """The open sample is complete; or cut off, and then nobody knows what else belonged to it."""
        sample, self._open = self._open, None
        if sample is None:
            return
        if sample.key in self._row_of:
            self._reject(sample.key, sample.start, "interleaved")
            if (row := self._row_of[sample.key]) >= 0:
                self._dropped.append(row)
                self._reject(sample.key, self._rows["offset"][3 * row + IMAGE], "interleaved")
            self._row_of[sample.key] = -1
            return
        fault = sample.fault or ("incomplete" if is_cut else "no_image" if sample.size[IMAGE] == ABSENT else "")
        fault = fault or (sample.doubt if self._check else "")
        self._row_of[sample.key] = -1 if fault else len(self._rows["key"])
        if fault:
            self._reject(sample.key, sample.start, fault)
            return
        for name in ("offset", "size", "crc", "side"):
            self._rows[name].extend(getattr(sample, name)[: ARRAYS[name][1]])
        self._rows["caption_length"].append(sample.caption_length)
        self._rows["key"].append(sample.key.encode())
        self._columns.append(sample.columns())

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The rows, and the columns of metadata, without the samples whose key came again."""
        rows = {}
        for name, (kind, width) in ARRAYS.items():
            values = np.array(self._rows[name], kind)
            rows[name] = np.delete(values.reshape(-1, width) if width > 1 else values, self._dropped, axis=0)
        columns = {name: np.delete(column, self._dropped) for name, column in self._columns.arrays().items()}
        return rows, columns

    def losses(self, defect: Defect | None, arrays: dict[str, np.ndarray]) -> tuple[Loss, ...]:
        """What was left out, by reason."""
        found = [(reason, count, "samples left out") for reason, count in self._faults.items()]
        if defect:
            num = len(arrays["key"])
            found.append(
                (defect.reason, 1, f"{defect}; the {num} whole samples before it are used" if num else str(defect))
            )
        elif not self._row_of:
            found.append(("empty_shard", 1, "no member of any sample"))
            self.rejections.append(Rejection(self._shard, "", 0, "empty_shard"))
        if self._forbidden:
            found.append(("forbidden_suffix", self._num_forbidden, f"never opened: {', '.join(self._forbidden)}"))
        if self._ignored:
            names = ", ".join(f"{suffix} {count}" for suffix, count in self._ignored.most_common())
            found.append(("ignored_member", self._ignored.total(), f"members that are not read: {names}"))
        if without := int((arrays["size"][:, CAPTION] == ABSENT).sum()):
            found.append(("no_caption", without, "samples without .txt: their caption is empty"))
        return tuple(Loss(self._shard, *loss) for loss in found)

    def _reject(self, key: str, offset: int, reason: str) -> None:
        self._faults[reason] += 1
        if len(self.rejections) < _MAX_RECORDS:
            self.rejections.append(Rejection(self._shard, key[:300], offset, reason))
