"""One pass through a shard that nobody has indexed: its samples, in their order, as far as it is whole.

The tar walk is our own, since webdataset's loses the rest of a damaged shard without a word and, where a shard is cut
off, joins the picture of one to the caption of the next. Here nothing crosses a shard's end, what follows a defect is
lost, and all that is lost is counted. What no walk can see is a flipped bit inside of a caption: a tar has no checksum
for it, an index has.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from sdtrain.data.address import shown
from sdtrain.data.download import BROKEN, open_once
from sdtrain.data.layout import CAPTION, IMAGE, KINDS, MAX_BYTES, TOO_LARGE, is_forbidden, is_safe_key, split_name
from sdtrain.data.retry import Retry
from sdtrain.data.tar import Defect, Member, Tape, walk

# Of a whole shard, then of single samples and members.
_LOSSES = ("bad_header", "cut_off", "data_after_end", "refused_member", "compressed", "interleaved", "unreadable")
_LOSSES += ("incomplete", "no_image", "bad_key", "duplicate_member", "forbidden_suffix", "no_caption")
_COLUMNS = {reason: column for column, reason in enumerate(_LOSSES)}

_log = logging.getLogger(__name__)


class Raw(NamedTuple):
    """A sample as it stands in a shard; `fault` says why it is known to be bad."""

    key: str
    offset: int
    members: tuple[bytes | None, ...]  # by layout's kinds
    fault: str


class Losses:
    """Counts by reason; the workers' copies count into the same memory, each into a row of its own."""

    def __init__(self, num_workers: int = 0) -> None:
        self._counts = torch.zeros(num_workers + 1, len(_LOSSES), dtype=torch.int64).share_memory_()
        self._row = 0
        self._said: set[str] = set()

    def enter_worker(self, worker: int) -> None:
        """From here on this is the copy of a DataLoader worker."""
        self._row = worker + 1

    def add(self, reason: str) -> None:
        """Counts one more."""
        self._counts[self._row, _COLUMNS[reason]] += 1

    def say(self, address: str, what: object) -> None:
        """A line for people, once a shard."""
        if address not in self._said:
            self._said.add(address)
            _log.warning("data: %s: %s; what follows there is lost", shown(address), what)

    def report(self) -> dict[str, int]:
        """All processes' counts together, without zeros."""
        return {f"lost/{name}": n for name, n in zip(_LOSSES, self._counts.sum(0).tolist()) if n}


def read_shard(address: str, losses: Losses, retry: Retry) -> Iterator[Raw]:
    """The samples of a shard. What is wrong with it ends it early, and is counted and said."""
    group, keys = None, set()
    try:
        with open_once(address, retry) as file:
            tape = Tape(file)
            for member in walk(tape, sys.maxsize):
                key, suffix = split_name(member.name)
                if is_forbidden(suffix):
                    losses.add("forbidden_suffix")
                if suffix not in KINDS or not key:
                    continue
                if group is None or group.key != key:
                    if key in keys:
                        raise Defect("interleaved", member.offset, f"{key!r} comes again after other samples")
                    if group is not None:
                        yield from group.whole(losses)
                    keys.add(key)
                    group = _Group(key, member.offset)
                group.add(KINDS[suffix], member, tape)
        if group is not None:
            yield from group.whole(losses)
    except (Defect, *BROKEN) as error:
        is_defect = isinstance(error, Defect)
        losses.add(error.reason if is_defect else "unreadable")
        if group is not None:  # nobody knows what else belonged to it
            losses.add("incomplete")
        losses.say(address, error if is_defect else f"unreadable: {error or type(error).__name__}")


class _Group:
    """The members of one key, which stand together."""

    def __init__(self, key: str, offset: int) -> None:
        self.key, self.offset = key, offset
        self.members: list[bytes | None] = [None] * len(MAX_BYTES)
        self.is_twofold, self.fault = False, ""

    def add(self, kind: int, member: Member, tape: Tape) -> None:
        if self.members[kind] is not None:
            self.is_twofold = True
            return
        if member.size > MAX_BYTES[kind]:
            self.fault, self.members[kind] = self.fault or TOO_LARGE[kind], b""
            return
        self.members[kind] = tape.read(member.size)  # where it is cut off, the walk finds no header behind it

    def whole(self, losses: Losses) -> Iterator[Raw]:
        """The sample, where it is one."""
        if not is_safe_key(self.key):
            losses.add("bad_key")
        elif self.is_twofold:
            losses.add("duplicate_member")
        elif self.members[IMAGE] is None:
            losses.add("no_image")
        else:
            if self.members[CAPTION] is None:
                losses.add("no_caption")  # it is empty
            yield Raw(self.key, self.offset, tuple(self.members), self.fault)
