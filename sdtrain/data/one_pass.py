"""One pass through a shard that nobody has indexed: its samples, in their order, as far as it is whole.

The tar walk is our own, since webdataset's loses the rest of a damaged shard without a word and, where a shard is cut
off, joins the picture of one to the caption of the next. Here nothing crosses a shard's end, what follows a defect is
lost, and all that is lost is counted. What no walk can see is a flipped bit inside of a caption: a tar has no checksum
for it, an index has.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sdtrain.data.address import shown
from sdtrain.data.bad_sample import BadSample
from sdtrain.data.layout import CAPTION, IMAGE, KINDS, MAX_BYTES, TOO_LARGE, is_forbidden, is_safe_key, split_name
from sdtrain.data.retry import Retry
from sdtrain.data.steady import BROKEN, open_once
from sdtrain.data.tar import Defect, Member, Tape, walk
from sdtrain.errors import ConfigError

if TYPE_CHECKING:
    from sdtrain.data.accounting import Accounting

# Of a whole shard, then of single samples and members.
_LOSSES = ("bad_header", "cut_off", "data_after_end", "refused_member", "compressed", "interleaved", "unreadable")
_LOSSES += ("incomplete", "no_image", "bad_key", "duplicate_member", "forbidden_suffix", "no_caption")
_LOSSES += ("ignored_member", "empty_shard")
_COLUMNS = {reason: column for column, reason in enumerate(_LOSSES)}
_FLOOR = 8  # so many broken shards are no rate yet

_log = logging.getLogger(__name__)


class Raw(NamedTuple):
    """A sample as it stands in a shard; `fault` says why it is known to be bad."""

    key: str
    offset: int
    members: tuple[bytes | None, ...]  # by layout's kinds
    fault: str


class Losses:
    """What shards held and no sample came of: counts by reason, records in the quarantine, and a budget.

    The workers' copies count into the same memory, each into a row of its own. The budget is each process's own: of the
    shards that it went through at most a fraction may break off, as of samples, and one in ten of a few shards.

    Args:
        accounting: of the samples; its quarantine takes the records, its fraction is the limit.
        num_workers: DataLoader workers that will count.
    """

    def __init__(self, accounting: Accounting, num_workers: int = 0) -> None:
        self.accounting = accounting
        self._counts = torch.zeros(num_workers + 1, len(_LOSSES), dtype=torch.int64).share_memory_()
        self._floor = min(_FLOOR, max(1, len(accounting.shards) // 10))
        self.enter(0)

    def enter(self, row: int) -> None:
        """From here on this is the copy of the process that has this row."""
        self._row = row
        self._done: set[int] = set()  # shards that this process went through
        self._broken: dict[int, str] = {}  # those of them that broke off the last time, and why

    def address(self, shard: int) -> str:
        """Where it lies."""
        return self.accounting.shards[shard].address

    def add(self, reason: str, shard: int, key: str, offset: int) -> None:
        """A sample or a member is lost, in every pass; it is written down in the first."""
        self.count(reason)
        if shard not in self._done:
            self.accounting.quarantine.add(BadSample(reason), shown(self.address(shard)), key, offset)

    def count(self, reason: str) -> None:
        """Counts one more."""
        self._counts[self._row, _COLUMNS[reason]] += 1

    def whole(self, shard: int) -> None:
        """A shard was read to its end."""
        self._done.add(shard)
        self._broken.pop(shard, None)

    def broken(self, reason: str, shard: int, offset: int, error: BaseException) -> None:
        """A shard broke off; what follows there is lost.

        Raises:
            ConfigError: where the budget is spent.
        """
        self.count(reason)
        name, quarantine = shown(self.address(shard)), self.accounting.quarantine
        if shard not in self._broken:
            told = re.sub(r"\?\S*", "?...", str(error) or type(error).__name__)  # a query may be secret
            _log.warning("data: %s: %s; what follows there is lost", name, told)
            quarantine.write(reason, name, "", offset, type(error).__name__)
        self._done.add(shard)
        self._broken[shard] = reason
        limit = self.accounting.max_bad_fraction
        if len(self._broken) > self._floor and len(self._broken) > limit * len(self._done):
            reasons = ", ".join(f"{why} {num}" for why, num in Counter(self._broken.values()).most_common())
            record = f"; each is in {quarantine.path}" if quarantine.path else ""
            raise ConfigError(
                f"data: {len(self._broken)} of {len(self._done)} shards broke off: {reasons}; {name} last{record}. "
                f"Repair them, or raise data.reader.max_bad_fraction (now {limit})"
            )

    def report(self) -> dict[str, int]:
        """All processes' counts together, without zeros."""
        return {f"lost/{name}": n for name, n in zip(_LOSSES, self._counts.sum(0).tolist()) if n}


def read_shard(shard: int, losses: Losses, retry: Retry) -> Iterator[Raw]:
    """The samples of a shard. What is wrong with it ends it early, and is counted, said and written down."""
    group, keys, tape = None, set(), None
    try:
        with _opened(losses.address(shard), losses, retry) as file:
            tape = Tape(file)
            for member in walk(tape, sys.maxsize):
                key, suffix = split_name(member.name)
                if is_forbidden(suffix):
                    losses.add("forbidden_suffix", shard, member.name[:300], member.offset)
                elif suffix not in KINDS or not key:
                    losses.count("ignored_member")
                if suffix not in KINDS or not key:
                    continue
                if group is None or group.key != key:
                    if key in keys:
                        raise Defect("interleaved", member.offset, f"{key!r} comes again after other samples")
                    if group is not None:
                        yield from group.whole(shard, losses)
                    keys.add(key)
                    group = _Group(key, member.offset)
                group.add(KINDS[suffix], member, tape)
        if group is not None:
            yield from group.whole(shard, losses)
        else:
            losses.count("empty_shard")
        losses.whole(shard)
    except (Defect, *BROKEN) as error:
        if group is not None:  # nobody knows what else belonged to it
            losses.add("incomplete", shard, group.key[:300], group.offset)
        if isinstance(error, Defect):
            losses.broken(error.reason, shard, error.offset, error)
        else:
            losses.broken("unreadable", shard, 0 if tape is None else tape.position, error)


@contextmanager
def _opened(address: str, losses: Losses, retry: Retry) -> Iterator[Any]:
    """The shard's bytes; the tries that failed are counted."""
    with open_once(address, retry) as file:
        try:
            yield file
        finally:
            losses.accounting.add("retries", file.num_retries)


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

    def whole(self, shard: int, losses: Losses) -> Iterator[Raw]:
        """The sample, where it is one."""
        fault = "" if is_safe_key(self.key) else "bad_key"
        fault = fault or ("duplicate_member" if self.is_twofold else "")
        if fault := fault or ("no_image" if self.members[IMAGE] is None else ""):
            losses.add(fault, shard, self.key[:300], self.offset)
            return
        if self.members[CAPTION] is None:
            losses.count("no_caption")  # it is empty
        yield Raw(self.key, self.offset, tuple(self.members), self.fault)
